"""How this process keeps memory while it stages and sends: pieces of some megabytes come and go without end."""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import Final

# Objects made before circles among them are looked for, then how many such looks before older ones are looked at too.
# Rows make no circles: looking as often as usual took a seventh of loading and a twentieth of staging.
COLLECT_AFTER: Final = (50_000, 20, 20)
# glibc's names and numbers. By itself it gives memory back to the system after every few megabytes and asks for it again,
# cleared, for the next piece: a third of cutting a source into rows, 6 % of staging.
_TRIM, _MMAP = -1, -3
KEPT_BYTES: Final = 16 * 1024 * 1024  # ours: free memory kept at the end of the heap
PIECE_BYTES: Final = 32 * 1024 * 1024  # glibc takes no more: larger pieces have memory of their own


def settle() -> None:
    """Keep what was freed for the next piece, and look for circles of objects less often. Call before much is loaded."""
    gc.set_threshold(*COLLECT_AFTER)
    if sys.platform != "linux":
        return
    option = getattr(ctypes.CDLL(None), "mallopt", None)  # not every C library has it
    if option is not None:
        option(_TRIM, KEPT_BYTES)
        option(_MMAP, PIECE_BYTES)
