"""The official Python SDK, unmodified, against a real server: everything it is given arrives exactly once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from amplitude import Amplitude, BaseEvent, Config, EventOptions, Identify, Revenue
from tests.faults.process import API_KEY, Process, Row

pytestmark = pytest.mark.slow

# An event that is put back while the thread that sends them ends lies there until the next one comes: an SDK's own
# race. Whoever has waited longer than any pause it makes (30 s for a throttled device) asks it to send what it has.
STUCK_S = 40
FLUSHES = 5
# It waits twice as long before every second try: twelve, if it is told nothing, are nine seconds, sixteen 38. A busy
# machine may need more than nine to stop and start a server.
TRIES = 16
Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    servers: list[Process] = []

    def started(limits: str = "none") -> Process:
        server = Process(tmp_path / "data", settings="STOP_FIRST_S=60", limits=limits)
        servers.append(server)
        server.start()
        server.wait_until_ready()
        return server

    yield started
    for server in servers:
        server.end()


class Sdk:
    """A client, and what it told its caller of each event."""

    def __init__(
        self, server: Process, *, path: str = "/2/httpapi", per_request: int = 100
    ) -> None:
        self.told: dict[str, int] = {}
        self._given = 0
        self._changed = threading.Condition()
        self.client = Amplitude(
            API_KEY,
            Config(
                server_url=server.url + path,
                flush_queue_size=per_request,
                flush_interval_millis=50,
                flush_max_retries=TRIES,
                callback=self._tell,
            ),
        )

    def _tell(self, event: BaseEvent, code: int, message: str | None = None) -> None:
        del message
        with self._changed:
            key = str(event.insert_id)
            assert key not in self.told, "told twice"
            self.told[key] = code
            self._changed.notify_all()

    def track(self, event: BaseEvent) -> None:
        self._given += 1
        self.client.track(event)

    def also(self, call: Callable[..., None], *args: Any) -> None:
        """Call another method that makes one event."""
        self._given += 1
        call(*args)

    def wait_for(self, events: int) -> None:
        """Wait until the caller was told of so many events."""
        for _ in range(FLUSHES):
            with self._changed:
                if self._changed.wait_for(lambda: len(self.told) >= events, STUCK_S):
                    return
            self.client.flush()
        raise AssertionError(f"{len(self.told)} of {events}: {Counter(self.told.values())}")

    def delivered(self) -> Counter[int]:
        """Wait until the caller was told of every event; return how often which code."""
        self.wait_for(self._given)
        assert len(self.told) == self._given
        self.client.shutdown()
        return Counter(self.told.values())


def click(number: int, *, device: str = "device-1", user: str = "user-1", **more: Any) -> BaseEvent:
    return BaseEvent(
        event_type="click",
        user_id=user,
        device_id=device,
        time=1_700_000_000_000 + number,
        insert_id=f"{device}-{number}",
        event_properties={"number": number},
        **more,
    )


def numbers(rows: list[Row], device: str = "device-1") -> list[int]:
    return sorted(
        row["event_properties"]["number"]
        for row in rows
        if row["event_type"] == "click" and row["device_id"] == device
    )


@pytest.mark.parametrize("path", ["/2/httpapi", "/batch"])
def test_every_event_arrives_once(start: Start, path: str) -> None:
    server = start()
    sdk = Sdk(server, path=path)
    for number in range(1000):
        sdk.track(click(number))
    assert sdk.delivered() == {200: 1000}
    assert numbers(server.export()) == list(range(1000))


def test_identifies_groups_and_revenue_arrive_with_their_meaning(start: Start) -> None:
    server = start()
    sdk = Sdk(server, per_request=1)
    who = EventOptions(user_id="user-1", device_id="device-1")
    of_user = Identify()
    of_user.set("plan", "free").add("visits", 2).append("seen", "home")
    of_group = Identify()
    of_group.set("seats", 5)
    revenue = Revenue(price=2.5, quantity=4, product_id="book", receipt="r", receipt_sig="s")
    given: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
        (sdk.client.identify, (of_user, who)),
        (sdk.client.set_group, ("team", "blue", who)),
        (sdk.client.group_identify, ("team", "blue", of_group, who)),
        (sdk.client.revenue, (revenue, who)),
        (sdk.client.track, (click(1, groups={"team": "blue"}),)),
    ]
    for expected, (call, args) in enumerate(given, 1):
        sdk.also(call, *args)
        sdk.wait_for(expected)  # one after the other: the SDK sends from many threads
    assert sdk.delivered() == {200: 5}
    rows = {row["event_type"]: row for row in server.export()}
    last = rows["click"]
    assert last["user_properties"]["plan"] == "free"
    assert last["user_properties"]["visits"] == 2
    assert last["user_properties"]["seen"] == ["home"]
    assert last["groups"] == {"team": ["blue"]}
    assert last["group_properties"] == {"team": {"blue": {"seats": 5}}}
    assert rows["revenue_amount"]["event_properties"]["$price"] == 2.5


def test_an_invalid_event_among_good_ones_holds_back_no_other(start: Start) -> None:
    server = start()
    sdk = Sdk(server)
    for number in range(100):
        sdk.track(click(number))
    sdk.track(click(0, device="dev", user="u"))  # both ids are too short
    for number in range(100, 199):
        sdk.track(click(number))
    assert sdk.delivered() == {200: 199, 400: 1}
    assert sdk.told["dev-0"] == 400
    rows = server.export()
    assert numbers(rows) == list(range(199))
    assert len(rows) == 199


def test_a_throttled_device_is_delivered_later_and_holds_back_no_other(start: Start) -> None:
    server = start("amplitude")
    sdk = Sdk(server)
    for number in range(1000):  # 100 more than a device may send in 30 s
        sdk.track(click(number, device="device-hot", user="user-hot"))
        if number % 10 == 0:
            device = f"device-{number}"
            sdk.track(click(number, device=device, user=f"user-{number}"))
    assert sdk.delivered() == {200: 1100}
    rows = server.export()
    assert numbers(rows, "device-hot") == list(range(1000))
    assert len(rows) == 1100


def test_a_restart_loses_nothing(start: Start) -> None:
    server = start()
    sdk = Sdk(server, per_request=20)
    stopping = threading.Event()

    def track() -> None:
        for number in range(2000):
            if number == 500:
                stopping.set()
            sdk.track(click(number))

    tracking = threading.Thread(target=track)
    tracking.start()
    assert stopping.wait(STUCK_S)
    server.stop()
    server.start()
    server.wait_until_ready()
    tracking.join(STUCK_S)
    assert sdk.delivered() == {200: 2000}
    assert numbers(server.export()) == list(range(2000))
