"""An Amplitude project as its export shows it: what an import will meet there, estimated.

A row of an export shows whom it belongs to and the person's properties after it, so the last row of each person is
taken as their state, their rows as their history, in order of arrival. What no export shows is in UNKNOWN.
"""

from __future__ import annotations

import contextlib
import gzip
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pyarrow as pa

from retrofill.backfill import readback
from retrofill.core import likeness, mend
from retrofill.core.block import COLUMNS
from retrofill.core.person import Person
from retrofill.core.sql import literal
from retrofill.engine.history import BRIEF, Alike, Days, Position, types
from retrofill.engine.seeding import PROJECT
from retrofill.errors import InputError
from retrofill.hot.checkpoint import FIRST_AMPLITUDE_ID
from retrofill.limits import HISTORY_ALIKE_MAX, Limits
from retrofill.rehearse.asked import Touched
from retrofill.rehearse.given import Given

UNKNOWN = [
    "property operations that were sent: the export shows what they came to, as of each person's last event",
    "identify calls, group properties, aliases and what arrived after the export: no export shows them",
    "merges that were: whoever was merged counts under each id that stands on the rows",
    "insert_ids beyond the exported days, and those that were dropped as duplicates",
    "addresses of people whom the import's ids do not touch: of those only user_ids are compared",
    "limits and settings of the project: Amplitude's documented ones are taken",
]
_ROWS_A_BLOCK = 2000
_MEMORY = "768MB"
_READ_ROWS = 50_000
# Column here → column of an Export row.
_NAMES = {name: {"carrier": "device_carrier"}.get(name, name) for name in COLUMNS}
_TEXTS = ("user_id", "device_id", "event_type", "$insert_id", "uuid", *_NAMES.values())
_TIMES = ("event_time", "server_upload_time", "user_creation_time")
_JSON = ("user_properties", "groups")


@contextlib.contextmanager
def opened(path: Path, folder: Path) -> Iterator[Archive]:
    """Read an export into a folder, which is made. Raises InputError if it is none."""
    folder.mkdir()
    _unpack(path, folder / "rows.ndjson.gz")
    with contextlib.closing(duckdb.connect(str(folder / "rows.duckdb"))) as db:
        db.execute(f"SET memory_limit = '{_MEMORY}'")
        db.execute(f"SET temp_directory = {literal(str(folder))}")
        yield Archive(path, db, folder / "rows.ndjson.gz")


def _unpack(path: Path, to: Path) -> None:
    mend = "Give the zip that Amplitude's Export API or `GET /api/2/export` answers"
    try:
        with gzip.open(to, "wb", compresslevel=1) as file:
            for line in readback.lines(path):
                file.write(line if line.endswith(b"\n") else line + b"\n")
    except OSError as problem:
        raise InputError(
            f"The export cannot be read: {problem.strerror or problem}", where=str(path), mend=mend
        ) from problem
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as problem:
        # RuntimeError: a member is encrypted, or packed in a way that is not known.
        raise InputError(
            f"This is no whole export: {problem}", where=str(path), mend=mend
        ) from problem


