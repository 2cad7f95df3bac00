"""What a set of sent properties does to a property table. Users and groups use the same rules.

A table is name → JSON value and never holds null. Nothing here changes a value that others can see: a changed table is
a new dict, a grown list a new list, so a checkpoint or a snapshot may keep a reference. An unchanged table is returned
as the same object, and that identity is how the caller knows that neither state nor snapshot has to be written again.
A table applied to itself does not change: it has no operation in it.

The silences of the contract, as decided here:

- Plain keys are `$set`, applied immediately before the explicit `$set`: for a name in both, `$set` wins.
- An unknown key that starts with `$` is ignored (`/identify` refuses it, see `unknown`), and so is an operation whose
  operand is no object. A property cannot bear the name of an operation.
- A null value is dropped, also as the operand of an operation and as an element of a list operation's array.
  `$unset` looks at names alone: there any value will do.
- Every list operation but `$remove` makes a property that is absent (an empty list) or scalar (one element) a list,
  even if it then adds nothing. `$remove` leaves an absent property absent; what it empties stays, as an empty list.
- Membership (`$preInsert`, `$postInsert`, `$remove`) is equality of JSON values: 1 is 1.0 but not true. A value listed
  twice in one `$preInsert` is put in once.
- An array grown by an operation stays within ARRAY_ITEM_CHARS_MAX: a string counts its characters, any other value
  those of its JSON text, each at least one. The first new value that does not fit and those after it are not added;
  what is there stays, even if `$set` made it larger.
- `$add` counts a current value that is no number as 0 and ignores an operand that is none. Whole numbers stay whole
  within 64 bits, beyond them the sum is a float; a sum that is no finite number changes nothing.

Source: contract, properties 4 and 7; the order of operations is that of `OPERATIONS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import isfinite
from typing import Any

import msgspec

from retrofill.core.block import COLUMNS
from retrofill.limits import ARRAY_ITEM_CHARS_MAX

Json = Any  # a JSON value as decoded: never a type of ours
Properties = dict[str, Json]
Columns = tuple[str | None, ...]  # in the order of `block.COLUMNS`

# What whole numbers a decoder of JSON is sure to hold: a signed or an unsigned 64-bit one.
_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1
_NUMBER = re.compile(r"\s*[+-]?(\d+)(\.\d*)?([eE][+-]?\d+)?\s*", re.ASCII)

_text = msgspec.json.Encoder().encode
_canonical = msgspec.json.Encoder(order="deterministic").encode


def apply(table: Properties, sent: Properties) -> Properties:
    """Return the table after `sent`: plain keys, operations, or both. The same object if nothing changed.

    String values were cut to their limit at the border. Neither argument is changed; values may be shared.
    """
    # Most events repeat what is known: one comparison in C, and then only of what `==` does not tell apart.
    if sent.items() <= table.items():
        for name, value in sent.items():
            if type(value) is not str and not _same(table[name], value):
                break
        else:
            return table
    result = table
    for name, value in sent.items():
        # A key that starts with `$` is looked at only if it differs, as every operation does: no property bears its name.
        if name in table and _same(table[name], value):
            continue
        if name[:1] == "$":
            return _apply_operations(table, sent)
        if value is not None:
            if result is table:
                result = table.copy()
            result[name] = value
    # A table that holds just what was sent is that object, which others may say too: see `core.alike`.
    return sent if result == sent and list(result) == list(sent) else result


def unknown(sent: Properties) -> list[str]:
    """Name the keys that start with `$` and are no operation: `/identify` answers them with 400."""
    return [name for name in sent if name[:1] == "$" and name not in OPERATIONS]


def _apply_operations(table: Properties, sent: Properties) -> Properties:
    result = table.copy()
    named: set[str] = set()
    for operation, operand in in_order(sent):
        if operation == "$clearAll":
            named.update(table)
        else:
            named.update(operand)
        OPERATIONS[operation](result, operand)
    for name in named:
        if not _same(table.get(name), result.get(name)):
            return result
    return table


def in_order(sent: Properties) -> list[tuple[str, Properties]]:
    """Return the operations to apply with their operands: plain keys as one more `$set`."""
    found: list[tuple[str, Properties]] = []
    plain: Properties = {}
    for name, value in sent.items():
        if name[:1] != "$":
            plain[name] = value
        elif name == "$clearAll" and value is not None:
            found.append((name, {}))
        elif type(value) is dict and name in OPERATIONS:
            found.append((name, value))
    if plain:
        found.insert(0, ("$set", plain))  # the sort keeps it before the explicit one
    if len(found) > 1:
        found.sort(key=_rank)
    return found


# Each operation changes the table it is given, which is a fresh copy, but none of the values in it.


def clear_all(table: Properties, _operand: Properties) -> None:
    """Remove every custom property. The operand is not looked at; SDKs send `"-"`, no object."""
    table.clear()


def unset(table: Properties, operand: Properties) -> None:
    """Remove the named properties, whatever their operand's values."""
    for name in operand:
        table.pop(name, None)


def set_(table: Properties, operand: Properties) -> None:
    """Overwrite or create."""
    for name, value in operand.items():
        if value is not None and name not in OPERATIONS:
            table[name] = value


def set_once(table: Properties, operand: Properties) -> None:
    """Create what has no value yet."""
    for name, value in operand.items():
        if value is not None and name not in table and name not in OPERATIONS:
            table[name] = value


