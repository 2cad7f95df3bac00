"""What an import will meet: people, ids, groups, merges and counts of a project, and where its history begins to go on.

Of our server all of it is what `POST /api/1/history` answers, exact for one position. The rows follow the state and are
taken as they come, straight into the scratch directory: however large the history is, some thousand rows are in memory.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import io
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from datetime import date, timedelta
from typing import IO, Any, TypeVar

import msgspec
import pyarrow as pa
import pyarrow.json as pj
from msgspec import Struct

from retrofill.backfill.keys import Keys
from retrofill.backfill.profile import Target, names_retrofill
from retrofill.core.fold import Group
from retrofill.core.order import CHANGED, SHOWN, Place
from retrofill.core.person import Person
from retrofill.engine import history
from retrofill.engine.admission import ProjectSettings
from retrofill.engine.history import Alike, Asked, Days, Position
from retrofill.engine.seeding import PROJECT, Start
from retrofill.errors import FinalError, InputError, RetryError
from retrofill.hot.checkpoint import FIRST_AMPLITUDE_ID, Changed, Meta
from retrofill.lake.arrow import MergeRow
from retrofill.limits import CHART_DAYS_MAX, Limits

T = TypeVar("T")

ANSWER_S = 600.0  # ours: how long a server may take to begin, or to send the next piece
_PIECE_BYTES = 8 * 1024 * 1024
_SAID_BYTES = 500
_TRIES = 5  # ours: while the server is busy, or still ends the answer before
_ROWS_BEGIN = b'{"kind":"rows"}'
_END = b'{"kind":"end"'


class Given(Struct):
    """A project at one position, as far as an import touches it. known: (place among the asked keys, block).

    days: of the whole project.
    """

    position: Position
    days: Days
    devices: dict[str, int] = {}
    users: dict[str, int] = {}
    people: dict[int, Person] = {}
    groups: dict[Group, dict[str, Any]] = {}
    aliases: dict[str, str] = {}
    merges: list[history.Merged] = []
    barred: list[tuple[str, str]] = []
    known: list[tuple[int, int]] = []
    alike: list[Alike] = []

    @property
    def settings(self) -> ProjectSettings:
        """What the operator set, every limit named."""
        own = msgspec.convert(self.position.settings, ProjectSettings)
        return msgspec.structs.replace(own, limits=self.position.limits)

    @property
    def limits(self) -> Limits:
        """The limits in force."""
        return msgspec.convert(self.position.limits, Limits)

    @property
    def property_time(self) -> str:
        """`arrival` or `event`: in which order properties are folded."""
        return str(self.position.settings.get("property_time", "arrival"))

    @property
    def start(self) -> Start:
        """Where a scratch directory begins."""
        where = self.position
        return Start(
            Meta(where.block, where.server_upload_ms, where.fresh),
            where.now_ms,
            where.window_from,
            self.settings,
            self.limits,
            Changed(
                dict(self.devices),
                dict(self.users),
                dict(self.people),
                dict(self.groups),
                dict(self.aliases),
                late=self._late(),
            ),
            [self._merge_row(one) for one in self.merges],
            self.barred,
        )

    def _late(self) -> dict[Place, int] | None:
        """Mark everybody, where properties go by event time: all of it is folded again in the end, whatever comes."""
        if self.property_time == "arrival":
            return None
        groups = [(word, *group) for group in self.groups for word in (SHOWN, CHANGED)]
        return dict.fromkeys([*self.people, *groups], 1)

    @staticmethod
    def _merge_row(one: history.Merged) -> MergeRow:
        place = (0, one.block, one.row, one.event_time, one.server_upload_time)
        return (PROJECT, one.absorbed, one.surviving, *place)


class Answer:
    """A server's history on its way. `given` is whole when this is made; then `rows` yields the rows once."""

    def __init__(self, stream: IO[bytes], names: tuple[str, ...]) -> None:
        self._stream = stream
        self._schema = history.types(names)
        self._left = b""
        self.count = 0
        self.given = self._head()

    def _head(self) -> Given:
        """Read everything before the rows."""
        found: Given | None = None
        position: Position | None = None
        for line in self._lines():
            if line == _ROWS_BEGIN:
                if found is None:
                    break
                return found
            one = _line(line)
            if isinstance(one, Position):
                position = one
            elif isinstance(one, Days) and position is not None:
                found = Given(position, one)
            elif found is not None:
                _take(found, one)
        raise _cut_off()

    def _lines(self) -> Iterator[bytes]:
        while piece := self._read():
            *lines, self._left = (self._left + piece).split(b"\n")
            for at, line in enumerate(lines):
                if line == _ROWS_BEGIN:
                    self._left = b"\n".join([*lines[at + 1 :], self._left])
                    yield line
                    return
                yield line

    def _read(self) -> bytes:
        try:
            return self._stream.read(_PIECE_BYTES)
        except (OSError, EOFError, zlib.error, http.client.HTTPException) as problem:
            raise _cut_off() from problem

    def rows(self) -> Iterator[pa.Table]:
        """Yield the rows, a piece at a time. Raises RetryError if the answer is cut off."""
        while True:
            piece = self._read()
            text = self._left + piece
            end = text.rfind(b"\n", 0, len(text) - (not piece)) + 1
            last = text.rfind(_END, max(0, len(text) - 200))
            if last >= 0 and text.endswith(b"\n"):
                table = self._table(text[:last])
                yield table
                told = _line(text[last:].rstrip(b"\n"))
                if not isinstance(told, history.End) or told.rows != self.count:
                    raise _cut_off()
                return
            if not piece:
                raise _cut_off()
            if end:
                yield self._table(text[:end])
            self._left = text[end:]

    def _table(self, text: bytes) -> pa.Table:
        if not text:
            return self._schema.empty_table()
        table = pj.read_json(
            io.BytesIO(text),
            read_options=pj.ReadOptions(block_size=max(len(text), 1), use_threads=False),
            parse_options=pj.ParseOptions(
                explicit_schema=self._schema, unexpected_field_behavior="error"
            ),
        )
        self.count += table.num_rows
        return table


