"""Sealing and compaction: the CPU's part in a child process, the catalog's part here.

Making rows out of blocks and writing Parquet holds the interpreter for seconds; in the server's process it would stop
the commit loop. So a child (`engine.child`) reads the blocks from the hot store, writes the file, syncs it and says its
path; only then does the server adopt it in the lake. A child that is killed leaves a file that no catalog names, which
the next start removes; it is started again with the next task.

Two children at most: one seals, one compacts, so that a long compaction
never keeps blocks waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
import pyarrow as pa
import structlog
from msgspec import Struct

from retrofill.core.block import Block
from retrofill.engine.child import Child, serve
from retrofill.engine.refolder import ChildRefolder, Refolder
from retrofill.errors import CorruptError, FullError, StoreError
from retrofill.hot.sqlite import read_blocks
from retrofill.lake import Lake, arrow, compact, parquet
from retrofill.lake.arrow import MergeRow
from retrofill.lake.compact import LakeFile
from retrofill.lake.files import Files
from retrofill.limits import EXPORT_ALONE_S, SEAL_BYTES_MAX

log = structlog.get_logger()

T = TypeVar("T")

_SEAL_NICE, _COMPACT_NICE = 5, 10
# Memory given back is memory that the next seal, which wants as much, has to ask for again.
_KEEP_MEMORY = {"MIMALLOC_PURGE_DELAY": "-1"}
# A merge asks for the same memory again and again, and gives all of it back at its end.
_KEEP_FOR_A_SECOND = {"MIMALLOC_PURGE_DELAY": "1000"}
_CHILD = "from retrofill.engine import seal; seal.main()"


class SealTask(Struct, frozen=True, tag="seal"):
    """Write blocks first … last of a hot store as one file; stop earlier if they are too large together."""

    blocks: Path
    first: int
    last: int
    file: Path


class MergeTask(Struct, frozen=True, tag="merge"):
    """Write some lake files as one."""

    sources: list[LakeFile]
    file: Path


class Done(Struct, frozen=True, tag="done"):
    """A file is on disk; with no rows there is none. last: the last block in it."""

    rows: int
    file_bytes: int
    last: int = 0
    merges: list[MergeRow] = []


class Failed(Struct, frozen=True, tag="failed"):
    """The task could not be done."""

    error: str
    what: str
    where: str = ""
    mend: str = ""


class SealResult(Struct, frozen=True):
    """What sealing moved into the lake."""

    files: int = 0
    rows: int = 0
    file_bytes: int = 0


Task = SealTask | MergeTask
_task = msgspec.json.Decoder(Task, dec_hook=lambda kind, value: kind(value)).decode
_answer = msgspec.json.Decoder(Done | Failed).decode
_encode = msgspec.json.Encoder(enc_hook=str).encode  # a Path
_ERRORS = {kind.__name__: kind for kind in (StoreError, FullError, CorruptError)}


class Sealer:
    """Moves committed blocks into the lake, and keeps the lake's files few. Belongs to one asyncio loop."""

    def __init__(self, blocks: Path, lake: Lake) -> None:
        self._blocks = blocks
        self._lake = lake
        self._sealing = _Child(_SEAL_NICE, _KEEP_MEMORY)
        self._compacting = _Child(_COMPACT_NICE, _KEEP_FOR_A_SECOND)
        self._round: asyncio.Task[None] | None = None
        self._merging: asyncio.Task[Done] | None = None  # what the child has to do of a round
        self._resting = 0
        self._exports: list[float] = []  # until when each may be alone, by the loop's clock
        self._put_off = False
        self._in_lake: set[asyncio.Task[object]] = set()

    async def seal(self, first: int, last: int) -> SealResult:
        """Move blocks first … last into the lake, as one file or a few. They are adopted when this returns.

        Raises StoreError, FullError or CorruptError; blocks adopted by then are in the lake, the others are where
        they were.
        """
        result = SealResult()
        while first <= last:
            file = self._lake.new_file(first, last)
            task = SealTask(self._blocks, first, last, file)
            done = await self._sealing.ask(task)
            named = file if done.rows else None
            await self._of_lake(self._lake.adopt, named, block=done.last, merges=done.merges)
            first = done.last + 1
            result = SealResult(
                result.files + bool(done.rows),
                result.rows + done.rows,
                result.file_bytes + done.file_bytes,
            )
        return result

    def refolder(self) -> Refolder:
        """Make who folds history again for one change of it."""
        return ChildRefolder()

    async def compact(self) -> None:
        """Begin to merge what should be merged, in the background; nothing happens if that is under way.

        Nothing is lost by a compaction that fails: it is told in the log and tried again with the next call.
        """
        if self._rests():
            self._put_off = True
        elif self._round is None or self._round.done():
            self._put_off = False
            self._round = asyncio.create_task(self._compact())

    @contextlib.asynccontextmanager
    async def compaction_rests(self, *, given_up: bool) -> AsyncIterator[None]:
        """Begin to merge nothing meanwhile.

        given_up: a merge that is under way ends, and is begun again some time later; else it goes on.
        """
        self._resting += 1
        try:
            if given_up and self._merging is not None and self._round is not None:
                self._merging.cancel()
                await asyncio.wait([self._round])
            yield
        finally:
            self._resting -= 1

    @contextlib.asynccontextmanager
    async def export_goes_on(self) -> AsyncIterator[None]:
        """Begin to merge nothing meanwhile, for EXPORT_ALONE_S at most; then do what was put off.

        An export and a merge want some hundred megabytes each, and a merge can wait.
        """
        until = asyncio.get_running_loop().time() + EXPORT_ALONE_S
        self._exports.append(until)
        try:
            yield
        finally:
            self._exports.remove(until)
            if self._put_off:
                await self.compact()

    def _rests(self) -> bool:
        now = asyncio.get_running_loop().time()
        return self._resting > 0 or any(until > now for until in self._exports)

    async def children_rest(self) -> None:
        """Have children with nothing to do give their memory back: they end, and the next task starts another."""
        await self._sealing.rest()
        await self._compacting.rest()

    async def compacted(self) -> None:
        """Wait until nothing is left to merge, or until it fails."""
        if self._round is not None:
            await self._round

    async def close(self) -> None:
        """Stop the children. A compaction under way is given up, but for what it has begun in the lake: see `_of_lake`."""
        self._resting += 1  # nothing is begun any more
        if self._round is not None:
            self._round.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._round
        await asyncio.gather(*self._in_lake, return_exceptions=True)
        await self._sealing.stop()
        await self._compacting.stop()

    async def _of_lake(self, step: Callable[..., T], *values: object, **named: object) -> T:
        """Have the lake do something in a thread. Who waits may be cancelled, the thread cannot: `close` waits for it.

        The lake must not be closed before, nor the directory be given up: its next owner would not be the only one.
        """
        task = asyncio.create_task(asyncio.to_thread(step, *values, **named))
        self._in_lake.add(task)
        task.add_done_callback(self._in_lake.discard)
        return await asyncio.shield(task)

    async def _compact(self) -> None:
        try:
            while not self._rests() and await self._merge_some():
                pass
            if self._rests():
                self._put_off = True
                await self._compacting.stop()
        except StoreError as problem:
            log.warning("compaction_failed", reason=str(problem))

    async def _merge_some(self) -> bool:
        sources = compact.choose(await self._of_lake(self._lake.event_files))
        if not sources or self._rests():
            return False
        # An undo leaves files whose blocks overlap those of others.
        file = self._lake.new_file(sources[0].first, max(source.last for source in sources))
        try:
            done = await self._merged(MergeTask(sources, file))
        except StoreError:
            now = await self._of_lake(self._lake.event_files)
            if all(source in now for source in sources):
                raise
            return True  # rows of them were deleted meanwhile, and what they were went away
        if done is None:
            return False
        swapped = await self._of_lake(self._lake.swap, sources, file if done.rows else None)
        if not swapped and done.rows:
            self._lake.files.remove(file)
        log.info("compacted", files=len(sources), rows=done.rows, adopted=swapped)
        return True

    async def _merged(self, task: MergeTask) -> Done | None:
        """Have the child merge files; None if that was given up: then the child has ended, and there is no file."""
        merging = self._merging = asyncio.create_task(self._compacting.ask(task))
        try:
            await asyncio.wait([merging])
        finally:
            self._merging = None
            if merging.cancel():  # whoever waits for it is cancelled
                await asyncio.wait([merging])
        if not merging.cancelled():
            return merging.result()
        self._lake.files.remove(task.file)
        log.info("compaction_given_up", files=len(task.sources))
        return None


