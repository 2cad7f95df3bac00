"""What no file of the project may hold: marks of one machine, addresses of registries, promises for later."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.manners.house import ROOT, tracked

# Written with a class of one letter here and there, so that this file may be searched like any other.
FORBIDDEN = {
    "a path of one machine": re.compile(r"(?<![\w.])/(?:root|work|home/\w+|Users/\w+|tmp/v)/"),
    "the address of a package registry": re.compile(
        r"py[p]i\.org|python[h]osted|registry\.npm[j]s|/-/[^ \"]+\.tgz|https?://[^ \"]+/simple/"
    ),
    "a promise for later": re.compile(r"\b(?:T[O]DO|FIX[M]E|XX[X])\b"),
    "a merge conflict": re.compile(r"^(?:<{7}|>{7}) ", re.MULTILINE),
}


def _text(path: Path) -> str:
    if path.suffix in {".gz", ".xz", ".zip", ".parquet", ".png"}:
        return ""
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{_text(path)[: match.start()].count(chr(10)) + 1} {match.group()}"
        for path in tracked()
        for match in FORBIDDEN[what].finditer(_text(path))
    ]
    assert not found, "\n".join(found[:20])


def test_every_locked_dependency_has_a_hash() -> None:
    for lock in ("requirements.lock", "requirements-dev.lock"):
        lines = (ROOT / lock).read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            if "==" in line and not line.startswith(" "):
                assert lines[number + 1].lstrip().startswith("--hash=sha256:"), line


def test_the_runtime_lock_is_part_of_the_test_lock() -> None:
    pinned = re.compile(r"^\S+==\S+", re.MULTILINE)
    runtime, everything = (
        set(pinned.findall((ROOT / lock).read_text(encoding="utf-8")))
        for lock in ("requirements.lock", "requirements-dev.lock")
    )
    assert runtime <= everything
