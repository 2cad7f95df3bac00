"""Killed under load, again and again: nothing acknowledged is lost, nothing doubled, everything in order.

Several connections send. Each person's events carry a number n and `$add` 1 to a running total, one request after the
other; a request without an answer is sent again as it was until it is answered. So a person's rows must read 1, 2, 3 …
and the snapshot on row n must hold the total n: a lost, doubled or moved event shows in it, also one that was lost and
sent again. Other people come, are deleted and never come back: of them nothing may be left.

The server seals, compacts, saves its state and deletes all the time, and is killed at a moment of each kind.
"""

from __future__ import annotations

import http.client
import json
import random
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.faults.process import API_KEY, Process, Row

pytestmark = pytest.mark.slow

# Everything that happens in the background, as often as possible.
SETTINGS = (
    "SEAL_EVENTS=400 SEAL_AGE_MS=300 CHECKPOINT_EVENTS=700 CHECKPOINT_AGE_MS=500 "
    "COMPACT_FILES=3 COMPACT_FILES_MIN=2 KEY_FILES_MERGED=3 CHORES_S=0.1 "
    "FINGERPRINTS_IN_MEMORY=20000 PEOPLE_IN_MEMORY=20 IDS_IN_MEMORY=20"
)
# A server that acknowledges before it writes: the last dozen blocks are never on the disk, so that some of what they
# hold has been answered at any moment; readers wait for them, so that nothing shows while it lives. It never seals: a
# sealer would find its blocks missing at once.
LATE = """
import threading
from retrofill.hot.sqlite import Blocks
append, read, waiting, lock = Blocks.append, Blocks.read, [], threading.Lock()
def write(left):
    with lock:
        while len(waiting) > left:
            append(*waiting.pop(0))
Blocks.append = lambda *block: waiting.append(block) or write(12)
Blocks.read = lambda *blocks: write(0) or read(*blocks)
"""
NEVER_SEALING = "SEAL_EVENTS=1000000 SEAL_AGE_MS=10000000 CHECKPOINT_EVENTS=1000000"
# One that knows no duplicates, and is killed between writing a block and answering: what that holds comes again.
FORGETFUL = """
import os, signal
from retrofill.engine.duplicates import Duplicates
from retrofill.hot.sqlite import Blocks
append = Blocks.append
def dying(self, number, rows, blob):
    append(self, number, rows, blob)
    if number == 30:
        os.kill(os.getpid(), signal.SIGKILL)
Blocks.append = dying
Duplicates.split = lambda self, keyed, oldest_block: bytearray(len(keyed.packed) // 16)
"""
SENDERS = 4
PEOPLE_PER_SENDER = 6
PAUSE_S = 0.05  # between two requests of a sender: the machine has others to serve
DELETED_S = 300  # kills leave deletions to be done, one after another
MOMENT_S = 300  # the wait for a moment of some kind
ANSWER_S = 120


class Sender(threading.Thread):
    """One connection. It sends until told to stop; then everything it sent is acknowledged."""

    def __init__(self, server: Process, name: str, seed: int) -> None:
        super().__init__(name=name)
        self.over = False  # nobody will answer any more
        self._server = server
        self._random = random.Random(seed)
        self._connection: http.client.HTTPConnection | None = None
        self._stop_asked = threading.Event()
        self.people = [f"person-{name}-{number}" for number in range(PEOPLE_PER_SENDER)]
        self.sent: Counter[str] = Counter()
        self.repeated = 0
        self.wrong: str | None = None

    def stop(self) -> None:
        self._stop_asked.set()

    def run(self) -> None:
        try:
            while not self._stop_asked.wait(PAUSE_S):
                self._round()
        except Exception as problem:  # noqa: BLE001 - told by the test itself
            self.wrong = repr(problem)
        finally:
            self._hang_up()

    def _round(self) -> None:
        events = []
        for person in self._random.sample(self.people, 3):
            events += [self._event(person) for _ in range(self._random.randint(1, 8))]
        self._random.shuffle(events)
        events.sort(
            key=lambda one: int(one["event_properties"]["n"])
        )  # mixed, each person in order
        path = self._random.choice(("/batch", "/2/httpapi"))
        answer = self._until_answered(path, {"api_key": API_KEY, "events": events})
        assert answer["events_ingested"] == len(events)

    def _event(self, person: str) -> Row:
        self.sent[person] += 1
        number = self.sent[person]
        return {
            "event_type": "step",
            "user_id": person if number > 3 else None,  # anonymous at first
            "device_id": f"device-of-{person}",
            "time": 1_700_000_000_000 + number,
            "insert_id": f"{person}-{number}",
            "event_properties": {"n": number, "who": person},
            "user_properties": {"$add": {"total": 1}},
        }

    def _until_answered(self, path: str, body: Any) -> Any:
        """Send the same bytes until there is an answer. Raises AssertionError if it is not 200."""
        sent = json.dumps(body)
        while True:
            found = self._once("POST", path, sent)
            if found is not None and found[0] == 200:
                return json.loads(found[1])
            assert found is None or found[0] == 503, found
            assert not self.over
            self.repeated += 1
            time.sleep(0.05)

    def _once(self, method: str, path: str, body: str) -> tuple[int, bytes] | None:
        try:
            if self._connection is None:
                self._connection = http.client.HTTPConnection(
                    "127.0.0.1", self._server.port, timeout=ANSWER_S
                )
            self._connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = self._connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            self._hang_up()
            return None

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Deleter(Sender):
    """Makes people and has them deleted. gone: those whose deletion was acknowledged."""

    def __init__(self, server: Process, name: str, seed: int) -> None:
        super().__init__(server, name, seed)
        self.gone: list[str] = []
        self.asked = threading.Event()

    def _round(self) -> None:
        person = f"victim-{len(self.gone)}"
        events = [
            self._event(person) | {"user_id": person, "event_type": "victim"} for _ in range(5)
        ]
        self._until_answered("/batch", {"api_key": API_KEY, "events": events})
        asked = {"user_ids": [person], "requester": "test", "ignore_invalid_id": True}
        while True:
            try:
                status, body = self._server.ask("POST", "/api/2/deletions/users", asked)
            except (OSError, http.client.HTTPException):
                status, body = 503, b""
            if status == 200:
                break
            assert status == 503, body
            assert not self.over
            time.sleep(0.05)
        self.gone.append(person)
        self.asked.set()
        self._stop_asked.wait(0.5)


