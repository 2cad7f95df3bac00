"""How this process keeps memory while it stages and sends: pieces of some megabytes come and go without end."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Final

from retrofill import glibc

# Objects made before circles among them are looked for, then how many such looks before older ones are looked at too.
# Rows make no circles: looking as often as usual took a seventh of loading and a twentieth of staging.
COLLECT_AFTER: Final = (50_000, 20, 20)
# By itself glibc gives memory back to the system after every few megabytes and asks for it again, cleared, for the next
# piece: a third of cutting a source into rows, 6 % of staging.
# ours: free memory kept at the end of the heap, more than sorting has in use at once: with a quarter of it, two of three pages
# that were asked for were fresh ones, half a CPU second for a million events.
KEPT_BYTES: Final = 64 * 1024 * 1024
PIECE_BYTES: Final = 32 * 1024 * 1024  # glibc takes no more: larger pieces have memory of their own


SENT_KEPT_BYTES: Final = 1024 * 1024  # the same two while sending, which goes on for hours
SENT_PIECE_BYTES: Final = 4 * 1024 * 1024


_TOLD, _BOUND = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")


def settle() -> None:
    """Keep what was freed for the next piece, and look for circles of objects less often. Call before much is loaded."""
    gc.set_threshold(*COLLECT_AFTER)
    # Nothing here multiplies matrices; a thread that waits for some takes 0.03 CPU seconds of every start.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    glibc.keep(KEPT_BYTES, PIECE_BYTES)


def loaded() -> None:
    """Look at nothing of what is loaded any more, now or at the end, when circles are looked for. Call once much is."""
    gc.freeze()


def give_back() -> None:
    """Give back what staging took, and keep little from now on. Call before sending."""
    gc.collect()
    glibc.keep(SENT_KEPT_BYTES, SENT_PIECE_BYTES)
    glibc.trim()


def available() -> int:
    """Return the bytes that the system has for files in memory, 0 where it does not say."""
    if not _TOLD.exists():
        return 0
    told = dict(line.split(":", 1) for line in _TOLD.read_text().splitlines())
    free = int(told["MemAvailable"].split()[0]) * 1024
    bound = _BOUND.read_text().strip() if _BOUND.exists() else ""  # of the container
    return min(free, int(bound)) if bound.isdigit() else free
