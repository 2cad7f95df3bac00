"""A first mapping for a source that nobody has described: each guess with its reason, to be read and mended.

A name says most: `userId`, `created_at`, `event_name` mean the same nearly everywhere. What the first thousands of rows
hold decides what a name leaves open: whether a number counts seconds, whether a column that might be an event's id is
different in every row, and, where no name says so, which column is the time. A column nobody knows becomes an event
property.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import yaml
from msgspec import Struct
from msgspec.structs import replace

from retrofill.backfill.columns import told_objects
from retrofill.backfill.intake import Source
from retrofill.core.sql import quoted
from retrofill.errors import InputError

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECONDS_MAX, _MILLIS_MAX = 1e11, 1e14
_LISTED = 200
_MOMENT = re.compile(r"(19|20)\d\d-[01]\d-[0-3]\d[T ][0-2]\d:[0-5]\d.*")
_TIMES = ("DATE", "TIMESTAMP")  # as the types of Parquet begin
_SECONDS = re.compile(r"1\d{9}(\d{3}){0,2}")  # 2001 to 2033, also in milli- and microseconds

# For each field the names that mean it, best first, compared without case, `_`, `-` and spaces.
_NAMES: dict[str, tuple[str, ...]] = {
    "user_id": (
        "userid",
        "user",
        "uid",
        "customerid",
        "accountid",
        "memberid",
        "profileid",
        "email",
    ),
    "device_id": (
        "deviceid",
        "device",
        "anonymousid",
        "anonid",
        "visitorid",
        "clientid",
        "cookieid",
        "installid",
    ),
    "event_type": ("eventtype", "eventname", "event", "action", "activity", "name", "type"),
    "time": (
        "time",
        "timestamp",
        "eventtime",
        "eventtimestamp",
        "ts",
        "at",
        "occurredat",
        "createdat",
        "datetime",
        "date",
    ),
    "insert_id": ("insertid", "eventid", "messageid", "uuid", "id", "rowid"),
    "session_id": ("sessionid",),
    "platform": ("platform",),
    "os_name": ("osname", "os"),
    "os_version": ("osversion",),
    "device_model": ("devicemodel", "model"),
    "device_brand": ("devicebrand", "brand"),
    "app_version": ("appversion", "versionname", "version"),
    "country": ("country", "countryname"),
    "region": ("region", "state"),
    "city": ("city",),
    "language": ("language", "locale"),
    "ip": ("ip", "ipaddress"),
    "revenue": ("revenue",),
    "event_properties": ("eventproperties", "properties", "props", "params"),
    "user_properties": ("userproperties", "traits", "userattributes"),
    "groups": ("groups",),
}
_OBJECTS = frozenset({"event_properties", "user_properties", "groups"})
_ABOUT_USERS = ("user", "customer", "member", "account", "acquisition", "cohort", "plan", "tier")
# Presets know these better than any guess: the keys that give a source away.
_PRESETS: tuple[tuple[str, frozenset[str]], ...] = (
    ("amplitude-export", frozenset({"$insert_id", "amplitude_id", "event_time"})),
    ("ga4", frozenset({"event_timestamp", "user_pseudo_id", "event_params"})),
    ("segment", frozenset({"messageId", "anonymousId", "context"})),
    ("posthog", frozenset({"distinct_id", "uuid", "event", "properties"})),
    ("mixpanel", frozenset({"event", "properties"})),
    ("snowplow", frozenset({"collector_tstamp", "event_id", "v_tracker"})),
)


class Guess(Struct, frozen=True):
    """One line of the mapping. why: the comment behind it."""

    field: str
    expression: str
    why: str


def write(source: Source, shown: str) -> str:
    """Return the YAML text of a first mapping. shown: the source as the user named it. Raises InputError without a column."""
    if not source.types:
        raise InputError("The source has no row to guess a mapping from", where=shown)
    rows = _sample(source)
    columns = {path[0]: kind for path, kind in source.types.items() if len(path) == 1}
    guesses = list(_guesses(columns, rows))
    used = {name for guess in guesses for name in columns if _uses(guess, name)}
    rest = [name for name in columns if name not in used][:_LISTED]
    lines = [
        f"# A first mapping for {shown}, guessed from {len(rows):,} rows. Read each line, mend what is wrong, then:"
    ]
    lines.append("#   retrofill plan SOURCE --map THIS-FILE")
    known = _preset(columns)
    if known:
        lines.append(f"# These rows look like {known}: try --map {known} first.")
    lines += [
        "event:",
        *(_line(guess.field, guess.expression, guess.why) for guess in _required(guesses)),
    ]
    lines += _block("user_properties", [name for name in rest if _about_users(name)], guesses)
    lines += _block("event_properties", [name for name in rest if not _about_users(name)], guesses)
    return "\n".join(lines) + "\n"


def preset(source: Source) -> str:
    """Return the preset that the source's columns give away. Raises InputError if none does."""
    found = _preset(path[0] for path in source.types)
    if found is None:
        raise InputError(
            "No mapping was named, and the source looks like none of those that come with the program",
            mend="`retrofill map SOURCE` writes a first mapping; read it, then name it with --map",
        )
    return found


def _sample(source: Source) -> list[dict[str, Any]]:
    if source.style != "cells":
        found = []
        for row in source.rows:
            try:
                value = json.loads(row or "")  # which knows NaN, as DuckDB writes it
            except ValueError:
                continue
            if isinstance(value, dict):
                found.append(value)
        return found
    rows: list[dict[str, Any]] = source.table.to_pylist()
    return [{name: row[f"cell_{at}"] for at, name in enumerate(source.names)} for row in rows]


