"""Stores for tests of `checkpoint.remote`: in memory with latency, errors and interruptions, and S3 over real HTTP."""

import random
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

BUCKET, SIGNATURE = "bucket", "5" * 20


class Interrupted(BaseException):
    """What stands for the death of the process: nothing catches it."""


class Unsteady(MemoryFileSystem):
    """A store whose every request takes time and may fail, `flaky://`.

    A request that fails may have been carried out, or have written a part of its file.
    """

    protocol = "flaky"
    store, pseudo_dirs = {}, [""]
    cachable = True

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("flaky://"))

    @classmethod
    def reset(cls, *, share=0.0, latency=0.0, seed=0):
        """Empty the store; let this share of requests fail, and each take `latency` seconds of `now`."""
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.share, cls.latency, cls.random = share, latency, random.Random(seed)
        cls.now, cls.requests, cls.dies_at, cls.before = 0.0, [], None, lambda verb, path: None

    def request(self, verb, path, carry_out, part=lambda: None):
        cls = type(self)
        cls.before(verb, path)
        cls.now += cls.latency
        cls.requests.append((verb, path))
        dies = len(cls.requests) == cls.dies_at
        if dies or cls.random.random() < cls.share:
            cls.random.choice([carry_out, part, lambda: None])()
            if dies:
                raise Interrupted
            raise OSError(5, f"as asked for at https://store/x?X-Amz-Signature={SIGNATURE}")
        return carry_out()

    def ls(self, path, detail=True, **options):
        return self.request("ls", path, lambda: MemoryFileSystem.ls(self, path, detail=detail, **options))

    def cat_file(self, path, start=None, end=None, **options):
        return self.request("cat", path, lambda: MemoryFileSystem.cat_file(self, path, start, end, **options))

    def put_file(self, lpath, rpath, **options):
        def cut():
            with open(lpath, "rb") as file:  # noqa: PTH123
                MemoryFileSystem.pipe_file(self, rpath, file.read()[:-7])

        self.request("put", rpath, lambda: MemoryFileSystem.put_file(self, lpath, rpath), cut)

    def pipe_file(self, path, value, **options):
        cut = lambda: MemoryFileSystem.pipe_file(self, path, value[: len(value) // 2])  # noqa: E731
        self.request("pipe", path, lambda: MemoryFileSystem.pipe_file(self, path, value), cut)

    def get_file(self, rpath, lpath, **options):
        self.request("get", rpath, lambda: MemoryFileSystem.get_file(self, rpath, lpath))

    def rm_file(self, path):
        self.request("rm", path, lambda: MemoryFileSystem.rm_file(self, path))


fsspec.register_implementation("flaky", Unsteady, clobber=True)


@dataclass
class S3:
    """A server that speaks S3, open to a test.

    Attributes:
        environment: The variables with which a process finds it.
        requests: Each request so far, method and path.
        hold: Requests whose `METHOD /path` matches this pattern wait until `release` is set.
        held: The requests that have waited.
        faults: For requests that match a pattern, the statuses of the next answers.
    """

    environment: dict[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    hold: str | None = None
    held: list[str] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)
    faults: dict[str, list[int]] = field(default_factory=dict)

    def names(self, folder=""):
        """Return the names of all objects below a folder of the bucket."""
        from moto.s3.models import s3_backends

        (backend,) = [each["global"] for each in s3_backends.values()]
        keys = backend.buckets[BUCKET].keys if BUCKET in backend.buckets else {}
        return sorted(name for name in keys if name.startswith(folder))

    def filter(self, application):
        """Return a WSGI application that holds and fails requests before it answers them."""

        def answer(environ, start_response):
            request = f"{environ['REQUEST_METHOD']} {unquote(environ.get('PATH_INFO', ''))}"
            self.requests.append(request)
            if self.hold and re.search(self.hold, request):
                self.held.append(request)
                self.release.wait(300)
            for pattern, statuses in self.faults.items():
                if statuses and re.search(pattern, request):
                    start_response(f"{statuses.pop(0)} as asked for", [("Content-Length", "0")])
                    return [b""]
            return application(environ, start_response)

        return answer


@contextmanager
def s3() -> Iterator[S3]:
    """Run a server with one empty bucket in a thread while the block lasts."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    found = S3()
    application = found.filter(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True)
    found.environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "AKIA" + "STANDIN0STANDIN0",
        "AWS_SECRET_ACCESS_KEY": "secretSTANDINsecretSTANDIN",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found.release.set()
        server.shutdown()
        server.server_close()
        thread.join()
