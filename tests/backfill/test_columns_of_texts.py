"""Columns of texts: hashes that tell ids apart, objects looked at together, cuts that touch no neighbour."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrofill.backfill import hashes, objects, texts
from retrofill.backfill.order import _order
from retrofill.backfill.people import Pairs

ids = st.lists(st.none() | st.text(max_size=90), max_size=40)


@given(ids, st.randoms(use_true_random=False))
def test_a_hash_depends_on_the_text_and_the_seed_alone(
    column: list[str | None], draw: random.Random
) -> None:
    array = pa.array(column, pa.string())
    found = hashes.of(array, seed=hashes.USER).tolist()
    for text, one in zip(column, found, strict=True):
        assert (one == 0) == (not text)
        assert 0 <= one < 2**63
    alone = [int(hashes.of(pa.array([text], pa.string()), seed=hashes.USER)[0]) for text in column]
    assert found == alone
    mixed = draw.sample(range(len(column)), len(column))
    shuffled = hashes.of(array.take(pa.array(mixed, pa.int64())), seed=hashes.USER).tolist()
    assert shuffled == [found[at] for at in mixed]
    start = len(column) // 2
    assert hashes.of(array[start:], seed=hashes.USER).tolist() == found[start:]
    for one, other in zip(found, hashes.of(array, seed=hashes.DEVICE).tolist(), strict=True):
        assert one != other or one == 0


@pytest.mark.parametrize(
    "form", ["{:08d}", "user-{:07d}@example.com", "{:032x}", "{:b}", "{:070d}"]
)
def test_ids_that_are_much_alike_have_different_hashes(form: str) -> None:
    column = pa.array([form.format(number) for number in range(200_000)])
    found = hashes.of(column, seed=hashes.DEVICE)
    assert len(np.unique(found)) == len(column)
    each = np.bincount(found >> 57, minlength=64)  # spread over the sets
    assert each.min() > 2_500
    assert each.max() < 3_800


def test_a_place_filled_while_there_is_nothing_is_nothing() -> None:
    """A filter may leave bytes where a text is null."""
    column = pa.Array.from_buffers(
        pa.string(),
        2,
        [
            pa.py_buffer(b"\x02"),
            pa.py_buffer(np.array([0, 3, 6], np.int32)),
            pa.py_buffer(b"abcdef"),
        ],
    )
    assert column.to_pylist() == [None, "def"]
    none, other = hashes.of(column, seed=hashes.INSERT).tolist()
    assert none == 0
    assert other == int(hashes.of(pa.array(["def"]), seed=hashes.INSERT)[0])


def test_a_hash_of_two_is_none_where_the_second_is() -> None:
    first, second = np.array([1, 2, 2, 0], np.int64), np.array([0, 5, 6, 5], np.int64)
    found = hashes.both(first, second).tolist()
    assert found[0] == 0
    assert len({*found}) == 4


@given(st.lists(st.text(min_size=3, max_size=9, alphabet="abcé"), min_size=1, max_size=9))
def test_bytes_are_cut_off_both_ends(column: list[str]) -> None:
    array = pa.array([f"{{{text}\n" for text in column])
    assert texts.less(array, front=1, back=1).to_pylist() == column
    assert texts.less(array[1:], front=1, back=1).to_pylist() == column[1:]


def looked(*tables: list[str]) -> objects.Objects:
    raws = [[msgspec.Raw(text.encode()) for text in table] for table in tables]
    return objects.together(raws, len(tables[0]))


PLAIN = [
    *("{}", '{"a":1}', '{"a":0}', '{"a":-1.5}', '{"a":[0.1,20.25]}', '{"a":52.520008}'),
    *('{"a":1.0}', '{"a":1234567890123}', '{"a":"1e5"}', '{"a":"-0"}', '{"a":"x-04.50"}'),
    '{"a":"12345678901234567890123"}',
    '{"a":0.0001,"b":123456789.123456}',
    '{"a":0.30000000000000004}',
]
REWRITTEN = [
    *('{"a":1e5}', '{"a":1E5}', '{"a":-0}', '{"a":[-0,1]}', '{"a":1.50}', '{"a":1.00}'),
    *('{"a":0.00001}', '{"a":1.5e3}', '{"a":12345678901234567890}', '{"a":-1234567890123456789}'),
    '{"a":1234567890.12345678901}',
    f'{{"a":{"1" * 60}.5}}',
    f'{{"a":{"1" * 300}}}',
]


@given(st.lists(st.sampled_from(PLAIN + REWRITTEN), min_size=1, max_size=12))
def test_numbers_that_are_written_otherwise_are_found_wherever_they_stand(table: list[str]) -> None:
    found = objects.rewritten(looked(table))
    assert found.tolist() == [text in REWRITTEN for text in table]
    twice = objects.rewritten(looked(table, table[::-1]))
    assert twice.tolist() == (found | found[::-1]).tolist()


def test_what_is_no_object_empty_spaced_or_deep_is_told_apart() -> None:
    found = looked(["{}", "null", "", '{"a" :1}', "[]", '{"a":"b c"}'])
    assert objects.empty(found).tolist() == [0, 1]
    assert objects.none(found).tolist() == [False, True, False, False, True, False]
    assert objects.spaced(found).tolist() == [False, False, False, True, False, False]
    assert objects.shallow(found)
    assert objects.shallow(looked(['{"a":[{}]}'] * 100))
    assert not objects.shallow(looked(["{}", f'{{"a":{"[" * 60}{"]" * 60}}}']))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(5, 6)), max_size=40))
def test_rows_are_ordered_by_person_and_time_and_then_as_they_stand(
    rows: list[tuple[int, int, int]],
) -> None:
    if not rows:
        return
    person = np.array([one << 60 | low for one, low, _ in rows], np.int64)
    time_ms = np.array([time for *_, time in rows], np.int64)
    found = _order(person, time_ms)
    assert found is not None
    assert found.tolist() == np.lexsort((time_ms, person)).tolist()


def test_times_too_far_apart_for_one_number_are_left_to_another_sort() -> None:
    person, time_ms = np.array([1 << 60, 5, 7]), np.array([0, 1 << 62, 3])
    assert _order(person, time_ms) is None


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=9), max_size=5))
def test_pairs_are_counted_once_each(batches: list[list[tuple[int, int]]]) -> None:
    pairs = Pairs()
    meant: dict[tuple[int, int], int] = {}
    for batch in batches:
        pairs.add(*(np.array([one[at] for one in batch], np.int64) for at in (0, 1)))
        pairs.compact()
        for one in batch:
            meant[one] = meant.get(one, 0) + 1
    device, user, count = (column.tolist() for column in pairs.compact())
    assert dict(zip(zip(device, user, strict=True), count, strict=True)) == meant
    assert len(device) == len(meant)
