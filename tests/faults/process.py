"""A real server process on a data directory, started, killed and started again on one port."""

from __future__ import annotations

import base64
import gzip
import http.client
import io
import json
import signal
import socket
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

API_KEY, SECRET_KEY = "key-of-faults", "secret-of-faults"
_DECODER = msgspec.json.Decoder()
PATIENCE_S = 300  # for what comes within seconds unless the machine is busy

Row = dict[str, Any]

# Other numbers than limits.py has must be there before any other module has read them.
_START = """
import sys
import retrofill.limits as limits
for setting in sys.argv.pop(1).split():
    name, value = setting.split("=")
    assert hasattr(limits, name), name
    setattr(limits, name, float(value) if "." in value else int(value))
exec(sys.argv.pop(1))
from retrofill.cli.main import app
app()
"""


class Process:
    """A server that can be killed.

    settings: constants of limits.py with other values, `NAME=1 OTHER=2`. first: what its interpreter does before all else.
    """

    def __init__(
        self, data: Path, *, settings: str = "", first: str = "", limits: str = "none"
    ) -> None:
        self.data = data
        self._held = held_port()
        self.port: int = self._held.getsockname()[1]
        self.log = data.with_name(f"{data.name}.log")
        self._command = [
            *(sys.executable, "-c", _START, settings, first, "serve", "--data", str(data)),
            *("--port", str(self.port), "--limits", limits, "--log-level", "warning"),
            *("--project", f"faults:{API_KEY}:{SECRET_KEY}"),
        ]
        self.running: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start; it may not answer yet when this returns."""
        assert self.running is None
        with self.log.open("ab") as written:
            self.running = subprocess.Popen(self._command, stdout=written, stderr=written)

    def wait_until_ready(self) -> None:
        end = time.monotonic() + PATIENCE_S
        while not self.answers():
            assert self.running is not None
            assert self.running.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.02)

    def answers(self) -> bool:
        with suppress(OSError, http.client.HTTPException):
            return self.ask("GET", "/healthz")[0] == 200
        return False

    def kill(self) -> None:
        """End it as a power cut would, but for what the kernel holds."""
        assert self.running is not None
        self.running.kill()
        assert self.running.wait(PATIENCE_S) == -signal.SIGKILL, self.said()
        self.running = None

    def stop(self) -> None:
        """End it in good order."""
        assert self.running is not None
        self.running.terminate()
        assert self.running.wait(PATIENCE_S) == 0, self.said()
        self.running = None

    def end(self) -> None:
        """End it whatever its state, for the end of a test."""
        if self.running is not None:
            self.running.kill()
            self.running.wait(PATIENCE_S)
            self.running = None
        self._held.close()

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    # What a client does.

    def ask(
        self, method: str, path: str, body: Any = None, *, timeout_s: float = PATIENCE_S
    ) -> tuple[int, bytes]:
        """Return status and body of an answer; body: sent as JSON. Raises OSError, HTTPException."""
        sent = None if body is None else json.dumps(body).encode()
        return self.ask_raw(method, path, sent, timeout_s=timeout_s)

    def ask_raw(
        self, method: str, path: str, body: bytes | None, *, timeout_s: float = PATIENCE_S
    ) -> tuple[int, bytes]:
        """As `ask`; body: sent as it is."""
        token = base64.b64encode(f"{API_KEY}:{SECRET_KEY}".encode()).decode()
        headers = {"Authorization": f"Basic {token}", "Content-Type": "application/json"}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def send(self, events: list[Row], *, path: str = "/batch") -> tuple[int, Row]:
        status, body = self.ask("POST", path, {"api_key": API_KEY, "events": events})
        return status, json.loads(body)

    def export(self) -> list[Row]:
        """Return every row there is, in the order of the export."""
        now = datetime.now(UTC)
        hours = f"start={now - timedelta(1):%Y%m%dT%H}&end={now + timedelta(1):%Y%m%dT%H}"
        status, archive = self.ask("GET", f"/api/2/export?{hours}")
        if status == 404:
            return []
        assert status == 200, archive[:500]
        rows: list[Row] = []
        with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
            for member in zipped.namelist():
                rows += _DECODER.decode_lines(gzip.decompress(zipped.read(member)))
        return rows


def held_port() -> socket.socket:
    """Bind a free port that nobody else is given as long as this socket lives; a server that names it may listen there.

    Nor does a connection begin there: one that asks for the port while nothing listens could else be its own peer.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held
