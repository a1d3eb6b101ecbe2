"""Render in a process of its own, with limits on time, memory and output.

A chat template is a program, and often a stranger's. transformers runs it in jinja2's immutable sandbox, which keeps it
from the objects of Python, but not from a loop without end or from filling the memory. So `rendering` works in a child
of this process. The child is forked, because a new interpreter would import for seconds; it touches no device and no
lock, holds no file of this process, and ends with it.
"""

import gc
import json
import math
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_kit.data.formats import Completion, Example
from lora_kit.data.messages import Conversation
from lora_kit.data.rendering import (
    TEXT_CHARACTERS,
    Answer,
    Rendered,
    Renderer,
    TooLongError,
    apply,
    render,
    syntax_problem,
)
from lora_kit.errors import DataError

SECONDS = 10  # processor time for one example
MEMORY_BYTES = 1 << 30  # in addition to what this process has mapped
ANSWER_SECONDS = 300.0  # by the clock, on a machine that is busy with other things
CHUNK_BYTES = 1 << 22  # examples that are sent together
OUT_OF_MEMORY, TOO_LONG = 97, 98  # exit codes of the child
PARALLELISM = "TOKENIZERS_PARALLELISM"


def render_all(examples: Sequence[Example | DataError], renderer: Renderer) -> list[Rendered | DataError]:
    """Render examples and find their answers, as `rendering.render`; an error takes the place of its example.

    Raises:
        DataError: The template exceeds a limit.
    """
    conversations = [example for example in examples if isinstance(example, Conversation)]
    found = iter(_ask("render", conversations, renderer))
    return [example if isinstance(example, DataError) else _rendered(example, found, renderer) for example in examples]


def _rendered(example: Example, found: Iterator[Any], renderer: Renderer) -> Rendered | DataError:
    if isinstance(example, Completion):
        return render(example, renderer)
    result = next(found)
    if isinstance(result, DataError):
        return result
    text, answers, boundary, marked = result
    return Rendered(text, tuple(Answer(*answer) for answer in answers), boundary, marked)


def render_prompt(conversation: Conversation, renderer: Renderer) -> str:
    """Return the text of a conversation that ends where an answer begins.

    Raises:
        DataError: The template fails or exceeds a limit.
    """
    (result,) = _ask("prompt", [conversation], renderer)
    if isinstance(result, DataError):
        raise result
    return str(result)


def check_template(renderer: Renderer) -> None:
    """Check the recipe's template before any example is read.

    Raises:
        DataError: It is not valid Jinja, or exceeds a limit.
    """
    if renderer.template is not None:
        (problem,) = _ask("syntax", [Conversation(({"role": "user", "content": "x"},))], renderer)
        if problem:
            raise DataError(str(problem))


def close() -> None:
    """End the child; the next rendering starts another."""
    with _lock:
        if _child:
            _child.pop().end()


def _work(kind: str, conversation: Conversation, renderer: Renderer) -> Any:
    """Do one piece of the child's work and return it as values of JSON."""
    if kind == "prompt":
        return apply(conversation, renderer, prompting=True)
    if kind == "syntax":
        return syntax_problem(renderer, conversation)
    return render(conversation, renderer)


def _ask(kind: str, conversations: Sequence[Conversation], renderer: Renderer) -> list[Any]:
    """Return the child's results; the error of a conversation takes the place of its result."""
    if not conversations:
        return []
    try:
        renderer = replace(renderer, template=renderer.chat_template)
    except DataError as error:
        return [error for _ in conversations]
    settings = (renderer.tokenizer, renderer.template, renderer.train_on)
    with _lock:
        if _child and not _child[0].serves(settings):
            _child.pop().end()
        if not _child:
            _child.append(Child(renderer, settings))
        try:
            return [result for chunk in _chunks(kind, conversations) for result in _child[0].ask(chunk)]
        except BaseException:  # e.g. Ctrl-C: answers are still to come, so this child cannot be used again
            _child.pop().end(kill=True)
            raise


