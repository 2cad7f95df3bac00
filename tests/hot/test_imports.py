"""What is known of imports is there again when the file is opened again, and changes in one step or not at all."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from retrofill.errors import StoreError
from retrofill.hot.imports import NAME, Counted, Import, Imports


def test_imports_and_counts_are_kept_and_scoped_to_their_project(tmp_path: Path) -> None:
    path = tmp_path / "imports.sqlite"
    with closing(Imports(path)) as store:
        assert (store.all(1), store.counts()) == ([], (0, {}))
        store.put(1, Import("b", "open", 5))
        store.put(1, Import("a", "undone", None, 3))
        store.put(2, Import("b", "closed"))
        store.count(7, {(1, "a"): Counted(2, 1)})
        store.count(9, {(1, "a"): Counted(1), (2, "a"): Counted(0, 4)})
    with closing(Imports(path)) as store:
        assert store.all(1) == [Import("a", "undone", None, 3), Import("b", "open", 5)]
        assert store.all(2) == [Import("b", "closed")]
        assert store.get(2, "a") is None
        assert store.counts() == (9, {(1, "a"): Counted(3, 1), (2, "a"): Counted(0, 4)})


def test_counts_of_an_undone_generation_are_kept_for_a_restore(tmp_path: Path) -> None:
    """Each step is said twice, as by a server that stopped before it had noted it."""
    with closing(Imports(tmp_path / "imports.sqlite")) as store:
        store.count(9, {(1, "a"): Counted(3, 1), (2, "a"): Counted(0, 4)})
        for was in (Counted(3, 1), Counted(5, 5)):  # the second would be of the next generation
            store.put_counts_aside(1, "a", 2, was)
            assert store.counts() == (9, {(2, "a"): Counted(0, 4)})
            store.count(9, {(1, "a"): Counted(1)})
        for _ in range(2):
            store.bring_counts_back(1, "a", 2)
            assert store.counts()[1][1, "a"] == Counted(3, 1)
        store.put_counts_aside(1, "a", 2, Counted(3, 1))
        store.put_counts_aside(1, "a", 3, Counted(8))
        store.bring_counts_back(
            1, "a", 2
        )  # what is older than an undone generation is never brought back
        assert (1, "a") not in store.counts()[1]
        store.bring_counts_back(1, "a", 3)
        assert store.counts()[1][1, "a"] == Counted(8)


def test_a_file_of_an_earlier_version_is_opened_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "imports.sqlite"
    with closing(sqlite3.connect(path)) as earlier:
        earlier.executescript(
            "CREATE TABLE imports (project INTEGER, name TEXT, state TEXT NOT NULL, opened_ms INTEGER, "
            "generation INTEGER NOT NULL, after INTEGER NOT NULL, until INTEGER NOT NULL, "
            "undone_ms INTEGER NOT NULL, PRIMARY KEY (project, name)) WITHOUT ROWID;"
            "INSERT INTO imports VALUES (1, 'a', 'undone', 5, 2, 7, 9, 11);"
        )
    for _ in range(2):
        with closing(Imports(path)) as store:
            assert store.everywhere() == [(1, Import("a", "undone", 5, 2, 7, 9, 11, "", 0))]
    with closing(Imports(path)) as store:
        store.put(1, Import("b", "undoing", former="closed", purged=3))
        assert store.get(1, "b") == Import("b", "undoing", former="closed", purged=3)


def test_a_change_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    with closing(Imports(tmp_path / "imports.sqlite")) as store:
        store.put(1, Import("a", "undoing", 5))

        def refuse(before: Import | None) -> Import:
            assert before == Import("a", "undoing", 5)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            store.change(1, "a", refuse)
        assert store.change(1, "a", lambda _: None) is None
        assert store.all(1) == [Import("a", "undoing", 5)]


def test_a_damaged_file_is_said_to_be_one(tmp_path: Path) -> None:
    path = tmp_path / "imports.sqlite"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError, match=r"imports\.sqlite"):
        Imports(path)


def test_names_are_those_that_a_run_may_give() -> None:
    assert all(NAME.fullmatch(name) for name in ("a", "Old.shop_2-b", "x" * 64))
    assert not any(NAME.fullmatch(name) for name in ("", "a b", "a/b", "é", "x" * 65, "a\n"))
