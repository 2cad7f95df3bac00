"""The wire: what an answer means, and real connections to a server that breaks them in every way."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st
from tests.backfill import staged
from tests.backfill.destination import FAULTS, Misbehaving, serve
from tests.backfill.test_send import OPEN, check_whole
from tests.faults.process import held_port

from retrofill.backfill import destination as wire
from retrofill.backfill import manifest as manifests
from retrofill.backfill.destination import Answer, Connection, judge, parse_url, retry_after
from retrofill.backfill.feed import Feed
from retrofill.backfill.journal import Journal
from retrofill.backfill.send import Sender
from retrofill.errors import InputError

NOW = 1_700_000_000.0


def body(**keys: object) -> bytes:
    return json.dumps(keys).encode()


# Answer → verdict, uncertain. Source: contract, ingest 4 and 7.
VERDICTS = [
    (Answer(200, body(code=200, server_upload_time=5)), "taken", False),
    (Answer(200, b""), "again", True),
    (Answer(200, b"<html>"), "again", True),
    (Answer(200, b'{"code": 200, "events_ing'), "again", True),
    (Answer(200, b"[200]"), "again", True),
    (Answer(200, body(code="200")), "again", True),
    (Answer(200, body(code=True)), "again", True),
    (Answer(200, body(code=429)), "throttled", False),
    (Answer(200, body(code=400)), "refused", False),
    (Answer(400, body(code=200)), "refused", False),
    (Answer(400, b""), "refused", False),
    (Answer(413, b"<html>"), "large", False),
    (Answer(429, b""), "throttled", False),
    (Answer(408, b""), "again", True),
    (Answer(500, b""), "again", True),
    (Answer(502, b""), "again", True),
    (Answer(504, b""), "again", True),
    (Answer(503, b""), "again", False),
    (Answer(403, b""), "forbidden", False),
    (Answer(301, b"<html>"), "forbidden", False),
    (Answer(308, b""), "forbidden", False),
    (Answer(0, problem="reset"), "again", True),
    (Answer(0, problem="cannot connect", sent=False), "again", False),
]


@pytest.mark.parametrize(("answer", "verdict", "uncertain"), VERDICTS)
def test_only_a_200_that_says_code_200_acknowledges(
    answer: Answer, verdict: str, *, uncertain: bool
) -> None:
    found = judge(answer, 10, NOW)
    assert (found.verdict, found.uncertain) == (verdict, uncertain)
    assert (found.status == 200) == (verdict == "taken")


@given(
    st.integers(100, 599),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "code", "error", "missing_field", "events_with_invalid_fields", "silenced_events",
                    "throttled_events", "throttled_devices", "eps_threshold", "time",
                    "exceeded_daily_quota_users",
                ]
            ),
            inner,
            max_size=4,
        ),
    ),
    st.text(max_size=10),
)  # fmt: skip
def test_no_answer_at_all_breaks_the_judge(status: int, value: Any, pause: str) -> None:
    found = judge(Answer(status, json.dumps(value).encode(), pause), 3, NOW)
    assert all(0 <= index < 3 for index in (*found.refusal.listed, *found.refusal.throttled))
    assert found.retry_after_s >= 0
    assert (found.status == 200) == (found.verdict == "taken")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 30),
        ("", 0),
        ("soon", 0),
        ("-5", 0),
        ("99999999", 86_400),
        ("Tue, 14 Nov 2023 22:13:40 GMT", 20),
        ("Tue, 14 Nov 1923 22:13:40 GMT", 0),
    ],
)
def test_retry_after_is_seconds_or_a_date(text: str, seconds: float) -> None:
    assert retry_after(text, NOW) == seconds


def test_an_address_says_where_requests_go() -> None:
    assert parse_url("http://[::1]:81/batch").authority == "[::1]:81"
    assert parse_url("https://api2.amplitude.com/batch").authority == "api2.amplitude.com"
    for text in ("ftp://x", "amplitude", "http://", "http://x:99999999"):
        with pytest.raises(InputError, match="no address to send to"):
            parse_url(text)


class ScaledClock:
    """Real time that runs faster."""

    def __init__(self, times: float) -> None:
        self._times = times
        self._start = time.monotonic()

    def now(self) -> float:
        return NOW + (time.monotonic() - self._start) * self._times

    def later(self, seconds: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds / self._times, call)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_of_a_real_server_ends_in_everything_once(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "ANSWER_S", 0.3)
    chance = random.Random(fault)
    made = staged.random_history(chance, 600)
    staged.write(tmp_path, made)
    to = Misbehaving(3, faults={fault: 0.25})

    async def whole() -> bool:
        clock = ScaledClock(1000)
        server = await serve(to, 0, now=clock.now)
        port = server.sockets[0].getsockname()[1]
        url = parse_url(f"http://127.0.0.1:{port}/batch")
        manifest = manifests.read(tmp_path / "stage")
        assert manifest is not None
        journal = Journal(tmp_path)
        sender = Sender(
            feed=Feed(tmp_path / "stage", manifest, OPEN.rates, journal.done()),
            journal=journal,
            profile=OPEN,
            api_key="key",
            wires=[Connection(url) for _ in range(8)],
            clock=clock,
            chance=chance.random,
        )
        outcome = await sender.run()
        journal.close()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        return outcome.complete

    assert asyncio.run(whole())
    assert to.statuses[fault] > 2
    check_whole(tmp_path, made, to)


async def _answers(script: list[bytes]) -> list[Answer]:
    """What a connection makes of raw answers, one a request; the server closes after each."""
    left = list(script)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(size)
        writer.write(left.pop(0))
        writer.close()

    with closing(held_port()) as held:
        port = held.getsockname()[1]
        server = await asyncio.start_server(talk, "127.0.0.1", port)
        url = parse_url(f"http://127.0.0.1:{port}/batch")
        found = [await Connection(url).post([b"{", b"}"]) for _ in script]
        server.close()
        return [*found, await Connection(url).post([b"{}"])]


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [1, 7, 200, 3000])
def test_a_large_request_arrives_as_its_pieces_say(pieces: int) -> None:
    draw = random.Random(pieces)
    sent = [memoryview(draw.randbytes(1_500_000 // pieces)) for _ in range(pieces)]
    arrived: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            head = await reader.readuntil(b"\r\n\r\n")
            arrived.append(await reader.readexactly(int(head.split(b"Content-Length: ")[1])))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    async def whole() -> list[Answer]:
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        url = parse_url(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/batch")
        connection = Connection(url)
        found = [await connection.post(sent) for _ in range(2)]
        connection.close()
        server.close()
        return found

    assert [answer.status for answer in uvloop.run(whole())] == [200, 200]
    assert arrived == [b"".join(sent)] * 2


def test_answers_are_read_however_they_are_framed() -> None:
    script = [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.0 200 OK\r\n\r\n{}",
        b"HTTP/1.1 429 Slow\r\nRetry-After: 9\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}",
        b"220 smtp ready\r\n",
        b"",
    ]
    *found, refused = asyncio.run(_answers(script))
    assert [(a.status, a.body, a.retry_after) for a in found] == [
        *[(200, b"{}", "")] * 4,
        (429, b"", "9"),
        *[(0, b"", "")] * 3,
    ]
    assert "cut off" in found[5].problem
    assert "not HTTP" in found[6].problem
    assert "lost" in found[7].problem
    assert all(answer.sent for answer in found)
    assert not refused.sent
