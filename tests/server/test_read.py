"""The read APIs through the whole application, in one process and without sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import json
import threading
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from tests.engine.stored import DAY_MS, PROJECT, Stored, block
from tests.faults.process import PATIENCE_S
from tests.lake.blocks import START_MS

from retrofill.config import Project
from retrofill.core.person import Person
from retrofill.engine.deletion import Deletions
from retrofill.limits import (
    PERSON_READS_PER_PROJECT,
    READ_THREADS,
    READS_PER_PROJECT,
    Limits,
)
from retrofill.server.app import App
from retrofill.server.read import Reads

from .conftest import KEY, SECRET, FakeEngine

RANGE = {"start": "20260101", "end": "20260102"}
HOURS = {"start": "20260101T00", "end": "20260101T23"}
E = json.dumps({"event_type": "e"})


class Clock:
    """A day after the first event."""

    def __init__(self) -> None:
        self.ms = START_MS + DAY_MS

    def now_ms(self) -> int:
        return self.ms


class Site:
    """An application over one lake, asked in one process."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        events = [
            {"person": one, "user_id": f"user-{one}", "insert_id": str(one)} for one in (1, 2)
        ]
        self.stored = Stored(
            folder / "lake", [block(1, events[:1]), block(2, events[1:])], sealed=1
        )
        self.stored.people = {one: Person(one, f"user-{one}") for one in (1, 2)}
        self.limits = Limits(deletions_per_s=0)
        self.deletions = Deletions(
            folder / "deletions.sqlite", self.clock, days=lambda _: self.limits.deletion_days
        )
        self.late: dict[int, tuple[asyncio.Barrier, asyncio.Event]] = {}
        self.reads = Reads(
            self.stored.reader,
            self.deletions,
            limits=lambda _: self.limits,
            clock=self.clock,
            settle=self.settle,
            export_goes_on=self.export_goes_on,
        )
        self.exports = [0, 0]  # begun, ended
        self.engine = FakeEngine()
        self.engine.projects = {KEY: Project(PROJECT, "shop", KEY, SECRET)}
        self.app = App(clock=Clock())
        self.app.open(self.engine, self.reads.routes())

    @contextlib.asynccontextmanager
    async def export_goes_on(self) -> AsyncIterator[None]:
        self.exports[0] += 1
        try:
            yield
        finally:
            self.exports[1] += 1

    async def settle(self, project: int) -> None:
        for one in self.late.get(project, ()):
            await one.wait()

    def run(
        self, use: Callable[[httpx.AsyncClient], Awaitable[Any]], auth: Any = (KEY, SECRET)
    ) -> Any:
        async def main() -> Any:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://x", auth=auth
            ) as client:
                return await use(client)

        return asyncio.run(main())

    def get(self, path: str, **given: Any) -> httpx.Response:
        url = f"{path}?{urlencode(given, doseq=True)}"
        return self.run(lambda client: client.get(url))  # type: ignore[no-any-return]

    def send(self, method: str, path: str, body: Any = None) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body)
        return self.run(lambda client: client.request(method, path, content=content))  # type: ignore[no-any-return]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    found = Site(tmp_path)
    yield found
    found.reads.close()
    found.deletions.close()


def test_an_export_is_a_zip_of_gzipped_lines(site: Site) -> None:
    answer = site.get("/api/2/export", **HOURS)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/zip")
    assert answer.headers["content-disposition"].startswith("attachment")
    whole = zipfile.ZipFile(io.BytesIO(answer.content))
    text = b"".join(gzip.decompress(whole.read(name)) for name in whole.namelist())
    assert [json.loads(line)["$insert_id"] for line in text.splitlines()] == ["1", "2"]
    assert site.stored.pins == []
    assert site.exports == [1, 1]


def test_an_export_of_nothing_is_404_and_one_over_the_limit_400(site: Site) -> None:
    assert site.get("/api/2/export", start="20250101T00", end="20250101T23").status_code == 404
    site.limits = Limits(export_bytes=10)
    answer = site.get("/api/2/export", **HOURS)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid")
    assert site.stored.pins == []
    assert site.exports == [2, 2]


