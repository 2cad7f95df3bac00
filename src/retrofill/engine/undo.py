"""Taking an import back, and bringing it back: `rewriting` with its rows hidden, or shown again."""

from __future__ import annotations

import asyncio
from typing import Protocol

from retrofill.clock import Clock
from retrofill.engine import imports
from retrofill.engine.imports import Counting
from retrofill.engine.refold import Rule, Seed, Which
from retrofill.engine.rewriting import Intent, Rewriting
from retrofill.hot.imports import Import, Imports
from retrofill.lake import Lake


class Host(Protocol):
    """What is needed of the engine."""

    lake: Lake
    imports: Imports
    counting: Counting

    async def seal(self) -> None:
        """Move every block committed so far into the lake."""


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
        one = self._known(project, name)
        if one.state == "undone" and self._host.lake.holds_import(project, name, one.until):
            imports.begun_again(self._host.imports, project, name)
        return self._known(project, name)

    def _to_restore(self, project: int, name: str) -> Import:
        known, host = self._known(project, name), self._host
        again = known.state == "undone" and host.lake.holds_import(project, name, known.until)
        return imports.to_restore(
            host.imports, project, name, again=again, now_ms=self._clock.now_ms()
        )

    async def _undone(self, intent: Intent, block: int) -> None:
        await self._host.counting.forget(intent.project, intent.argument)
        one = self._known(intent.project, intent.argument)
        done = imports.undone(one, until=block, now_ms=self._clock.now_ms())
        await asyncio.to_thread(self._host.imports.put, intent.project, done)

    async def _restored(self, intent: Intent, block: int) -> None:
        del block
        await self._host.counting.forget(intent.project, intent.argument)
        done = imports.restored(self._known(intent.project, intent.argument))
        await asyncio.to_thread(self._host.imports.put, intent.project, done)
