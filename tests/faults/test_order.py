"""The order of effects around the blocks: they go only once the lake, the key files and the checkpoint have them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retrofill.clock import SystemClock
from retrofill.config import Settings
from retrofill.core import event as events
from retrofill.core.event import Batch
from retrofill.engine.ingest import Engine
from retrofill.engine.seal import Sealer, SealResult, SealTask, seal_blocks
from retrofill.limits import PROFILES

pytestmark = pytest.mark.slow


class SealerInside(Sealer):
    """Seals in this process, where the calls can be watched."""

    async def seal(self, first: int, last: int) -> SealResult:
        file = self._lake.new_file(first, last)
        done = seal_blocks(SealTask(self._blocks, first, last, file))
        self._lake.adopt(file if done.rows else None, block=done.last, merges=done.merges)
        return SealResult(1, done.rows, done.file_bytes)


def request(number: int) -> Batch:
    event = {"event_type": "e", "user_id": "user-1", "insert_id": f"i-{number}"}
    opened = events.open_envelope(json.dumps({"api_key": "key", "events": [event]}).encode())
    assert isinstance(opened, events.Envelope)
    batch = events.parse(
        opened,
        project=1,
        path="/batch",
        limits=PROFILES["none"],
        received_ms=SystemClock().now_ms(),
        remote=None,
        payload_bytes=100,
    )
    assert isinstance(batch, Batch)
    return batch


def watch(calls: list[str], owner: Any, name: str, patch: pytest.MonkeyPatch) -> None:
    """Write down when a method has returned."""
    original: Callable[..., Any] = getattr(owner, name)

    def watched(*args: Any, **more: Any) -> Any:
        result = original(*args, **more)
        calls.append(name)
        return result

    patch.setattr(owner, name, watched)


async def lived(folder: Path, calls: list[str], patch: pytest.MonkeyPatch) -> None:
    engine = Engine.open(
        Settings(data=folder, limits="none"), clock=SystemClock(), sealer=SealerInside
    )
    engine.add_project(engine.projects_store.add("one", "key", "secret"))
    watch(calls, engine.blocks, "append", patch)
    watch(calls, engine.lake, "adopt", patch)
    watch(calls, engine.duplicates, "sealed", patch)
    watch(calls, engine._checkpoint, "save", patch)
    watch(calls, engine.blocks, "delete", patch)
    await engine.start()
    for number in range(3):
        await engine.ingest(request(number))
        calls.append("answer")
    await engine.close()


def test_blocks_go_after_the_lake_the_keys_and_the_checkpoint_have_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    asyncio.run(lived(tmp_path / "data", calls, monkeypatch))
    assert calls == ["append", "answer"] * 3 + ["adopt", "sealed", "save", "delete"]