def test_people_are_searched_and_shown(site: Site) -> None:
    found = site.get("/api/2/usersearch", user="user-1").json()
    assert found == {
        "matches": [{"user_id": "user-1", "amplitude_id": 1}],
        "type": "match_user_or_device_id",
    }
    shown = site.get("/api/2/useractivity", user=1).json()
    assert shown["userData"]["num_events"] == 1
    assert [row["$insert_id"] for row in shown["events"]] == ["1"]
    unknown = site.get("/api/2/useractivity", user=77, limit=5, offset=0, direction="earliest")
    assert (unknown.status_code, unknown.json()["events"]) == (200, [])


def test_who_waits_for_late_events_keeps_no_other_project_waiting(site: Site) -> None:
    other, count = "a" * 32, READ_THREADS + 1
    site.engine.projects[other] = Project(PROJECT + 1, "other", other, SECRET)
    search = "/api/2/usersearch?user=user-1"

    async def use(client: httpx.AsyncClient) -> tuple[httpx.Response, list[httpx.Response]]:
        come, done = site.late[PROJECT] = asyncio.Barrier(count + 1), asyncio.Event()
        late = [asyncio.create_task(client.get(search)) for _ in range(count)]
        await come.wait()
        listed = await client.get("/api/2/deletions/users?start_day=2026-01-01&end_day=2026-01-02")
        assert listed.status_code == 200
        found = await client.get(search, auth=(other, SECRET))
        assert not any(task.done() for task in late)
        done.set()
        return found, await asyncio.gather(*late)

    found, late = site.run(use)
    assert (found.status_code, found.json()["matches"]) == (200, [])
    assert [len(one.json()["matches"]) for one in late] == [1] * count


def test_charts_answer_in_their_shapes(site: Site) -> None:
    users = site.get("/api/2/users", **RANGE).json()["data"]
    assert (users["series"], users["seriesLabels"], users["xValues"]) == (
        [[2, 0]],
        [0],
        ["2026-01-01", "2026-01-02"],
    )
    assert users["seriesMeta"] == [{"segmentIndex": 0}]
    assert site.get("/api/2/users", m="new", i=7, **RANGE).json()["data"]["series"] == [[2]]
    found = site.get("/api/2/events/segmentation", e=E, m="totals", n="any", i=1, **RANGE).json()[
        "data"
    ]
    assert (found["series"], found["seriesCollapsed"]) == ([[2, 0]], [[{"setId": "", "value": 2}]])
    assert site.get("/api/2/sessions/average", **RANGE).json()["data"]["series"] == [[0, 0]]
    assert site.get("/api/2/sessions/peruser", **RANGE).json()["data"]["series"] == [[0, 0]]
    assert len(site.get("/api/2/sessions/length", **RANGE).json()["data"]["xValues"]) == 9
    (event_type,) = site.get("/api/2/events/list").json()["data"]
    assert (event_type["value"], event_type["totals"]) == ("e", 2)


def test_what_connectors_ask_for_and_we_do_not_have_is_empty(site: Site) -> None:
    for version in (2, 3):
        assert site.get(f"/api/{version}/annotations").json() == {"data": []}
    assert site.get("/api/3/cohorts").json() == {"cohorts": []}


def test_mappings_are_read(site: Site) -> None:
    site.stored.aliases = {"user-1": "user-2"}
    for given in ('["user-1","user-2"]', "user-1,user-2", ["user-1", "user-2"]):
        found = site.get("/api/2/usermap", user_ids=given).json()
        assert found["user-1"]["mapped_to"] == [{"amplitude_id": 2, "user_id": "user-2"}]
        assert found["user-2"]["mapped_from"] == [{"amplitude_id": 1, "user_id": "user-1"}]


def test_a_zero_in_a_text_is_a_character_as_any_other(site: Site) -> None:
    for zero in ("\0", "a\0'b", "\0' OR 1=1 --"):
        assert site.get("/api/2/usermap", user_ids=zero).json() == {zero: {}}
        assert site.get("/api/2/usersearch", user=zero).json()["matches"] == []
        for name in ("user_id", "platform", "gp:plan", "device_id"):
            wanted = {"subprop_type": "user", "subprop_key": name, "subprop_op": "is"}
            asked = json.dumps(
                {"event_type": "e", "filters": [{**wanted, "subprop_value": [zero]}]}
            )
            found = site.get("/api/2/events/segmentation", e=asked, **RANGE)
            assert found.json()["data"]["series"] == [[0, 0]], (name, found.text)
        asked = json.dumps({"event_type": zero})
        assert site.get("/api/2/events/segmentation", e=asked, **RANGE).status_code == 200


