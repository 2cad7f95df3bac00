"""What a server answers about an import is understood, or said to be not."""

from __future__ import annotations

import struct
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from retrofill.backfill.keys import Keys
from retrofill.backfill.profile import Target
from retrofill.errors import FinalError, InputError, RetryError
from retrofill.rehearse import archive, given

pytestmark = pytest.mark.slow

KEYS = Keys("KEY", "SECRET")
DAY = date(2026, 1, 1)
ASKS: dict[str, Callable[[Target], object]] = {
    "project": lambda to: given.property_time(to, KEYS),
    "imports": lambda to: given.import_figures(to, KEYS, "spring"),
    "chart": lambda to: given.chart(to, KEYS, "new", DAY, DAY),
}


@contextmanager
def answering(body: bytes, length: int) -> Iterator[Target]:
    """Run a server that answers everything with a body, which may be shorter than it says; then it waits."""
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()
            if length == STALLED:
                ended.wait(60)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        try:
            yield Target(address, f"{address}/batch", address)
        finally:
            ended.set()
            server.shutdown()
            thread.join()


STALLED = 1000


@pytest.mark.parametrize("name", ASKS)
def test_an_answer_that_is_none_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    page = b"<html>Sign in</html>"
    with answering(page, len(page)) as to, pytest.raises(FinalError, match="not understood"):
        ASKS[name](to)
    with answering(b'{"a":', 500) as to, pytest.raises(RetryError, match="cut off"):
        ASKS[name](to)
    # No patience once the answer has begun.
    opened = given._open

    def impatient(*asked: Any) -> Any:
        answer: Any = opened(*asked)
        answer.fp.raw._sock.settimeout(0.05)
        return answer

    monkeypatch.setattr(given, "_open", impatient)
    with answering(b'{"a":', STALLED) as to, pytest.raises(RetryError, match="cut off"):
        ASKS[name](to)


@pytest.mark.parametrize("what", ["encrypted", "packed in an unknown way"])
def test_an_export_that_cannot_be_unpacked_is_told(what: str, tmp_path: Path) -> None:
    path = tmp_path / "export.zip"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("rows.json", "{}\n")
    data = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.index(mark) + flags + (0 if what == "encrypted" else 2)
        struct.pack_into("<H", data, at, 1 if what == "encrypted" else 97)
    path.write_bytes(data)
    with (
        pytest.raises(InputError, match="no whole export"),
        archive.opened(path, tmp_path / "rows"),
    ):
        pass
