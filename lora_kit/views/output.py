"""Output whose errors never end a run: a closed pipe, a full disk, a closed terminal, a character it cannot write."""

import os
import sys
from contextlib import suppress
from typing import Any


class SafeStream:
    """A text stream that drops what cannot be written, and escapes characters that its encoding does not have.

    Args:
        stream: The stream to write to; everything but writing is left to it.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text; return its length, also if it could not be written."""
        with suppress(OSError, ValueError):  # ValueError: the stream is closed
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what is buffered."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def make_output_safe() -> None:
    """Replace stdout and stderr of this process by safe streams, unless a test or a notebook has replaced them.

    Descriptors 0 to 2 that are closed are opened on /dev/null. Otherwise the next file that is opened would get such a
    number, and what a library prints would be written into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number is this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
        elif stream is not getattr(sys, f"__{name}__"):
            continue
        setattr(sys, name, SafeStream(stream))
