"""A stand-in for the hub on this machine: as much of its protocol as downloads and uploads need."""

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
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server holds, and what it was asked for."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Repository -> file -> content."""
    gated: set[str] = field(default_factory=set)
    cut_after: dict[str, int] = field(default_factory=dict)
    """File -> bytes after which the connection breaks, once."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and Range of every request."""
    url: str = ""

    def fetched(self, file: str) -> list[str | None]:
        """The Range of every GET of ``file``."""
        return [r for method, path, r in self.requests if method == "GET" and path.endswith(file)]


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """Serves ``hub`` on a free port of this machine."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._get(body=False)

    def do_GET(self):
        self._get(body=True)

    def do_POST(self):
        content = self._body()
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(("POST", path, None))
        if path == "/api/repos/create":
            values = json.loads(content)
            repo = f"{values.get('organization') or 'owner'}/{values['name']}"
            self.hub.repos.setdefault(repo, {})
            self._json({"url": f"{self.hub.url}/{repo}", "name": repo})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(content)["files"]
            ]
            self._json({"files": files})
        elif "/paths-info/" in path:
            repo = "/".join(path.removeprefix("/api/datasets/").split("/")[:2])
            wanted = parse_qs(content.decode()).get("paths", [])
            held = self.hub.repos[repo]
            self._json([self._entry(repo, name) for name in wanted if name in held])
        elif "/commit/" in path:
            repo = path.removeprefix("/api/models/").split("/commit/")[0]
            for line in content.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    data = base64.b64decode(entry["value"]["content"])
                    self.hub.repos[repo][entry["value"]["path"]] = data
            url = f"{self.hub.url}/{repo}/commit/{COMMIT}"
            self._json({"success": True, "commitOid": COMMIT, "commitUrl": url})
        else:
            self._error(404, "EntryNotFound")

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _get(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        is_api = path.startswith(("/api/models/", "/api/datasets/"))
        parts = re.sub(r"^/(api/)?(models/|datasets/)?", "", path).split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        if repo in self.hub.gated:
            self._error(403, "GatedRepo")
        elif repo not in self.hub.repos:
            self._error(404, "RepoNotFound")
        elif is_api and rest[:1] == ["tree"]:
            self._json(self._tree(repo, "/".join(rest[2:])))
        elif is_api:
            siblings = [{"rfilename": name} for name in self.hub.repos[repo]]
            self._json({"id": repo, "sha": COMMIT, "siblings": siblings, "private": False})
        elif rest[:1] == ["resolve"]:
            self._file(self.hub.repos[repo].get("/".join(rest[2:])), "/".join(rest[2:]), body)
        else:
            self._error(404, "EntryNotFound")

    def _tree(self, repo: str, folder: str) -> list[dict]:
        recursive = "recursive=true" in urlsplit(self.path).query.lower()
        prefix = folder + "/" if folder else ""
        entries: dict[str, dict] = {}
        for name in self.hub.repos[repo]:
            inside = name.removeprefix(prefix)
            if not name.startswith(prefix):
                continue
            if "/" in inside and not recursive:
                path = prefix + inside.split("/")[0]
                entries[path] = {"type": "directory", "path": path, "oid": _oid(path.encode())}
            else:
                entries[name] = self._entry(repo, name)
        return list(entries.values())

    def _entry(self, repo: str, name: str) -> dict:
        content = self.hub.repos[repo][name]
        return {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}

    def _file(self, content: bytes | None, name: str, body: bool) -> None:
        if content is None:
            self._error(404, "EntryNotFound")
            return
        start = 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{_oid(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not body:
            return
        cut = self.hub.cut_after.pop(name, None)
        self.wfile.write(content[start:cut])
        if cut is not None:
            self.close_connection = True

    def _json(self, values: object) -> None:
        content = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
