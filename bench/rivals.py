"""What people send a history with when they have no backfill client: each as its own manual shows it.

Run as `rivals.py NAME FILE ADDRESS`. Who starts it counts what it takes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

_TOGETHER = 1000


def _events(path: str) -> Iterator[dict[str, Any]]:
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def loop(path: str, address: str) -> None:
    """Post 1000 events at a time with `requests`: no order between people, no mapping, no journal."""
    import requests  # noqa: PLC0415 - each is charged for what it loads itself

    session = requests.Session()
    events = _events(path)
    while batch := list(islice(events, _TOGETHER)):
        answer = session.post(f"{address}/batch", json={"api_key": "bench-key", "events": batch})
        answer.raise_for_status()


def sdk(path: str, address: str) -> None:
    """Track every event with Amplitude's SDK for Python as it is set up by itself, then flush."""
    from amplitude import Amplitude, BaseEvent  # noqa: PLC0415 - as above

    client = Amplitude("bench-key")
    client.configuration.server_url = f"{address}/batch"
    refused = []
    client.configuration.callback = lambda _event, code, _message: (
        None if code == 200 else refused.append(code)
    )
    for event in _events(path):
        client.track(BaseEvent(**event))
    client.shutdown()
    assert not refused, refused[:3]


if __name__ == "__main__":
    name, source, sink = sys.argv[1:]
    {"loop": loop, "sdk": sdk}[name](source, sink)
