"""The servers under test: started as real commands, watched from outside, ended in each way."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

READY_S = 120
STOP_S = 300
SETTLE_S = 180
IDLE_S = 0.05  # CPU seconds in a second; less is nothing
_COMPILES_ANEW = "PYTHONDONTWRITEBYTECODE"
API_KEY, SECRET_KEY = "bench-key", "bench-secret"


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@dataclass(frozen=True)
class Memory:
    """Resident bytes. own: of each process, by what it does; shared: of the files that they map, which they have in common."""

    own: dict[str, int]
    shared: int

    @property
    def total(self) -> int:
        """All of it; what several map counts once."""
        return sum(self.own.values()) + self.shared

    def __str__(self) -> str:
        parts = [*self.own.items(), ("code", self.shared)]
        return "resident: " + ", ".join(f"{name} {used / 1e6:,.0f} MB" for name, used in parts)


class Server:
    """One server process and its children."""

    def __init__(self, command: list[str], port: int, *, ready: str, log: Path) -> None:
        self.port = port
        self.address = f"http://127.0.0.1:{port}"
        self._log = log.open("ab")
        started = time.perf_counter()
        # A service starts from modules that were compiled once, wherever this shell forbids to keep them.
        kept = {name: value for name, value in os.environ.items() if name != _COMPILES_ANEW}
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env=kept)
        self.tree = psutil.Process(self.process.pid)
        self._await(ready, log)
        self.ready_s = time.perf_counter() - started

    def _await(self, path: str, log: Path) -> None:
        end = time.monotonic() + READY_S
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"The server ended:\n{log.read_text(errors='replace')[-3000:]}")
            with contextlib.suppress(OSError):
                if self.get(path)[0] == 200:
                    return
            time.sleep(0.01)
        raise TimeoutError(f"The server was not ready in {READY_S} s")

    def get(self, path: str) -> tuple[int, bytes]:
        """Return status and body of a GET without keys."""
        try:
            with urllib.request.urlopen(self.address + path, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as problem:
            return problem.code, problem.read()

    def metric(self, name: str) -> float:
        """Return the sum of a metric's samples at /metrics, 0 if there are none."""
        text = self.get("/metrics")[1].decode()
        found = re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, found))

    def processes(self) -> list[psutil.Process]:
        """Return the server and its children."""
        return [self.tree, *self.tree.children(recursive=True)]

    def cpu_s(self) -> float:
        """Return CPU seconds, user and system, of the server and all its children, ended ones included."""
        total = 0.0
        for one in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
        return total

    def memory(self) -> Memory:
        """Return what the server and its children hold now."""
        own, shared = {}, [0]
        for one in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                used, name = one.memory_info(), _name(one)
                own[name] = own.get(name, 0) + used.rss - used.shared
                shared.append(used.shared)
        return Memory(own, max(shared))

    def settle(self) -> None:
        """Wait until nothing goes on in the background, by the CPU it uses, three minutes at most."""
        end = time.monotonic() + SETTLE_S
        before = self.cpu_s()
        while time.monotonic() < end:
            time.sleep(1)
            now = self.cpu_s()
            if now - before < IDLE_S:
                return
            before = now

    def stop(self) -> float:
        """End it in good order (SIGTERM); return the CPU seconds of that. It must exit 0."""
        before = self.cpu_s()
        last = before
        self.process.terminate()
        while self.process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                last = max(last, self.cpu_s())
            time.sleep(0.02)
        self._log.close()
        if self.process.returncode:
            raise RuntimeError(f"The server exited {self.process.returncode} at SIGTERM")
        return last - before

    def kill(self) -> None:
        """End it without warning (SIGKILL)."""
        self.process.kill()
        self.process.wait()
        self._log.close()


def retrofill(data: Path, *, extra: tuple[str, ...] = ()) -> Server:
    """Start `retrofill serve` on a directory, without rate limits, and wait until it is ready."""
    port = free_port()
    command = [
        str(Path(sys.executable).parent / "retrofill"),
        *("serve", "--data", str(data), "--port", str(port), "--limits", "none"),
        *("--project", f"bench:{API_KEY}:{SECRET_KEY}", *extra),
    ]
    return Server(command, port, ready="/healthz", log=data.parent / "server.log")


def null(folder: Path, *, app: str = "app") -> Server:
    """Start the app that stores nothing, or `counting`, which counts."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "uvicorn", f"null:{app}", "--app-dir", str(Path(__file__).parent)),
        *("--port", str(port), "--log-level", "warning", "--loop", "uvloop", "--http", "httptools"),
    ]
    return Server(command, port, ready="/", log=folder / "null.log")


def _name(process: psutil.Process) -> str:
    """Say what one of the server's processes does. The last argument of a child says how nice it is."""
    command = process.cmdline()
    if "refolder.main()" in " ".join(command):
        return "fold"
    if "seal.main()" in " ".join(command):
        return "seal" if command[-1] == "5" else "compaction"
    return "server"


@contextlib.contextmanager
def peak_memory(server: Server) -> Iterator[list[Memory]]:
    """Watch memory while the block runs; the list's one value is the most that was seen."""
    peak = [server.memory()]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], server.memory(), key=lambda seen: seen.total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
