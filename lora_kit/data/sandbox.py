"""Do work in forked processes, with limits on the time, memory and output of chat templates.

A chat template is a program, often by an unknown author. transformers runs it in jinja2's immutable sandbox, which
denies access to Python's objects, but does not prevent an endless loop or filling the memory. So templates are rendered
in children of this process. A child is forked, because a new interpreter would import for seconds. It touches no device
and no lock, keeps no open file of this process, and ends when this process ends. Its answers are JSON or bytes, never
pickles.

`render_all` and `render_prompt` ask a child for a few examples. A `Pool` has several children that run a function of
the caller; inside a child, `render_all` and `render_prompt` render in the child itself, within the same limits.
"""

import gc
import json
import math
import mmap
import os
import resource
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from functools import partial
from itertools import count
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, cast

from lora_kit.data.answers import Rendered, render
from lora_kit.data.formats import Completion, Example
from lora_kit.data.messages import Conversation
from lora_kit.data.rendering import (
    TEXT_CHARACTERS,
    Renderer,
    TooLongError,
    apply,
    syntax_problem,
)
from lora_kit.errors import DataError
from lora_kit.host import end_with_parent

SECONDS = 10  # processor time for one example
MEMORY_BYTES = 1 << 30  # memory that a child may map beyond what it has mapped before
RENDER_SECONDS = 300.0  # wall-clock time for one example, on a machine that may be busy
IDLE = -1  # the place in a request while a child renders nothing
CHUNK_BYTES = 1 << 22  # bytes of the examples in one message
OUT_OF_MEMORY, TOO_LONG = 97, 98  # exit codes of the child
PARALLELISM = "TOKENIZERS_PARALLELISM"
PENDING = 2  # requests that a child of a pool has not answered yet; with two it never waits for a request
WINDOW = 4  # answers per child that may be held back until an earlier request is answered
HEADER = struct.Struct("<cQ")  # a message's kind and length
RESULT, BUG = b"=", b"!"

Work = Callable[[bytes], Iterable[bytes]]
"""A function of a child that returns the answer to a request in pieces."""


class LostError(Exception):
    """A child ended before it had answered.

    Attributes:
        excess: Which limit the child exceeded, or how it ended.
        place: The index of the example in the request that the child was rendering; None if it rendered none.
        killed: Whether SIGKILL ended it: from the kernel when memory runs out, or from `wait_for`.
        request: The request, for a child of a pool.
    """

    def __init__(self, excess: str, place: int | None, *, killed: bool) -> None:
        super().__init__(excess)
        self.excess, self.place, self.killed, self.request = excess, place, killed, b""

    def error(self, where: str = "template") -> DataError:
        """Return the error for the user.

        `where` is the file and line of the example `place`; of the request's first example if `place` is None.
        """
        if self.place is None:
            return DataError(f"{where}: the process that tokenises the records from here on {self.excess}")
        return DataError(f"{where}: the chat template {self.excess}; set data.template to another template")


def render_all(examples: Sequence[Example | DataError], renderer: Renderer) -> list[Rendered | DataError]:
    """Render examples and find their answers, as `answers.render`; an error takes the place of its example.

    Raises:
        DataError: The template exceeds a limit.
    """
    places = [place for place, example in enumerate(examples) if isinstance(example, Conversation)]
    found = iter(_ask("render", [cast(Conversation, examples[place]) for place in places], renderer, places))
    return [example if isinstance(example, DataError) else _rendered(example, found, renderer) for example in examples]


def _rendered(example: Example, found: Iterator[Any], renderer: Renderer) -> Rendered | DataError:
    if isinstance(example, Completion):
        return render(example, renderer)
    result = next(found)
    if isinstance(result, DataError):
        return result
    return Rendered.of(result)


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
    """End the child of `render_all`; the next rendering starts another."""
    with _lock:
        if _child:
            _child.pop().end()