class Archive:
    """The rows of an export, in a table of a database of their own."""

    def __init__(self, path: Path, db: duckdb.DuckDBPyConnection, rows: Path) -> None:
        self._db = db
        fields = {
            "amplitude_id": "BIGINT",
            **dict.fromkeys(_TEXTS, "VARCHAR"),
            **dict.fromkeys(_TIMES, "VARCHAR"),
            **dict.fromkeys(_JSON, "VARCHAR"),
        }
        columns = ", ".join(f"'{name}': '{kind}'" for name, kind in fields.items())
        times = ", ".join(f'epoch_ms(try_cast("{name}" AS TIMESTAMP)) AS {name}' for name in _TIMES)
        names = ", ".join(f'"{name}"' for name in (*_TEXTS, *_JSON) if name not in _TIMES)
        try:
            db.execute(
                f"""
                CREATE TABLE rows AS
                SELECT row_number() OVER (ORDER BY server_upload_time) - 1 AS place, *
                FROM (
                    SELECT amplitude_id, {times}, {names}
                    FROM read_json($1, format = 'newline_delimited', columns = {{{columns}}})
                ) WHERE amplitude_id IS NOT NULL AND event_time IS NOT NULL AND event_type IS NOT NULL
                """,
                [str(rows)],
            )
        except duckdb.Error as problem:
            raise _none(path, str(problem).splitlines()[0][:200]) from problem
        if not self._one("SELECT count(*) FROM rows"):
            raise _none(path, "no line of it has amplitude_id, event_type and event_time")

    def _one(self, statement: str) -> Any:
        return self._db.execute(statement).fetchall()[0][0]

    def given(self, touched: Touched, limits: Limits, *, now_ms: int) -> Given:
        """Return what stands for the project. now_ms: when an import would be sent."""
        db = self._db
        for name, ids in (("devices", touched.device_ids), ("users", touched.user_ids)):
            db.register(f"touched_{name}", pa.table({"id": pa.array(ids, pa.string())}))
        db.execute(
            "CREATE TABLE mine AS SELECT DISTINCT amplitude_id FROM rows "
            "WHERE device_id IN (SELECT id FROM touched_devices) OR user_id IN (SELECT id FROM touched_users)"
        )
        rows, last_ms, most = db.execute(
            "SELECT count(*), max(server_upload_time), max(amplitude_id) FROM rows"
        ).fetchall()[0]
        inside = self._db.execute(
            "SELECT min(place) FROM rows WHERE server_upload_time > $1",
            [now_ms - limits.dedupe_window_ms],
        ).fetchall()[0][0]
        last = (rows - 1) // _ROWS_A_BLOCK + 1
        where = Position(
            PROJECT,
            last,
            last_ms or 0,
            max(now_ms, last_ms or 0),
            max(most + 1, FIRST_AMPLITUDE_ID),
            last + 1 if inside is None else inside // _ROWS_A_BLOCK + 1,
            msgspec.to_builtins(limits),
            {},
        )
        people = dict(self._people())
        return Given(
            where,
            self._days(),
            self._ids("device_id", "devices"),
            self._ids("user_id", "users"),
            people,
            alike=list(self._alike(touched)),
        )

    def _ids(self, column: str, name: str) -> dict[str, int]:
        return dict(
            self._db.execute(
                f"SELECT {column}, arg_max(amplitude_id, place) FROM rows "
                f"WHERE amplitude_id IN (FROM mine) AND {column} IN (SELECT id FROM touched_{name}) "
                f"GROUP BY {column}"
            ).fetchall()
        )

    def _people(self) -> Iterator[tuple[int, Person]]:
        last = ", ".join(
            f'arg_max(struct_pack(v := "{name}"), place).v' for name in (*_NAMES.values(), *_JSON)
        )
        cursor = self._db.execute(
            f"""
            SELECT amplitude_id, arg_max(user_id, place) FILTER (user_id IS NOT NULL),
                   least(min(event_time), min(user_creation_time)), max(server_upload_time), {last}
            FROM rows WHERE amplitude_id IN (FROM mine) GROUP BY amplitude_id
            """
        )
        while some := cursor.fetchmany(_READ_ROWS):
            for number, user, first_ms, last_ms, *said in some:
                columns, properties, groups = tuple(said[: len(_NAMES)]), said[-2], said[-1]
                yield (
                    number,
                    Person(
                        number,
                        user,
                        _object(properties),
                        columns,
                        _object(groups),
                        first_ms,
                        last_ms or 0,
                    ),
                )

    def _days(self) -> Days:
        day = "strftime(make_timestamp(event_time * 1000), '%Y-%m-%d')"
        active = self._db.execute(
            f"SELECT {day} AS day, count(DISTINCT amplitude_id) FROM rows GROUP BY day ORDER BY day"
        ).fetchall()
        new = self._db.execute(
            f"SELECT {day} AS day, count(*) FROM "
            "(SELECT min(event_time) AS event_time FROM rows GROUP BY amplitude_id) "
            "GROUP BY day ORDER BY day"
        ).fetchall()
        return Days(dict(new), dict(active))

    def _alike(self, touched: Touched) -> Iterator[Alike]:
        sought = {form: user for user in touched.user_ids for form in likeness.forms(user)}
        cursor = self._db.execute(
            "SELECT user_id, min(amplitude_id) FROM rows WHERE user_id IS NOT NULL "
            "AND amplitude_id NOT IN (FROM mine) GROUP BY user_id ORDER BY user_id"
        )
        left = HISTORY_ALIKE_MAX
        while some := cursor.fetchmany(_READ_ROWS):
            for user, number in some:
                other = next((sought[one] for one in likeness.forms(user) if one in sought), None)
                by = None if other is None else likeness.alike(user, other)
                if by is not None and other is not None and left:
                    left -= 1
                    yield Alike(number, user, by, other)

    def tables(self) -> Iterator[pa.Table]:
        """Yield the rows of the people that the import touches."""
        schema = types(BRIEF)
        reader = self._db.execute(
            f"""
            SELECT place // {_ROWS_A_BLOCK} + 1 AS "block", place % {_ROWS_A_BLOCK} AS "row",
                   amplitude_id, 0 AS kind, user_id, device_id, event_type, event_time,
                   coalesce(server_upload_time, 0) AS server_upload_time,
                   coalesce("$insert_id", uuid) AS insert_id, NULL AS import_id
            FROM rows WHERE amplitude_id IN (FROM mine)
            """
        ).to_arrow_reader(_READ_ROWS)
        for batch in reader:
            yield pa.Table.from_batches([batch]).cast(schema)


def _object(text: str | None) -> dict[str, Any]:
    try:
        found = mend.held(msgspec.json.decode(text)) if text else {}
    except ValueError:  # no JSON, or a number that no decoder holds
        return {}
    return found if isinstance(found, dict) else {}


def _none(path: Path, why: str) -> InputError:
    return InputError(
        f"This is no export of Amplitude's: {why}",
        where=str(path),
        mend="Give the zip that Amplitude's Export API or `GET /api/2/export` answers",
    )