class _Child(Child):
    """The child that writes lake files."""

    def __init__(self, nice: int, settings: dict[str, str]) -> None:
        super().__init__(_CHILD, nice, settings)
        self._asking = asyncio.Lock()

    async def rest(self) -> None:
        """End it if it has nothing to do: what it holds is given back, and the next task starts another."""
        if not self._asking.locked():
            async with self._asking:
                await self.stop()

    async def ask(self, task: Task) -> Done:
        """Have a task done, by a second child if the first one dies of it. Raises what the child raised."""
        async with self._asking:
            line = b""
            for _ in range(2):
                line = await self.exchange(_encode(task))
                if line:
                    break
            else:
                raise StoreError(
                    "The process that writes lake files dies",
                    where=str(task.file),
                    mend="See whether the machine has memory left; blocks wait until it works",
                )
        answer: Done | Failed = _answer(line)
        if isinstance(answer, Failed):
            raise _ERRORS[answer.error](answer.what, where=answer.where, mend=answer.mend)
        return answer


# In the child.


def main() -> None:
    """Write lake files until standard input ends."""
    serve(lambda line: _encode(_tried(_task(line))))


def _tried(task: Task) -> Done | Failed:
    try:
        return seal_blocks(task) if isinstance(task, SealTask) else merge_files(task)
    except Exception as problem:  # noqa: BLE001 - whatever it is, the server must hear of it
        with contextlib.suppress(StoreError):
            Files().remove(task.file)
        if isinstance(problem, StoreError):
            return Failed(type(problem).__name__, problem.what, problem.where, problem.mend)
        return Failed(
            CorruptError.__name__,
            f"Making a lake file failed: {type(problem).__name__}: {problem}",
            str(task.file),
            "This is a mistake in the program: keep the data directory and report it",
        )


