"""A destination that gives back what it took, as the Export API does, and can be made to forget or to change things."""

from __future__ import annotations

import gzip
import io
import json
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Json = dict[str, Any]


def row(event: Json, upload_ms: int) -> Json:
    """An Export row of an event. Source: contract, read 2."""
    groups = {k: v if isinstance(v, list) else [v] for k, v in event.get("groups", {}).items()}
    return {
        "$insert_id": event.get("insert_id"),
        "event_type": event["event_type"],
        "user_id": event.get("user_id"),
        "device_id": event.get("device_id", "derived"),
        "client_event_time": text(event["time"]),
        "event_time": text(event["time"]),
        "server_upload_time": text(upload_ms),
        "event_properties": event.get("event_properties", {}),
        "user_properties": event.get("user_properties", {}),
        "groups": groups,
        "platform": event.get("platform"),
        "session_id": event.get("session_id", -1),
        "version_name": event.get("app_version"),
    }


def text(ms: int) -> str:
    """A time as the Export API writes it."""
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")


class Exporting:
    """Rows by hour of upload, served as archives; `broken`: answers to give before a good one."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, Json]] = []  # (upload ms, row)
        self.broken: list[int] = []
        self.asked: list[str] = []
        self.url = ""

    def archive(self, hour: str | None) -> bytes:
        """The rows of an hour, or all of them."""
        mine = [row for at, row in self.rows if hour in {None, _hour(at)}]
        if not mine:
            return b""
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as file:
            half = len(mine) // 2
            for number, part in enumerate((mine[:half], mine[half:])):
                lines = "".join(json.dumps(one) + "\n" for one in part)
                name = f"1/1_{hour}#{number}.json.gz"
                file.writestr(name, gzip.compress(lines.encode()))
        return out.getvalue()


def _hour(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y%m%dT%H")


@contextmanager
def serving(data: Exporting, *, health: bytes = b"{}") -> Iterator[Exporting]:
    """Serve /healthz, and /api/2/export to whoever has the keys `key` and `secret`.

    One that is healthy as ours is serves the import `imp`, which has all rows, too.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            data.asked.append(self.path)
            if parts.path == "/healthz":
                self._say(200, health)
            elif parts.path == "/api/1/imports/imp/export" and b"retrofill" in health:
                self._say(200, data.archive(None))
            elif parts.path != "/api/2/export":
                self._say(404, b"")
            elif self.headers["Authorization"] != "Basic a2V5OnNlY3JldA==":
                self._say(401, b"no")
            elif data.broken:
                self._say(data.broken.pop(0), b"not now")
            else:
                query = parse_qs(parts.query)
                assert query["start"] == query["end"]
                found = data.archive(query["start"][0])
                self._say(200 if found else 404, found)

        def _say(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    data.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield data
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
