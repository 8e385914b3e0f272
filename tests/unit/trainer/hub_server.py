"""A local HTTP server that answers as the Hugging Face hub does, for the requests that huggingface_hub makes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories by their API name, such as models/org/name or datasets/org/name."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.cut_off: set[str] = set()
        """Files whose download breaks off in the middle, every time."""
        self.away: set[str] = set()
        """Parts of paths that are answered with 503."""
        self.token = "hf_letmein"
        self.requested: list[str] = []
        """Path of each request, and the range where it asks for one."""
        self.knows_ranges, self.tells_sizes = True, True

    @property
    def endpoint(self) -> str:
        """URL of the hub."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running() -> Iterator[Hub]:
    """Serve until the block ends."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requested.append(" ".join(filter(None, (self.path, self.headers.get("Range")))))
        path = unquote(urlsplit(self.path).path)
        if any(part in path for part in self.server.away):
            self._send(503, b"", {})
            return
        for name, folder in self.server.repos.items():
            prefix = name.removeprefix("models/")
            if path.startswith((f"/api/{name}/", f"/{prefix}/resolve/")) or path == f"/api/{name}":
                if name in self.server.gated and self.headers.get("Authorization") != f"Bearer {self.server.token}":
                    self._error(401, "GatedRepo")
                else:
                    self._answer(path, name, prefix, folder)
                return
        self._error(404 if "/api/" not in path else 401, "RepoNotFound")

    do_HEAD = do_POST = do_GET  # noqa: N815 - http.server's names

    def _answer(self, path: str, name: str, prefix: str, folder: Path) -> None:
        files = {file.name: file for file in sorted(folder.iterdir())}
        if path.startswith(f"/{prefix}/resolve/"):
            revision, _, file = path.removeprefix(f"/{prefix}/resolve/").partition("/")
            self._file(files.get(file), revision)
        elif path.startswith(f"/api/{name}/revision/") and not path.endswith(("/main", f"/{COMMIT}", "/v1")):
            self._error(404, "RevisionNotFound")
        elif path == f"/api/{name}" or "/revision/" in path:
            sizes = {key: file.stat().st_size if self.server.tells_sizes else None for key, file in files.items()}
            siblings = [{"rfilename": key, "size": size} for key, size in sizes.items()]
            self._json({"id": name.partition("/")[2], "sha": COMMIT, "siblings": siblings, "private": False})
        elif "/tree/" in path:
            self._json([_entry(file) for file in files.values()])
        elif "/paths-info/" in path:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            wanted = json.loads(body)["paths"] if body.startswith("{") else []
            self._json([_entry(files[key]) for key in wanted if key in files])
        else:
            self._error(404, "EntryNotFound")

    def _file(self, file: Path | None, revision: str) -> None:
        if file is None or revision != COMMIT:
            self._error(404, "EntryNotFound")
            return
        content = file.read_bytes()
        if self.command == "GET" and file.name in self.server.cut_off:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        if self.server.knows_ranges and (asked := self.headers.get("Range")):
            if not content:
                self._send(416, b"", {"Content-Range": "bytes */0"})
                return
            last = int(asked.removeprefix("bytes=0-"))
            self._send(206, content[: last + 1], {"Content-Range": f"bytes 0-{last}/{len(content)}"})
            return
        headers = {"ETag": f'"{hashlib.sha1(content, usedforsecurity=False).hexdigest()}"', "X-Repo-Commit": COMMIT}
        self._send(200, content, headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", "X-Repo-Commit": COMMIT})

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


def _entry(file: Path) -> dict[str, Any]:
    oid = hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
    return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": oid}
