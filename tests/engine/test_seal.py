"""Sealing and compaction through real child processes: exactly once, also when something is killed."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
import select
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.faults.process import PATIENCE_S
from tests.lake.blocks import World, block_of

from retrofill.core import block as codec
from retrofill.core.block import Block, Merge
from retrofill.engine import seal as seal_module
from retrofill.engine.seal import Sealer
from retrofill.errors import CorruptError, StoreError
from retrofill.hot.sqlite import Blocks
from retrofill.lake import Lake, arrow
from retrofill.limits import COMPACT_FILES

pytestmark = pytest.mark.slow


def on_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on an asyncio loop of its own."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


ROOT = Path(__file__).parents[2]


def stored(folder: Path, blocks: list[Block]) -> Path:
    """Write blocks into a hot store; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "hot.sqlite"
    store = Blocks(path)
    for block in blocks:
        store.append(block.number, block.rows, codec.encode(block))
    store.close()
    return path


@asynccontextmanager
async def sealer(folder: Path, path: Path) -> AsyncIterator[tuple[Sealer, Lake]]:
    lake = Lake.open(folder / "lake")
    opened = Sealer(path, lake)
    try:
        yield opened, lake
    finally:
        await opened.close()
        lake.close()


def positions(lake: Lake) -> list[tuple[int, int]]:
    with lake.snapshot() as snapshot:
        return snapshot.cursor.execute(
            'SELECT "block", "row" FROM lake.events ORDER BY ALL'
        ).fetchall()


async def each_sealed(opened: Sealer, blocks: list[Block]) -> None:
    """Seal blocks, each into a file of its own."""
    for block in blocks:
        await opened.seal(block.number, block.number)


def expected(blocks: list[Block]) -> list[tuple[int, int]]:
    return [(block.number, row) for block in blocks for row in range(block.rows)]


@on_loop
async def test_blocks_become_rows_of_the_lake(tmp_path: Path) -> None:
    event = {"event_type": "e", "user_id": "user-1"}
    blocks = [
        *World(people=50).blocks(4, rows=30),
        block_of([event], number=5, merges=[Merge(0, 7, 1, 2, 3)]),
    ]
    path = stored(tmp_path, blocks)
    async with sealer(tmp_path, path) as (opened, lake):
        first = await opened.seal(1, 2)
        await opened.seal(3, 5)
        assert (first.files, first.rows) == (1, 60)
        assert lake.sealed() == 5
        with lake.snapshot() as snapshot:
            found = snapshot.cursor.execute('SELECT * FROM lake.events ORDER BY "block", "row"')
            assert found.to_arrow_table().cast(arrow.SCHEMA).equals(arrow.table(blocks))
            merges = snapshot.cursor.execute("SELECT absorbed, surviving FROM lake.merges")
            assert merges.fetchall() == [(1, 2)]


@on_loop
async def test_large_blocks_become_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = list(World(people=50).blocks(4, rows=30))
    path = stored(tmp_path, blocks)
    monkeypatch.setattr(
        seal_module,
        "_CHILD",
        "from retrofill.engine import seal; seal.SEAL_BYTES_MAX = 30_000; seal.main()",
    )
    async with sealer(tmp_path, path) as (opened, lake):
        result = await opened.seal(1, 4)
        assert result.files > 1
        assert result.rows == 120
        assert positions(lake) == expected(blocks)
        assert lake.sealed() == 4


@on_loop
async def test_many_small_files_become_one(tmp_path: Path) -> None:
    blocks = list(World(people=50).blocks(COMPACT_FILES + 2, rows=20))
    path = stored(tmp_path, blocks)
    async with sealer(tmp_path, path) as (opened, lake):
        await each_sealed(opened, blocks)
        await opened.compact()
        await opened.compacted()
        assert len(lake.event_files()) == 3
        assert positions(lake) == expected(blocks)


