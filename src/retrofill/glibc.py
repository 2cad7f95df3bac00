"""How the C library keeps memory that was freed, where it is glibc; where it is another, nothing happens here.

It keeps what was freed in an arena for each of some threads, and gives back what lies at the end of one. After work that
took much for a short time most of that stays, and other threads do not find it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

# Its names and numbers.
_TRIM, _MMAP = -1, -3


def keep(kept_bytes: int, piece_bytes: int) -> None:
    """Keep so much free memory at the end of the heap; larger pieces than `piece_bytes` have memory of their own."""
    option = _function("mallopt")
    if option is not None:
        option(_TRIM, kept_bytes)
        option(_MMAP, piece_bytes)


def trim() -> None:
    """Give back every page that nothing is on: some hundredths of a second. Other threads go on."""
    give_back = _function("malloc_trim")
    if give_back is not None:
        give_back(0)


def _function(name: str) -> Callable[..., int] | None:
    """Return a function of the C library; not every one has it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
