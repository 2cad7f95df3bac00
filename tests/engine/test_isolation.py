"""Several projects in one installation: nothing that happens in one is felt in another.

Both have a device, a user and an insert_id of the same name. One is worn out in every way that there is; the other one
must answer, store and show as if it were alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from retrofill.clock import SystemClock
from retrofill.config import Settings
from retrofill.core import event as events
from retrofill.core.event import Batch
from retrofill.core.throttle import Accepted, Silenced, Throttled
from retrofill.engine.admission import ProjectSettings
from retrofill.engine.ingest import Engine, Outcome
from retrofill.engine.people import activity, search
from retrofill.engine.query import View

pytestmark = pytest.mark.slow

WORN, OTHER = 1, 2


class House:
    """One engine with two projects."""

    def __init__(self, data: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self.engine = Engine.open(Settings(data=data, limits="amplitude"), clock=SystemClock())
        for name in ("worn", "other"):
            self.engine.add_project(self.engine.projects_store.add(name, name, "secret"))
        self.loop.run_until_complete(self.engine.start())

    def close(self) -> None:
        self.loop.run_until_complete(self.engine.close())
        self.loop.close()

    def send(self, project: int, *wire: dict[str, Any], path: str = "/batch") -> Outcome:
        same = {"event_type": "View", "user_id": "ann-111", "device_id": "phone-1"}
        found = [events.decode_one(msgspec.json.encode({**same, **one})) for one in wire]
        body = events.encode(found)
        batch = Batch(project, path, body, found, len(body), SystemClock().now_ms())
        return self.loop.run_until_complete(self.engine.ingest(batch))

    def set(self, project: int, **limits: int) -> None:
        self.engine.set_settings(project, ProjectSettings(dict(limits)))

    def ann(self, project: int) -> int:
        found = self.engine.state.project(project).users.get("ann-111")
        assert found
        return found

    def table(self, project: int) -> dict[str, Any]:
        person = self.engine.person(project, self.ann(project))
        assert person is not None
        return person.properties

    def ask(self, project: int, question: Callable[[View], Any]) -> Any:
        with self.engine.reader().view(project) as view:
            return question(view)


def rates(house: House) -> None:
    house.set(WORN, batch_eps=1, window_s=2)
    assert isinstance(house.send(WORN, *[{}] * 3), Throttled)


def quota(house: House) -> None:
    house.set(WORN, daily_quota=1)
    assert isinstance(house.send(WORN, {}), Throttled)


def requests(house: House) -> None:
    house.set(WORN, project_eps=1, window_s=1)
    assert isinstance(house.send(WORN, {}, {}), Throttled)


def silence(house: House) -> None:
    house.engine.set_settings(WORN, ProjectSettings(silenced_devices=["phone-1"]))
    assert isinstance(house.send(WORN, {}), Silenced)


def updates(house: House) -> None:
    house.set(WORN, property_updates_per_h=1)
    for value in (1, 2):
        house.send(WORN, {"user_properties": {"plan": value}})
    assert house.table(WORN) == {"plan": 1}


def insert_ids(house: House) -> None:
    house.send(WORN, *[{"insert_id": f"i{number}"} for number in range(1, 20)])


def properties(house: House) -> None:
    house.send(WORN, {"user_properties": {"secret": 1}, "platform": "iOS"})
    acme = {"groups": {"org": "acme"}}
    house.send(WORN, {"event_type": "$groupidentify", **acme, "group_properties": {"secret": 1}})


def merge(house: House) -> None:
    house.send(WORN, {"device_id": "laptop", "user_id": None}, {"device_id": "laptop"})


def alias(house: House) -> None:
    mapping = {"event_type": "$usermap", "user_properties": {"global_user_id": "bob-222"}}
    assert isinstance(house.send(WORN, mapping, path="/usermap"), Accepted)
    assert house.engine.aliases(WORN) == {"ann-111": "bob-222"}


def deletion(house: House) -> None:
    house.send(WORN, {}, {"device_id": "laptop"})
    house.loop.run_until_complete(house.engine.forget(WORN, [house.ann(WORN)]))
    assert house.ask(WORN, lambda view: search(view, "ann-111")).matches == []


# Insert ids first: all that the other project sends is known in this one then.
WAYS = [
    *(insert_ids, rates, quota, requests, silence),
    *(updates, properties, merge, alias, deletion),
]


def test_what_wears_out_one_project_is_not_felt_in_another(tmp_path: Path) -> None:
    house = House(tmp_path)
    try:
        assert isinstance(house.send(OTHER, {"user_properties": {"plan": 0}}), Accepted)
        ann = house.ann(OTHER)
        for number, wear in enumerate(WAYS, 1):
            wear(house)
            sent = {"insert_id": f"i{number}", "groups": {"org": "acme"}}
            outcome = house.send(OTHER, {**sent, "user_properties": {"plan": number}})
            assert isinstance(outcome, Accepted), wear.__name__
            shown = house.ask(
                OTHER, lambda view: activity(view, ann, offset=0, limit=1, latest=True)
            )
            assert shown["userData"]["num_events"] == number + 1, wear.__name__
            assert shown["userData"]["device_ids"] == ["phone-1"]
            (last,) = msgspec.json.decode(msgspec.json.encode(shown["events"]))
            assert (last["user_properties"], last["group_properties"]) == ({"plan": number}, {})
            assert (last["platform"], house.engine.aliases(OTHER)) == (None, {})
            house.set(WORN)
        for text, count in (("ann-111", 1), ("laptop", 0)):
            matches = house.ask(OTHER, lambda view, text=text: search(view, text)).matches
            assert len(matches) == count
    finally:
        house.close()