@on_loop
async def test_files_that_change_under_a_merge_are_chosen_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deletion writes the places of a file's deleted rows anew, and the list of before goes."""
    blocks = list(World(people=50).blocks(COMPACT_FILES + 2, rows=20))
    path = stored(tmp_path, blocks)
    async with sealer(tmp_path, path) as (opened, lake):
        await each_sealed(opened, blocks)
        now = lake.event_files
        before = [msgspec.structs.replace(file, deleted=tmp_path / "gone") for file in now()]
        told = iter([before])
        monkeypatch.setattr(lake, "event_files", lambda: next(told, None) or now())
        await opened.compact()
        await opened.compacted()
        assert len(now()) == 3
        assert positions(lake) == expected(blocks)


@on_loop
async def test_a_child_that_was_killed_is_started_again(tmp_path: Path) -> None:
    blocks = list(World(people=50).blocks(2, rows=20))
    path = stored(tmp_path, blocks)
    async with sealer(tmp_path, path) as (opened, lake):
        await opened.seal(1, 1)
        process = opened._sealing._process
        assert process is not None
        process.send_signal(signal.SIGKILL)
        await opened.seal(2, 2)
        assert positions(lake) == expected(blocks)


@on_loop
async def test_a_child_that_always_dies_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stored(tmp_path, list(World(people=5).blocks(1, rows=5)))
    monkeypatch.setattr(seal_module, "_CHILD", "import sys; sys.exit(3)")
    async with sealer(tmp_path, path) as (opened, lake):
        with pytest.raises(StoreError, match="dies"):
            await opened.seal(1, 1)
        assert lake.sealed() == 0


@on_loop
async def test_a_missing_block_is_never_passed_over(tmp_path: Path) -> None:
    blocks = list(World(people=5).blocks(3, rows=5))
    path = stored(tmp_path, [blocks[0], blocks[2]])
    async with sealer(tmp_path, path) as (opened, lake):
        with pytest.raises(CorruptError, match="Block 2 is missing"):
            await opened.seal(1, 3)
        assert lake.sealed() == 0
        assert lake.files.list(tmp_path / "lake" / "files") == []


@on_loop
async def test_an_unreadable_body_is_told_and_leaves_no_file(tmp_path: Path) -> None:
    block = block_of([{"event_type": "e"}])
    block.parts[0] = msgspec.structs.replace(block.parts[0], body=b'{"events":[{]}')
    path = stored(tmp_path, [block])
    async with sealer(tmp_path, path) as (opened, lake):
        with pytest.raises(CorruptError, match="DecodeError"):
            await opened.seal(1, 1)
        assert lake.files.list(tmp_path / "lake" / "files") == []


@on_loop
async def test_closing_gives_up_a_compaction_under_way(tmp_path: Path) -> None:
    blocks = list(World(people=50).blocks(COMPACT_FILES, rows=20))
    path = stored(tmp_path, blocks)
    async with sealer(tmp_path, path) as (opened, _):
        await each_sealed(opened, blocks)
        await opened.compact()
        await asyncio.sleep(0)
    async with sealer(tmp_path, path) as (_, lake):
        assert positions(lake) == expected(blocks)


SILENT = """
import json, sys
task = json.loads(sys.stdin.buffer.readline())
with open(task["file"], "wb") as file:
    file.write(b"half of it")
with open({told!r}, "wb") as told:
    told.write(b"begun")
sys.stdin.buffer.read()
"""


@asynccontextmanager
async def merging(folder: Path, opened: Sealer, lake: Lake) -> AsyncIterator[Path]:
    """Begin a merge whose child has half a file and answers nothing more; gives that file."""
    told = folder / "told"
    os.mkfifo(told)
    heard = os.open(told, os.O_RDONLY | os.O_NONBLOCK)
    compacting = opened._compacting
    real, compacting._code = compacting._code, SILENT.format(told=str(told))
    try:
        before = set(lake.files.list(folder / "lake" / "files"))
        await opened.compact()
        assert (await asyncio.to_thread(select.select, [heard], [], [], PATIENCE_S))[0]
        compacting._code = real
        (half,) = set(lake.files.list(folder / "lake" / "files")) - before
        yield half
    finally:
        os.close(heard)


