"""A stand-in for the Hugging Face Hub on this machine: its file layout and the few calls that upload and download."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    root: Path

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            name = json.loads(body)
            repository = f"{name['organization']}/{name['name']}" if name.get("organization") else name["name"]
            (self.root / repository).mkdir(parents=True, exist_ok=True)
            self._json({"url": f"{self._address()}/{repository}", "name": repository})
        elif path == "/api/validate-yaml":  # of the card
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            self._json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in path:
            repository = unquote(path.removeprefix("/api/models/").partition("/commit/")[0])
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    file = self.root / repository / entry["value"]["path"]
                    file.write_bytes(base64.b64decode(entry["value"]["content"]))
            self._json({"commitUrl": f"{self._address()}/{repository}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.send_error(404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if "/tree/" in path:
            folder = self.root / path.removeprefix("/api/models/").partition("/tree/")[0]
            self._json(
                [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": COMMIT}
                    for file in sorted(folder.iterdir())
                ]
            )
            return
        if path.startswith("/api/models/"):
            repository, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            folder = self.root / repository
            if not folder.is_dir() or revision not in ("", "main", "v1", COMMIT):
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound" if not folder.is_dir() else "RevisionNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            names = sorted(file.name for file in folder.iterdir())
            self._json({"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]})
            return
        repository, _, rest = path.lstrip("/").partition("/resolve/")
        file = self.root / repository / rest.partition("/")[2]
        if not file.is_file():
            self.send_error(404)
            return
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _json(self, data: object) -> None:
        content = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _address(self) -> str:
        host, port = self.server.server_address[:2]
        return f"http://{host!s}:{port}"


@contextmanager
def hub_server(root: Path) -> Iterator[str]:
    """Serve the folder `root/ORGANISATION/NAME` as a Hub, and yield its address."""
    handler = type("Handler", (_Handler,), {"root": root})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