def _ask(
    kind: str, conversations: Sequence[Conversation], renderer: Renderer, places: Sequence[int] | None = None
) -> list[Any]:
    """Return the results of a child, or of this process if it is a child; an error takes the place of its result."""
    if not conversations:
        return []
    try:
        if renderer.template != (template := renderer.chat_template):  # otherwise keep its cached properties
            renderer = replace(renderer, template=template)
    except DataError as error:
        return [error for _ in conversations]
    if _own_cells:
        return _work(kind, conversations, renderer, places or range(len(conversations)))
    settings = tuple(vars(renderer)[field.name] for field in fields(Renderer))
    with _lock:
        if _child and not (_settings[0] is settings[0] and _settings[1:] == list(settings[1:])):
            _child.pop().end()
        if not _child:
            _child.append(Child(partial(_answer, renderer)))
            _settings[:] = settings
        child = _child[0]
        try:
            answers = [json.loads(child.ask(chunk)) for chunk in _chunks(kind, conversations)]
        except LostError as lost:
            _child.clear()
            raise lost.error() from lost
        except BaseException:  # e.g. Ctrl-C: answers are still to come, so this child cannot be used again
            _child.pop().end()
            raise
    return [DataError(value) if name == "error" else value for answer in answers for name, value in answer]


_child: list["Child"] = []  # the child of this process, if there is one
_settings: list[Any] = []  # the fields of the renderer that it was forked with
_lock = threading.RLock()


def _chunks(kind: str, conversations: Sequence[Conversation]) -> Iterator[bytes]:
    chunk, size = list[str](), 0
    for conversation in conversations:
        indices = {name: sorted(getattr(conversation, name)) for name in ("untrained", "excluded")}
        values = {
            "messages": conversation.messages,
            "tools": conversation.tools,
            "labels": conversation.labels,
        } | indices
        chunk.append(json.dumps(values, default=str))
        size += len(chunk[-1])
        if size > CHUNK_BYTES:
            yield f'["{kind}", [{",".join(chunk)}]]'.encode()
            chunk, size = [], 0
    if chunk:
        yield f'["{kind}", [{",".join(chunk)}]]'.encode()


def _answer(renderer: Renderer, request: bytes) -> list[bytes]:
    """Answer a request of `_ask`."""
    kind, values = json.loads(request)
    conversations = [
        Conversation(
            tuple(each["messages"]),
            each["tools"] and tuple(each["tools"]),
            frozenset(each["untrained"]),
            frozenset(each["excluded"]),
            labels=tuple(each["labels"]),
        )
        for each in values
    ]
    results = _work(kind, conversations, renderer, range(len(conversations)))
    answer = [["error", str(each)] if isinstance(each, DataError) else ["result", each] for each in results]
    return [json.dumps(answer).encode()]


def _work(kind: str, conversations: Sequence[Conversation], renderer: Renderer, places: Sequence[int]) -> list[Any]:
    """Render conversations in this process, which is a child, within the limits."""
    results = list[Any]()
    with _limits():
        for place, conversation in zip(places, conversations, strict=True):
            _begin(place)
            try:
                if kind == "prompt":
                    results.append(apply(conversation, renderer, prompting=True))
                elif kind == "syntax":
                    results.append(syntax_problem(renderer, conversation))
                else:
                    results.append(render(conversation, renderer))
            except DataError as error:
                results.append(error)
            except TooLongError:
                os._exit(TOO_LONG)
            except MemoryError:
                os._exit(OUT_OF_MEMORY)
    return results


