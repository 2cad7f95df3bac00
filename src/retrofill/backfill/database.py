"""The rows that a query brings from SQLite, PostgreSQL or DuckDB, each as one line of JSON.

So a database is read like any file of JSON lines: rows stream in the order of the query, and what a dead letter shows is
what the database gave. Dates and times become ISO 8601 text, decimals numbers, bytes Base64.
"""

from __future__ import annotations

import datetime as dt
import decimal
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import msgspec

from retrofill.errors import InputError

if TYPE_CHECKING:
    import psycopg

_ROWS = 5_000  # rows fetched at once

_encoder = msgspec.json.Encoder(decimal_format="number", enc_hook=str)


def lines(place: str, query: str) -> Iterator[bytes]:
    """Yield some thousand rows at a time as JSON lines. place: `sqlite:path`, `duckdb:path`, `postgresql://…`.

    Raises InputError with the database's own words when it refuses.
    """
    kind, _, path = place.partition(":")
    rows = {"sqlite": _sqlite, "duckdb": _duckdb}.get(kind)
    yield from _encoded(rows(path, query) if rows else _postgresql(place, query))


def _encoded(batches: Iterator[tuple[list[str], Sequence[Sequence[Any]]]]) -> Iterator[bytes]:
    for names, rows in batches:
        found = [dict(zip(names, map(_plain, row), strict=True)) for row in rows]
        try:
            yield _encoder.encode_lines(found)
        except UnicodeEncodeError:  # a text that is none, see `_text`
            yield b"".join(map(_as_it_is, found))


def _as_it_is(row: dict[str, Any]) -> bytes:
    """Return a row as a line that is no UTF-8 where its text is none: whoever reads it refuses that row alone."""
    try:
        return _encoder.encode_lines([row])
    except UnicodeEncodeError:
        text = json.dumps(row, ensure_ascii=False, default=str)
        return text.encode(errors="surrogateescape") + b"\n"


def _different(names: list[str]) -> list[str]:
    """Return the columns of a query. Raises InputError if two have one name: the mapping could mean either."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(
            f"Two columns of the query are named {twice[0]!r}",
            mend="Name the columns in it one by one, with AS",
        )
    return names


def _plain(value: object) -> object:
    if isinstance(value, float) and value != value:  # noqa: PLR0124  # NaN, which JSON has not
        return None
    if isinstance(value, dt.timedelta | decimal.Decimal):
        return value if isinstance(value, decimal.Decimal) and value.is_finite() else str(value)
    return value


def _sqlite(path: str, query: str) -> Iterator[tuple[list[str], Sequence[Sequence[Any]]]]:
    try:
        with closing(sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True)) as connection:
            connection.execute("BEGIN")  # asked twice, the query answers the same
            cursor, seen = connection.execute(query), 0
            names = _different([column[0] for column in cursor.description or ()])
            while True:
                try:
                    rows = cursor.fetchmany(_ROWS)
                except sqlite3.OperationalError as error:
                    if "decode" not in str(error) or connection.text_factory is _text:
                        raise
                    connection.text_factory = _text  # which is slow, so not for everybody
                    cursor = connection.execute(query)
                    cursor.fetchmany(seen)
                    continue
                if not rows:
                    return
                seen += len(rows)
                yield names, rows
    except sqlite3.Error as error:
        raise InputError(f"SQLite said: {error}", where=path) from error


def _text(raw: bytes) -> str:
    """Decode a text of SQLite, which takes any bytes for one."""
    return raw.decode(errors="surrogateescape")


def _duckdb(path: str, query: str) -> Iterator[tuple[list[str], Sequence[Sequence[Any]]]]:
    import duckdb  # noqa: PLC0415  # as in `_postgresql`

    try:
        with closing(duckdb.connect(path, read_only=True)) as connection:
            cursor = connection.execute(query)
            columns = [(column[0], str(column[1])) for column in cursor.description or ()]
            names = _different([name for name, _ in columns])
            zoned = [name for name, kind in columns if kind == "TIMESTAMP WITH TIME ZONE"]
            if zoned:
                cursor = connection.execute(_without_zones(query, zoned))
            while rows := cursor.fetchmany(_ROWS):
                yield names, rows
    except duckdb.Error as error:
        mend = "Cast moments inside of lists and structs to text" if "pytz" in str(error) else ""
        raise InputError(f"DuckDB said: {error}", where=path, mend=mend) from error


def _without_zones(query: str, zoned: list[str]) -> str:
    """Return a query that gives these moments as text: as values DuckDB gives them only where pytz is installed."""
    moments = ", ".join(
        f"strftime(timezone('UTC', {name}), '%Y-%m-%dT%H:%M:%S.%fZ') AS {name}"
        for name in ('"' + name.replace('"', '""') + '"' for name in zoned)
    )
    return f"SELECT * REPLACE ({moments}) FROM (\n{query.rstrip().removesuffix(';')}\n)"


def _fetched(cursor: psycopg.ServerCursor[Any]) -> Sequence[Sequence[Any]]:
    """Return the next rows, with text for what Python has no value for: `infinity`, years before 1 and after 9999."""
    import psycopg  # noqa: PLC0415  # as in `_postgresql`
    from psycopg.adapt import Transformer  # noqa: PLC0415  # as above

    try:
        return cursor.fetchmany(_ROWS)
    except psycopg.DataError:
        found = cursor.pgresult
        if found is None:
            raise
        for name, loader in _loaders().items():
            cursor.adapters.register_loader(name, loader)
        lenient = Transformer(cursor)  # slow, so not for everybody
        lenient.set_pgresult(found)
        return lenient.load_rows(0, found.ntuples, tuple)


def _loaders() -> dict[str, Any]:
    import psycopg  # noqa: PLC0415  # as in `_postgresql`
    from psycopg.types import datetime as kinds  # noqa: PLC0415  # as above

    def lenient(loader: Any) -> Any:
        def load(self: Any, data: Any) -> Any:
            try:
                return loader.load(self, data)
            except psycopg.DataError:
                return bytes(data).decode()

        return type("Lenient", (loader,), {"load": load})

    every = {
        "date": kinds.DateLoader,
        "time": kinds.TimeLoader,
        "timetz": kinds.TimetzLoader,
        "timestamp": kinds.TimestampLoader,
        "timestamptz": kinds.TimestamptzLoader,
        "interval": kinds.IntervalLoader,
    }
    return {name: lenient(loader) for name, loader in every.items()}


def _postgresql(url: str, query: str) -> Iterator[tuple[list[str], Sequence[Sequence[Any]]]]:
    import psycopg  # noqa: PLC0415  # only this source needs it

    try:
        # A cursor with a name stays on the server and streams.
        with psycopg.connect(url) as connection, connection.cursor("retrofill") as cursor:
            cursor.itersize = _ROWS
            cursor.execute(query.encode())
            names = _different([column.name for column in cursor.description or ()])
            while rows := _fetched(cursor):
                yield names, rows
    except psycopg.Error as error:
        parts = urlsplit(url)  # of which some hold passwords
        where = f"{parts.hostname or ''}{parts.path}"
        raise InputError(f"PostgreSQL said: {error}", where=where) from error