@on_loop
async def test_a_merge_under_way_is_given_up_and_made_again_later(tmp_path: Path) -> None:
    blocks = list(World(people=50).blocks(COMPACT_FILES, rows=20))
    path = stored(tmp_path, blocks)
    async with sealer(tmp_path, path) as (opened, lake):
        await each_sealed(opened, blocks)
        async with merging(tmp_path, opened, lake) as half:
            process = opened._compacting._process
            assert process is not None
            async with opened.compaction_rests(given_up=True):
                assert process.returncode == -signal.SIGKILL
                assert not half.exists()
                await opened.compact()
                await opened.compacted()
                assert len(lake.event_files()) == COMPACT_FILES
        await opened.compact()
        await opened.compacted()  # the answer of the child before is not taken for that of this one
        assert len(lake.event_files()) == 1
        assert positions(lake) == expected(blocks)


@on_loop
async def test_a_merge_under_way_goes_on_where_it_need_not_give_way(tmp_path: Path) -> None:
    blocks = list(World(people=50).blocks(COMPACT_FILES + 1, rows=20))
    path = stored(tmp_path, blocks)
    async with sealer(tmp_path, path) as (opened, lake):
        await each_sealed(opened, blocks[:-1])
        async with merging(tmp_path, opened, lake) as half:
            merge, seal = opened._compacting._process, opened._sealing._process
            assert merge is not None
            assert seal is not None
            async with opened.compaction_rests(given_up=False):
                await opened.children_rest()
                assert seal.returncode == -signal.SIGKILL  # it had nothing to do
                assert merge.returncode is None
                assert half.exists()
            await opened.seal(blocks[-1].number, blocks[-1].number)
            assert positions(lake) == expected(blocks)
            await opened.close()  # who waits for the child is cancelled, and the child has ended
            assert merge.returncode == -signal.SIGKILL


@on_loop
async def test_no_merge_begins_beside_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was put off comes when the last one ends; one that goes on and on keeps it from nothing."""
    blocks = list(World(people=50).blocks(2 * COMPACT_FILES, rows=20))
    path = stored(tmp_path, blocks)
    async with sealer(tmp_path, path) as (opened, lake):
        async with opened.export_goes_on():
            async with opened.export_goes_on():
                await each_sealed(opened, blocks[:COMPACT_FILES])
                await opened.compact()
                await opened.compacted()
            await opened.compacted()
            assert len(lake.event_files()) == COMPACT_FILES
        await opened.compacted()
        assert len(lake.event_files()) == 1
        monkeypatch.setattr(seal_module, "EXPORT_ALONE_S", 0)
        async with opened.export_goes_on():
            await each_sealed(opened, blocks[COMPACT_FILES:])
            await opened.compact()
            await opened.compacted()
            assert len(lake.event_files()) == 2
        assert positions(lake) == expected(blocks)


@on_loop
async def test_a_file_left_by_a_merge_given_up_is_removed_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill between the child's end and the removal leaves it."""
    blocks = list(World(people=50).blocks(COMPACT_FILES, rows=20))
    path = stored(tmp_path, blocks)
    async with sealer(tmp_path, path) as (opened, lake):
        await each_sealed(opened, blocks)
        async with merging(tmp_path, opened, lake) as half:
            monkeypatch.setattr(lake.files, "remove", lambda _: None)
            async with opened.compaction_rests(given_up=True):
                assert half.exists()
    async with sealer(tmp_path, path) as (_, lake):
        assert not half.exists()
        assert positions(lake) == expected(blocks)


