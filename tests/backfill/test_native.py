"""Compiled code is kept for the next process, and compiled anew where what was kept is damaged or of something else."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from retrofill.backfill import native
from retrofill.backfill.native import Code


@pytest.fixture(scope="module")
def code() -> Code:
    return native.compiled("copy")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What counts is asked once in a process."""
    native._counted.cache_clear()
    yield
    native._counted.cache_clear()


@pytest.fixture(autouse=True)
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: Code) -> list[str]:
    """What was compiled. Code is kept in folders of this test."""
    names: list[str] = []
    monkeypatch.setattr(native, "_folders", lambda: [tmp_path / "one", tmp_path / "two"])
    monkeypatch.setattr(native, "compiled", lambda name: names.append(name) or code)
    return names


def ints(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


def copied() -> bytes:
    """Use the function once."""
    to, text = np.zeros(12, np.uint8), np.frombuffer(b"one two three", np.uint8)
    lead = np.frombuffer(b",", np.uint8)
    native.native("copy")(text, ints(0, 8), ints(3, 5), lead, to, ints(7, 0))
    return to.tobytes()


def test_code_is_compiled_once_and_does_the_same(tmp_path: Path, made: list[str]) -> None:
    assert not native.there("copy")
    assert [copied(), copied()] == [b",three\0,one\0"] * 2
    assert native.there("copy")
    assert made == ["copy"]
    assert len([*(tmp_path / "one").iterdir()]) == 1
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("kept", [b"", b"x" * 20, "cut", "changed"])
def test_what_was_kept_and_is_damaged_is_compiled_anew(
    tmp_path: Path, made: list[str], kept: bytes | str
) -> None:
    copied()
    (path,) = (tmp_path / "one").iterdir()
    data = path.read_bytes()
    if kept == "cut":
        kept = data[:-1]
    if kept == "changed":
        kept = data[:-1] + bytes([data[-1] ^ 1])
    assert isinstance(kept, bytes)
    path.write_bytes(kept)
    assert [copied(), copied()] == [b",three\0,one\0"] * 2
    assert made == ["copy"] * 2
    assert path.read_bytes() == data


def test_a_folder_that_cannot_be_written_leaves_it_to_the_next(
    tmp_path: Path, made: list[str]
) -> None:
    (tmp_path / "one").write_text("no folder")
    copied()
    copied()
    assert made == ["copy"]
    assert len([*(tmp_path / "two").iterdir()]) == 1


def test_without_room_it_is_compiled_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[str]
) -> None:
    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:50])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert [copied(), copied()] == [b",three\0,one\0"] * 2
    assert made == ["copy"] * 2
    assert [*tmp_path.glob("*/*")] == []


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_code_that_others_may_write_is_compiled_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[str], mode: int
) -> None:
    program = tmp_path / "program.py"
    program.touch(mode=0o644)
    monkeypatch.setattr(native, "__file__", str(program))
    copied()
    (path,) = (tmp_path / "one").iterdir()
    assert not path.stat().st_mode & 0o022
    path.chmod(mode)
    assert [copied(), copied()] == [b",three\0,one\0"] * 2
    assert made == ["copy"] * 2
    assert not path.stat().st_mode & 0o022
    program.chmod(mode)  # whoever may write the program itself needs no other way
    path.chmod(mode)
    copied()
    assert made == ["copy"] * 2


def test_code_of_another_user_is_compiled_anew(
    monkeypatch: pytest.MonkeyPatch, made: list[str]
) -> None:
    """The mark of a file is known to all, and so is its checksum: neither says who made it."""
    copied()
    fstat = os.fstat

    def owned(handle: int) -> os.stat_result:
        found = fstat(handle)
        stranger = 1 + max(found.st_uid, Path(native.__file__).stat().st_uid)
        return os.stat_result((*found[:4], stranger, *found[5:10]))

    monkeypatch.setattr(os, "fstat", owned)
    copied()
    assert made == ["copy"] * 2


def test_what_many_write_that_have_one_umask_is_kept_for_themselves(
    tmp_path: Path, made: list[str]
) -> None:
    before = os.umask(0o002)
    try:
        copied()
    finally:
        os.umask(before)
    (path,) = (tmp_path / "one").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    copied()
    assert made == ["copy"]


@pytest.mark.parametrize("what", ["numba", "source", "processor"])
def test_code_of_another_version_or_processor_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[str], what: str
) -> None:
    copied()
    if what == "numba":
        monkeypatch.setattr(native.metadata, "version", lambda _name: "0.0.1")
    elif what == "source":
        for name in native._SOURCES:
            (tmp_path / name).write_text("changed")
        monkeypatch.setattr(native, "_HERE", tmp_path)
    else:
        monkeypatch.setattr(native.binding, "get_host_cpu_name", lambda: "another")
    native._counted.cache_clear()
    copied()
    assert made == ["copy"] * 2


@pytest.mark.parametrize(
    "wrong", [ints(1).astype(np.int32), np.zeros((1, 1), np.int64), np.zeros(4, np.int64)[::2]]
)
def test_arrays_of_another_kind_are_not_given_to_the_machine(wrong: Any) -> None:
    text = np.zeros(1, np.uint8)
    call = native.native("copy")
    with pytest.raises(AssertionError):
        call(text, wrong, ints(1), text, text, ints(0))
    with pytest.raises(ValueError, match="zip"):
        call(text)


def test_code_is_kept_beside_the_program_or_in_the_cache_of_the_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    beside, users = native._folders()
    assert beside == Path(native.__file__).parent / "__pycache__"
    assert users == Path("/somewhere/retrofill")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert native._folders() == [beside]
