"""What people send a history with when they have no backfill client: each as its own manual shows it.

Run as `rivals.py NAME FILE EVENTS ADDRESS`. Prints the CPU seconds from the first event read to the last answer, so that
nobody is charged for being loaded.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

_TOGETHER = 1000


def _events(path: str, count: int) -> Iterator[dict[str, Any]]:
    with Path(path).open(encoding="utf-8") as file:
        for line in islice(file, count):
            yield json.loads(line)


def naive(path: str, count: int, address: str) -> float:
    """Post 1000 events at a time with `requests`: no order between people, no mapping, no journal."""
    import requests  # noqa: PLC0415 - loaded before the clock starts

    session = requests.Session()
    started = time.process_time()
    events = _events(path, count)
    while batch := list(islice(events, _TOGETHER)):
        answer = session.post(f"{address}/batch", json={"api_key": "bench-key", "events": batch})
        answer.raise_for_status()
    return time.process_time() - started


def sdk(path: str, count: int, address: str) -> float:
    """Track every event with Amplitude's SDK for Python, then flush."""
    from amplitude import Amplitude, BaseEvent  # noqa: PLC0415 - loaded before the clock starts

    client = Amplitude("bench-key")
    client.configuration.server_url = f"{address}/batch"
    client.configuration.flush_queue_size = _TOGETHER
    refused = []
    client.configuration.callback = lambda _event, code, _message: (
        None if code == 200 else refused.append(code)
    )
    started = time.process_time()
    for event in _events(path, count):
        client.track(BaseEvent(**event))
    client.shutdown()
    assert not refused, refused[:3]
    return time.process_time() - started


if __name__ == "__main__":
    name, source, events, sink = sys.argv[1:]
    print({"naive": naive, "sdk": sdk}[name](source, int(events), sink))
