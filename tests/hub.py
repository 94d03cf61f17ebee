"""A stand-in for the Hugging Face hub: the few endpoints that its client uses to push and to fetch.

Repositories are commits, each a whole mapping of names to contents. What is asked is kept, and can be
answered with a failure instead.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "a" * 34


@dataclass
class Repository:
    """branches: name → commit; commits: commit → name → contents."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        text = f"{len(self.commits)} {branch} {sorted(files)}".encode()
        oid = hashlib.sha1(text).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def at(self, revision: str) -> str | None:
        found = self.branches.get(revision, revision)
        return found if found in self.commits else None


class Hub:
    """url; requests: (method, path) of all that was asked; failures: what to answer instead, by a pattern of
    "METHOD path", (status, headers, document)."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.sent: list[bytes] = []
        self.failures: dict[str, tuple[int, dict[str, str], Any]] = {}
        self.ignored: set[str] = set()
        self.url = ""

    def make(self, repo: str, files: dict[str, bytes], *, private: bool = True) -> Repository:
        made = self.repositories[repo] = Repository(private)
        made.commit("main", {".gitattributes": b"", **files}, "initial commit")
        return made

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What is there, the hub's own .gitattributes aside."""
        found = self.repositories[repo]
        oid = found.at(revision)
        assert oid is not None
        return {name: data for name, data in found.commits[oid].items() if name != ".gitattributes"}


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def is_large(name: str) -> bool:
    return name.endswith(".safetensors")


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append((self.command, path))
        self.state.sent.append(self.body)
        for pattern, failure in self.state.failures.items():
            if re.search(pattern, f"{self.command} {path}"):
                status, headers, document = failure
                return self._json(document, status, headers)
        for pattern, method in _ROUTES:
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match:
                if (
                    path.startswith("/api/")
                    and self.headers.get("Authorization") != f"Bearer {TOKEN}"
                ):
                    return self._error(401, "Invalid username or password.")
                return method(self, **match.groupdict())
        self._error(404, f"no such endpoint: {self.command} {path}")

    def _json(
        self, document: Any, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self._answer(
            json.dumps(document).encode(),
            status,
            {"Content-Type": "application/json", **(headers or {})},
        )

    def _answer(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status: int, message: str, code: str = "") -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._json({"error": message}, status, headers)

    def _commit_of(self, repo: str, revision: str) -> tuple[Repository, str] | None:
        """The commit, or the hub's own answers that there is none."""
        found = self.state.repositories.get(repo)
        if found is None:
            self._error(404, "Repository not found", "RepoNotFound")
            return None
        oid = found.at(revision)
        if oid is None:
            self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return None
        return found, oid

    def info(self, repo: str, revision: str | None = None) -> None:
        found = self._commit_of(repo, revision or "main")
        if found:
            repository, oid = found
            siblings = [{"rfilename": name} for name in repository.commits[oid]]
            self._json(
                {"id": repo, "sha": oid, "private": repository.private, "siblings": siblings}
            )

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.state.repositories:
            return self._error(409, "You already created this model repo")
        self.state.make(
            repo, {}, private=asked.get("visibility") == "private" or asked.get("private", False)
        )
        self._json({"url": f"{self.state.url}/{repo}"})

    def branch(self, repo: str, revision: str) -> None:
        found = self._commit_of(repo, json.loads(self.body).get("startingPoint", "main"))
        if found:
            found[0].branches[revision] = found[1]
            self._json({})

    def validate(self) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        found = self._commit_of(repo, revision)
        if not found:
            return
        there = found[0].commits[found[1]]
        self._json(
            {
                "files": [
                    {
                        "path": asked["path"],
                        "uploadMode": "lfs" if is_large(asked["path"]) else "regular",
                        "shouldIgnore": asked["path"] in self.state.ignored,
                        "oid": _oid(asked["path"], there[asked["path"]])
                        if asked["path"] in there
                        else None,
                    }
                    for asked in json.loads(self.body)["files"]
                ]
            }
        )

    def batch(self, repo: str) -> None:
        objects = []
        for asked in json.loads(self.body)["objects"]:
            entry: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.state.blobs:
                entry["actions"] = {"upload": {"href": f"{self.state.url}/lfs/{asked['oid']}"}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, "the contents are not what was announced")
        self.state.blobs[oid] = self.body
        self._json({})

    def commit(self, repo: str, revision: str) -> None:
        found = self._commit_of(repo, revision)
        if not found:
            return
        repository, head = found
        files = dict(repository.commits[head])
        header: dict[str, Any] = {}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                header = value
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.state.blobs:
                    return self._error(400, f"{value['path']}: its contents were not uploaded")
                files[value["path"]] = self.state.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        if header.get("parentCommit", head) != head:
            return self._error(412, "A commit has happened since. Please refresh and try again.")
        oid = repository.commit(revision, files, header["summary"])
        self._json({"commitUrl": f"{self.state.url}/{repo}/commit/{oid}", "commitOid": oid})

    def paths(self, repo: str, revision: str) -> None:
        found = self._commit_of(repo, revision)
        if found:
            files = found[0].commits[found[1]]
            asked = parse_qs(self.body.decode())["paths"]
            self._json([_entry(name, files[name]) for name in asked if name in files])

    def tree(self, repo: str, revision: str) -> None:
        found = self._commit_of(repo, revision)
        if found:
            self._json([_entry(name, data) for name, data in found[0].commits[found[1]].items()])

    def resolve(self, repo: str, revision: str, name: str) -> None:
        found = self._commit_of(repo, revision)
        if not found:
            return
        data = found[0].commits[found[1]].get(name)
        if data is None:
            return self._error(404, f"no {name}", "EntryNotFound")
        self._answer(data, 200, {"X-Repo-Commit": found[1], "ETag": f'"{_oid(name, data)}"'})


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _oid(name: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if is_large(name) else _blob(data)


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}
    if is_large(name):
        entry["lfs"] = {
            "size": len(data),
            "oid": hashlib.sha256(data).hexdigest(),
            "pointerSize": 130,
        }
    return entry


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, Any]] = [
    (rf"GET /api/models/{_REPO}", _Handler.info),
    (rf"GET /api/models/{_REPO}/revision/(?P<revision>[^/]+)", _Handler.info),
    (r"POST /api/repos/create", _Handler.create),
    (rf"POST /api/models/{_REPO}/branch/(?P<revision>[^/]+)", _Handler.branch),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"POST /api/models/{_REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /lfs/(?P<oid>\w+)", _Handler.upload),
    (rf"POST /api/models/{_REPO}/commit/(?P<revision>[^/]+)", _Handler.commit),
    (rf"POST /api/models/{_REPO}/paths-info/(?P<revision>[^/]+)", _Handler.paths),
    (rf"GET /api/models/{_REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.resolve),
]
