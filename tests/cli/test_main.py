"""What the disk refuses is told in our words by every verb, without a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.backfill import staged
from typer.testing import CliRunner, Result

from retrofill.backfill.journal import Journal
from retrofill.cli.main import app, of_disk


def call(*words: str) -> Result:
    found = CliRunner().invoke(app, list(words))
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    assert found.exit_code == 1
    assert "Traceback" not in found.stderr
    return found


def test_a_work_directory_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.ndjson").write_text('{"user":"user-1","event":"Open","at":1700000000000}\n')
    (tmp_path / "map.yaml").write_text("event: {user_id: user, event_type: event, time: at}")
    (tmp_path / "file").touch()
    line = ["plan", str(tmp_path / "rows.ndjson"), "--map", str(tmp_path / "map.yaml"), "--work"]
    for work in (tmp_path / "file", tmp_path / "file" / "work"):
        said = call(*line, str(work)).stderr
        assert "retrofill: A file cannot be written or read: Not a directory" in said
        assert f"where: {work}" in said
        assert "--work" in said


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    staged.write(tmp_path, staged.history({1: 3}))
    said = call("report", "--work", str(tmp_path), "--out", "/dev/full").stderr
    assert "retrofill: No room is left on the device" in said
    assert "Free some space" in said


def test_a_journal_that_is_none_is_told(tmp_path: Path) -> None:
    staged.write(tmp_path, staged.history({1: 3}))
    Journal(tmp_path, threaded=False).close()
    (tmp_path / "journal.db").write_bytes(b"no database at all, and long enough to be looked at")
    said = call("status", "--work", str(tmp_path)).stderr
    assert "The journal of the work directory cannot be written or read: file is not" in said


@pytest.mark.parametrize("problem", [ConnectionResetError(104, "reset"), OSError("no number")])
def test_an_error_of_something_else_is_no_error_of_a_disk(problem: OSError) -> None:
    assert of_disk(problem, "run") is None
