"""A disk that is full, read-only or fails to sync: 503, nothing acknowledged that is not there, whole when opened anew.

The server is a real process; only what it asks of the disk fails, from the moment on at which a flag appears. A full
disk is real as well: the kernel refuses to let its files grow. In each case the server takes events until it meets
the fault, refuses all of them from then on, also when the fault has gone, and recovers by an ordinary start.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.faults.process import PATIENCE_S, Process, Row

pytestmark = pytest.mark.slow

SETTINGS = "SEAL_EVENTS=300 SEAL_AGE_MS=300 CHECKPOINT_EVENTS=500 CHECKPOINT_AGE_MS=300"
EVENTS = 50

# Before: `flagged()` says whether the disk is broken.
_FLAG = """
import errno, os, sqlite3
from pathlib import Path
def flagged(flag=Path({flag!r})):
    return flag.exists()
def broken(*_):
    raise OSError(errno.EIO, os.strerror(errno.EIO))
"""
_READ_ONLY = """
def wrapped(original):
    def call(self, *args, **more):
        if flagged():
            self._writer.execute("PRAGMA query_only=ON")
        return original(self, *args, **more)
    return call
"""
FAULTS = {
    "a read-only block store": _READ_ONLY
    + "from retrofill.hot.sqlite import Blocks\nBlocks.append = wrapped(Blocks.append)\n",
    "a read-only block store when blocks go": _READ_ONLY
    + "from retrofill.hot.sqlite import Blocks\nBlocks.delete = wrapped(Blocks.delete)\n",
    "a read-only checkpoint": _READ_ONLY
    + "from retrofill.hot.checkpoint import Checkpoint\nCheckpoint.save = wrapped(Checkpoint.save)\n",
    # The row may be on disk, nobody knows: it must not be acknowledged, and not be doubled when it is sent again.
    "a block whose sync fails": """
from retrofill.hot.sqlite import Blocks, store_error
original = Blocks.append
def append(self, number, rows, blob):
    original(self, number, rows, blob)
    if flagged():
        raise store_error(sqlite3.OperationalError("disk I/O error"), self.path)
Blocks.append = append
""",
    # Lake files and key files: whatever this process syncs itself.
    "a failing fsync": """
sync = os.fsync
os.fsync = lambda file: broken() if flagged() else sync(file)
""",
    "a lake that cannot commit": """
from retrofill.lake.files import Files, store_error
def committing(self, path):
    if flagged():
        raise store_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), path)
Files.committing = committing
""",
}
# In the process that writes lake files.
IN_CHILD = """
from retrofill.engine import seal
seal._CHILD = {child!r} + seal._CHILD
"""
FAULTS["a failing fsync of the sealer"] = IN_CHILD
# One after another on one directory, each met by a server that recovers from the one before.
IN_ROW = ["a read-only block store", "a block whose sync fails", "a failing fsync"]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[[str], Process]]:
    servers: list[Process] = []

    def start(first: str) -> Process:
        for before in servers:
            before.end()
        server = Process(tmp_path / "data", settings=SETTINGS, first=first)
        servers.append(server)
        server.start()
        server.wait_until_ready()
        return server

    yield start
    for server in servers:
        server.end()


class History:
    """One person's events, each with its number and a running total. pending: sent, but not acknowledged."""

    def __init__(self, server: Process) -> None:
        self.server = server
        self.count = 0
        self.pending: list[Row] = []

    def send(self) -> int:
        """Send what is pending, or the next events; return the status."""
        if not self.pending:
            self.pending = [
                {
                    "event_type": "step",
                    "user_id": "user-1",
                    "insert_id": f"step-{number}",
                    "event_properties": {"n": number, "padding": "x" * 200},
                    "user_properties": {"$add": {"total": 1}},
                }
                for number in range(self.count + 1, self.count + EVENTS + 1)
            ]
        status, said = self.server.send(self.pending)
        assert status == said["code"]
        if status == 200:
            self.count += len(self.pending)
            self.pending = []
        return status

    def send_until_refused(self) -> None:
        end = time.monotonic() + PATIENCE_S
        while (status := self.send()) == 200:
            assert time.monotonic() < end, "the fault was never met"
            time.sleep(0.01)
        assert status == 503

    def check(self) -> None:
        """Everything acknowledged is there, once, in order; of what is not, all or nothing."""
        rows = self.server.export()
        numbers = [row["event_properties"]["n"] for row in rows]
        assert numbers == list(range(1, len(rows) + 1))
        assert [row["user_properties"]["total"] for row in rows] == numbers
        assert len(rows) in {self.count, self.count + len(self.pending)}


def refusing(history: History, mend: Callable[[], object]) -> None:
    """Once a fault was met: all is refused, with the reason, also when the fault has gone."""
    status, said = history.server.ask("GET", "/healthz")
    assert (status, bool(json.loads(said)["reason"])) == (503, True)
    mend()
    assert history.send() == 503
    history.server.stop()


def whole(history: History) -> None:
    """Opened anew, it has what it acknowledged and takes the rest."""
    history.check()
    assert history.send() == 200
    assert not history.pending
    for _ in range(10):
        assert history.send() == 200
    history.check()


def again(history: History) -> None:
    """Open it in the ordinary way."""
    history.server.start()
    history.server.wait_until_ready()
    whole(history)


def faulty(fault: str, flag: Path) -> str:
    """Return what an interpreter does first, so that the fault holds while the flag is there."""
    first = _FLAG.format(flag=str(flag))
    if FAULTS[fault] is IN_CHILD:
        return IN_CHILD.format(child=first + FAULTS["a failing fsync"])
    return first + FAULTS[fault]


def test_disks_that_fail_in_turn_lose_nothing_that_was_acknowledged(
    started: Callable[[str], Process], tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    history = None
    for fault in IN_ROW:
        server = started(faulty(fault, flag))
        if history is None:
            history = History(server)
        else:
            history.server = server
        whole(history)
        flag.touch()
        history.send_until_refused()
        refusing(history, flag.unlink)
    assert history is not None
    again(history)


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_disk_loses_nothing_that_was_acknowledged(
    started: Callable[[str], Process], tmp_path: Path, fault: str
) -> None:
    flag = tmp_path / "flag"
    history = History(started(faulty(fault, flag)))
    whole(history)
    flag.touch()
    history.send_until_refused()
    refusing(history, flag.unlink)
    again(history)
    history.server.stop()
    again(history)


def largest(folder: Path) -> int:
    """Return the size of the largest file. Others come and go meanwhile."""
    sizes = [0]
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                sizes.append(Path(place, name).stat().st_size)
    return max(sizes)


def test_a_full_disk_loses_nothing_that_was_acknowledged(
    started: Callable[[str], Process],
) -> None:
    server = started("")
    history = History(server)
    whole(history)
    assert server.running is not None
    bytes_max = largest(server.data)
    unlimited = resource.prlimit(
        server.running.pid, resource.RLIMIT_FSIZE, (bytes_max, resource.RLIM_INFINITY)
    )
    history.send_until_refused()
    pid = server.running.pid
    refusing(history, lambda: resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited))
    again(history)


def test_a_directory_that_cannot_be_written_is_told_and_nothing_starts(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the directory should be")
    server = Process(tmp_path / "data")
    server.start()
    assert server.running is not None
    try:
        assert server.running.wait(PATIENCE_S) == 2
        assert "mend:" in server.said()
        assert "Traceback" not in server.said()
    finally:
        server.end()
