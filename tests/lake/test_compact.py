"""Which files are merged, and that merging loses no row and keeps the order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrofill.lake.compact import LakeFile, choose, merge
from retrofill.limits import COMPACT_FILES, COMPACT_ROWS_MAX, SEAL_EVENTS


def files(*rows: int, deleted: int | None = None) -> list[LakeFile]:
    return [
        LakeFile(Path(str(index)), count, index, index, Path("d") if index == deleted else None)
        for index, count in enumerate(rows)
    ]


def test_few_files_are_left_alone() -> None:
    assert choose([]) == []
    assert choose(files(*[SEAL_EVENTS] * (COMPACT_FILES - 1))) == []


def test_enough_neighbours_of_a_size_become_one() -> None:
    found = files(*[SEAL_EVENTS] * (COMPACT_FILES + 1))
    assert choose(found) == found[:COMPACT_FILES]


def test_a_small_file_between_large_ones_goes_with_them() -> None:
    half = [SEAL_EVENTS] * (COMPACT_FILES // 2)
    found = files(*half, 10, *half)
    assert choose(found) == found[:COMPACT_FILES]


def test_small_files_do_not_have_a_large_one_written_again() -> None:
    assert choose(files(SEAL_EVENTS * 8, *[10] * (COMPACT_FILES - 1))) == []


def test_no_merge_passes_the_largest_size() -> None:
    found = files(*[COMPACT_ROWS_MAX // 4] * 7)
    chosen = choose(found)
    assert chosen == found[:4]
    assert choose(files(*[COMPACT_ROWS_MAX] * 20)) == []


def test_a_file_that_lost_rows_is_written_again_when_nothing_else_is_due() -> None:
    found = files(COMPACT_ROWS_MAX, 10, deleted=0)
    assert choose(found) == found[:1]
    found = files(COMPACT_ROWS_MAX, *[10] * COMPACT_FILES, deleted=0)
    assert choose(found) == found[1:]


@given(st.lists(st.integers(1, SEAL_EVENTS), max_size=300))
def test_the_number_of_files_grows_with_the_logarithm_of_the_rows(sealed: list[int]) -> None:
    """Sealing file after file and merging what is chosen: few files stay, and no row is written often."""
    held: list[LakeFile] = []
    written = 0
    for number, rows in enumerate(sealed):
        held.append(LakeFile(Path(f"{number}-{number}"), rows, number, number))
        while chosen := choose(held):
            total = sum(file.rows for file in chosen)
            written += total
            at = held.index(chosen[0])
            assert held[at : at + len(chosen)] == chosen
            held[at : at + len(chosen)] = [
                LakeFile(Path("m"), total, chosen[0].first, chosen[-1].last)
            ]
    assert sum(file.rows for file in held) == sum(sealed)
    assert len(held) <= 60
    assert written <= 7 * sum(sealed)


@pytest.mark.parametrize(
    ("millions", "files_max", "times_max"), [(10, 15, 1.0), (40, 22, 2.0), (100, 35, 2.0)]
)
@pytest.mark.parametrize("rows", [SEAL_EVENTS, SEAL_EVENTS * 5 // 4, SEAL_EVENTS * 7 // 5])
def test_a_short_history_is_merged_once_and_a_long_one_stays_in_few_files(
    rows: int, millions: int, files_max: int, times_max: float
) -> None:
    held: list[LakeFile] = []
    written = most = 0
    for number in range(millions * 1_000_000 // rows):
        held.append(LakeFile(Path("s"), rows, number, number))
        while chosen := choose(held):
            total = sum(file.rows for file in chosen)
            written += total
            at = held.index(chosen[0])
            merged = LakeFile(Path("m"), total, chosen[0].first, chosen[-1].last)
            held[at : at + len(chosen)] = [merged]
        most = max(most, len(held))
    assert most <= files_max
    assert written <= times_max * millions * 1_000_000


KEYS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 99)), unique=True)


@given(st.lists(KEYS, max_size=5), st.integers(1, 7))
def test_merging_gives_every_row_once_in_order(
    sources: list[list[tuple[int, int, int]]], size: int
) -> None:
    def chunks(number: int, keys: list[tuple[int, int, int]]) -> Iterator[pa.Table]:
        keys = sorted(keys)
        for first in range(0, len(keys), size):
            some = keys[first : first + size]
            yield pa.table(
                {
                    **{
                        name: pa.array([key[place] for key in some], pa.int64())
                        for place, name in enumerate(("amplitude_id", "block", "row"))
                    },
                    "source": pa.array([number] * len(some), pa.int64()),
                }
            )

    found = [
        tuple(row.values())
        for table in merge([chunks(number, keys) for number, keys in enumerate(sources)])
        for row in table.to_pylist()
    ]
    expected = [(*key, number) for number, keys in enumerate(sources) for key in keys]
    assert sorted(found) == sorted(expected)
    assert [row[:3] for row in found] == sorted(row[:3] for row in found)