@contextmanager
def load(server: Process, seed: int, *, deletes: bool = True) -> Iterator[list[Sender]]:
    senders = [Sender(server, str(number), seed + number) for number in range(SENDERS)]
    if deletes:
        senders.append(Deleter(server, "deleter", seed))
    for sender in senders:
        sender.start()
    try:
        yield senders
        finish(server, senders)
    finally:
        for sender in senders:
            sender.stop()
            sender.over = True
        server.end()
        for (
            sender
        ) in senders:  # a failed test leaves nobody who sends to a port that others may be given
            sender.join()


def finish(server: Process, senders: list[Sender]) -> None:
    """Wait until everything that was sent is acknowledged."""
    for sender in senders:
        sender.stop()
    for sender in senders:
        sender.join(2 * ANSWER_S)
        assert not sender.is_alive(), server.said()
        assert sender.wrong is None, f"{sender.wrong}\n{server.said()}"


# Moments to kill at. Each returns whether it came.


def _soon(rng: random.Random, most_s: float) -> None:
    """Let a little time go by, more often very little: most of what is of interest takes some milliseconds."""
    time.sleep(most_s * rng.random() ** 3)


def _until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + MOMENT_S
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.001)
    return False


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")} if folder.exists() else set()


def _span(name: str) -> tuple[int, int]:
    first, last, _ = name.split("-")
    return int(first), int(last)


def anywhere(server: Process, deleter: Deleter, rng: random.Random) -> bool:
    del server, deleter
    _soon(rng, 1.5)
    return True


def sealing(server: Process, deleter: Deleter, rng: random.Random) -> bool:
    """A lake file has begun of blocks that no other file has."""
    del deleter
    return _lake_file(server, rng, again=False)


def compacting(server: Process, deleter: Deleter, rng: random.Random) -> bool:
    """A lake file has begun of blocks that other files have."""
    del deleter
    return _lake_file(server, rng, again=True)


def _lake_file(server: Process, rng: random.Random, *, again: bool) -> bool:
    folder = server.data / "lake" / "files" / "main" / "events"
    before: set[str] = set()

    def begun() -> bool:
        nonlocal before
        found = {name for name in _names(folder) if name[:1].isdigit()}
        new, known = found - before, before
        before = found
        last = max((_span(name)[1] for name in known), default=0)
        return bool(known) and any((_span(name)[0] <= last) == again for name in new)

    came = _until(begun)
    _soon(rng, 0.15)
    return came


def deleting(server: Process, deleter: Deleter, rng: random.Random) -> bool:
    """A deletion is asked for, and is done at once; sometimes its rows are marked already."""
    if rng.random() < 0.5:
        deleter.asked.clear()
        came = deleter.asked.wait(MOMENT_S)
        _soon(rng, 0.5)
        return came
    folder = server.data / "lake" / "files" / "main" / "events"
    before = _names(folder)
    came = _until(lambda: any(not name[:1].isdigit() for name in _names(folder) - before))
    _soon(rng, 0.1)
    return came


def filing(server: Process, deleter: Deleter, rng: random.Random) -> bool:
    """A file of dedupe keys is written or merged."""
    del deleter
    folder = server.data / "keys"
    before = _names(folder)
    came = _until(lambda: bool(_names(folder) - before))
    _soon(rng, 0.05)
    return came


def starting(server: Process, deleter: Deleter, rng: random.Random) -> bool:
    """It was killed, has begun to open its directory, and is killed again."""
    del deleter
    server.kill()
    server.start()
    time.sleep(rng.random() * 2.5)
    return True


MOMENTS = [compacting, deleting, sealing, starting, anywhere, filing]


