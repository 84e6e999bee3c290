"""A local server that answers as the Hugging Face hub does, for the real client.

The protocol is that of huggingface_hub 2.4: repository and tree under /api/, files under .../resolve/COMMIT/PATH, large ones by a redirect
to a store that knows ranges. What is written comes as the client does it: create, branch, validate-yaml, preupload, LFS, commit. Faults
are given by file: a connection that breaks, other bytes, an error.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

SMALL_BYTES = 1000
"""Files below this size are kept in git and come without a redirect."""
LICENSES = {
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigcode-openrail-m",
    "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause", "cc", "cc0-1.0", "cc-by-2.0",
    "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-sa-4.0",
    "ecl-2.0", "epl-2.0", "eupl-1.1", "agpl-3.0", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-3.0", "isc", "ms-pl",
    "mpl-2.0", "odc-by", "odbl", "ofl-1.1", "osl-3.0", "pddl", "unlicense", "zlib", "unknown", "other",
}  # fmt: skip
"""Names of licences that this server takes: some of those that the hub knows."""


@dataclass
class Repo:
    """A repository at one commit."""

    kind: str
    commit: str
    files: dict[str, bytes]
    token: str | None = None
    """Needed to read it, as for a private one."""
    gated: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files of other branches than main."""
    commits: list[str] = field(default_factory=list)
    """Messages of what was committed by the client."""


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
    writer: str | None = None
    """Token that may make repositories and write to them."""
    store: dict[str, bytes] = field(default_factory=dict)
    """SHA-256 -> large file that was uploaded, committed or not."""
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

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, None))
        lines = [json.loads(line) for line in body.splitlines()]
        if path == "/api/validate-yaml":
            errors = [{"message": problem} for problem in card_problems(lines[0]["content"])]
            return self._json({"errors": errors, "warnings": []}, 400 if errors else 200)
        if self.headers.get("Authorization") != f"Bearer {self.hub.writer}":
            return self._json({"error": "You don't have the rights to create a model under this namespace"}, 403)
        if path == "/api/repos/create":
            name = f"{lines[0]['organization']}/{lines[0]['name']}"
            url = {"url": f"{self.hub.url}/{name}"}
            if name in self.hub.repos:
                return self._json(url | {"error": "You already created this model repo"}, 409)
            self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs"}, "model")
            return self._json(url)
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            # Files that are there already come without an action.
            place = f"{self.hub.url}/upload/{found[1]}"
            wanted = [
                entry | {"actions": {"upload": {"href": f"{place}/{entry['oid']}"}}}
                if entry["oid"] not in self.hub.store
                else entry
                for entry in lines[0]["objects"]
            ]
            return self._json({"transfer": "basic", "objects": wanted})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path)
        if found is None or found[1] not in self.hub.repos:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        repo, branch = self.hub.repos[found[1]], found[3]
        if found[2] == "branch":
            is_new = branch not in repo.branches
            repo.branches.setdefault(branch, dict(repo.files))
            return self._json({}, 201 if is_new else 409)
        files = repo.files if branch == "main" else repo.branches[branch]
        if found[2] == "preupload":
            return self._json({"files": [_upload_mode(entry, files.get(entry["path"])) for entry in lines[0]["files"]]})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.store[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                repo.commits.append(value["summary"])
        repo.commit = hashlib.sha1(body).hexdigest()
        url = f"{self.hub.url}/{found[1]}/commit/{repo.commit}"
        return self._json({"success": True, "commitOid": repo.commit, "commitUrl": url})

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        oid = self.path.rpartition("/")[2]
        self.hub.requests.append((self.command, self.path, None))
        if status := self.hub.failing.get("upload"):
            return self._send(status, b"out of order")
        if hashlib.sha256(data).hexdigest() != oid:
            return self._send(400, b"other bytes")
        self.hub.store[oid] = data
        return self._send(200, b"")

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
        if revision not in ("main", repo.commit, *repo.branches):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if what == "revision":
            files = repo.branches.get(revision, repo.files)
            about = {"id": name, "sha": repo.commit, "private": False, "tags": []}
            about["siblings"] = [{"rfilename": path} for path in files]
            about["cardData"] = front_matter(files.get("README.md", b"").decode())
            return self._json(about)
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

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

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


def front_matter(card: str) -> dict[str, Any]:
    """The metadata of a card; empty where it has none."""
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    value = yaml.safe_load(found[1]) if found else {}
    return value if isinstance(value, dict) else {}


def card_problems(card: str) -> list[str]:
    """Return what this server says against the metadata of a model's card; the hub's own rules may be others."""
    data = front_matter(card)
    problems = [] if data.get("license") in LICENSES else ['"license" must be one of the hub\'s']
    for name in data.get("datasets", []):
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            problems.append(f'"datasets" has {name!r}, which is no data set')
    for key in ("tags", "datasets"):
        if not all(isinstance(one, str) for one in data.get(key, [])):
            problems.append(f'"{key}" must be a list of strings')
    for key in ("library_name", "pipeline_tag"):
        if not isinstance(data.get(key, ""), str):
            problems.append(f'"{key}" must be a string')
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str) or not model.get("results"):
            problems.append('"model-index" needs "name" and "results"')
        for result in model.get("results", []):
            parts = [result.get("task", {}), result.get("dataset", {}), *result.get("metrics", [{}])]
            if not all(isinstance(part.get("type"), str) for part in parts) or not result["dataset"].get("name"):
                problems.append('"model-index" has a result without types or without the name of its data')
            if not all(isinstance(metric.get("value"), int | float) for metric in result.get("metrics", [])):
                problems.append('"model-index" has a metric without a number')
    return problems


def _upload_mode(entry: dict[str, Any], there: bytes | None) -> dict[str, Any]:
    is_large = entry["size"] >= SMALL_BYTES and not entry["path"].endswith((".md", ".json"))
    answer = {"path": entry["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
    if there is not None:
        answer["oid"] = hashlib.sha256(there).hexdigest() if is_large else _git_sha1(there)
    return answer


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git_sha1(data)}
    if len(data) >= SMALL_BYTES:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
