"""Taking an import back, and bringing it back: `rewriting` with its rows hidden, or shown again.

Hidden rows are kept for UNDO_RETENTION_DAYS, and then deleted.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import structlog

from retrofill.clock import Clock
from retrofill.engine import imports
from retrofill.engine.change import Intent
from retrofill.engine.imports import Counting
from retrofill.engine.refold import Rule, Seed, Which
from retrofill.engine.rewriting import Rewriting
from retrofill.errors import ConflictError
from retrofill.hot.imports import Import, Imports
from retrofill.hot.intents import Tried
from retrofill.lake import Lake

log = structlog.get_logger()

_KINDS = ("undo", "restore")


class Host(Protocol):
    """What is needed of the engine."""

    lake: Lake
    imports: Imports
    counting: Counting

    async def seal(self) -> None:
        """Move every block committed so far into the lake."""

    async def compact(self) -> None:
        """Write lake files anew that must lose rows, or are many; nothing is done while a change of history is under way."""


class Undoing:
    """Undo and restore of the imports of one engine."""

    def __init__(self, rewriting: Rewriting, host: Host, clock: Clock) -> None:
        self._rewriting = rewriting
        self._host = host
        self._clock = clock
        rewriting.kinds["undo"] = self._undone
        rewriting.kinds["restore"] = self._restored

    async def undo(self, project: int, name: str) -> Import:
        """Hide an import's rows; it is undone when this returns. One that is undone already stays what it is."""
        async with self._rewriting.alone():
            await self._host.seal()
            one = await asyncio.to_thread(self._to_undo, project, name)
            if one.state == "undone":
                return one
            which = Which(name, one.after)
            await self._rewriting.run(
                Intent(project, "undo", name, Seed(which), Rule(hide=which)),
                begun=lambda: imports.under_way(self._host.imports, project, name, "undoing"),
            )
            return self._known(project, name)

    async def restore(self, project: int, name: str) -> Import:
        """Show an undone import's rows again. Raises ConflictError if they cannot be, MissingError."""
        async with self._rewriting.alone():
            await self._host.seal()
            one = await asyncio.to_thread(self._to_restore, project, name)
            which = Which(name, one.after, one.until)
            await self._rewriting.run(
                Intent(project, "restore", name, Seed(which), Rule(show=which)),
                begun=lambda: imports.under_way(self._host.imports, project, name, "restoring"),
            )
            return self._known(project, name)

    def _known(self, project: int, name: str) -> Import:
        return self._host.imports.get(project, name) or Import(name)

    def _to_undo(self, project: int, name: str) -> Import:
        """Return the import as it is; an undone one that has rows since is in its next generation."""
        one, known = self._known(project, name), self._host.imports
        if one.state == "undone" and self._host.lake.holds_import(project, name, one.until):
            imports.begun_again(known, project, name)
        elif one.state == "undone":
            imports.not_again(known, project, name)
        return self._known(project, name)

    def _to_restore(self, project: int, name: str) -> Import:
        known, host = self._known(project, name), self._host
        again = known.state == "undone" and host.lake.holds_import(project, name, known.until)
        return imports.to_restore(
            host.imports, project, name, again=again, now_ms=self._clock.now_ms()
        )

    async def cancel(self, project: int, name: str) -> Import:
        """Call off an undo or restore that has changed nothing yet; the import is then what it was before.

        Raises ConflictError if there is none, or it is too late.
        """
        async with self._rewriting.called_off(project, _KINDS, name) as found:
            if self._known(project, name).state not in ("undoing", "restoring") and not found:
                raise ConflictError(f"The import {name} is neither being undone nor restored")
            await asyncio.to_thread(imports.as_before, self._host.imports, project, name)
        return self._known(project, name)

    async def purge(self) -> int:
        """Delete the hidden rows that nobody can restore any more; they are in no file when this returns.

        Returns how many were deleted. Nothing is noted before it is done, so it is done again after a stop; that changes
        nothing more. Raises StoreError.
        """
        now_ms = self._clock.now_ms()
        due = [
            (project, one.name)
            for project, one in await asyncio.to_thread(self._host.imports.everywhere)
            if imports.to_purge(one, now_ms)
        ]
        if not due:
            return 0
        lake, done, gone = self._host.lake, [], 0
        async with self._rewriting.alone():
            for project, name in due:
                last = imports.to_purge(self._known(project, name), now_ms)
                if last:
                    gone += await asyncio.to_thread(lake.purge, project, name, last)
                    done.append((project, name, last))
            left = await asyncio.to_thread(lake.event_files)
        holding = {file.path for file in left if file.deleted is not None}
        await self._host.compact()
        if holding.isdisjoint(file.path for file in await asyncio.to_thread(lake.event_files)):
            for project, name, last in done:
                await asyncio.to_thread(imports.purged, self._host.imports, project, name, last)
            log.info("purged", imports=len(done), rows=gone)
        return gone

    def recover(self) -> None:
        """Mend what a stop left between an intent that was called off and the import's state."""
        begun = self._rewriting.begun(_KINDS)
        for project, one in self._host.imports.everywhere():
            if one.state in ("undoing", "restoring") and (project, one.name) not in begun:
                imports.as_before(self._host.imports, project, one.name)

    def tried(self, project: int) -> dict[str, Tried]:
        """Return how each undo or restore of a project fared that is not ended. Any thread."""
        found = self._rewriting.begun(_KINDS)
        return {name: tried for (number, name), tried in found.items() if number == project}

    async def _undone(self, intent: Intent, block: int) -> None:
        one = self._known(intent.project, intent.argument)
        await self._host.counting.put_aside(intent.project, one.name, one.generation)
        done = imports.undone(one, until=block, now_ms=self._clock.now_ms())
        await asyncio.to_thread(self._host.imports.put, intent.project, done)

    async def _restored(self, intent: Intent, block: int) -> None:
        del block
        one = self._known(intent.project, intent.argument)
        await self._host.counting.bring_back(intent.project, one.name, one.generation)
        done = imports.restored(one)
        await asyncio.to_thread(self._host.imports.put, intent.project, done)
