"""The official SDK for Node, unmodified, against a real server: everything it is given arrives exactly once."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from tests.faults.process import API_KEY, Process

pytestmark = [pytest.mark.slow, pytest.mark.long]

ROOT = Path(__file__).parents[2]  # node finds node_modules beside package.json
SCRIPT = Path(__file__).with_name("node.js")


def told(server: Process, *, good: int, hot: int, path: str) -> dict[str, int]:
    """Have the SDK send; return what it told its caller, code → events."""
    done = subprocess.run(
        ["node", str(SCRIPT), server.url + path, API_KEY, str(good), str(hot)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr + server.said()
    codes: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return codes


# On /2/httpapi a short id is refused, on /batch it is dropped where another id is left. Here neither is left.
@pytest.mark.parametrize(
    ("path", "limits", "hot"),
    [("/2/httpapi", "none", 0), ("/batch", "none", 0), ("/2/httpapi", "amplitude", 1000)],
    ids=["httpapi", "batch", "a throttled device"],
)
def test_every_event_arrives_once_and_the_invalid_one_is_told(
    tmp_path: Path, path: str, limits: str, hot: int
) -> None:
    server = Process(tmp_path / "data", limits=limits)
    server.start()
    try:
        server.wait_until_ready()
        assert told(server, good=1000, hot=hot, path=path) == {"200": 1000 + hot, "400": 1}
        arrived = Counter(
            (row["device_id"], row["event_properties"]["number"]) for row in server.export()
        )
        expected = [(f"device-{number % 20}", number) for number in range(1000)]
        assert arrived == Counter(expected + [("device-hot", number) for number in range(hot)])
    finally:
        server.end()