def seal_blocks(task: SealTask) -> Done:
    """Write blocks as one sorted file; it is on disk when this returns.

    Raises StoreError, CorruptError if a block is damaged or missing.
    """
    blocks = _Taken(task, read_blocks(task.blocks, task.first, task.last))
    written = parquet.write(task.file, parquet.in_order(blocks), Files())
    return Done(written.rows, written.file_bytes, blocks.last, blocks.merges)


class _Taken:
    """The blocks of one file, as they pass by: the last one's number, and what merges they hold."""

    def __init__(self, task: SealTask, found: Iterator[Block]) -> None:
        self._task = task
        self._found = found
        self.last = task.first - 1
        self.merges: list[MergeRow] = []

    def __iter__(self) -> Iterator[Block]:
        left_bytes = SEAL_BYTES_MAX
        for block in self._found:
            if block.number != self.last + 1:
                break
            self.last = block.number
            self.merges += arrow.merges([block])
            yield block
            left_bytes -= block.payload_bytes
            if left_bytes < 0:
                return
        if self.last < self._task.last:
            raise CorruptError(
                f"Block {self.last + 1:,} is missing",
                where=str(self._task.blocks),
                mend="Restore the data directory from a copy; do not write to it before",
            )


def merge_files(task: MergeTask) -> Done:
    """Write lake files as one, without their deleted rows; it is on disk when this returns. Raises StoreError."""
    schema = parquet.coding_of(source.path for source in task.sources)
    sources = [parquet.read(source.path, source.deleted, schema) for source in task.sources]
    rows = sum(source.rows for source in task.sources)
    written = parquet.write(
        task.file,
        compact.merge(sources),
        Files(),
        group_rows=parquet.group_rows_of(rows),
        lasting=compact.lasting(rows),
    )
    pa.default_memory_pool().release_unused()  # until the next merge, which may be hours away
    return Done(written.rows, written.file_bytes)
