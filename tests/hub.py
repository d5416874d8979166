"""A Hub on the loopback: enough of its protocol for the real client to push and pull model repositories."""

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


@dataclass
class Repository:
    """Commits by hash, oldest first: path -> content."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return next(reversed(self.commits))

    def commit(self, files: dict[str, bytes]) -> str:
        tree = (self.commits[self.head] if self.commits else {}) | files
        listing = json.dumps([len(self.commits), sorted((path, hash_of(tree[path])) for path in tree)])
        self.commits[hashlib.sha1(listing.encode()).hexdigest()] = tree
        return self.head

    def at(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.head if revision == "main" else revision)


@dataclass
class Hub:
    """What the server holds. `token` is the one it lets write, but not for the organisation `closed`."""

    token: str = "hf_secret"
    closed: str = "closed"
    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)


def hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers every route the client uses; anything else is a 404 that names it."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.dispatch({})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.dispatch(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    do_PUT = do_POST

    def dispatch(self, body: Any) -> None:
        path, hub = self.path.split("?")[0], self.hub
        may_write = self.headers.get("Authorization") == f"Bearer {hub.token}"
        if path == "/api/repos/create" and not may_write:
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create" and json.loads(body).get("organization") == hub.closed:
            return self.answer(403, {"error": "You don't have the rights to create a model here."})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if match := re.fullmatch("/blobs/([0-9a-f]{64})", path):
            assert hash_of(body) == match[1]
            hub.blobs[match[1]] = body
            return self.answer(200, {})
        if match := re.fullmatch(r"/(\w+/[\w-]+)\.git/info/lfs/objects/batch", path):
            return self.answer(200, {"transfer": "basic", "objects": self.uploads(json.loads(body)["objects"])})
        match = re.fullmatch(r"/(?:api/models/)?(\w+/[\w-]+)(?:/(\w+)/([\w]+)(?:/(.+))?)?", path)
        if not match or match[1] not in hub.repositories:
            return self.answer(404, {"error": f"no route or repository {path}"}, {"X-Error-Code": "RepoNotFound"})
        repository, verb = hub.repositories[match[1]], match[2]
        if verb == "preupload":
            return self.preupload(json.loads(body)["files"])
        if verb == "commit":
            return self.commit(match[1], repository, body.decode().splitlines())
        return self.read(match[1], repository, verb, match[3] or "main", match[4])

    def create(self, request: dict[str, Any]) -> None:
        name = f"{request.get('organization') or 'someone'}/{request['name']}"
        known = name in self.hub.repositories
        self.hub.repositories.setdefault(name, Repository(request.get("visibility") == "private"))
        if not self.hub.repositories[name].commits:
            self.hub.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self.answer(409 if known else 200, {"url": f"{self.hub.url}/{name}", "name": name})

    def preupload(self, files: list[dict[str, Any]]) -> None:
        modes = {True: "lfs", False: "regular"}
        kept = [
            {"path": file["path"], "uploadMode": modes[file["path"].endswith(".safetensors")], "shouldIgnore": False}
            for file in files
        ]
        self.answer(200, {"files": kept})

    def uploads(self, objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            one | {"actions": {"upload": {"href": f"{self.hub.url}/blobs/{one['oid']}", "header": {}}}}
            for one in objects
        ]

    def commit(self, name: str, repository: Repository, lines: list[str]) -> None:
        files = {}
        for entry in map(json.loads, lines):
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        sha = repository.commit(files)
        self.answer(200, {"commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "success": True})

    def read(self, name: str, repository: Repository, verb: str | None, revision: str, path: str | None) -> None:
        tree = repository.at(revision)
        if tree is None:
            return self.answer(404, {"error": "revision"}, {"X-Error-Code": "RevisionNotFound"})
        sha = repository.head if revision == "main" else revision
        if verb in (None, "revision"):
            siblings = [{"rfilename": file} for file in tree]
            return self.answer(200, {"id": name, "sha": sha, "private": repository.private, "siblings": siblings})
        if verb == "tree":
            return self.answer(200, [self.entry(file, content) for file, content in tree.items()])
        if verb == "resolve" and path in tree:
            headers = {"ETag": f'"{hash_of(tree[path])}"', "X-Repo-Commit": sha}
            return self.answer(200, tree[path], headers)
        return self.answer(404, {"error": "entry"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "oid": hash_of(content)[:40], "size": len(content), "path": path}

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serve() -> Iterator[Hub]:
    """A running, empty Hub."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
