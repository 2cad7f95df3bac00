"""A destination that misbehaves by script: everything the contract allows, and what real servers do besides.

`Misbehaving` decides, from a seed, what happens to each request; it stores and remembers insert_ids as Amplitude does
(by device or, without one, user). It can be asked in memory (`Wire`, for virtual time) or over real HTTP (`serve`).
"""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import socket
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from retrofill.backfill.destination import Answer

Json = dict[str, Any]


class Reply(NamedTuple):
    """What to do with a connection. fault: "" answers, else reset, hang or cut."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    fault: str = ""


class Arrival(NamedTuple):
    """A request as it came in."""

    at: float
    events: int
    devices: Counter[str]
    users: Counter[str]


def ok(events: int, size: int, at: float) -> Reply:
    body = {
        "code": 200,
        "events_ingested": events,
        "payload_size_bytes": size,
        "server_upload_time": int(at * 1000),
    }
    return _json(200, body)


def _json(status: int, body: Json, **headers: str) -> Reply:
    pairs = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return Reply(status, json.dumps(body).encode(), pairs)


FAULTS = (
    "throttle listed", "throttle unlisted", "quota", "silent body 429", "500 after storing", "500",
    "502 html", "503", "408", "reset before", "reset after", "hang", "cut", "html 200", "empty 200",
)  # fmt: skip


class Misbehaving:
    """Stores events and misbehaves by chance.

    faults: how often each kind of FAULTS happens, as parts of 1. poison: insert_ids that are never taken; `lists` says
    how their 400 names them: "full", "first", "none", "silenced" or "id". events_max, bytes_max: larger requests get a
    413. device_limit: events of a device in 30 s before it is throttled for real. forget: no fault after so many requests.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        faults: dict[str, float] | None = None,
        poison: frozenset[str] = frozenset(),
        lists: str = "full",
        events_max: int = 2000,
        bytes_max: int = 20_000_000,
        device_limit: int = 0,
        calm_after: int = 3000,
    ) -> None:
        self.chance = random.Random(seed)
        self.faults = faults or {}
        self.poison = poison
        self.lists = lists
        self.events_max = events_max
        self.bytes_max = bytes_max
        self.device_limit = device_limit
        self.calm_after = calm_after
        self.stored: list[Json] = []
        self.keys: set[tuple[str, str]] = set()
        self.repeats = 0
        self.throttles = 0
        self.arrivals: list[Arrival] = []
        self.acknowledged: set[str] = set()
        self.statuses: Counter[str] = Counter()
        self._recent: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
        self._throttled: dict[str, float] = {}

    def handle(self, body: bytes, at: float) -> Reply:
        """Say what happens to a request that arrives at a time."""
        events: list[Json] = json.loads(body)["events"]
        devices = Counter(str(e["device_id"]) for e in events if "device_id" in e)
        users = Counter(str(e["user_id"]) for e in events if "user_id" in e)
        self.arrivals.append(Arrival(at, len(events), devices, users))
        kind = self._kind()
        self.statuses[kind or "none"] += 1
        reply = self._fault(kind, events, devices, users, at) if kind else None
        return reply or self._honest(body, events, devices, at)

    def _kind(self) -> str:
        if len(self.arrivals) > self.calm_after:
            return ""
        dice = self.chance.random()
        for kind, part in self.faults.items():
            dice -= part
            if dice < 0:
                return kind
        return ""

    def _store(self, events: list[Json]) -> None:
        for event in events:
            key = (str(event.get("device_id") or event.get("user_id")), event["insert_id"])
            if key in self.keys:
                self.repeats += 1
            else:
                self.keys.add(key)
                self.stored.append(event)

    def _honest(self, body: bytes, events: list[Json], devices: Counter[str], at: float) -> Reply:
        if len(events) > self.events_max or len(body) > self.bytes_max:
            return _json(413, {"code": 413, "error": "Payload too large"})
        bad = [index for index, event in enumerate(events) if event["insert_id"] in self.poison]
        if bad:
            return self._refuse(bad)
        hot = self._over(devices, at)
        if hot:
            return self._throttle(events, hot, {}, at)
        self._store(events)
        self.acknowledged |= {event["insert_id"] for event in events}
        return ok(len(events), len(body), at)

    def _over(self, devices: Counter[str], at: float) -> dict[str, int]:
        """Devices above their limit over 30 s. Only what is taken counts."""
        if not self.device_limit:
            return {}
        hot = {}
        for device, count in devices.items():
            recent = [(t, n) for t, n in self._recent[device] if t > at - 30]
            if sum(n for _, n in recent) + count > self.device_limit * 30:
                hot[device] = self.device_limit + 1
            self._recent[device] = recent
        if not hot:
            for device, count in devices.items():
                self._recent[device].append((at, count))
        return hot

    def _refuse(self, bad: list[int]) -> Reply:
        body: Json = {"code": 400, "error": "Invalid field values on some events"}
        if self.lists == "first":
            body["events_with_invalid_fields"] = {"time": bad[:1]}
        elif self.lists == "full":
            body["events_with_invalid_fields"] = {"time": bad}
            body["events_with_missing_fields"] = {}
        elif self.lists == "id":
            body["error"] = "Invalid id length for user_id or device_id"
            body["events_with_invalid_id_lengths"] = {"user_id": bad}
        elif self.lists == "silenced":
            body["error"] = "Events silenced for device_id"
            body["silenced_events"] = bad
        return _json(400, body)

    def _throttle(
        self, events: list[Json], devices: dict[str, int], users: dict[str, int], at: float
    ) -> Reply:
        assert at
        self.throttles += 1
        listed = [
            index
            for index, event in enumerate(events)
            if event.get("device_id") in devices or event.get("user_id") in users
        ]
        body = {
            "code": 429,
            "error": "Too many requests for some devices and users",
            "eps_threshold": self.device_limit or 1000,
            "throttled_devices": devices,
            "throttled_users": users,
            "exceeded_daily_quota_devices": {},
            "exceeded_daily_quota_users": {},
            "throttled_events": listed,
        }
        return _json(429, body)

    def _fault(  # noqa: C901, PLR0911, PLR0912 - a table of faults
        self, kind: str, events: list[Json], devices: Counter[str], users: Counter[str], at: float
    ) -> Reply | None:
        html = b"<html><body>Bad Gateway</body></html>"
        match kind:
            case "throttle listed":
                names = sorted(devices)
                if not names:
                    return None
                return self._throttle(events, {self.chance.choice(names): 31}, {}, at)
            case "throttle unlisted":
                return Reply(429, html)
            case "quota":
                ids = sorted(users)
                if not ids:
                    return None
                body = {
                    "code": 429,
                    "error": "Too many requests for some devices and users",
                    "exceeded_daily_quota_users": {self.chance.choice(ids): 500_001},
                }
                headers = {} if self.chance.random() < 0.5 else {"Retry_After": "120"}
                return _json(429, body, **headers)
            case "silent body 429":
                body = {"code": 429, "throttled_devices": dict.fromkeys(list(devices)[:1], 31)}
                return Reply(200, json.dumps(body).encode())
            case "500 after storing":
                self._store_if_good(events)
                return _json(500, {"code": 500, "error": "who knows"})
            case "500":
                return Reply(500)
            case "502 html":
                return Reply(502, html)
            case "503":
                return _json(503, {"code": 503, "error": "busy"}, Retry_After="7")
            case "408":
                return Reply(408)
            case "reset before" | "reset after" | "hang" | "cut":
                if kind != "reset before":
                    self._store_if_good(events)
                fault = kind.split(maxsplit=1)[0]
                return Reply(200, b'{"code": 200, "events_inge', fault=fault)
            case "html 200":
                self._store_if_good(events)
                return Reply(200, html)
            case "empty 200":
                return Reply(200)
        raise AssertionError(kind)

    def _store_if_good(self, events: list[Json]) -> None:
        if not any(event["insert_id"] in self.poison for event in events):
            self._store(events)


