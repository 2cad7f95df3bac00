"""Requests made from the server's own description, on a real server: each answer is one that it describes.

Schemathesis makes them: the allowed values at the edges of every parameter, then some that it searches, allowed and
forbidden. The long run also sends what lies just beyond every edge, a thousand requests more.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.faults.process import API_KEY, PATIENCE_S, SECRET_KEY, Process

pytestmark = pytest.mark.slow

EVENTS = 20
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
)
ROOT = Path(__file__).parents[2]
TESTER = Path(sys.executable).with_name("schemathesis")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Process]:
    server = Process(tmp_path / "data")
    server.start()
    try:
        server.wait_until_ready()
        events = [
            {"event_type": "click", "user_id": f"user-{number}", "time": 1_700_000_000_000}
            for number in range(EVENTS)
        ]
        assert server.send(events)[0] == 200
        yield server
    finally:
        server.end()


def examined(server: Process, folder: Path, *options: str) -> str:
    """Run the tester; return what it says. Raises AssertionError if an answer is not as described."""
    command = [
        *(str(TESTER), "run", f"{server.url}/openapi.json", "--checks", ",".join(CHECKS)),
        *("--auth", f"{API_KEY}:{SECRET_KEY}", "--no-color"),
        *("--request-timeout", str(PATIENCE_S), "--suppress-health-check", "too_slow"),
        *("--output-truncate", "true", *options),
    ]
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "SCHEMATHESIS_HOOKS": "tests.server.hooks"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-12_000:] + done.stderr[-2000:] + server.said()
    assert server.answers()
    return done.stdout


def test_every_answer_is_one_that_is_described(server: Process, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(
        '[phases.coverage]\ngeneration = { mode = "positive" }\n'
    )
    examined(
        server,
        tmp_path,
        *("--phases", "examples,coverage,fuzzing", "--max-examples", "8"),
        *("--seed", "1", "--generation-deterministic"),
    )
    assert len(server.export()) > EVENTS  # some of what was made is stored


@pytest.mark.long
def test_every_answer_of_a_long_search_is_described(server: Process, tmp_path: Path) -> None:
    examined(
        server,
        tmp_path,
        *("--phases", "examples,coverage,fuzzing", "--mode", "all"),
        *("--max-examples", "300", "--max-time", "900", "--generation-database", "none"),
    )