class Child:
    """A forked process that answers requests; it shares a socket and two numbers with this process.

    Args:
        work: The function that answers.
        pooled: Whether the child ends with the thread that forks it, even in the middle of its work.
    """

    def __init__(self, work: Work, *, pooled: bool = False) -> None:
        # the index of the example that is rendered, and how many were rendered
        self._cells = memoryview(mmap.mmap(-1, 16)).cast("q")
        self._cells[0] = IDLE
        mine, theirs = socket.socketpair()
        before, self._process = os.environ.get(PARALLELISM), 0
        os.environ[PARALLELISM] = "false"  # the threads of tokenizers are not in the child; unset, it would warn
        parent = os.getpid()
        try:
            self._process = os.fork()
            if self._process == 0:
                _serve(theirs.detach(), work, self._cells, parent if pooled else 0)
        finally:
            if before is None:
                del os.environ[PARALLELISM]
            else:
                os.environ[PARALLELISM] = before
        theirs.close()
        self._socket = mine

    def fileno(self) -> int:
        """Return the descriptor that is readable when an answer arrives."""
        return self._socket.fileno()

    @property
    def rendering(self) -> int | None:
        """The number of examples that the child has begun to render, a sign of life; None if it renders none now."""
        return None if self._cells[0] == IDLE else self._cells[1]

    def ask(self, request: bytes) -> bytearray:
        """Return the answer to a request.

        Raises:
            LostError: The child ended.
        """
        self.send(request)
        wait_for([self])
        return self.receive()

    def send(self, request: bytes) -> None:
        """Send a request. If the child has ended, `receive` raises the error."""
        with suppress(BrokenPipeError, ConnectionResetError):
            _send(self._socket, RESULT, [request])

    def receive(self) -> bytearray:
        """Return the answer to the oldest request.

        Raises:
            LostError: The child ended.
        """
        try:
            kind, answer = _receive(self._socket)
        except (EOFError, ConnectionResetError):
            raise self._lost() from None
        assert kind == RESULT, answer.decode()
        return answer

    def _lost(self) -> LostError:
        """Wait for the child's end, and return how it ended."""
        self._socket.close()
        code = os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])
        self._process = 0
        killed, place = code == -signal.SIGKILL, None if self._cells[0] == IDLE else self._cells[0]
        end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if place is None:
            no_memory = killed or code == OUT_OF_MEMORY
            excess = f"ended ({end}); {'free memory, or shorten the records' if no_memory else 'start again'}"
        elif code == OUT_OF_MEMORY:
            excess = f"needs more than {MEMORY_BYTES >> 30} GB of memory for one example"
        elif code == TOO_LONG:
            excess = f"writes more than {TEXT_CHARACTERS:,} characters for one example"
        elif code == -signal.SIGXCPU:
            excess = f"computes for more than {SECONDS} s for one example"
        else:
            excess = f"ended the process that renders it ({end})"
        return LostError(excess, place, killed=killed)

    def kill(self) -> None:
        """Kill the child; `receive` then raises LostError."""
        if self._process:
            os.kill(self._process, signal.SIGKILL)

    def end(self) -> None:
        """Kill the child and wait for its end. A child has no files or locks that would be left behind."""
        if self._process:
            self.kill()
            self._socket.close()
            os.waitpid(self._process, 0)
            self._process = 0


def wait_for(children: Sequence[Child]) -> list[Child]:
    """Return the children with an answer. If none answers for RENDER_SECONDS, kill those at the same example since."""
    while True:
        rendering = [child.rendering for child in children]
        if ready := wait([child.fileno() for child in children], RENDER_SECONDS):
            return [child for child in children if child.fileno() in ready]
        for child, before in zip(children, rendering, strict=True):
            if before is not None and child.rendering == before:
                child.kill()


class Pool:
    """Children that do the same work on different requests. Leaving the context ends them.

    Args:
        work: The function that answers.
        children: The number of children.
    """

    def __init__(self, work: Work, children: int) -> None:
        self._work, self._children = work, children
        self._asked: dict[Child, deque[tuple[int, bytes]]] = {}  # each child's requests, by number; the oldest first
        self._dealt = 0  # requests of `map` that were sent

    def __enter__(self) -> "Pool":
        try:
            for _ in range(self._children):
                self._asked[Child(self._work, pooled=True)] = deque()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for child in self._asked:
            child.end()

    def map(self, requests: Iterator[bytes]) -> Iterator[bytearray]:
        """Yield the answers in the order of the requests, each as soon as all before it are there.

        If a child is killed, e.g. because memory ran out, a new child takes its requests. If that child is killed at
        the same request, the error is raised.

        Raises:
            LostError: A child ended.
        """
        numbered, answers, lost = enumerate(requests), dict[int, bytearray](), set[int]()
        self._dealt = 0
        for number in count():
            while number not in answers:
                self._deal(numbered, number + WINDOW * len(self._asked))
                working = [child for child, asked in self._asked.items() if asked]
                if not working:
                    return
                for child in wait_for(working):
                    try:
                        answers[self._asked[child][0][0]] = child.receive()
                    except LostError as error:
                        self._replace(child, error, lost)
                    else:
                        self._asked[child].popleft()
            yield answers.pop(number)

    def _deal(self, requests: Iterator[tuple[int, bytes]], end: int) -> None:
        """Send requests to children that have fewer than `PENDING`, until the first `end` of all requests are sent."""
        for child, asked in self._asked.items():
            while len(asked) < PENDING:
                if self._dealt >= end or (request := next(requests, None)) is None:
                    return
                self._dealt += 1
                asked.append(request)
                child.send(request[1])

    def _replace(self, child: Child, error: LostError, lost: set[int]) -> None:
        """Let a new child take the requests of a killed child."""
        asked = self._asked.pop(child)
        number, request = asked[0]
        if not error.killed or number in lost:
            error.request = request
            raise error
        lost.add(number)
        successor = Child(self._work, pooled=True)
        self._asked[successor] = asked
        for _, each in asked:
            successor.send(each)


