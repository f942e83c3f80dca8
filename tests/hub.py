"""A small stand-in for the Hugging Face hub, on this machine: what huggingface_hub asks when it downloads a model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

from huggingface_hub.utils import close_session

Files = dict[str, bytes]


@dataclass
class Request:
    """One request that came: its path without the query, and the headers that matter."""

    method: str
    path: str
    authorization: str | None
    range: str | None


@dataclass
class Hub:
    """Serves one model, owner/name.

    Large files lie on another host, as on the real hub: `resolve` redirects to localhost, which is not 127.0.0.1.

    Attributes:
        commits: the files of each commit.
        refs: branches and tags.
        token: what a request must bring, if anything.
        gated: whether access must be asked for.
        failing: whether everything is answered with 500.
        cut: how many bytes of a file are sent before the connection breaks; each entry works so many times.
        requests: what came.
    """

    commits: dict[str, Files]
    refs: dict[str, str]
    token: str | None = None
    gated: bool = False
    failing: bool = False
    cut: dict[str, list[int]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    url: str = ""

    def __enter__(self) -> Hub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the server and the client's open connections to it."""
        self._server.shutdown()
        self._server.server_close()
        close_session()

    def downloaded(self) -> list[str]:
        """The names of the files whose content was asked for, once for each request."""
        names = {
            hashlib.sha256(data).hexdigest(): name for files in self.commits.values() for name, data in files.items()
        }
        paths = [request.path.split("/", 5) for request in self.requests if request.method == "GET"]
        small = [path[-1] for path in paths if path[3:4] == ["resolve"] and not is_large(path[-1])]
        return sorted([*small, *(names[path[-1]] for path in paths if path[1] == "cdn")])


def read_files(folder: Path) -> Files:
    """A folder's files by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def is_large(name: str) -> bool:
    """Whether the hub keeps a file apart from the repository, and names it by its SHA-256."""
    return name.endswith((".safetensors", ".bin", ".gguf", ".onnx"))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        authorization, hub = self.headers["Authorization"], self.hub
        hub.requests.append(Request(self.command, path, authorization, self.headers["Range"]))
        if hub.failing:
            return self._error(500, "", "Internal Error")
        if path.startswith("/cdn/"):
            return self._content(path.removeprefix("/cdn/"))
        if hub.token is not None and authorization is not None and authorization != f"Bearer {hub.token}":
            return self._error(401, "", "Invalid credentials in Authorization header")
        if "owner/name" not in path or (hub.token is not None and authorization is None):
            return self._error(401 if authorization is None else 404, "RepoNotFound", "Repository not found")
        if hub.gated:
            return self._error(403, "GatedRepo", "Access to model owner/name is restricted")
        parts = path.strip("/").split("/")
        revision = parts[5] if parts[0] == "api" else parts[3]
        commit = hub.refs.get(revision, revision)
        if commit not in hub.commits:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        files = hub.commits[commit]
        if parts[:2] == ["api", "models"]:
            return self._json({"revision": _info, "tree": _tree}[parts[4]](commit, files))
        name = "/".join(parts[4:])
        if name not in files:
            return self._error(404, "EntryNotFound", "Entry not found", commit)
        return self._file(name, files[name], commit)

    def _file(self, name: str, data: bytes, commit: str) -> None:
        if not is_large(name):
            return self._send(200, data, {"ETag": f'"{_git_id(data)}"', "X-Repo-Commit": commit})
        digest = hashlib.sha256(data).hexdigest()
        self.send_response(302)
        self.send_header("Location", f"http://localhost:{self.hub.port}/cdn/{digest}")
        self.send_header("X-Linked-ETag", f'"{digest}"')
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _content(self, digest: str) -> None:
        everything = (file for files in self.hub.commits.values() for file in files.items())
        name, data = next((name, data) for name, data in everything if hashlib.sha256(data).hexdigest() == digest)
        start, end, status, headers = 0, len(data), 200, {}
        if wanted := self.headers["Range"]:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, end, status = int(first), min(int(last) + 1, end) if last else end, 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        cuts = self.hub.cut.get(name, [])
        self._send(status, data[start:end], headers, cuts.pop(0) if cuts and self.command == "GET" else None)

    def _send(self, status: int, data: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:cut])
        if cut is not None:
            self.close_connection = True

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str, commit: str = "") -> None:
        named = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        self._send(
            status, json.dumps({"error": message}).encode(), {key: value for key, value in named.items() if value}
        )


def _info(commit: str, files: Files) -> Any:
    return {
        "id": "owner/name",
        "modelId": "owner/name",
        "sha": commit,
        "siblings": [{"rfilename": name} for name in files],
    }


def _tree(_: str, files: Files) -> Any:
    entries: list[dict[str, Any]] = []
    for name, data in files.items():
        entry = {"type": "file", "path": name, "size": len(data), "oid": _git_id(data)}
        if is_large(name):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        entries.append(entry)
    return entries


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
