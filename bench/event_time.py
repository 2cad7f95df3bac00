"""What does it cost that a project goes by event time? The same live traffic in order, into two engines, turn by turn.

Both are in this process and take requests as the server hands them over, read and checked. CPU seconds are of this
process, checkpoints included; what a seal costs in its child is the same for both and is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

from events import lines, templates
from retrofill.clock import SystemClock
from retrofill.config import Settings
from retrofill.core import event as events
from retrofill.core.event import Batch
from retrofill.core.throttle import Accepted
from retrofill.engine.admission import ProjectSettings, PropertyTime
from retrofill.engine.ingest import Engine

ROOM = Path(__file__).parent.parent / ".bench"
TURN_EVENTS = 100_000  # given to one engine before it is the other's turn: it saves three times as often as a server
TOGETHER = 8  # requests under way
EVENTS = 200_000


def opened(folder: Path, to: PropertyTime) -> Engine:
    """Open an engine with one project."""
    engine = Engine.open(Settings(data=folder, limits="none"), clock=SystemClock())
    engine.add_project(engine.projects_store.add("one", "key", "secret"))
    engine.set_settings(1, ProjectSettings(property_time=to))
    return engine


def batch(body: bytes, engine: Engine) -> Batch:
    """Read a request."""
    opened = events.open_envelope(body)
    assert isinstance(opened, events.Envelope)
    now_ms = int(time.time() * 1000)
    read = events.parse(
        opened,
        project=1,
        path="/batch",
        payload_bytes=len(body),
        received_ms=now_ms,
        remote="10.0.0.1",
        limits=engine.limits(1),
    )
    assert isinstance(read, Batch)
    return read


async def turn(engine: Engine, bodies: list[bytes]) -> float:
    """Give an engine some requests, eight under way at a time, then let it save; return the CPU seconds."""
    began = time.process_time()
    for first in range(0, len(bodies), TOGETHER):
        some = [batch(body, engine) for body in bodies[first : first + TOGETHER]]
        answers = await asyncio.gather(*map(engine.ingest, some))
        assert all(isinstance(answer, Accepted) for answer in answers)
    await engine.checkpoint()
    return time.process_time() - began


async def measured(folder: Path, count: int, per_request: int) -> dict[PropertyTime, float]:
    """Return the CPU seconds of each mode for so many events."""
    made = lines(ROOM, count)
    bodies = templates(made, events=per_request, api_key="key")
    engines: dict[PropertyTime, Engine] = {
        to: opened(folder / to, to) for to in ("arrival", "event")
    }
    used: dict[PropertyTime, float] = dict.fromkeys(engines, 0.0)
    for engine in engines.values():
        await engine.start()
    step = TURN_EVENTS // per_request
    for number, first in enumerate(range(0, len(bodies), step)):
        for to in sorted(engines, reverse=bool(number % 2)):  # nobody is always first
            used[to] += await turn(engines[to], bodies[first : first + step])
    assert not engines["event"].event_time.late_since(1), "this traffic is in order"
    for engine in engines.values():
        await engine.close()
    return used


def ratio(count: int, per_request: int) -> tuple[float, float, float]:
    """Return CPU seconds for a million events by arrival and by event time, and how much more the second is."""
    ROOM.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOM) as folder:
        used = asyncio.run(measured(Path(folder), count, per_request))
    million = 1e6 / count
    arrival, event = used["arrival"] * million, used["event"] * million
    return arrival, event, event / arrival


def main() -> None:
    """Print one line for each size of request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=EVENTS)
    count = parser.parse_args().events
    for per_request in (1000, 10):
        arrival, event, more = ratio(count if per_request > 10 else count // 4, per_request)
        print(
            f"{per_request} events a request: {arrival:.1f} s/M by arrival, {event:.1f} s/M by event time: "
            f"{more:.3f} times"
        )


if __name__ == "__main__":
    main()