REFUSED = [
    ("export", {}, "start"),
    ("export", {"start": "20260101T00"}, "end"),
    ("export", {"start": "20260101", "end": "20260102"}, "start must be an hour"),
    ("export", {**HOURS, "unknown": 1}, "unknown"),
    ("usersearch", {}, "user"),
    ("useractivity", {}, "user"),
    ("useractivity", {"user": "ada"}, "integer"),
    ("useractivity", {"user": 2**63}, "user must be"),
    ("useractivity", {"user": 1, "limit": 1001}, "limit must be 0 to 1000"),
    ("useractivity", {"user": 1, "offset": -1}, "offset"),
    ("useractivity", {"user": 1, "direction": "up"}, "direction"),
    ("users", {}, "start, end"),
    ("users", {**RANGE, "m": "old"}, "m must be"),
    ("users", {**RANGE, "i": 2}, "i must be"),
    ("users", {**RANGE, "i": -300000}, "i must be"),
    ("users", {**RANGE, "g": "shoe size"}, "shoe size"),
    ("users", {**RANGE, "s": "{"}, "JSON"),
    ("users", {**RANGE, "start": ["20260101", "20260102"]}, "2 times"),
    ("sessions/average", {"start": "20260101"}, "end"),
    ("sessions/average", {**RANGE, "g": "country"}, "g"),
    ("sessions/length", {**RANGE, "timeHistogramConfigBinMin": 1}, "timeHistogramConfigBinMin"),
    ("events/list", {"x": 1}, "x"),
    ("events/segmentation", RANGE, "give e"),
    ("events/segmentation", {**RANGE, "e": E, "m": "formula"}, "m must be"),
    ("events/segmentation", {**RANGE, "e": E, "m": "sums"}, "group_by"),
    ("events/segmentation", {**RANGE, "e": E, "formula": "A"}, "formula"),
    ("events/segmentation", {**RANGE, "e": E, "rollingWindow": 7}, "rollingWindow"),
    ("events/segmentation", {**RANGE, "e": E, "limit": 1001}, "limit"),
    ("events/segmentation", {**RANGE, "e": E, "n": "inactive"}, "n must be"),
    ("usermap", {}, "user_ids"),
    ("usermap", {"user_ids": "[1"}, "JSON"),
    ("deletions/users", {"start_day": "2026-01-01"}, "end_day"),
    ("deletions/users", {"start_day": "20260101", "end_day": "2026-01-02"}, "YYYY-MM-DD"),
]


@pytest.mark.parametrize(("path", "given", "says"), REFUSED)
def test_a_parameter_that_is_not_understood_is_refused(
    site: Site, path: str, given: dict[str, Any], says: str
) -> None:
    answer = site.get(f"/api/2/{path}", **given)
    error = answer.json()["error"]
    assert (answer.status_code, error["http_code"], error["type"]) == (400, 400, "invalid")
    assert says in error["message"]


def test_without_the_keys_nothing_is_read(site: Site) -> None:
    for auth in (None, (KEY, "wrong"), ("wrong", SECRET)):
        answer = site.run(lambda client: client.get("/api/2/events/list"), auth=auth)
        assert (answer.status_code, answer.json()["error"]["http_code"]) == (401, 401)


@pytest.mark.parametrize(
    ("url", "most"),
    [
        ("/api/2/events/list", READS_PER_PROJECT),
        ("/api/2/export?start=20260101T00&end=20260101T01", READS_PER_PROJECT),
        ("/api/2/usersearch?user=ada", PERSON_READS_PER_PROJECT),
    ],
)
def test_one_request_too_many_at_once_is_429(
    site: Site, monkeypatch: pytest.MonkeyPatch, url: str, most: int
) -> None:
    gate = threading.Event()
    view = site.stored.reader.view
    monkeypatch.setattr(
        site.stored.reader, "view", lambda number: gate.wait(PATIENCE_S) and view(number)
    )

    async def crowd(client: httpx.AsyncClient) -> tuple[int, list[int]]:
        under_way = [asyncio.ensure_future(client.get(url)) for _ in range(most)]
        while sum(site.reads._under_way.values()) < most:  # noqa: ASYNC110 # the counters tell no event
            await asyncio.sleep(0)
        refused = await client.get(url)
        gate.set()
        return refused.status_code, [(await one).status_code for one in under_way]

    assert site.run(crowd) == (429, [200] * most)
    assert site.run(lambda client: client.get(url)).status_code == 200
    assert site.stored.pins == []


