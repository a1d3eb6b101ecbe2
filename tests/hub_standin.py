"""A stand-in of the Hub on this machine: repositories, branches, commits and large files over real HTTP, with faults.

    with serve() as hub:
        hub.faults["/commit/"] = [503, "cut"]  # what the next requests to such paths meet
        ... HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET=1 ...
        hub.repos["me/x"].branches["main"]     # the commits, oldest first

A fault is a status, `cut` (the connection ends in the middle of the request) or `lost` (the request is carried out, its
answer is not sent); anything else lets the request pass. Writing takes the token; `parentCommit` is enforced.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from huggingface_hub import ModelCard

TOKEN = "hf_" + "standinTOKENstandinTOKENstandin"
DATE = "2026-01-01T00:00:00.000Z"
LARGE = (".safetensors", "tokenizer.json")  # kept by LFS


@dataclass
class Commit:
    """The tree of a commit, path to content, and who made it from what."""

    id: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """A repository's branches, each the list of its commits."""

    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> Commit:
        """Add a commit to a branch."""
        before = self.branches.setdefault(branch, [])
        number = f"{id(self)} {branch} {len(before)} {sorted((k, _sha1(v)) for k, v in files.items())}"
        before.append(Commit(hashlib.sha1(number.encode()).hexdigest(), message, files))
        return before[-1]

    def find(self, revision: str) -> Commit | None:
        """Return the commit that a branch's name or an id means."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((one for commits in self.branches.values() for one in commits if one.id == revision), None)


@dataclass
class Standin:
    """The state of the stand-in, open to a test."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[int | str]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def add(self, name: str, folder: Path, *, private: bool = False) -> Commit:
        """Publish a folder as a repository."""
        repo = self.repos.setdefault(name, Repo(private))
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return repo.commit("main", files, "added")

    def commits(self, name: str, branch: str = "main") -> list[Commit]:
        """Return the commits that pushes made on a branch."""
        return self.repos[name].branches[branch][1:] if name in self.repos else []

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """Return the files at the tip of a branch."""
        return self.repos[name].branches[branch][-1].files


class Failed(Exception):
    """An answer that is an error: status, headers."""


