"""A local HTTP server of a folder, with range requests, and faults on request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self


@dataclass
class Faults:
    """What the server does instead of answering, and what it was asked for.

    Attributes:
        status: HTTP status for (path, number of requests for it so far); 0 answers, -1 closes the connection in the
            middle of the body, -2 never answers.
        delay: seconds before each answer.
        ranges: whether parts are sent.
        dead: whether all connections are closed.
        flip: paths of which one byte in the middle is changed in the next so many answers.
        asked: (method, path, range) of each request.
    """

    status: Callable[[str, int], int] = lambda path, number: 0
    delay: float = 0.0
    ranges: bool = True
    dead: bool = False
    flip: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)

    def parts(self) -> list[tuple[str, str]]:
        """(path, range) of what was read of shards."""
        return [(path, part) for method, path, part in self.asked if method == "GET" and path.endswith(".tar")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *args: object, root: Path, faults: Faults) -> None:
        self.root, self.faults = root, faults
        super().__init__(*args)  # type: ignore[arg-type]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        faults, part = self.faults, self.headers.get("Range", "")
        number = sum(path == self.path for _, path, _ in faults.asked)
        faults.asked.append((self.command, self.path, part))
        if faults.dead:
            self.close_connection = True
            return
        time.sleep(faults.delay)
        status = faults.status(self.path, number)
        file = self.root / self.path.lstrip("/")
        if status == 0 and not file.is_file():
            status = 404
        if status == -2:
            time.sleep(3)
            self.close_connection = True
            return
        if status > 0:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = bytearray(file.read_bytes())
        etag = f'"{file.stat().st_mtime_ns}-{len(content)}"'
        if body and faults.flip.get(self.path, 0) > 0:
            faults.flip[self.path] -= 1
            content[len(content) // 2] ^= 0xFF
        first, last = 0, len(content) - 1
        if part and faults.ranges:
            first, last = (int(text) for text in part.removeprefix("bytes=").split("-"))
        data = bytes(content[first : last + 1])
        self.send_response(206 if part and faults.ranges else 200)
        if part and faults.ranges:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if status == -1 else data)
            self.close_connection = status == -1


class RemoteFolder:
    """A folder at a URL while the context lasts."""

    def __init__(self, root: Path) -> None:
        self.faults = Faults()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, root=root, faults=self.faults))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.faults.dead = True  # of connections that are open
        self._server.shutdown()
        self._server.server_close()
