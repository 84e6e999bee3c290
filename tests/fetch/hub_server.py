"""A local server that answers as the Hugging Face hub does, for the real client.

The protocol is that of huggingface_hub 2.4: repository and tree under /api/, files under .../resolve/COMMIT/PATH, large ones by a redirect
to a store that knows ranges. Faults are given by file: a connection that breaks, other bytes, an error.
"""

import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

SMALL_BYTES = 1000
"""Files below this size are kept in git and come without a redirect."""


@dataclass
class Repo:
    """A repository at one commit."""

    kind: str
    commit: str
    files: dict[str, bytes]
    token: str | None = None
    """Needed to read it, as for a private one."""
    gated: bool = False


@dataclass
class HubServer:
    """Repositories by name, what was asked for, and faults to make."""

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and range of each request."""
    break_after: dict[str, list[int]] = field(default_factory=dict)
    """Path of a file -> bytes after which its next answers break off."""
    spoilt: Counter = field(default_factory=Counter)
    """Path of a file -> how many answers have one other byte."""
    failing: dict[str, int] = field(default_factory=dict)
    """Path of a file -> HTTP status that its store answers with."""
    is_stopped: bool = False

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.is_stopped:
            self.stop()

    def stop(self) -> None:
        """Answer no more, on connections that are open either."""
        self.is_stopped = True
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def add(self, name: str, files: dict[str, bytes], kind: str = "dataset", **more: Any) -> Repo:
        """A repository with these files; another one of the name is replaced, under another commit."""
        contents = json.dumps({path: hashlib.sha256(data).hexdigest() for path, data in files.items()}, sort_keys=True)
        self.repos[name] = Repo(kind, hashlib.sha1(contents.encode()).hexdigest(), files, **more)
        return self.repos[name]

    def downloads(self) -> list[str]:
        """Paths of files whose bytes were asked for, in order."""
        return [
            path.rpartition("/store/")[2] for method, path, _ in self.requests if method == "GET" and "/store/" in path
        ]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if self.hub.is_stopped:
            self.close_connection = True
            return None
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if found := re.fullmatch(r"/store/([^/]+/[^/]+)/(.+)", path):
            return self._store(self.hub.repos[found[1]].files[found[2]], found[2])
        found = re.fullmatch(
            r"/(api/)?(?:(datasets|models)/)?([^/]+/[^/]+)/(revision|tree|resolve)/([^/]+)(?:/(.*))?", path
        )
        if found is None:
            return self._send(404, b"{}")
        _, _, name, what, revision, file = found.groups()
        repo = self.hub.repos.get(name)
        if repo is None:
            # The hub does not tell strangers what does not exist and what is private.
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        authorized = self.headers.get("Authorization") == f"Bearer {repo.token}"
        if repo.token and not authorized:
            if repo.gated:
                if what == "resolve":
                    return self._send(401, b"{}", {"X-Error-Code": "GatedRepo"})
            else:
                return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", repo.commit):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if what == "revision":
            return self._json({"id": name, "sha": repo.commit, "siblings": [], "private": False, "tags": []})
        if what == "tree":
            return self._json([_entry(path, data) for path, data in repo.files.items()])
        return self._resolve(name, repo, file)

    def _resolve(self, name: str, repo: Repo, file: str) -> None:
        headers = {"X-Repo-Commit": repo.commit}
        data = repo.files.get(file)
        if data is None:
            return self._send(404, b"{}", headers | {"X-Error-Code": "EntryNotFound"})
        if len(data) < SMALL_BYTES:
            return self._send(200, data, headers | {"ETag": f'"{_git_sha1(data)}"'})
        headers |= {
            "X-Linked-Size": str(len(data)),
            "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            # Another host, as the store of large files is one: the client leaves out its token there.
            "Location": f"{self.hub.url.replace('127.0.0.1', 'localhost')}/store/{name}/{file}",
        }
        return self._send(302, b"", headers)

    def _store(self, data: bytes, file: str) -> None:
        if status := self.hub.failing.get(file):
            return self._send(status, b"out of order")
        if self.command == "GET" and self.hub.spoilt[file] > 0:
            self.hub.spoilt[file] -= 1
            data = data[:10] + bytes([data[10] ^ 1]) + data[11:]
        status, headers, first = 200, {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "Accept-Ranges": "bytes"}, 0
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first = int(asked[1])
            status = 206
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        body = data[first:]
        breaks = self.hub.break_after.get(file)
        if self.command == "GET" and breaks:
            self._send(status, body, headers, send_bytes=breaks.pop(0))
            self.close_connection = True
            self.connection.close()
            return None
        return self._send(status, body, headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, send_bytes: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:send_bytes])
            self.wfile.flush()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git_sha1(data)}
    if len(data) >= SMALL_BYTES:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
