"""Read APIs over HTTP: parameters in, the engine's answer out.

A handler reads its parameters, refusing what it does not know, and runs one query in a thread of the readers; the
loop only waits. A project may have READS_PER_PROJECT requests under way, one person's look-ups
PERSON_READS_PER_PROJECT; the next is answered 429. The project is known already: `request.state.project`.
Source: contract, read.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from retrofill.clock import Clock
from retrofill.core import mend
from retrofill.core.throttle import Tally
from retrofill.engine import charts, condition, deletion, people
from retrofill.engine.deletion import Deletions, Job
from retrofill.engine.export import Export, Hours, export, hours_of
from retrofill.engine.query import Reader, View
from retrofill.errors import InputError
from retrofill.limits import (
    ACTIVITY_EVENTS_MAX,
    CHART_GROUPS_MAX,
    DELETION_BYTES_MAX,
    DELETIONS_PER_PROJECT,
    PERSON_READS_PER_PROJECT,
    READ_THREADS,
    READS_PER_PROJECT,
    Limits,
)
from retrofill.server import body as bodies

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

T = TypeVar("T")

_INTERVALS = (1, 7, 30)
_SHORT_INTERVALS = (-300_000, -3_600_000)
_USERMAP_IDS_MAX = 100
_decode_ids = msgspec.json.Decoder(list[str | int]).decode


async def _nobody_waits(_project: int) -> None:
    pass


class Reads:
    """The read endpoints of one server. close: waits for what runs.

    settle: waits until what came late to a project shows. A view waits too, but in a thread, which is then missing to
    all other projects: as long as a change of history takes that is under way. export_goes_on: keeps what needs much
    memory and can wait from beginning beside an export.
    """

    def __init__(
        self,
        reader: Reader,
        deletions: Deletions,
        *,
        limits: Callable[[int], Limits],
        clock: Clock,
        settle: Callable[[int], Awaitable[None]] = _nobody_waits,
        export_goes_on: Callable[
            [], contextlib.AbstractAsyncContextManager[None]
        ] = contextlib.nullcontext,
    ) -> None:
        self._settle, self._export_goes_on = settle, export_goes_on
        self._reader = reader
        self._deletions = deletions
        self._limits = limits
        self._clock = clock
        self._threads = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read")
        self._under_way: Counter[tuple[int, str]] = Counter()
        self._deletions_asked: dict[int, Tally] = {}

    def close(self) -> None:
        """Wait for what runs."""
        self._threads.shutdown()

    def routes(self) -> list[Route]:
        """Return every route."""
        return [
            Route("/api/2/export", self.export),
            Route("/api/2/usersearch", self.search),
            Route("/api/2/useractivity", self.activity),
            Route("/api/2/users", self.users),
            Route("/api/2/sessions/average", self.session_average),
            Route("/api/2/sessions/peruser", self.sessions_per_user),
            Route("/api/2/sessions/length", self.session_lengths),
            Route("/api/2/events/list", self.event_types),
            Route("/api/2/events/segmentation", self.segmentation),
            Route("/api/2/usermap", self.aliases),
            Route("/api/2/annotations", _empty_data),
            Route("/api/3/annotations", _empty_data),
            Route("/api/3/cohorts", _no_cohorts),
            Route("/api/1/project/rows", self.rows),
            Route("/api/2/deletions/users", self.deletions),
            Route("/api/2/deletions/users", self.delete, methods=["POST"]),
            Route("/api/2/deletions/users/{amplitude_id}/{day}", self.keep, methods=["DELETE"]),
        ]

    async def export(self, request: Request) -> Response:
        """GET /api/2/export."""
        given = Given(request, "start", "end")
        hours = hours_of(given.text("start"), given.text("end"))
        number = _project(request)
        most = self._limits(number).export_bytes
        return await self.archive(request, hours, bytes_max=most, empty="No data in these hours")

    async def search(self, request: Request) -> Response:
        """GET /api/2/usersearch."""
        user = Given(request, "user").text("user")
        return await self._person(request, lambda view: people.search(view, user))

    async def activity(self, request: Request) -> Response:
        """GET /api/2/useractivity."""
        given = Given(request, "user", "offset", "limit", "direction")
        user = given.number("user", None, least=0, most=2**63 - 1)
        offset = given.number("offset", 0, least=0, most=2**31 - 1)
        limit = given.number("limit", ACTIVITY_EVENTS_MAX, least=0, most=ACTIVITY_EVENTS_MAX)
        latest = given.one_of("direction", ("latest", "earliest")) == "latest"
        return await self._person(
            request,
            lambda view: people.activity(view, user, offset=offset, limit=limit, latest=latest),
        )

    async def users(self, request: Request) -> Response:
        """GET /api/2/users."""
        given = Given(request, "start", "end", "m", "i", "s", "g", many=("s",))
        metric = {"active": charts.active, "new": charts.new}[given.one_of("m", ("active", "new"))]
        when = given.range(_INTERVALS)
        segments = condition.segments_of(given.all("s"))
        group = given.get("g")
        return await self._chart(request, lambda view: metric(view, when, segments, group))

    async def session_average(self, request: Request) -> Response:
        """GET /api/2/sessions/average."""
        when = Given(request, "start", "end").range((1,))
        return await self._chart(request, lambda view: charts.session_average(view, when))

    async def sessions_per_user(self, request: Request) -> Response:
        """GET /api/2/sessions/peruser."""
        when = Given(request, "start", "end").range((1,))
        return await self._chart(request, lambda view: charts.sessions_per_user(view, when))

    async def session_lengths(self, request: Request) -> Response:
        """GET /api/2/sessions/length."""
        when = Given(request, "start", "end").range((1,))
        return await self._chart(request, lambda view: charts.session_lengths(view, when))

    async def event_types(self, request: Request) -> Response:
        """GET /api/2/events/list."""
        Given(request)
        now_ms = self._clock.now_ms()
        return await self._chart(request, lambda view: charts.event_types(view, now_ms=now_ms))

    async def rows(self, request: Request) -> Response:
        """GET /api/1/project/rows."""
        Given(request)
        return await self.answer(
            request, "reads", READS_PER_PROJECT, lambda: self._view(request, charts.rows)
        )

    async def segmentation(self, request: Request) -> Response:
        """GET /api/2/events/segmentation."""
        given = Given(
            request,
            "e",
            "e2",
            "m",
            "n",
            "start",
            "end",
            "i",
            "s",
            "g",
            "g2",
            "limit",
            many=("e", "s"),
        )
        given.one_of("n", ("any", "active"))  # no event type is inactive
        texts = given.all("e") + given.all("e2")
        if not 1 <= len(texts) <= 2:  # noqa: PLR2004 # contract, read 5: e and e2
            raise InputError(f"{len(texts)} events, give e, and e2 for a second one")
        asked = charts.Question(
            [condition.event_of(text) for text in texts],
            given.range((*_INTERVALS, *_SHORT_INTERVALS)),
            given.one_of("m", charts.METRICS),
            condition.segments_of(given.all("s")),
            [one for one in (given.get("g"), given.get("g2")) if one is not None],
            given.number("limit", 100, least=1, most=CHART_GROUPS_MAX),
        )
        return await self._chart(request, lambda view: charts.segmentation(view, asked))

    async def aliases(self, request: Request) -> Response:
        """GET /api/2/usermap."""
        users = _user_ids(Given(request, "user_ids", many=("user_ids",)).all("user_ids"))
        number = _project(request)
        return await self.answer(
            request, "reads", READS_PER_PROJECT, lambda: people.mapped(self._reader, number, users)
        )

    async def deletions(self, request: Request) -> Response:
        """GET /api/2/deletions/users."""
        given = Given(request, "start_day", "end_day")
        first, last = given.day("start_day"), given.day("end_day")
        number = _project(request)
        return await self.answer(
            request,
            "deletions",
            DELETIONS_PER_PROJECT,
            lambda: [_job(job, number) for job in self._deletions.jobs(number, first, last)],
            of_rows=False,
        )

    async def delete(self, request: Request) -> Response:
        """POST /api/2/deletions/users."""
        asked = _deletion(await bodies.gather(request, most=DELETION_BYTES_MAX))
        number = _project(request)
        self._paced(number)

        def add() -> list[Any]:
            job, invalid = self._deletions.add(self._reader, number, asked)
            answer = _job(job, number, with_user_ids=asked.with_user_ids, done=False)
            return [{**answer, "invalid_ids": invalid} if asked.ignore or asked.org else answer]

        return await self.answer(request, "deletions", DELETIONS_PER_PROJECT, add)

    async def keep(self, request: Request) -> Response:
        """DELETE /api/2/deletions/users/{amplitude_id}/{day}."""
        amplitude_id = _amplitude_id("amplitude_id", request.path_params["amplitude_id"])
        day = _day("day", request.path_params["day"])
        number = _project(request)
        return await self.answer(
            request,
            "deletions",
            DELETIONS_PER_PROJECT,
            lambda: _entry(
                self._deletions.take_back(number, amplitude_id, day), with_user_id=False
            ),
            of_rows=False,
        )

    async def _chart(self, request: Request, ask: Callable[[View], Any]) -> Response:
        return await self.answer(
            request, "reads", READS_PER_PROJECT, lambda: {"data": self._view(request, ask)}
        )

    async def _person(self, request: Request, ask: Callable[[View], Any]) -> Response:
        return await self.answer(
            request, "people", PERSON_READS_PER_PROJECT, lambda: self._view(request, ask)
        )

    def _view(self, request: Request, ask: Callable[[View], T]) -> T:
        with self._reader.view(_project(request)) as view:
            return ask(view)

    async def archive(
        self, request: Request, hours: Hours, *, bytes_max: int, empty: str
    ) -> Response:
        """Answer with an archive of rows. empty: what is said if there are none."""
        number = _project(request)
        async with contextlib.AsyncExitStack() as held:
            held.enter_context(self.place(number, "reads", READS_PER_PROJECT))
            await held.enter_async_context(self._export_goes_on())
            await self._settle(number)
            found = await self.run(lambda: export(self._reader, number, hours, bytes_max=bytes_max))
            if found is None:
                raise HTTPException(404, empty)
            return _Archive(found, self._threads, held.pop_all(), number)

    async def answer(
        self,
        request: Request,
        kind: str,
        most: int,
        ask: Callable[[], Any],
        *,
        of_rows: bool = True,
    ) -> Response:
        """Answer with what a question finds, as JSON. most: requests of the project and this kind at once.

        of_rows: whether it opens a view.
        """
        number = _project(request)
        with self.place(number, kind, most):
            if of_rows:
                await self._settle(number)
            body = await self.run(lambda: msgspec.json.encode(ask()))
        return Response(body, media_type="application/json")

    def _paced(self, project: int) -> None:
        """Count one request to delete; refuse it if the project has had as many as it may within this second."""
        most = self._limits(project).deletions_per_s
        tally = self._deletions_asked.setdefault(project, Tally())
        now_ms = self._clock.now_ms()
        if most and tally.wait_s(1, most=most, window_s=1, now_ms=now_ms):
            raise HTTPException(
                429, f"{most} requests to delete a second: send this one again later"
            )
        tally.count(1, window_s=1, now_ms=now_ms)

    async def run(self, ask: Callable[[], T]) -> T:
        """Call something in a reader's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, ask)

    @contextlib.contextmanager
    def place(self, project: int, kind: str, most: int) -> Iterator[None]:
        """Count a request of a project and a kind while it is under way. Raises HTTPException 429 if there are `most`."""
        key = (project, kind)
        if self._under_way[key] >= most:
            raise HTTPException(
                429, f"{most} requests of this project are under way: send this one again later"
            )
        self._under_way[key] += 1
        try:
            yield
        finally:
            self._under_way[key] -= 1