def test_a_deletion_is_asked_for_listed_and_taken_back(site: Site) -> None:
    body = {
        "amplitude_ids": [1],
        "user_ids": ["user-2"],
        "requester": "me",
        "include_mapped_user_ids": "True",
    }
    day = f"2026-01-{2 + Limits().deletion_days:02}"
    (job,) = site.send("POST", "/api/2/deletions/users", body).json()
    entry = {"amplitude_id": 1, "requested_on_day": "2026-01-02", "requester": "me"}
    assert job["amplitude_ids"][0] == {**entry, "user_id": "user-1"}
    assert {key: job[key] for key in job if key != "amplitude_ids"} == {
        "day": day,
        "status": "staging",
    }
    (listed,) = site.get(
        "/api/2/deletions/users", start_day="2026-01-02", end_day="2026-02-01"
    ).json()
    assert listed["active_scrub_done_date"] is None
    assert listed["amplitude_ids"] == [entry, {**entry, "amplitude_id": 2}]
    assert site.send("DELETE", f"/api/2/deletions/users/1/{day}").json() == entry
    assert site.send("DELETE", f"/api/2/deletions/users/1/{day}").status_code == 400
    assert (
        site.get("/api/2/deletions/users", start_day="2025-01-02", end_day="2025-02-01").json()
        == []
    )


@pytest.mark.parametrize("flag", ["ignore_invalid_id", "ignore_invalid_ids", "delete_from_org"])
@pytest.mark.parametrize("value", [True, "true", "True"])
def test_unknown_ids_are_listed_when_they_are_to_be_ignored(
    site: Site, flag: str, value: Any
) -> None:
    body = {"amplitude_ids": [1, 99], "requester": "me"}
    assert site.send("POST", "/api/2/deletions/users", {**body, flag: False}).status_code == 400
    (job,) = site.send("POST", "/api/2/deletions/users", {**body, flag: value}).json()
    assert (job["invalid_ids"], [one["amplitude_id"] for one in job["amplitude_ids"]]) == (
        [99],
        [1],
    )
    assert ("app" in job) == (flag == "delete_from_org")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        {},
        {"amplitude_ids": []},
        {"amplitude_ids": ["x"]},
        {"user_ids": [{}]},
        {"amplitude_ids": [2**70]},
    ],
)
def test_a_deletion_that_is_not_understood_is_400(site: Site, body: Any) -> None:
    assert site.send("POST", "/api/2/deletions/users", body).status_code == 400


def test_people_may_be_deleted_by_one_request_a_second(site: Site) -> None:
    site.limits = Limits()
    body = {"amplitude_ids": [1], "requester": "me"}
    assert site.send("POST", "/api/2/deletions/users", body).status_code == 200
    refused = site.send("POST", "/api/2/deletions/users", body)
    assert (refused.status_code, refused.json()["error"]["http_code"]) == (429, 429)
    days = {"start_day": "2026-01-02", "end_day": "2026-02-01"}
    assert site.get("/api/2/deletions/users", **days).status_code == 200
    site.clock.ms += 1000
    assert site.send("POST", "/api/2/deletions/users", body).status_code == 200


def test_a_deletion_that_is_too_large_is_413(site: Site) -> None:
    assert site.send("POST", "/api/2/deletions/users", b" " * 300_000).status_code == 413


def test_another_method_is_told_every_one_that_a_path_has(site: Site) -> None:
    answer = site.send("PATCH", "/api/2/deletions/users")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, OPTIONS, POST")


def test_a_day_or_id_that_cannot_be_is_400(site: Site) -> None:
    for path in ("x/2026-01-20", "1/20260120", f"{2**70}/2026-01-20"):
        assert site.send("DELETE", f"/api/2/deletions/users/{path}").status_code == 400