def _preset(columns: Iterable[str]) -> str | None:
    names = set(columns)
    return next((preset for preset, keys in _PRESETS if keys <= names), None)


def _guesses(columns: dict[str, str], rows: Sequence[dict[str, Any]]) -> Iterable[Guess]:
    taken: set[str] = set()
    for field, names in _NAMES.items():
        candidates = [name for wanted in names for name in columns if _folded(name) == wanted]
        for name in candidates:
            if name in taken or (field not in _OBJECTS and _holds_objects(name, rows)):
                continue
            guess = _guess(field, name, columns[name], [row.get(name) for row in rows])
            if guess is not None:
                taken.add(name)
                yield guess
                break
        else:
            if field == "time":
                yield from _unnamed_time(columns, rows)


def _unnamed_time(columns: dict[str, str], rows: Sequence[dict[str, Any]]) -> Iterable[Guess]:
    """Guess the first column of which every row reads as a time, unless its name means something else, as session_id."""
    others = {other for field, names in _NAMES.items() if field != "time" for other in names}
    for name, kind in columns.items():
        if _folded(name) in others:
            continue
        values = [row.get(name) for row in rows]
        if values and (
            (kind.startswith(_TIMES) and None not in values) or all(map(_reads_as_time, values))
        ):
            guess = _guess("time", name, kind, values)
            if guess is not None:
                yield replace(guess, why=f"by its values alone: {guess.why}")
                return


def _reads_as_time(value: object) -> bool:
    text = str(value)
    return bool(_MOMENT.fullmatch(text) or _SECONDS.fullmatch(text))


def _holds_objects(name: str, rows: Sequence[dict[str, Any]]) -> bool:
    return any(isinstance(row.get(name), dict | list) for row in rows)


def _guess(field: str, name: str, kind: str, values: Sequence[Any]) -> Guess | None:
    given = [value for value in values if value is not None]
    sql = name if _PLAIN.fullmatch(name) else quoted(name)
    if field == "time":
        return _time(sql, kind, given)
    if field == "insert_id":
        different = len({str(value) for value in given})
        if different < len(values) or not given:
            return None
        return Guess(field, sql, f"different in each of {len(values):,} rows")
    if field in _OBJECTS:
        whole = bool(given) and all(isinstance(value, dict) for value in given)
        what = "an object" if whole else "the text of an object"
        return Guess(field, sql, f"{what}, taken whole") if whole or told_objects(given) else None
    if field == "session_id" and kind not in {"BIGINT", "HUGEINT"}:
        return None
    people = len({str(value) for value in given})
    return Guess(field, sql, f"by its name; {people:,} different values in {len(values):,} rows")


def _time(sql: str, kind: str, given: Sequence[Any]) -> Guess | None:
    if not given:
        return None
    first = given[0]
    numeric = kind in {"BIGINT", "DOUBLE", "HUGEINT", "INTEGER"}
    text = not numeric and str(first).isdecimal()  # one odd row makes a text of every number
    if text or numeric:
        number = float(first)
        if text and not _SECONDS_MAX <= number < _MILLIS_MAX:
            sql = f"CAST({sql} AS BIGINT)"
        if number < _SECONDS_MAX:
            return Guess(
                "time",
                f"{sql} * 1000",
                f"{first} counts seconds; an event's time is in milliseconds",
            )
        if number < _MILLIS_MAX:
            return Guess("time", sql, f"{first} counts milliseconds already")
        return Guess("time", f"{sql} // 1000", f"{first} counts microseconds")
    return Guess("time", sql, f"{first} is read as a time in UTC unless it names its offset")


def _required(guesses: Sequence[Guess]) -> list[Guess]:
    """Put the fields that every event needs first, those not found as questions."""
    found = {guess.field: guess for guess in guesses}
    open_questions = {
        "event_type": Guess("event_type", "'Imported'", "no column names the event: which is it?"),
        "time": Guess("time", "?", "no column looks like a time: which is it?"),
    }
    if "user_id" not in found and "device_id" not in found:
        open_questions["user_id"] = Guess("user_id", "?", "no column names a user or a device")
    order = ["user_id", "device_id", "event_type", "time", "insert_id"]
    needed = [found.get(name) or open_questions.get(name) for name in order]
    others = [
        guess
        for guess in guesses
        if guess.field not in {*order, "event_properties", "user_properties"}
    ]
    return [guess for guess in needed if guess] + others


def _block(field: str, names: Sequence[str], guesses: Sequence[Guess]) -> list[str]:
    whole = next((guess for guess in guesses if guess.field == field), None)
    if whole is not None:
        also = f"; not taken: {', '.join(names)}" if names else ""
        return [_line(field, whole.expression, whole.why + also)]
    if not names:
        return []
    inner = [
        f"    {_yaml(name)}: {_yaml(name if _PLAIN.fullmatch(name) else quoted(name))}"
        for name in names
    ]
    why = "columns that speak of the user" if field == "user_properties" else "all other columns"
    return [f"  {field}:  # {why}", *inner]


def _line(field: str, expression: str, why: str) -> str:
    return f"  {field}: {_yaml(expression)}  # {' '.join(why.split())}"


def _yaml(text: str) -> str:
    """Return the text as YAML reads it back: a column `on` or `2024` needs quotes."""
    try:
        same = yaml.safe_load(f"{text}  # why") == text
    except yaml.YAMLError:
        same = False
    return text if same else msgspec.json.encode(text).decode()


def _folded(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _about_users(name: str) -> bool:
    return _folded(name).startswith(_ABOUT_USERS)


def _uses(guess: Guess, name: str) -> bool:
    bare = guess.expression.split(" ")[0]
    return bare in {name, quoted(name)}