def _line(text: bytes) -> Any:
    try:
        return history.decode_line(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as problem:
        raise FinalError(
            f"The server's answer is not understood: {problem}",
            mend="Rehearse with the version of Retrofill that the server has",
        ) from problem


def _take(given: Given, one: Any) -> None:
    match one:
        case history.Someone():
            given.people[one.amplitude_id] = one.person()
        case history.Device():
            given.devices[one.id] = one.amplitude_id
        case history.User():
            given.users[one.id] = one.amplitude_id
        case history.GroupOf():
            given.groups[one.type, one.value] = one.properties
        case history.Alias():
            given.aliases[one.user_id] = one.global_user_id
        case history.Merged():
            given.merges.append(one)
        case history.Barred():
            given.barred.append((one.device_id, one.user_id))
        case history.Known():
            given.known.append((one.index, one.block))
        case Alike():
            given.alike.append(one)


def nothing(limits: Limits, *, now_ms: int) -> Given:
    """Return an empty project."""
    where = Position(PROJECT, 0, 0, now_ms, FIRST_AMPLITUDE_ID, 1, msgspec.to_builtins(limits), {})
    return Given(where, Days({}, {}))


@contextlib.contextmanager
def ask(to: Target, keys: Keys, asked: Asked) -> Iterator[Answer]:
    """Ask a server of ours for history, whole before the rows. Raises FinalError if it refuses, RetryError."""
    names = history.WHOLE if asked.rows == "whole" else history.BRIEF
    with _open(to, keys, "/api/1/history", msgspec.json.encode(asked)) as answer:
        packed = answer.headers.get("Content-Encoding") == "gzip"
        stream: Any = gzip.GzipFile(fileobj=answer) if packed else answer
        yield Answer(stream, names)


def property_time(to: Target, keys: Keys) -> str:
    """Ask a server of ours in which order it folds properties. Raises FinalError if it refuses, RetryError."""
    settings = _read(to, keys, "/api/1/project", _Project).settings
    return str(settings.get("property_time", "arrival"))


class _Project(Struct, frozen=True):
    settings: dict[str, Any]


class Imported(Struct, frozen=True):
    """What a server shows of an import, as far as it is looked at."""

    name: str = ""
    events: int = 0
    identifies: int = 0
    duplicates: int = 0

    @property
    def rows(self) -> int:
        """Everything of it that is stored."""
        return self.events + self.identifies


class _Imports(Struct, frozen=True):
    imports: list[Imported]


def import_figures(to: Target, keys: Keys, name: str) -> Imported:
    """Ask a server of ours what became of an import, nothing if it has none. Raises FinalError, RetryError."""
    found = _read(to, keys, "/api/1/imports", _Imports).imports
    return next((one for one in found if one.name == name), Imported())


def chart(to: Target, keys: Keys, metric: str, first: date, last: date) -> dict[str, int]:
    """Ask any destination's charts for its `new` or `active` users by day. Raises FinalError, RetryError."""
    found: dict[str, int] = {}
    while first <= last:
        end = min(last, first + timedelta(CHART_DAYS_MAX - 1))
        path = f"/api/2/users?m={metric}&i=1&start={first:%Y%m%d}&end={end:%Y%m%d}"
        data = _read(to, keys, path, _Chart).data
        values = data.series[0] if data.series else []
        found |= {day: int(value) for day, value in zip(data.xValues, values, strict=False)}
        first = end + timedelta(1)
    return {day: value for day, value in found.items() if value}


class _Series(Struct, frozen=True):
    series: list[list[float]]
    xValues: list[str]  # noqa: N815 - as on the wire


class _Chart(Struct, frozen=True):
    data: _Series


def _read(to: Target, keys: Keys, path: str, kind: type[T]) -> T:
    """Return what a server answers, whole. Raises FinalError if it refuses or is not understood, RetryError."""
    with _open(to, keys, path, None) as answer:
        try:
            return msgspec.json.decode(answer.read(), type=kind)
        except (OSError, http.client.HTTPException) as problem:
            raise _cut_off() from problem
        except (msgspec.DecodeError, UnicodeDecodeError) as problem:
            raise FinalError(
                f"The server's answer is not understood: {problem}",
                where=f"{to.read}{path}",
                mend="Check the address: something else may answer there",
            ) from problem


def _open(to: Target, keys: Keys, path: str, body: bytes | None) -> http.client.HTTPResponse:
    url = f"{to.read}{path}"
    fields = {"Content-Type": "application/json"}
    fields |= {} if body is None else {"Accept-Encoding": "gzip"}
    request = urllib.request.Request(url, body, fields)  # noqa: S310 - http or https: `target` checked it
    keys.sign(request)
    for tries in range(_TRIES):
        try:
            answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=ANSWER_S)  # noqa: S310 - the same
        except urllib.error.HTTPError as refused:
            with refused:
                problem = _refused(refused, url)
            if tries + 1 == _TRIES or not isinstance(problem, RetryError):
                raise problem from refused
            time.sleep(tries + 1)
        except (OSError, http.client.HTTPException) as failed:
            raise RetryError(
                f"The server cannot be reached: {failed}",
                where=url,
                mend="Check --against and that the server is up; rehearse again",
            ) from failed
        else:
            return answer
    raise AssertionError


