"""Dedupe keys and the table of fingerprints, beside a dict."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrofill.core import dedupe
from retrofill.core.block import Kind
from retrofill.core.dedupe import (
    KEY_BYTES,
    NO_KEY,
    Fingerprints,
    held,
    key,
    keys,
    slot_value,
    table_of,
    triple,
)

TEXTS = st.text(st.sampled_from("a1:\0é"), max_size=6)
ARGUMENTS = st.tuples(st.integers(0, 99), TEXTS, TEXTS, TEXTS)


def made(fingerprint: int, second: int = 1) -> bytes:
    return fingerprint.to_bytes(8, "little") + second.to_bytes(8, "little")


def random_keys(count: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(count * KEY_BYTES)


def block_of(fingerprints: Fingerprints, one: bytes, *, oldest_block: int = 1) -> int:
    return int(fingerprints.split(one, oldest_block=oldest_block)[0])


@given(ARGUMENTS, ARGUMENTS)
def test_different_arguments_never_make_one_key(
    one: tuple[int, str, str, str], other: tuple[int, str, str, str]
) -> None:
    first = key(one[0], one[1], one[2], import_id=one[3])
    second = key(other[0], other[1], other[2], import_id=other[3])
    assert (first == second) == (one == other)


def test_a_key_of_each_kind_is_its_own() -> None:
    found = {
        key(1, "device", "1:5"),
        key(1, "", "1:5"),
        key(2, "device", "1:5"),
        key(1, "device", "1:5", import_id="i"),
        triple(1, "device", 1, 5),
        triple(1, "", 1, 5),
        triple(1, "device", 1, 5, import_id="i"),
    }
    assert len(found) == 7
    assert all(len(one) == KEY_BYTES for one in found)


def test_the_keys_of_a_batch_are_those_of_its_events() -> None:
    devices, inserts = ["d1", "", "d3", "d4"], ["a", "b", None, ""]
    for import_id in ("", "i"):
        expected = [
            key(7, device, insert, import_id=import_id) if insert else NO_KEY
            for device, insert in zip(devices, inserts, strict=True)
        ]
        assert keys(7, devices, inserts, import_id=import_id) == b"".join(expected)


def test_a_key_stays_the_same_for_ever() -> None:
    # Key files and blocks hold these bytes: another hash would forget every key.
    assert key(1, "device", "insert").hex() == "7c52851128608cd968981b0ee2267c7c"
    assert triple(1, "device", 2, 3).hex() == "e35e6fdbada39ba664b152c6592acc66"


LIVE, KEPT, DROPPED, DISPLACED = "", 0, int(Kind.DROPPED), int(Kind.DISPLACED)
# What holds the key of an event, of which import the event is, whether its own import has its key → what becomes of it.
VERDICTS = [
    (KEPT, LIVE, False, KEPT),
    (KEPT, "a", False, KEPT),
    (KEPT, "a", True, DROPPED),
    (DROPPED, LIVE, False, DROPPED),
    (DROPPED, "a", False, DROPPED),
    (DISPLACED, LIVE, False, DISPLACED),
    (DISPLACED, "a", False, DISPLACED),
    (DISPLACED, "a", True, DROPPED),
]


def own(import_id: str, insert: int) -> bytes:
    return made(insert, 2 + ord(import_id)) if import_id and insert else NO_KEY


def plain(insert: int) -> bytes:
    return made(insert) if insert else NO_KEY


class Stored:
    """The rule in plain dicts, for events that come one at a time."""

    def __init__(self, held: dict[bytes, int], own: set[bytes]) -> None:
        self.held, self.own = dict(held), set(own)

    def decide(self, events: list[tuple[str, int]]) -> list[int]:
        keys, owns = [plain(insert) for _, insert in events], [own(*event) for event in events]
        held = np.array([self.held.get(key, KEPT) for key in keys], np.uint8)
        own_held = np.array([one in self.own for one in owns])
        imports = b"".join(owns)
        if imports.strip(b"\0"):
            return list(dedupe.decide(b"".join(keys), imports, held, own_held))
        return list(dedupe.decide(b"".join(keys), b"", held, None))

    def take(self, event: tuple[str, int]) -> int:
        (verdict,) = self.decide([event])
        if verdict == KEPT and event[1]:
            self.held[plain(event[1])] = DISPLACED if event[0] else DROPPED
        if verdict != DROPPED and own(*event) != NO_KEY:
            self.own.add(own(*event))
        return verdict


@pytest.mark.parametrize(("held", "import_id", "own_held", "expected"), VERDICTS)
def test_what_becomes_of_an_event(
    *, held: int, import_id: str, own_held: bool, expected: int
) -> None:
    stored = Stored({plain(1): held}, {own(import_id, 1)} if own_held else set())
    assert stored.decide([(import_id, 1)]) == [expected]
    assert stored.decide([(import_id, 0), (import_id, 2)]) == [KEPT, KEPT]


@given(
    st.lists(st.tuples(st.sampled_from(["", "a", "b"]), st.integers(0, 3)), max_size=12),
    st.dictionaries(st.integers(1, 3), st.sampled_from([DROPPED, DISPLACED])),
    st.sets(st.tuples(st.sampled_from(["a", "b"]), st.integers(1, 3))),
)
def test_events_of_one_block_are_judged_as_if_each_had_come_alone(
    events: list[tuple[str, int]], held: dict[int, int], owns: set[tuple[str, int]]
) -> None:
    stored = Stored(
        {plain(insert): verdict for insert, verdict in held.items()}, {own(*one) for one in owns}
    )
    assert stored.decide(events) == [stored.take(event) for event in events]


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=12),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), max_size=12),
)
def test_a_key_is_held_by_a_block_only_whole(
    block: list[tuple[int, int]], wanted: list[tuple[int, int]]
) -> None:
    found = held(b"".join(made(*one) for one in block), b"".join(made(*one) for one in wanted))
    assert found.tolist() == [one in block for one in wanted]


def test_nothing_is_found_in_an_empty_table_nor_without_a_key() -> None:
    table = Fingerprints()
    assert table.split(b"", oldest_block=1).tolist() == []
    assert block_of(table, made(5)) == 0
    table.add(made(1) + NO_KEY, 3)
    assert table.split(NO_KEY + made(1), oldest_block=1).tolist() == [0, 3]
    assert len(table) == 1


def test_a_key_counts_as_long_as_its_block_is_in_the_window() -> None:
    table = Fingerprints()
    table.add(made(1), 3)
    table.add(made(2), 9)
    assert table.split(made(1) + made(2), oldest_block=3).tolist() == [3, 9]
    assert table.split(made(1) + made(2), oldest_block=4).tolist() == [0, 9]
    each = np.array([3, 10])
    assert table.split(made(1) + made(2), oldest_block=each).tolist() == [3, 0]


def test_a_key_sent_again_after_its_window_is_found_in_its_new_block() -> None:
    table = Fingerprints()
    for block in (3, 20, 40):
        assert block_of(table, made(1), oldest_block=block - 10) == 0
        table.add(made(1), block)
    assert block_of(table, made(1), oldest_block=30) == 40


def test_an_import_keeps_its_keys_for_ever() -> None:
    table = Fingerprints()
    table.add(made(1) + made(2), 3, forever=np.array([True, False]))
    table.add(made(3), 4, forever=True)
    wanted = made(1) + made(2) + made(3)
    assert table.split(wanted, oldest_block=1000).tolist() == [3, 0, 4]


def test_two_keys_of_one_fingerprint_are_both_named() -> None:
    table = Fingerprints()
    table.add(made(1, 1), 3)
    table.add(made(1, 2), 9)
    assert table.candidates(made(1, 1), oldest_block=1) == [9, 3]
    assert table.candidates(made(1, 1), oldest_block=4) == [9]
    assert table.candidates(made(2), oldest_block=1) == []


def test_block_numbers_beyond_31_bits_come_back_whole() -> None:
    table = Fingerprints()
    table.add(made(1), 2**31 - 1)
    table.add(made(2), 2**31)
    table.add(made(3), 2**31 + 1)
    wanted = made(1) + made(2) + made(3) + NO_KEY
    expected = [2**31 - 1, 2**31, 2**31 + 1, 0]
    assert table.split(wanted, oldest_block=2**31 - 5).tolist() == expected


def test_many_keys_that_fall_into_one_slot_are_all_kept() -> None:
    # The upper halves are equal: every key has the same home, also the last of the table.
    for high in (0, 2**32 - 1):
        table = Fingerprints()
        crowd = b"".join(made((high << 32) + low) for low in range(1, 2000))
        for block in range(1, 9):
            piece = crowd[(block - 1) * 250 * KEY_BYTES : block * 250 * KEY_BYTES]
            table.add(piece, block)
        expected = [index // 250 + 1 for index in range(1999)]
        assert table.split(crowd, oldest_block=1).tolist() == expected
        fingerprints = table_of(crowd)[:, 0].copy()
        values = slot_value(np.full(1999, 2, np.int64), forever=False)
        bulk = Fingerprints.bulk([(fingerprints, values)], newest=2)
        assert bulk.split(crowd, oldest_block=1).tolist() == [2] * 1999


@pytest.mark.parametrize("seed", range(4))
def test_the_table_agrees_with_a_dict_through_growth_and_expiry(seed: int) -> None:
    chance = random.Random(seed)
    table, model = Fingerprints(), dict[bytes, tuple[int, bool]]()
    known: list[bytes] = []
    for block in range(1, 120):
        oldest = max(1, block - 40)
        data = random_keys(chance.choice((1, 30, 900)), block + 1000 * seed)
        new = [data[at : at + KEY_BYTES] for at in range(0, len(data), KEY_BYTES)]
        again = chance.sample(known, min(len(known), 50))
        asked = new + again
        expected = []
        for one in asked:
            at, forever = model.get(one, (0, False))
            expected.append(at if forever or at >= oldest else 0)
        found = table.split(b"".join(asked), oldest_block=oldest)
        assert found.tolist() == expected
        fresh = [one for one, at in zip(asked, expected, strict=True) if not at]
        kept = np.array([chance.random() < 0.1 for _ in fresh], bool)
        table.add(b"".join(fresh), block, oldest_block=oldest, forever=kept)
        model |= {one: (block, bool(k)) for one, k in zip(fresh, kept, strict=True)}
        known += fresh
    live = sum(forever or at >= 79 for at, forever in model.values())
    assert len(table) < 3 * live + 10_000  # what expired is left behind


def test_a_table_that_grows_never_makes_one_call_do_all_the_moving() -> None:
    table = Fingerprints()
    data = random_keys(400_000, 5)
    moving = 0
    for block in range(1, 401):
        piece = data[(block - 1) * 1000 * KEY_BYTES : block * 1000 * KEY_BYTES]
        table.add(piece, block)
        moving += table._old is not None
        assert table._table.load < 0.72
    assert moving > 100
    expected = np.repeat(np.arange(1, 401), 1000)
    assert (table.split(data, oldest_block=1) == expected).all()
    assert abs(len(table) - 400_000) < 4000  # an estimate while it moves


def test_at_every_step_of_a_move_every_key_is_found_and_no_other() -> None:
    table = Fingerprints()
    data, others = random_keys(60_000, 7), random_keys(500, 8)
    moving = 0
    for block in range(1, 301):
        last = block * 200
        table.add(data[(block - 1) * 200 * KEY_BYTES : last * KEY_BYTES], block)
        if table._old is not None:
            moving += 1
            expected = np.repeat(np.arange(1, block + 1), 200)
            assert (table.split(data[: last * KEY_BYTES], oldest_block=1) == expected).all()
            assert not table.split(others, oldest_block=1).any()
            one = data[(last - 1) * KEY_BYTES : last * KEY_BYTES]
            assert table.candidates(one, oldest_block=1) == [block]
    assert moving > 20


def test_two_tables_take_no_more_memory_than_the_larger_one() -> None:
    table = Fingerprints()
    data = random_keys(1_000_000, 9)
    seen = []
    for block in range(1, 501):
        table.add(data[(block - 1) * 2000 * KEY_BYTES : block * 2000 * KEY_BYTES], block)
        if table._old is not None and table._old.size > 500_000:
            slots = [len(one.values) for one in (table._old, table._table)]
            seen.append(table.memory_bytes / (12 * max(slots)))
            assert not table._old.fingerprints[: table._old.given_back].any()  # it is the system's
    assert len(seen) > 10
    assert max(seen) < 1.1
    assert (table.split(data, oldest_block=1) == np.repeat(np.arange(1, 501), 2000)).all()


def test_one_call_may_add_more_than_the_table_has_slots() -> None:
    table = Fingerprints()
    data = random_keys(50_000, 6)
    table.add(data[: 20_000 * KEY_BYTES], 1)
    table.add(data[20_000 * KEY_BYTES :], 2)
    assert (table.split(data, oldest_block=1) == np.repeat([1, 2], [20_000, 30_000])).all()
    assert table._table.load < 0.7


@given(st.lists(st.integers(0, 300), min_size=1, max_size=5), st.integers(0, 10))
def test_a_table_built_from_runs_holds_every_key(sizes: list[int], seed: int) -> None:
    runs, data, expected = [], b"", []
    for block, size in enumerate(sizes, 1):
        packed = random_keys(size, 100 * seed + block)
        fingerprints = np.sort(table_of(packed)[:, 0])
        runs.append((fingerprints, slot_value(np.full(size, block, np.int64), forever=False)))
        data += packed
        expected += [block] * size
    table = Fingerprints.bulk(runs, newest=len(sizes))
    assert table.split(data, oldest_block=1).tolist() == expected
    table.add(random_keys(50, 999), len(sizes) + 1)
    assert table.split(data, oldest_block=1).tolist() == expected


def test_a_large_table_is_built_in_pieces() -> None:
    runs, data = [], b""
    for block in (1, 2, 3):
        packed = random_keys(70_000, block)
        data += packed
        fingerprints = np.sort(table_of(packed)[:, 0])
        runs.append((fingerprints, slot_value(np.full(70_000, block, np.int64), forever=False)))
    table = Fingerprints.bulk(runs, newest=3)
    assert (table.split(data, oldest_block=1) == np.repeat([1, 2, 3], 70_000)).all()
    assert not table.split(random_keys(5000, 9), oldest_block=1).any()


def test_beyond_its_bound_memory_leaves_the_oldest_to_the_files_that_hold_them() -> None:
    table = Fingerprints(most=20_000)
    data = random_keys(100_000, 3)
    for block in range(1, 101):
        table.add(data[(block - 1) * 1000 * KEY_BYTES : block * 1000 * KEY_BYTES], block)
        table.filed = block - 5
    assert 40 < table.memory_from <= table.filed + 1
    assert len(table) < 60_000
    found = table.split(data, oldest_block=1)
    expected = np.repeat(np.arange(1, 101), 1000)
    remembered = expected >= table.memory_from
    assert (found[remembered] == expected[remembered]).all()


def test_nothing_is_left_to_files_that_are_not_written() -> None:
    table = Fingerprints(most=20_000)
    data = random_keys(60_000, 3)
    for block in range(1, 61):
        table.add(data[(block - 1) * 1000 * KEY_BYTES : block * 1000 * KEY_BYTES], block)
    assert table.memory_from == 1
    assert table.split(data, oldest_block=1).all()


def test_a_key_whose_home_is_asked_twice_is_found_behind_what_expired() -> None:
    table = Fingerprints()
    for block in range(1, 40):
        table.add(made(77), block)
    assert block_of(table, made(77), oldest_block=39) == 39
    assert dedupe.table_of(made(77)).shape == (1, 2)