class Handler(BaseHTTPRequestHandler):
    """Answers the Hub's calls that a push and a download make."""

    protocol_version = "HTTP/1.1"
    hub: Standin

    def handle_any(self) -> None:
        path = urlsplit(self.path).path
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            queue = next((faults for part, faults in self.hub.faults.items() if part in path and faults), [])
            fault = queue.pop(0) if queue else None
        if fault == "cut":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self._hang_up()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if isinstance(fault, int):
                raise Failed(fault, {"X-Error-Message": f"as asked for {self.headers.get('Authorization')}"})
            with self.hub.lock:
                status, headers, content = self.answer(self.command, path, body)
        except Failed as failed:
            (status, headers), content = failed.args, json.dumps({"url": f"{self.hub.url}/me/there"}).encode()
        if fault == "lost":
            self._hang_up()
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and content."""
        for verb, pattern, call in CALLS:
            if verb == method.replace("HEAD", "GET") and (match := re.fullmatch(pattern, path)):
                result = call(self, body, **{key: unquote(text) for key, text in match.groupdict().items()})
                return result if isinstance(result, tuple) else (200, {}, json.dumps(result).encode())
        raise Failed(404, {})

    def authorize(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Failed(401, {"X-Error-Message": "Invalid credentials in Authorization header"})

    def repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            raise Failed(404, {"X-Error-Code": "RepoNotFound"})
        return repo

    def tip(self, name: str, revision: str) -> Commit:
        found = self.repo(name).find(revision)
        if found is None:
            raise Failed(404, {"X-Error-Code": "RevisionNotFound"})
        return found

    def create(self, body: bytes) -> Any:
        self.authorize()
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            raise Failed(409, {})
        self.hub.repos[name] = Repo(asked.get("visibility") == "private")
        self.hub.repos[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return {"url": f"{self.hub.url}/{name}"}

    def branch(self, body: bytes, name: str, branch: str) -> Any:
        self.authorize()
        branches = self.repo(name).branches
        if branch in branches:
            raise Failed(409, {})
        branches[branch] = branches["main"][-1:]
        return {}

    def validate(self, body: bytes) -> Any:
        ModelCard(json.loads(body)["content"])
        return {"errors": [], "warnings": []}

    def preupload(self, body: bytes, name: str, revision: str) -> Any:
        self.authorize()
        files, answers = self.tip(name, revision).files, []
        for path in (one["path"] for one in json.loads(body)["files"]):
            large = path.endswith(LARGE)
            oid = _oid(files[path], large) if path in files else None
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def batch(self, body: bytes, name: str) -> Any:
        self.authorize()
        objects = []
        for one in json.loads(body)["objects"]:
            href = f"{self.hub.url}/large/{one['oid']}?signature=SIGNED"
            actions = {} if one["oid"] in self.hub.large else {"actions": {"upload": {"href": href}}}
            objects.append({"oid": one["oid"], "size": one["size"], **actions})
        return {"transfer": "basic", "objects": objects}

    def put(self, body: bytes, oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Failed(400, {})
        self.hub.large[oid] = body
        return {}

    def commit(self, body: bytes, name: str, revision: str) -> Any:
        self.authorize()
        before = self.tip(name, revision)
        head, *lines = [json.loads(line) for line in body.splitlines()]
        if head["value"].get("parentCommit") not in (None, before.id):
            raise Failed(412, {"X-Error-Message": "A commit has happened since. Please refresh and try again."})
        files = dict(before.files)
        for line in lines:
            value = line["value"]
            inline = line["key"] == "file"
            files[value["path"]] = base64.b64decode(value["content"]) if inline else self.hub.large[value["oid"]]
        made = self.repo(name).commit(revision, files, head["value"]["summary"])
        return {"commitUrl": f"{self.hub.url}/{name}/commit/{made.id}", "commitOid": made.id}

    def info(self, body: bytes, name: str, revision: str = "main") -> Any:
        tip = self.tip(name, revision)
        siblings = [{"rfilename": path} for path in tip.files]
        return {"id": name, "sha": tip.id, "private": self.repo(name).private, "siblings": siblings}

    def log(self, body: bytes, name: str, revision: str) -> Any:
        self.tip(name, revision)
        commits = self.repo(name).branches[revision][::-1]
        return [{"id": one.id, "title": one.message, "message": "", "authors": [], "date": DATE} for one in commits]

    def tree(self, body: bytes, name: str, revision: str) -> Any:
        entries = []
        for path, content in self.tip(name, revision).files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": _oid(content, False)}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": _oid(content, True), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return entries

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> Any:
        tip = self.tip(name, revision)
        if path not in tip.files:
            raise Failed(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": tip.id})
        content = tip.files[path]
        return 200, {"X-Repo-Commit": tip.id, "ETag": f'"{_oid(content, path.endswith(LARGE))}"'}, content

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def _sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _oid(content: bytes, large: bool) -> str:
    return hashlib.sha256(content).hexdigest() if large else _sha1(content)


NAME, REVISION = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
CALLS = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/models/{NAME}/branch/(?P<branch>.+)", Handler.branch),
    ("POST", f"/api/models/{NAME}/preupload/{REVISION}", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/large/(?P<oid>.+)", Handler.put),
    ("POST", f"/api/models/{NAME}/commit/{REVISION}", Handler.commit),
    ("GET", f"/api/models/{NAME}", Handler.info),
    ("GET", f"/api/models/{NAME}/revision/{REVISION}", Handler.info),
    ("GET", f"/api/models/{NAME}/commits/{REVISION}", Handler.log),
    ("GET", f"/api/models/{NAME}/tree/{REVISION}", Handler.tree),
    ("GET", f"/{NAME}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]


@contextmanager
def serve() -> Iterator[Standin]:
    """Run a stand-in in a thread while the block lasts."""
    hub = Standin()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment(hub: Standin, cache: Path) -> dict[str, str]:
    """Return the variables with which a process talks to the stand-in instead of the Hub."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(cache),
    }