class Wire:
    """Asks a destination in memory, after half a round trip."""

    def __init__(
        self,
        to: Misbehaving,
        now: Callable[[], float],
        *,
        round_trip_s: float = 0.05,
        jitter_s: float = 0.002,
    ) -> None:
        self._to = to
        self._now = now
        self._half = round_trip_s / 2
        self._jitter = jitter_s

    async def open(self) -> Answer | None:
        """Nothing has to be opened."""

    async def post(self, body: Sequence[bytes | memoryview]) -> Answer:
        whole = b"".join(body)
        if whole.startswith(b"\x1f\x8b"):
            whole = gzip.decompress(whole)
        await asyncio.sleep(self._half + self._jitter * self._to.chance.random())
        reply = self._to.handle(whole, self._now())
        if reply.fault == "hang":
            await asyncio.sleep(60)
        else:
            await asyncio.sleep(self._half)
        if reply.fault:
            return Answer(0, problem=reply.fault)
        retry = dict(reply.headers).get("Retry-After", "")
        return Answer(reply.status, reply.body, retry)

    def close(self) -> None:
        """Nothing is open."""


async def serve(to: Misbehaving, port: int, *, now: Callable[[], float]) -> asyncio.Server:
    """Answer real HTTP requests on a port of the loopback address; 0 takes a free one."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await _one(to, now, reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            writer.close()

    return await asyncio.start_server(talk, "127.0.0.1", port, limit=1 << 20)


async def _one(
    to: Misbehaving,
    now: Callable[[], float],
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> bool:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
    except asyncio.IncompleteReadError:
        return False
    length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
    body = await reader.readexactly(int(length.split(b":")[1]))
    if b"content-encoding: gzip" in head:
        body = gzip.decompress(body)
    reply = to.handle(body, now())
    if reply.fault == "reset":
        sock: socket.socket = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        writer.transport.abort()
        return False
    if reply.fault == "hang":
        await asyncio.sleep(3600)
    extra = "".join(f"{name}: {value}\r\n" for name, value in reply.headers)
    size = len(reply.body) + (40 if reply.fault == "cut" else 0)
    start = f"HTTP/1.1 {reply.status} X\r\nContent-Length: {size}\r\n{extra}\r\n"
    writer.write(start.encode() + reply.body)
    await writer.drain()
    return reply.fault != "cut"


async def _main() -> None:
    """Serve until killed: PORT SEED; prints each stored insert_id as a line when asked with SIGTERM."""
    to = Misbehaving(int(sys.argv[2]), faults=json.loads(sys.argv[3]) if len(sys.argv) > 3 else {})
    loop = asyncio.get_running_loop()
    server = await serve(to, int(sys.argv[1]), now=loop.time)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main())