_own_cells: list[memoryview] = []  # set in a child: the numbers that it shares with its parent


def _serve(descriptor: int, work: Work, cells: memoryview, parent: int) -> None:
    """Answer requests until the socket closes; this is the child, which never returns."""
    try:
        if parent:
            end_with_parent(signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(0)
        gc.freeze()  # a collection would write to the parent's objects, which copies their pages
        _own_cells.append(cells)
        signal.set_wakeup_fd(-1)
        for number, action in _ACTIONS.items():
            signal.signal(number, action)
        os.dup2(descriptor, 3)
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(nothing, standard)
        for kept in [int(path.name) for path in Path("/dev/fd").iterdir() if int(path.name) > 3]:
            with suppress(OSError):  # the listing's own descriptor is closed already
                os.close(kept)
        _limit(resource.RLIMIT_CORE, 0)
        stream = socket.socket(fileno=3)
        while True:
            _, request = _receive(stream)
            try:
                answer = list(work(bytes(request)))
            except MemoryError:
                raise
            except Exception:
                _send(stream, BUG, [traceback.format_exc().encode()])
            else:
                _send(stream, RESULT, answer)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)
    except BaseException:
        os._exit(1)


_ACTIONS = {signal.SIGINT: signal.SIG_IGN} | dict.fromkeys(
    (signal.SIGTERM, signal.SIGUSR1, signal.SIGXCPU, signal.SIGCHLD), signal.SIG_DFL
)


def _send(stream: socket.socket, kind: bytes, pieces: Sequence[bytes]) -> None:
    stream.sendall(HEADER.pack(kind, sum(memoryview(piece).nbytes for piece in pieces)))
    for piece in pieces:
        stream.sendall(piece)


def _receive(stream: socket.socket) -> tuple[bytes, bytearray]:
    """Return the kind and content of the next message.

    Raises:
        EOFError: The other process has closed the socket.
    """
    kind, size = HEADER.unpack(_read(stream, HEADER.size))
    return kind, _read(stream, size)


def _read(stream: socket.socket, size: int) -> bytearray:
    content = bytearray(size)
    rest = memoryview(content)
    while rest:
        count = stream.recv_into(rest)
        if not count:
            raise EOFError
        rest = rest[count:]
    return content


@contextmanager
def _limits() -> Iterator[None]:
    """Limit the memory of this process to what it has mapped and `MEMORY_BYTES` more, and lift all limits afterwards.

    Tokenising is not limited: the memory that it needs depends on the text, whose length is limited.
    """
    _limit(resource.RLIMIT_AS, _mapped_bytes() + MEMORY_BYTES)
    try:
        yield
    finally:
        for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU):
            _limit(kind, resource.RLIM_INFINITY)
        _own_cells[0][0] = IDLE


def _begin(place: int) -> None:
    """Note which example of the request is rendered now, and limit its time."""
    cells = _own_cells[0]
    cells[0] = place
    cells[1] += 1
    _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + SECONDS)


def _limit(kind: int, value: int) -> None:
    """Set a soft limit, at most the hard limit."""
    hard, unlimited = resource.getrlimit(kind)[1], resource.RLIM_INFINITY
    limits = [each for each in (value, hard) if each != unlimited]
    resource.setrlimit(kind, (min(limits, default=unlimited), hard))


def _mapped_bytes() -> int:
    if not sys.platform.startswith("linux"):
        return 1 << 40
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