def _chunks(kind: str, conversations: Sequence[Conversation]) -> Iterator[list[str]]:
    chunk, size = list[str](), 0
    for conversation in conversations:
        values = vars(conversation) | {"untrained": sorted(conversation.untrained)}
        chunk.append(json.dumps([kind, values], default=str))
        size += len(chunk[-1])
        if size > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class Child:
    """The process that renders; its only connection is a socket to this process."""

    def __init__(self, renderer: Renderer, settings: tuple[Any, ...]) -> None:
        self._settings = settings
        mine, theirs = socket.socketpair()
        before = os.environ.get(PARALLELISM)
        os.environ[PARALLELISM] = before or "true"  # else tokenizers would print a warning in the child
        try:
            self._process = os.fork()
        finally:
            if self._process and before is None:
                del os.environ[PARALLELISM]
        if self._process == 0:
            _serve(theirs.detach(), renderer)
        theirs.close()
        mine.settimeout(ANSWER_SECONDS)
        self._stream = mine.makefile("rwb")
        mine.close()

    def serves(self, settings: tuple[Any, ...]) -> bool:
        """Return whether the child was forked with this tokenizer, this template and these trained tokens."""
        return self._settings[0] is settings[0] and self._settings[1:] == settings[1:]

    def ask(self, requests: Sequence[str]) -> Iterator[Any]:
        """Yield the result of each request; a DataError in place of the result if the template fails.

        Raises:
            DataError: The template exceeds a limit.
        """
        try:
            self._stream.write(f"[{','.join(requests)}]\n".encode())
            self._stream.flush()
            for _ in requests:
                answer = self._stream.readline()
                if not answer.endswith(b"\n"):
                    break
                (kind, value) = json.loads(answer)
                assert kind != "bug", value
                yield DataError(value) if kind == "error" else value
            else:
                return
        except (BrokenPipeError, ConnectionResetError):
            pass
        except TimeoutError:
            os.kill(self._process, signal.SIGKILL)
        raise DataError(f"template: the chat template {self._excess()}; set data.template to another template")

    def _excess(self) -> str:
        """Return which limit the child exceeded; wait for its end."""
        code = os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])
        self._process = 0
        if code == OUT_OF_MEMORY:
            return f"needs more than {MEMORY_BYTES >> 30} GB of memory for one example"
        if code == TOO_LONG:
            return f"writes more than {TEXT_CHARACTERS:,} characters for one example"
        if code == -signal.SIGXCPU:
            return f"computes for more than {SECONDS} s for one example"
        return f"ended the process that renders it ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"

    def end(self, *, kill: bool = False) -> None:
        """Close the socket, at which the child ends, and wait for its end."""
        if self._process:
            if kill:
                os.kill(self._process, signal.SIGKILL)
            with suppress(OSError):
                self._stream.close()
            os.waitpid(self._process, 0)


_child: list[Child] = []  # at most one
_lock = threading.RLock()


def _serve(descriptor: int, renderer: Renderer) -> None:
    """Answer requests until the socket closes; this is the child, which never returns."""
    try:
        gc.freeze()  # a collection would write to all objects of the parent, and so copy their pages
        os.environ[PARALLELISM] = "false"  # the threads of tokenizers are not in this process
        signal.set_wakeup_fd(-1)
        for number, action in _ACTIONS.items():
            signal.signal(number, action)
        os.dup2(descriptor, 3)
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(nothing, standard)
        for kept in [int(path.name) for path in Path("/dev/fd").iterdir() if int(path.name) > 3]:
            with suppress(OSError):  # the descriptor of the listing
                os.close(kept)
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_AS, _mapped_bytes() + MEMORY_BYTES)
        stream = socket.socket(fileno=3).makefile("rwb")
        for line in stream:
            for kind, values in json.loads(line):
                stream.write(json.dumps(_answer(kind, values, renderer)).encode() + b"\n")
            stream.flush()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except BaseException:
        os._exit(1)
    os._exit(0)


_ACTIONS = {signal.SIGINT: signal.SIG_IGN} | dict.fromkeys(
    (signal.SIGTERM, signal.SIGUSR1, signal.SIGXCPU, signal.SIGCHLD), signal.SIG_DFL
)


def _answer(kind: str, values: Mapping[str, Any], renderer: Renderer) -> tuple[str, Any]:
    _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + SECONDS)
    tools = values["tools"] and tuple(values["tools"])
    conversation = Conversation(tuple(values["messages"]), tools, frozenset(values["untrained"]))
    try:
        result = _work(kind, conversation, renderer)
    except DataError as error:
        return "error", str(error)
    except TooLongError:
        os._exit(TOO_LONG)
    except MemoryError:
        raise
    except Exception:
        return "bug", traceback.format_exc()
    return "result", result


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _mapped_bytes() -> int:
    if not sys.platform.startswith("linux"):
        return 1 << 40
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