@pytest.mark.parametrize("step", ["event_files", "swap", "adopt"])
@on_loop
async def test_closing_waits_for_what_is_under_way_in_the_lake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    blocks = list(World(people=50).blocks(COMPACT_FILES, rows=20))
    path = stored(tmp_path, blocks)
    inside, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    async with sealer(tmp_path, path) as (opened, lake):
        await each_sealed(opened, blocks[:-1])
        real = getattr(lake, step)

        def slow(*values: Any, **named: Any) -> Any:
            inside.set()
            assert go_on.wait(PATIENCE_S)
            made = real(*values, **named)
            ended.set()
            return made

        if step == "adopt":
            monkeypatch.setattr(lake, step, slow)
        last = asyncio.create_task(opened.seal(blocks[-1].number, blocks[-1].number))
        if step != "adopt":
            await last
            monkeypatch.setattr(lake, step, slow)
            await opened.compact()
        assert await asyncio.to_thread(inside.wait, PATIENCE_S)
        last.cancel()
        closing = asyncio.create_task(opened.close())
        for _ in range(20):
            await asyncio.sleep(0)
        assert not closing.done()
        go_on.set()
        await closing
        assert ended.is_set()  # the lake may be closed now
    async with sealer(tmp_path, path) as (_, lake):
        assert positions(lake) == expected(blocks)


# Killed anywhere.

RUN = """
import asyncio, sys
from pathlib import Path
from retrofill.engine.seal import Sealer
from retrofill.lake import Lake

async def main(folder, last):
    lake = Lake.open(folder / "lake")
    print(lake.sealed(), flush=True)
    sealer = Sealer(folder / "hot.sqlite", lake)
    for number in range(lake.sealed() + 1, last + 1):
        await sealer.seal(number, number)
        print(number, flush=True)
        await sealer.compact()
    await sealer.compacted()
    await sealer.close()
    lake.close()
    print("done", flush=True)

asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
"""


@contextmanager
def running(folder: Path, last: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder), str(last)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    try:
        yield process
    finally:
        children = children_of(process)
        process.kill()
        process.communicate()
        for child in children:  # one that is in the kernel just then writes what it was about to
            wait_gone(child)


def children_of(process: subprocess.Popen[str]) -> list[int]:
    if process.returncode is not None:  # it has ended, and its number may be another's
        return []
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(child) for child in listed.read_text().split()]


def kill_and_look(folder: Path, blocks: list[Block], kills: int, seed: int) -> None:
    """Seal and compact in another process, kill it at random places, and look each time what is there."""
    choose = random.Random(seed)
    killed = 0
    while killed < kills:
        with running(folder, len(blocks)) as process:
            assert process.stdout is not None
            told = int(process.stdout.readline())
            for _ in range(choose.randrange(5)):
                line = process.stdout.readline()
                if line == "done\n" or not line:
                    break
                told = int(line)
            # That it ends meanwhile is fine too.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(choose.random() * 0.3)
        killed += 1
        lake = Lake.open(folder / "lake")
        sealed = lake.sealed()
        assert sealed >= told
        assert positions(lake) == expected(blocks[:sealed])
        named = {path for file in lake.event_files() for path in (file.path, file.deleted) if path}
        assert set(lake.files.list(folder / "lake" / "files")) == named
        lake.close()


def test_killed_anywhere_every_row_is_there_once(tmp_path: Path) -> None:
    blocks = list(World(people=30).blocks(40, rows=20))
    stored(tmp_path, blocks)
    kill_and_look(tmp_path, blocks, 4, seed=1)


@pytest.mark.long
def test_killed_a_hundred_times_every_row_is_there_once(tmp_path: Path) -> None:
    blocks = list(World(people=30).blocks(400, rows=20))
    stored(tmp_path, blocks)
    kill_and_look(tmp_path, blocks, 100, seed=2)


def test_children_die_with_a_killed_parent(tmp_path: Path) -> None:
    blocks = list(World(people=30).blocks(200, rows=20))
    stored(tmp_path, blocks)
    with running(tmp_path, len(blocks)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        children = children_of(process)
        assert children
        process.kill()
        process.wait()
        for child in children:
            wait_gone(child)


def wait_gone(pid: int) -> None:
    """Return when a process that is not ours to wait for has ended."""
    try:
        opened = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([opened], [], [], PATIENCE_S)[0], f"process {pid} is still there"
    finally:
        os.close(opened)
