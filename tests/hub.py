"""A Hugging Face hub on localhost: files by the few routes that huggingface_hub and datasets ask for."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What is served, and what was asked for.

    Attributes:
        url: for HF_ENDPOINT.
        requests: "GET /path", in order.
    """

    def __init__(self, root: Path) -> None:
        self.root = root  # models/OWNER/NAME/..., datasets/OWNER/NAME/...
        self.requests: list[str] = []
        self.url = ""


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """Serve `root` while the context lasts."""
    hub = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        match path.strip("/").split("/"):
            case ["api", kind, owner, name, *rest] if (directory := self.hub.root / kind / owner / name).is_dir():
                self._about(directory, f"{owner}/{name}", rest)
            case ["api", *_]:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            case ["datasets", owner, name, "resolve", _, *file]:
                self._file(self.hub.root / "datasets" / owner / name / "/".join(file))
            case [owner, name, "resolve", _, *file]:
                self._file(self.hub.root / "models" / owner / name / "/".join(file))
            case _:
                self._send(404, b"", {})

    do_HEAD = do_GET

    def _about(self, directory: Path, name: str, rest: list[str]) -> None:
        def describe(path: Path) -> dict[str, object]:
            at = {"path": str(path.relative_to(directory)), "oid": "0" * 40}
            return {"type": "directory", **at} if path.is_dir() else {"type": "file", "size": path.stat().st_size, **at}

        match rest:
            case ["tree", _, *folder]:
                inside = directory.joinpath(*folder)
                found = inside.rglob("*") if "recursive=true" in self.path else inside.iterdir()
                answer: object = [describe(path) for path in sorted(found)]
            case _:
                files = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
                answer = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _file(self, path: Path) -> None:
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
            self._send(206, data[begin : end + 1], headers)
            return
        self._send(200, data, headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
