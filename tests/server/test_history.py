"""POST /api/1/history over HTTP: streamed, packed or not, and refused in our words."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import http.client
import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.faults.process import PATIENCE_S
from tests.server.live import Live
from tests.server.test_project import call

from retrofill.server.history import _Lines

pytestmark = pytest.mark.slow


def ask(
    live: Live, body: bytes, *, secret: str = "SECRET", coding: str = ""
) -> tuple[int, bytes, str]:
    address = urlsplit(live.address)
    connection = http.client.HTTPConnection(address.netloc, timeout=PATIENCE_S)
    token = base64.b64encode(f"KEY:{secret}".encode()).decode()
    fields = {"Authorization": f"Basic {token}", "Accept-Encoding": coding}
    connection.request("POST", "/api/1/history", body, fields)
    answer = connection.getresponse()
    found = answer.status, answer.read(), answer.headers.get("Content-Encoding", "")
    connection.close()
    return found


def lines(body: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in body.splitlines()]


def test_history_is_streamed_packed_or_plain(tmp_path: Path) -> None:
    with Live(tmp_path) as live:
        events = [
            {
                "user_id": f"user-{n}",
                "device_id": f"device-{n}",
                "event_type": "e",
                "time": 1_700_000_000_000,
                "insert_id": f"i-{n}",
                "user_properties": {"n": n},
            }
            for n in range(300)
        ]
        assert call(live, "POST", "/batch", {"api_key": "KEY", "events": events})[0] == 200
        wanted = json.dumps(
            {
                "user_ids": [f"user-{n}" for n in range(200)],
                "insert_keys": [["device-250", "i-250"]],
            }
        ).encode()
        status, plain, coding = ask(live, wanted)
        assert (status, coding) == (200, "")
        status, packed, coding = ask(live, wanted, coding="gzip")
        assert (status, coding) == (200, "gzip")
        found, same = lines(plain), lines(gzip.decompress(packed))
        assert found[0]["kind"] == "position"
        assert found[0]["limits"]["batch_eps"] == 1000
        assert found[-1] == {"kind": "end", "rows": 200}
        begin = found.index({"kind": "rows"})
        rows = found[begin + 1 : -1]
        assert _said(found[1:begin]) == _said(same[1:begin])
        assert rows == same[begin + 1 : -1]
        assert sorted(json.loads(row["sent"])["n"] for row in rows) == list(range(200))
        assert {"kind": "known", "index": 0, "block": 1} in found
        assert sum(one["kind"] == "person" for one in found[:begin]) == 200
        assert found[1]["active"] == {"2023-11-14": 300}


def _said(found: list[dict[str, Any]]) -> list[str]:
    """What lines say: ids and people come in any order, rows in their own."""
    return sorted(map(json.dumps, found))


def test_what_is_no_question_is_refused(tmp_path: Path) -> None:
    with Live(tmp_path) as live:
        for body in (b"", b"[]", b'{"device_ids": 5}', b'{"unknown": []}', b'{"rows": "some"}'):
            status, said, _ = ask(live, body)
            assert status == 400, body
            assert "asks for no history" in json.loads(said)["error"]["message"]
        many = json.dumps({"insert_keys": [["", "i"]] * 200_001}).encode()
        status, said, _ = ask(live, many)
        assert (status, "200,001 insert_keys" in said.decode()) == (400, True)
        assert ask(live, b"{}", secret="wrong")[0] == 401
        assert call(live, "GET", "/api/1/history")[0] == 405
        assert lines(ask(live, b"{}")[1])[-1] == {"kind": "end", "rows": 0}
        # One at a time, but the place is free again after an answer and after a refusal.
        assert [ask(live, b"{}")[0] for _ in range(3)] == [200, 200, 200]


def test_a_body_under_way_holds_the_place(tmp_path: Path) -> None:
    with Live(tmp_path) as live:
        slow = http.client.HTTPConnection(urlsplit(live.address).netloc, timeout=PATIENCE_S)
        slow.putrequest("POST", "/api/1/history")
        slow.putheader("Authorization", f"Basic {base64.b64encode(b'KEY:SECRET').decode()}")
        slow.putheader("Content-Length", "2")
        slow.endheaders(b"{")
        assert 429 in (ask(live, b"{}")[0] for _ in range(200))
        slow.send(b"}")
        answer = slow.getresponse()
        assert (answer.status, lines(answer.read())[-1]) == (200, {"kind": "end", "rows": 0})
        slow.close()
        assert ask(live, b"{}")[0] == 200


def test_a_client_that_has_gone_leaves_nothing_pinned() -> None:
    ended: list[str] = []

    class Pinned:
        def close(self) -> None:
            ended.append("moment")

    class Threads:
        async def run(self, call: Callable[[], Any]) -> Any:
            return await asyncio.to_thread(call)

    def pieces() -> Generator[bytes, None, None]:
        try:
            while True:
                yield b"{}\n"
        finally:
            ended.append("pieces")

    held = contextlib.ExitStack()
    held.callback(ended.append, "place")

    def answered(fails_at: int) -> None:
        sent = 0

        async def send(_message: Any) -> None:
            nonlocal sent
            sent += 1
            if sent > fails_at:
                raise OSError

        made: Any = _Lines(pieces(), Pinned(), Threads(), held, packed=False)  # type: ignore[arg-type]
        with pytest.raises(OSError):  # noqa: PT011 - this very one
            asyncio.run(made({}, None, send))

    answered(0)  # before the first piece was asked for
    assert ended == ["place", "moment"]
    ended.clear()
    answered(3)
    assert ended == ["pieces", "moment"]
