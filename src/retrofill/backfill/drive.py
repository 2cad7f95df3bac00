"""One run over a work directory: its stage, its journal and a destination put together, until all is settled.

What a later command needs to know (destination, profile, import) goes into the journal; keys never do.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import ssl
from collections.abc import Callable
from pathlib import Path

import msgspec
import pyarrow as pa
import uvloop
from msgspec import Struct

from retrofill.backfill import manifest as manifests
from retrofill.backfill.destination import Connection, SteadyClock, parse_url
from retrofill.backfill.feed import Feed
from retrofill.backfill.journal import GENERATION, Journal, Ledger
from retrofill.backfill.manifest import Manifest
from retrofill.backfill.profile import DAY_S, Profile, Target, target
from retrofill.backfill.send import MEMORY_MARGIN_S, Outcome, Progress, Sender
from retrofill.errors import InputError

SHOW_S = 0.5  # ours: how often the caller is told how far the run is


class Drive(Struct, frozen=True, kw_only=True):
    """What a run needs. show: told how far it is, twice a second and at the end.

    generation: of the import at the destination, which the rows belong to; None if it is not known.
    """

    work: Path
    to: Target
    profile: Profile
    api_key: str
    gzip: bool = False
    give_up_after_s: float | None = None
    generation: int | None = None
    show: Callable[[Progress], None] = lambda _: None


def staged(work: Path) -> Manifest:
    """Return the manifest of a work directory. Raises InputError if nothing is staged there."""
    found = manifests.read(work / "stage")
    if found is None:
        raise InputError(
            f"Nothing is staged in {work}",
            mend="Name the --work directory of a run; `retrofill plan` and `retrofill run` make one",
        )
    return found


def remembered(work: Path) -> tuple[Target, Profile]:
    """Return where this directory's run sends to, as its journal says. Raises InputError."""
    ledger = Ledger(work)
    try:
        facts = ledger.meta()
    finally:
        ledger.close()
    if "destination" not in facts or "limits" not in facts:
        raise InputError(
            f"The journal in {work} does not say where it sends to",
            mend="Run `retrofill run` with the same line as before",
        )
    return target(facts["destination"]), msgspec.json.decode(facts["limits"], type=Profile)


def drive(asked: Drive) -> Outcome:
    """Send what is staged and not settled. Ctrl-C and SIGTERM end it when what is under way is answered.

    Raises BusyError, InputError, StoreError, FinalError.
    """
    # Groups of rows come and go: Arrow's own pool asks the machine for fresh memory each time, malloc keeps some.
    pa.set_memory_pool(pa.system_memory_pool())
    return uvloop.run(_drive(asked))


async def _drive(asked: Drive) -> Outcome:
    found = staged(asked.work)
    clock = SteadyClock()
    journal = Journal(asked.work)
    try:
        journal.settle(
            {
                "fingerprint": found.fingerprint,
                "import": found.import_id,
                "destination": asked.to.name,
            }
        )
        journal.note({"limits": msgspec.json.encode(asked.profile).decode()})
        if asked.generation is not None:
            journal.note({GENERATION: str(asked.generation)})
        now = clock.now()
        unsure = 0
        if asked.profile.memory_days:
            edge = now - asked.profile.memory_days * DAY_S + MEMORY_MARGIN_S
            journal.unsure_before(int(edge * 1000), int(now * 1000))
        unsure = journal.unsure().count
        feed = Feed(asked.work / "stage", found, asked.profile.rates, journal.done())
        url = parse_url(asked.to.ingest)
        tls = ssl.create_default_context() if url.tls else None
        coding = "gzip" if asked.gzip else ""
        sender = Sender(
            feed=feed,
            journal=journal,
            profile=asked.profile,
            api_key=asked.api_key,
            wires=[
                Connection(url, tls=tls, encoding=coding) for _ in range(asked.profile.connections)
            ],
            clock=clock,
            chance=random.random,
            gzip=asked.gzip,
            give_up_after_s=asked.give_up_after_s,
        )
        dead = journal.dead_rows()
        one = sender.progress
        one.total, one.dead, one.unsure = found.events, dead, unsure
        one.before = found.events - feed.left - dead - unsure
        return await _shown(asked, sender)
    finally:
        journal.close()


async def _shown(asked: Drive, sender: Sender) -> Outcome:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, sender.stop, "stopped")
    showing = loop.create_task(_showing(asked, sender))
    try:
        return await sender.run()
    finally:
        showing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await showing
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        asked.show(sender.progress)


async def _showing(asked: Drive, sender: Sender) -> None:
    while True:
        asked.show(sender.progress)
        await asyncio.sleep(SHOW_S)