def add(table: Properties, operand: Properties) -> None:
    """Add a number, or a string that is one, to a number; an absent property starts at 0."""
    for name, value in operand.items():
        more = _number(value)
        if more is None or name in OPERATIONS:
            continue
        total = _number(table.get(name)) or 0
        try:
            total = total + more
            if type(total) is int and not _INT_MIN <= total <= _INT_MAX:
                total = float(total)
        except OverflowError:
            continue
        if isfinite(total):
            table[name] = total


def append(table: Properties, operand: Properties) -> None:
    """Put values at the end of a list."""
    for name, now, new in _lists(table, operand):
        table[name] = now + _fitting(now, new)


def prepend(table: Properties, operand: Properties) -> None:
    """Put values at the front of a list, in the order given."""
    for name, now, new in _lists(table, operand):
        table[name] = _fitting(now, new) + now


def pre_insert(table: Properties, operand: Properties) -> None:
    """Put values that are not in the list at its front, in the order given."""
    for name, now, new in _lists(table, operand):
        table[name] = _fitting(now, _missing(now, new)) + now


def post_insert(table: Properties, operand: Properties) -> None:
    """Put values that are not in the list at its end, in the order given."""
    for name, now, new in _lists(table, operand):
        table[name] = now + _fitting(now, _missing(now, new))


def remove(table: Properties, operand: Properties) -> None:
    """Remove every occurrence of the values."""
    for name, now, gone in _lists(table, operand):
        if name in table:
            keys = set(map(_key, gone))
            table[name] = [value for value in now if _key(value) not in keys]


# In the order in which the server applies them, wherever they stand in the object that was sent.
OPERATIONS: dict[str, Callable[[Properties, Properties], None]] = {
    "$clearAll": clear_all,
    "$unset": unset,
    "$set": set_,
    "$setOnce": set_once,
    "$add": add,
    "$append": append,
    "$prepend": prepend,
    "$preInsert": pre_insert,
    "$postInsert": post_insert,
    "$remove": remove,
}
_RANKS = {operation: rank for rank, operation in enumerate(OPERATIONS)}


def _rank(applied: tuple[str, Properties]) -> int:
    return _RANKS[applied[0]]


def _lists(table: Properties, operand: Properties) -> list[tuple[str, list[Json], list[Json]]]:
    """Return name, current value as a list, operand as a list, for each property a list operation names."""
    found = []
    for name, value in operand.items():
        if value is None or name in OPERATIONS:
            continue
        now = table.get(name)
        if type(now) is not list:
            now = [] if now is None else [now]
        new = [one for one in value if one is not None] if type(value) is list else [value]
        found.append((name, now, new))
    return found


def _fitting(now: list[Json], new: list[Json]) -> list[Json]:
    room = ARRAY_ITEM_CHARS_MAX - sum(map(_chars, now))
    for index, value in enumerate(new):
        room -= _chars(value)
        if room < 0:
            return new[:index]
    return new


def _chars(value: Json) -> int:
    return (len(value) or 1) if type(value) is str else len(_text(value).decode())


def _missing(now: list[Json], new: list[Json]) -> list[Json]:
    seen = set(map(_key, now))
    missing = []
    for value in new:
        key = _key(value)
        if key not in seen:
            seen.add(key)
            missing.append(value)
    return missing


def _key(value: Json) -> str | int | float | bytes | None:
    """Return something hashable that is equal for equal JSON values only."""
    return _canonical(value) if type(value) in (bool, list, dict) else value


def _same(before: Json, after: Json) -> bool:
    """Say whether two values read the same in a snapshot: 1, 1.0 and true do not."""
    if before is after:
        return True
    if before != after or type(before) is not type(after):
        return False
    return type(after) not in (list, dict) or _text(before) == _text(after)


def _number(value: Json) -> int | float | None:
    if type(value) is int or type(value) is float:
        return value
    if type(value) is not str:
        return None
    match = _NUMBER.fullmatch(value)
    if match is None:
        return None
    return float(value) if match[2] is not None or match[3] is not None else int(value)


# Built-in columns that are set together: what is sent of a group resets those of the group that are not.
_DEVICE = slice(COLUMNS.index("platform"), COLUMNS.index("carrier") + 1)
_PLACE = slice(COLUMNS.index("country"), COLUMNS.index("dma") + 1)
_SINGLE = slice(COLUMNS.index("language"), COLUMNS.index("paying") + 1)
_DERIVED = slice(COLUMNS.index("device_family"), COLUMNS.index("device_type") + 1)
_NO_DEVICE: Columns = (None,) * (_DEVICE.stop - _DEVICE.start)
_NO_PLACE: Columns = (None,) * (_PLACE.stop - _PLACE.start)
_NO_SINGLE: Columns = (None,) * (_SINGLE.stop - _SINGLE.start)


def columns(table: Columns, sent: Columns) -> Columns:
    """Return the built-in columns after an event, in the order of `block.COLUMNS`. The same object if none changed.

    sent: None for what the event does not say. `device_family` and `device_type` are the caller's, derived from the
    device as sent; they count if any of the device columns is. `start_version` is like any other column here: that
    the first version stays unless an identify sets it is the caller's rule. Source: contract, events 8.
    """
    if sent == table:
        return table
    from_device = sent if sent[_DEVICE] != _NO_DEVICE else table
    from_place = sent if sent[_PLACE] != _NO_PLACE else table
    single = table[_SINGLE]
    said = sent[_SINGLE]
    if said not in (single, _NO_SINGLE):
        single = tuple([old if new is None else new for old, new in zip(single, said, strict=True)])
    result: Columns = (
        *from_device[_DEVICE],
        *from_place[_PLACE],
        *single,
        *from_device[_DERIVED],
    )
    return table if result == table else result