def need_ours(to: Target) -> None:
    """Raise InputError unless the destination says that it is Retrofill."""
    if not to.ours:
        raise InputError(
            f"What {to.name} holds cannot be read as a whole",
            mend="Export it and rehearse against the archive: --against export.zip; or --against none",
        )
    if not names_retrofill(to.read):
        raise InputError(
            f"{to.name} does not say that it is a Retrofill server",
            where=f"{to.read}/healthz",
            mend="Check the address and that it is up; for another destination give --against export.zip or none",
        )


def _refused(refused: urllib.error.HTTPError, url: str) -> FinalError | RetryError:
    said = refused.read(_SAID_BYTES).decode("utf-8", "replace").strip()
    if refused.code in {401, 403}:
        return FinalError(
            f"The server does not accept the keys: {refused.code}",
            where=url,
            mend="Check the keys; both are needed",
        )
    if refused.code in {404, 405} or (refused.code == 400 and "path" in said):
        return FinalError(
            f"The server does not know this address: {refused.code}",
            where=url,
            mend="It may be an older version: update it, or rehearse against an export of it",
        )
    if refused.code in {429, 503}:
        return RetryError(
            f"The server is busy: {refused.code} {said}", where=url, mend="Rehearse again later"
        )
    return FinalError(f"The server refuses: {refused.code} {said}", where=url)


def _cut_off() -> RetryError:
    return RetryError("The server's answer was cut off", mend="Rehearse again")
