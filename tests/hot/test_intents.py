"""Intents are kept until they are removed, under numbers that never come again."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from retrofill.errors import StoreError
from retrofill.hot.intents import Intents, Tried


def test_what_is_not_removed_is_there_again(tmp_path: Path) -> None:
    intents = Intents(tmp_path / "intents.sqlite")
    first, second = intents.add(b"one"), intents.add(b"two")
    intents.remove(first)
    intents.close()
    again = Intents(tmp_path / "intents.sqlite")
    assert again.all() == [(second, b"two")]
    again.remove(second)
    assert again.all() == []
    assert again.add(b"three") > second
    again.close()


def test_tries_are_counted_and_the_last_reason_kept_until_an_intent_is_removed(
    tmp_path: Path,
) -> None:
    intents = Intents(tmp_path / "intents.sqlite")
    first, second = intents.add(b"one"), intents.add(b"two")
    assert intents.tried() == {}
    intents.begun(first)
    intents.failed(first, "no room")
    intents.begun(first)
    intents.begun(second)
    intents.close()
    again = Intents(tmp_path / "intents.sqlite")
    assert again.tried() == {first: Tried(2, "no room"), second: Tried(1)}
    again.remove(first)
    assert again.tried() == {second: Tried(1)}
    again.close()


def test_a_file_that_is_none_is_told(tmp_path: Path) -> None:
    path = tmp_path / "intents.sqlite"
    path.write_bytes(b"no database" * 100)
    with pytest.raises(StoreError, match="not a database"):
        Intents(path)


def test_what_is_noted_after_a_removal_that_failed_is_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "intents.sqlite"
    intents = Intents(path)
    number = intents.add(b"one")
    intents.begun(number)
    with sqlite3.connect(path) as other:
        other.execute(
            "CREATE TRIGGER fails BEFORE DELETE ON intents BEGIN SELECT RAISE(ABORT, 'planted'); END"
        )
    other.close()
    with pytest.raises(StoreError, match="planted"):
        intents.remove(number)
    intents.reserve(5, 100)
    intents.begun(number)
    again = Intents(path)  # as after a kill: nothing was closed
    assert again.reserved() == [(5, 100)]
    assert again.tried() == {number: Tried(2)}
    again.close()
    intents.close()
