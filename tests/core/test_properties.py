"""Property operations: the tables of contract, properties 2, 4 and 7, and the laws behind them."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrofill.core.block import COLUMNS
from retrofill.core.properties import OPERATIONS, Columns, apply, columns, unknown
from retrofill.limits import ARRAY_ITEM_CHARS_MAX

Table = dict[str, Any]

# before, sent, after. Source: contract, properties 4, first table.
EFFECTS: dict[str, tuple[Table, Table, Table]] = {
    "$set overwrites": ({"a": 1}, {"$set": {"a": 2}}, {"a": 2}),
    "$set creates": ({}, {"$set": {"a": 2}}, {"a": 2}),
    "a plain key is $set": ({"a": 1}, {"a": 2, "b": 3}, {"a": 2, "b": 3}),
    "$setOnce creates": ({}, {"$setOnce": {"a": 1}}, {"a": 1}),
    "$setOnce leaves what has a value": ({"a": 1}, {"$setOnce": {"a": 2}}, {"a": 1}),
    "$setOnce leaves a falsy value": ({"a": ""}, {"$setOnce": {"a": 2}}, {"a": ""}),
    "other operations change what $setOnce set": ({"a": 1}, {"$set": {"a": 3}}, {"a": 3}),
    "$add adds": ({"a": 1}, {"$add": {"a": 2}}, {"a": 3}),
    "$add starts at 0": ({}, {"$add": {"a": 2}}, {"a": 2}),
    "$add takes away": ({"a": 1}, {"$add": {"a": -2.5}}, {"a": -1.5}),
    "$add takes a numeric string": ({"a": 1}, {"$add": {"a": " +2 "}}, {"a": 3}),
    "$add takes a string with a point": ({"a": 1}, {"$add": {"a": "2.5"}}, {"a": 3.5}),
    "$append to a list": ({"a": [1]}, {"$append": {"a": 2}}, {"a": [1, 2]}),
    "$append allows duplicates": ({"a": [1]}, {"$append": {"a": [1, 1]}}, {"a": [1, 1, 1]}),
    "$append starts as a list": ({}, {"$append": {"a": "x"}}, {"a": ["x"]}),
    "$prepend to a list": ({"a": [1]}, {"$prepend": {"a": [2, 3]}}, {"a": [2, 3, 1]}),
    "$prepend allows duplicates": ({"a": [1]}, {"$prepend": {"a": 1}}, {"a": [1, 1]}),
    "$prepend starts as a list": ({}, {"$prepend": {"a": "x"}}, {"a": ["x"]}),
    "$preInsert keeps the order given": (
        {"a": ["c"]}, {"$preInsert": {"a": ["b", "c", "a"]}}, {"a": ["b", "a", "c"]},
    ),
    "$preInsert starts as a list": ({}, {"$preInsert": {"a": "x"}}, {"a": ["x"]}),
    "$postInsert keeps the order given": (
        {"a": ["c"]}, {"$postInsert": {"a": ["b", "c", "a"]}}, {"a": ["c", "b", "a"]},
    ),
    "$postInsert starts as a list": ({}, {"$postInsert": {"a": "x"}}, {"a": ["x"]}),
    "an insert puts a value in once": ({}, {"$postInsert": {"a": [1, 2, 1]}}, {"a": [1, 2]}),
    "$remove takes every occurrence": ({"a": [1, 2, 1]}, {"$remove": {"a": 1}}, {"a": [2]}),
    "$remove takes several values": ({"a": [1, 2, 3]}, {"$remove": {"a": [1, 3]}}, {"a": [2]}),
    "$remove leaves an empty list": ({"a": [1]}, {"$remove": {"a": 1}}, {"a": []}),
    "$remove of an absent property": ({"b": 1}, {"$remove": {"a": 1}}, {"b": 1}),
    "$unset removes": ({"a": 1, "b": 2}, {"$unset": {"a": "-"}}, {"b": 2}),
    "$unset takes any value": ({"a": 1, "b": 2}, {"$unset": {"a": None}}, {"b": 2}),
    "$unset of an absent property": ({"b": 2}, {"$unset": {"a": "-"}}, {"b": 2}),
    "$clearAll removes all": ({"a": 1, "b": 2}, {"$clearAll": "-"}, {}),
    "$clearAll takes an object": ({"a": 1, "b": 2}, {"$clearAll": {"a": 1}}, {}),
    "$clearAll of nothing": ({}, {"$clearAll": "-"}, {}),
}  # fmt: skip

# Source: contract, properties 4, second table, and what the module decides.
SITUATIONS: dict[str, tuple[Table, Table, Table]] = {
    "$append makes a scalar a list": ({"a": "x"}, {"$append": {"a": "y"}}, {"a": ["x", "y"]}),
    "$prepend makes a scalar a list": ({"a": "x"}, {"$prepend": {"a": "y"}}, {"a": ["y", "x"]}),
    "$postInsert makes a scalar a list": ({"a": "x"}, {"$postInsert": {"a": "x"}}, {"a": ["x"]}),
    "$remove makes a scalar a list": ({"a": "x"}, {"$remove": {"a": "y"}}, {"a": ["x"]}),
    "$remove of the scalar": ({"a": "x"}, {"$remove": {"a": "x"}}, {"a": []}),
    "an object is a scalar": ({"a": {"b": 1}}, {"$append": {"a": 2}}, {"a": [{"b": 1}, 2]}),
    "an array is not nested": ({"a": [1]}, {"$append": {"a": [2, [3]]}}, {"a": [1, 2, [3]]}),
    "$set keeps an object nested": ({}, {"$set": {"a": {"b": {"c": 1}}}}, {"a": {"b": {"c": 1}}}),
    "$append keeps an object nested": ({}, {"$append": {"a": {"b": 1}}}, {"a": [{"b": 1}]}),
    "$add to a numeric string": ({"a": "5"}, {"$add": {"a": 2}}, {"a": 7}),
    "$add to a text": ({"a": "five"}, {"$add": {"a": 2}}, {"a": 2}),
    "$add to true": ({"a": True}, {"$add": {"a": 2}}, {"a": 2}),
    "$add to a list": ({"a": [1]}, {"$add": {"a": 2}}, {"a": 2}),
    "$add of a text": ({"a": 1}, {"$add": {"a": "x"}}, {"a": 1}),
    "$add of true": ({"a": 1}, {"$add": {"a": True}}, {"a": 1}),
    "$add of no plain number": ({"a": 1}, {"$add": {"a": "1_0"}}, {"a": 1}),
    "$add of infinity": ({"a": 1}, {"$add": {"a": "1e999"}}, {"a": 1}),
    "$add to infinity": ({"a": 1e308}, {"$add": {"a": 1e308}}, {"a": 1e308}),
    "$add beyond 64 bits": ({"a": 2**64 - 1}, {"$add": {"a": 1}}, {"a": 2.0**64}),
    "$add within 64 bits": ({"a": 2**63}, {"$add": {"a": 1}}, {"a": 2**63 + 1}),
    "$add of very many digits": ({"a": 1}, {"$add": {"a": "9" * 1024}}, {"a": 1}),
    "a name in two operations": (
        {}, {"$append": {"a": 2}, "$setOnce": {"a": 9}, "$set": {"a": 1}}, {"a": [1, 2]},
    ),
    "$unset comes before $set": ({"a": 1}, {"$set": {"a": 2}, "$unset": {"a": "-"}}, {"a": 2}),
    "$clearAll comes first": ({"a": 1, "b": 2}, {"$set": {"b": 3}, "$clearAll": "-"}, {"b": 3}),
    "$remove comes last": ({}, {"$remove": {"a": 1}, "$append": {"a": [1, 2]}}, {"a": [2]}),
    "a plain key comes before $set": ({}, {"$set": {"a": 1}, "a": 2}, {"a": 1}),
    "a plain key comes before $setOnce": ({}, {"$setOnce": {"a": 1}, "a": 2}, {"a": 2}),
    "a plain key comes after $unset": ({"a": 1}, {"a": 2, "$unset": {"a": "-"}}, {"a": 2}),
    "membership knows values, not texts": ({"a": [1, "1"]}, {"$remove": {"a": 1}}, {"a": ["1"]}),
    "1 is 1.0": ({"a": [1]}, {"$postInsert": {"a": 1.0}}, {"a": [1]}),
    "1 is not true": ({"a": [1]}, {"$postInsert": {"a": True}}, {"a": [1, True]}),
    "objects are equal by value": (
        {"a": [{"b": 1, "c": 2}]}, {"$remove": {"a": {"c": 2, "b": 1}}}, {"a": []},
    ),
    "null is dropped": ({"a": 1}, {"a": None, "b": None}, {"a": 1}),
    "null in $set is dropped": ({"a": 1}, {"$set": {"a": None}}, {"a": 1}),
    "null in $append is dropped": ({}, {"$append": {"a": None, "b": [None, 1]}}, {"b": [1]}),
    "null in $add is dropped": ({}, {"$add": {"a": None}}, {}),
    "$clearAll of null is dropped": ({"a": 1}, {"$clearAll": None}, {"a": 1}),
    "an unknown operation is ignored": ({"a": 1}, {"$max": {"a": 2}, "b": 3}, {"a": 1, "b": 3}),
    "an operand that is no object": ({"a": 1}, {"$set": "a", "$unset": ["a"]}, {"a": 1}),
    "no property is called $set": ({}, {"$set": {"$set": 1, "b": 2}}, {"b": 2}),
    "0 becomes false": ({"a": 0}, {"a": False}, {"a": False}),
    "1 becomes 1.0": ({"a": 1}, {"a": 1.0}, {"a": 1.0}),
    "[1] becomes [true]": ({"a": [1]}, {"a": [True]}, {"a": [True]}),
}  # fmt: skip

CASES = {**EFFECTS, **SITUATIONS}


def text(value: object) -> bytes:
    return msgspec.json.encode(value, order="deterministic")


@pytest.mark.parametrize("name", CASES)
def test_each_situation_ends_as_documented(name: str) -> None:
    before, sent, after = CASES[name]
    assert text(apply(before, sent)) == text(after)  # as text: 1, 1.0 and true differ


@pytest.mark.parametrize("name", CASES)
def test_an_unchanged_table_is_the_same_object(name: str) -> None:
    before, sent, _ = CASES[name]
    after = apply(before, sent)
    assert (after is before) == (text(after) == text(before))


def test_the_operations_are_applied_in_the_documented_order() -> None:
    assert list(OPERATIONS) == [
        "$clearAll", "$unset", "$set", "$setOnce", "$add",
        "$append", "$prepend", "$preInsert", "$postInsert", "$remove",
    ]  # fmt: skip


def test_unknown_operations_are_named() -> None:
    assert unknown({"$set": {}, "a": 1, "$max": {}, "$": 1, "": 2}) == ["$max", "$"]


def test_an_array_grows_to_its_limit_and_no_further() -> None:
    word = "x" * 1000
    table: Table = {}
    for _ in range(12):
        table = apply(table, {"$append": {"a": word}})
    assert table == {"a": [word] * (ARRAY_ITEM_CHARS_MAX // 1000)}
    assert apply(table, {"$append": {"a": "y"}}) is table
    assert apply(table, {"$prepend": {"a": ["y"]}}) is table


def test_of_new_values_those_from_the_first_that_does_not_fit_are_not_added() -> None:
    table = {"a": ["x" * (ARRAY_ITEM_CHARS_MAX - 3)]}
    assert apply(table, {"$append": {"a": ["ab", "cd", "e"]}})["a"][1:] == ["ab"]
    assert apply(table, {"$prepend": {"a": ["ab", "cd", "e"]}})["a"][:-1] == ["ab"]
    assert apply(table, {"$postInsert": {"a": [12, 34]}})["a"][1:] == [12]


def test_empty_strings_cannot_grow_an_array_without_end() -> None:
    table = apply({}, {"$append": {"a": [""] * (ARRAY_ITEM_CHARS_MAX + 5)}})
    assert len(table["a"]) == ARRAY_ITEM_CHARS_MAX


def test_characters_count_not_bytes() -> None:
    table = apply({}, {"$append": {"a": ["ä" * 1000] * 20}})
    assert len(table["a"]) == ARRAY_ITEM_CHARS_MAX // 1000


# Source: contract, properties 2, both examples.


def test_the_snapshots_of_a_live_event_and_of_one_without_sync() -> None:
    table = {"city": "New York"}
    sent = {"subscriptionStatus": "active"}
    assert apply(table, sent) == {"city": "New York", "subscriptionStatus": "active"}
    assert apply({}, sent) == {"subscriptionStatus": "active"}
    assert table == {"city": "New York"}


NAMES = st.sampled_from(["a", "b", "c", "$set", "$x", ""])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers(2**62, 2**65)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "x", "y", "7", "1.5", "-1e3", "9" * 400])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=5,
)
OPERANDS = st.dictionaries(NAMES, VALUES, max_size=3)
SENT = st.dictionaries(
    st.sampled_from([*OPERATIONS, "$unknown", "a", "b", "d"]), OPERANDS | VALUES, max_size=4
)


@given(st.lists(SENT, max_size=6))
def test_nothing_that_others_can_see_is_changed(history: list[Table]) -> None:
    table: Table = {}
    for sent in history:
        kept = copy.deepcopy((table, sent))
        after = apply(table, sent)
        assert text((table, sent)) == text(kept)
        assert (after is table) == (text(after) == text(table))
        assert None not in after.values()
        table = after


@given(st.lists(SENT, max_size=6), SENT)
def test_set_once_again_changes_nothing(history: list[Table], sent: Table) -> None:
    table: Table = {}
    for one in history:
        table = apply(table, one)
    operand = sent.get("$setOnce", sent)
    once = apply(table, {"$setOnce": operand})
    assert apply(once, {"$setOnce": operand}) is once


@given(st.lists(SENT, max_size=8), st.integers(0, 8))
def test_a_history_cut_anywhere_folds_to_the_same_table(history: list[Table], cut: int) -> None:
    whole: Table = {}
    for sent in history:
        whole = apply(whole, sent)
    first: Table = {}
    for sent in history[:cut]:
        first = apply(first, sent)
    # Between two blocks a table goes through its stored form.
    rest = msgspec.msgpack.decode(msgspec.msgpack.encode(first)) if _storable(first) else first
    for sent in history[cut:]:
        rest = apply(rest, sent)
    assert text(rest) == text(whole)


def _storable(value: object) -> bool:
    try:
        msgspec.msgpack.encode(value)
    except OverflowError:  # a number over 64 bits, set by a sender
        return False
    return True


@given(SENT, SENT)
def test_plain_keys_and_set_are_one_operation(table: Table, sent: Table) -> None:
    before = apply({}, table)
    plain = {name: value for name, value in sent.items() if name[:1] != "$"}
    assert text(apply(before, plain)) == text(apply(before, {"$set": plain}))


# Built-in columns. Source: contract, events 8.

DEVICE = COLUMNS[:7]
PLACE = COLUMNS[7:11]
SINGLE = COLUMNS[11:17]
FULL: Columns = tuple(f"old {name}" for name in COLUMNS)


def said(**values: str) -> Columns:
    return tuple(values.get(name) for name in COLUMNS)


def after(table: Columns, **values: str) -> dict[str, str | None]:
    return dict(zip(COLUMNS, columns(table, said(**values)), strict=True))


def old(*names: str) -> dict[str, str]:
    return {name: f"old {name}" for name in names}


@pytest.mark.parametrize("name", DEVICE)
def test_one_device_column_resets_the_others_and_what_is_derived(name: str) -> None:
    found = after(FULL, **{name: "new"})
    expected = {**dict.fromkeys(COLUMNS), **old(*PLACE, *SINGLE), name: "new"}
    assert found == expected


def test_what_is_derived_comes_with_the_device() -> None:
    found = after(FULL, device_model="iPhone 5", device_family="Apple iPhone", device_type="x")
    assert (found["device_family"], found["device_type"]) == ("Apple iPhone", "x")


@pytest.mark.parametrize("name", PLACE)
def test_one_place_column_resets_the_other_three(name: str) -> None:
    found = after(FULL, **{name: "new"})
    reset = {**old(*COLUMNS), **dict.fromkeys(PLACE), name: "new"}
    assert found == reset


@pytest.mark.parametrize("name", SINGLE)
def test_any_other_column_stands_alone(name: str) -> None:
    assert after(FULL, **{name: "new"}) == {**old(*COLUMNS), name: "new"}


def test_an_event_that_says_nothing_or_the_same_changes_nothing() -> None:
    assert columns(FULL, said()) is FULL
    assert columns(FULL, tuple(f"old {name}" for name in COLUMNS)) is FULL
    assert columns(FULL, said(language="old language")) is FULL
    assert columns(FULL, said(**old(*PLACE))) is FULL


def test_an_empty_text_is_said_too() -> None:
    assert after(FULL, city="") == {**old(*COLUMNS), **dict.fromkeys(PLACE), "city": ""}