def kill(server: Process, kills: int, seed: int) -> list[Sender]:
    """Kill and start under load; afterwards everything sent is acknowledged and the server runs."""
    rng = random.Random(seed)
    missed: Counter[str] = Counter()
    server.start()
    with load(server, seed) as senders:
        deleter = senders[-1]
        assert isinstance(deleter, Deleter)
        server.wait_until_ready()
        at_once = {"limits": {"deletion_days": 0}}
        assert server.ask("PUT", "/api/1/project", at_once)[0] == 200
        for number in range(kills):
            server.wait_until_ready()
            moment = MOMENTS[number % len(MOMENTS)]
            if not moment(server, deleter, rng):
                missed[moment.__name__] += 1
            failed = [sender.wrong for sender in senders if sender.wrong is not None]
            assert not failed, f"after {number} kills: {failed}\n{server.said()}"
            server.kill()
            server.start()
        server.wait_until_ready()
        finish(server, senders)
        check(server, senders)
        server.stop()
        server.start()
        server.wait_until_ready()
        check(server, senders)
    assert sum(missed.values()) <= kills // 10, missed
    assert sum(sender.repeated for sender in senders) >= kills  # requests were under way
    return senders


def check(server: Process, senders: list[Sender]) -> None:
    """Compare everything the server has with what was acknowledged."""
    sent = {
        person: count
        for sender in senders
        if not isinstance(sender, Deleter)
        for person, count in sender.sent.items()
    }
    victims = {
        person for sender in senders if isinstance(sender, Deleter) for person in sender.gone
    }
    end = time.monotonic() + DELETED_S
    while left := _left(found := server.export(), victims):
        assert time.monotonic() < end, left
        time.sleep(0.2)
    rows: dict[str, list[Row]] = defaultdict(list)
    for row in found:
        if row["event_type"] == "step":
            rows[row["event_properties"]["who"]].append(row)
    assert rows.keys() <= sent.keys()
    for person, count in sent.items():
        mine = rows[person]
        numbers = [row["event_properties"]["n"] for row in mine]
        assert numbers == list(range(1, count + 1)), difference(person, numbers, count)
        totals = [row["user_properties"].get("total") for row in mine]
        assert totals == numbers, (
            person,
            [pair for pair in zip(numbers, totals, strict=True) if pair[0] != pair[1]][:20],
        )
        assert len({row["amplitude_id"] for row in mine}) == 1, person
        assert [row["user_id"] for row in mine] == [None] * 3 + [person] * (count - 3)
    uuids = [row["uuid"] for of_one in rows.values() for row in of_one]
    assert len(set(uuids)) == len(uuids)


def difference(person: str, numbers: list[int], count: int) -> str:
    missing = sorted(set(range(1, count + 1)) - set(numbers))
    doubled = [number for number, times in Counter(numbers).items() if times > 1]
    return f"{person}: {len(missing)} missing {missing[:20]}, {len(doubled)} doubled {doubled[:20]}"


def _left(rows: list[Row], victims: set[str]) -> set[str]:
    return {str(row["user_id"]) for row in rows if row["user_id"] in victims}


def test_a_server_that_acknowledges_before_it_writes_is_found_out(tmp_path: Path) -> None:
    server = Process(tmp_path / "data", settings=NEVER_SEALING, first=LATE)
    named, there = found_out(
        server,
        lambda senders: all(sum(one.sent.values()) >= 100 for one in senders),
        r"(\S+): \d+ missing \[([\d, ]+)\]",
    )
    assert [there[number] for number in named] == [0] * len(named)


def test_a_server_that_forgets_its_keys_is_found_out(tmp_path: Path) -> None:
    server = Process(tmp_path / "data", first=FORGETFUL)
    named, there = found_out(
        server,
        lambda _: server.running is not None and server.running.poll() is not None,
        r"(\S+): 0 missing \[\], \d+ doubled \[([\d, ]+)\]",
    )
    assert [there[number] for number in named] == [2] * len(named)


def found_out(
    server: Process, moment: Callable[[list[Sender]], bool], words: str
) -> tuple[list[int], Counter[int]]:
    """Kill it once under load; return which events of a person the check names, and how often each is there."""
    server.start()
    with load(server, 1, deletes=False) as senders:
        assert _until(lambda: moment(senders))
        server.kill()
        server.start()
        server.wait_until_ready()
        finish(server, senders)
        with pytest.raises(AssertionError) as failed:
            check(server, senders)
        said = re.search(words, str(failed.value))
        assert said is not None, str(failed.value)
        rows = [row["event_properties"] for row in server.export()]
        there = Counter(row["n"] for row in rows if row["who"] == said[1])
        return [int(number) for number in said[2].split(",")], there


def test_killed_under_load_everything_acknowledged_is_there_once_and_in_order(
    tmp_path: Path,
) -> None:
    kill(Process(tmp_path / "data", settings=SETTINGS), 5, seed=1)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_killed_two_hundred_times_everything_acknowledged_is_there_once_and_in_order(
    tmp_path: Path,
) -> None:
    kill(
        Process(tmp_path / "data", settings=SETTINGS),
        200,
        seed=random.SystemRandom().randrange(1 << 30),
    )