class _Archive(Response):
    """An export on its way: each piece is made in a reader's thread when the one before it was taken."""

    def __init__(
        self,
        found: Export,
        threads: ThreadPoolExecutor,
        held: contextlib.AsyncExitStack,
        project: int,
    ) -> None:
        self._found = found
        self._threads = threads
        self._held = held
        self.background = None
        self.status_code = 200
        self.init_headers(
            {
                "content-type": "application/zip",
                "content-disposition": f'attachment; filename="{project}.zip"',
            }
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; whatever happens, the snapshot is let go."""
        loop = asyncio.get_running_loop()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for piece in self._pieces():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._held.aclose()
            # A piece that is being made ends first: one thread at a time may use the snapshot.
            await asyncio.shield(loop.run_in_executor(self._threads, self._found.close))

    async def _pieces(self) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        while piece := await loop.run_in_executor(self._threads, next, self._found, b""):
            yield piece


class Given:
    """The parameters of one request. What is not named is refused, and so is a second value unless in `many`."""

    def __init__(self, request: Request, *known: str, many: tuple[str, ...] = ()) -> None:
        self._values: dict[str, list[str]] = {}
        for name, value in request.query_params.multi_items():
            self._values.setdefault(name, []).append(value)
        unknown = self._values.keys() - set(known)
        if unknown:
            raise InputError(f"Parameters that are not supported: {', '.join(sorted(unknown))}")
        for name, values in self._values.items():
            if len(values) > 1 and name not in many:
                raise InputError(f"{name} is given {len(values)} times")

    def get(self, name: str) -> str | None:
        """Return a value, None if it is absent or empty."""
        return (self._values.get(name) or [""])[0] or None

    def all(self, name: str) -> list[str]:
        """Return every value."""
        return [value for value in self._values.get(name, []) if value]

    def text(self, name: str) -> str:
        """Return a value that must be there."""
        value = self.get(name)
        if value is None:
            raise InputError(f"Missing parameter: {name}")
        return value

    def number(self, name: str, default: int | None, *, least: int, most: int) -> int:
        """Return an integer, required if there is no default."""
        value = self.text(name) if default is None else self.get(name)
        if value is None:
            assert default is not None
            return default
        try:
            number = int(value)
        except ValueError:
            raise InputError(f"{name} must be an integer, found {value[:40]!r}") from None
        if not least <= number <= most:
            raise InputError(f"{name} must be {least} to {most}, found {value[:40]}")
        return number

    def one_of(self, name: str, allowed: tuple[str, ...]) -> str:
        """Return one of these, the first if it is absent."""
        value = self.get(name) or allowed[0]
        if value not in allowed:
            raise InputError(f"{name} must be one of {', '.join(allowed)}, found {value!r}")
        return value

    def range(self, intervals: tuple[int, ...]) -> charts.Range:
        """Return the days of `start` and `end`, cut by `i`."""
        missing = [name for name in ("start", "end") if self.get(name) is None]
        if missing:
            raise InputError(f"Missing parameters: {', '.join(missing)}")
        interval = self.get("i") or "1"
        if interval not in map(str, intervals):
            raise InputError(
                f"i must be one of {', '.join(map(str, intervals))}, found {interval!r}"
            )
        return charts.range_of(self.text("start"), self.text("end"), int(interval))

    def day(self, name: str) -> date:
        """Return a day as YYYY-MM-DD."""
        return _day(name, self.text(name))


def _day(name: str, text: str) -> date:
    try:
        if len(text) != len("YYYY-MM-DD"):
            raise ValueError
        return date.fromisoformat(text)
    except ValueError:
        raise InputError(f"{name} must be a day as YYYY-MM-DD, found {text!r}") from None


def _project(request: Request) -> int:
    number: int = request.state.project.number
    return number


async def _empty_data(request: Request) -> Response:
    """GET /api/2/annotations: there are none."""
    return Response(b'{"data":[]}', media_type="application/json")


async def _no_cohorts(request: Request) -> Response:
    """GET /api/3/cohorts: there are none."""
    return Response(b'{"cohorts":[]}', media_type="application/json")


def _user_ids(texts: list[str]) -> list[str]:
    """Read `user_ids`: a JSON array, values separated by commas, or the parameter several times."""
    users: list[str] = []
    for text in texts:
        if text.lstrip().startswith("["):
            listed = bodies.read_json(
                text.encode(), _decode_ids, wrong="user_ids is no JSON array of ids"
            )
            users += map(str, listed)
        else:
            users += [one for one in text.split(",") if one]
    if not 1 <= len(users) <= _USERMAP_IDS_MAX:
        raise InputError(f"user_ids has {len(users)} ids, give 1 to {_USERMAP_IDS_MAX}")
    return users


# Deletion.


class _Deletion(msgspec.Struct):
    """The body of a deletion request. Both spellings of the flag. Source: contract, read 7, "flag name"."""

    amplitude_ids: list[int | str] | None = None
    user_ids: list[str | int] | None = None
    requester: str | None = None
    ignore_invalid_id: bool | str | None = None
    ignore_invalid_ids: bool | str | None = None
    delete_from_org: bool | str | None = None
    include_mapped_user_ids: bool | str | None = None


_decode_deletion = msgspec.json.Decoder(_Deletion).decode


def _deletion(body: bytes) -> deletion.Request:
    found = bodies.read_json(body, _decode_deletion, wrong="The body is not understood")
    return deletion.Request(
        [_amplitude_id("amplitude_ids", str(one)) for one in found.amplitude_ids or ()],
        [str(one) for one in found.user_ids or ()],
        found.requester or "",
        _true(found.ignore_invalid_id) or _true(found.ignore_invalid_ids),
        _true(found.delete_from_org),
        _true(found.include_mapped_user_ids),
    )


def _amplitude_id(name: str, text: str) -> int:
    number = mend.natural(text)
    if number is None:
        raise InputError(f"{name} must be an Amplitude ID, found {text[:40]!r}")
    return number


def _true(value: bool | str | None) -> bool:  # noqa: FBT001 # a flag as it was sent
    return value is True or (isinstance(value, str) and value.lower() == "true")


def _job(
    job: Job, project: int, *, with_user_ids: bool = False, done: bool = True
) -> dict[str, Any]:
    return {
        "day": job.day,
        "status": job.status,
        "amplitude_ids": [_entry(one, with_user_id=with_user_ids) for one in job.entries],
        **({"app": project} if job.org else {}),
        **({"active_scrub_done_date": job.done_on} if done else {}),
    }


def _entry(entry: deletion.Entry, *, with_user_id: bool) -> dict[str, Any]:
    return {
        "amplitude_id": entry.amplitude_id,
        "requested_on_day": entry.requested_on_day,
        "requester": entry.requester,
        **({"user_id": entry.user_id} if with_user_id else {}),
    }
