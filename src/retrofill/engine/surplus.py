"""Dedupe keys that belong to no row: what an event with such a key would be dropped for was never stored.

A key says neither its project nor its time, only its block; so they are told by project and day as far as the rows of
that block say it. A block without rows was committed no sooner than the last one before it that has some.

People who were deleted left no rows, and their keys stay until they expire: what comes again within the window is what
was deleted. Once somebody was deleted nobody can tell such a key from another one without a row, so all are `unknown`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from retrofill.engine.ingest import Engine
from retrofill.limits import CHECK_KEYS_SHOWN, MS_PER_S


class Surplus(Struct):
    """Keys of one project (0 where the rows do not say) and day of receive time. examples: each with its block."""

    count: int = 0
    examples: list[str] = []


def found(engine: Engine, *, drop: bool) -> Iterator[tuple[tuple[int, str], Surplus]]:
    """Yield the keys that no row holds by (project, day), the day "" if it is not known. drop: let go of them.

    Every block must be in the lake. Each file that loses some is replaced whole: cut off, the next one does the rest.
    """
    every: dict[tuple[int, str], Surplus] = defaultdict(Surplus)
    told = _Blocks(engine)
    for file, places in list(engine.duplicates.unowned(engine.lake.dedupe_rows, engine.limits)):
        for place, block in zip(places.tolist(), file.blocks(places).tolist(), strict=True):
            one = every[told.of(block)]
            one.count += 1
            if len(one.examples) < CHECK_KEYS_SHOWN:
                key = file.high[place].tobytes() + file.low[place].tobytes()
                one.examples.append(f"{key.hex()} of block {block}")
        if drop:
            engine.duplicates.drop(file, places)
    yield from sorted(every.items())


class _Blocks:
    """What the rows of blocks say of them. Read when first asked: a key without a row is rare."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._columns: list[NDArray[np.int64]] = []  # as `Lake.blocks` has them

    def of(self, block: int) -> tuple[int, str]:
        """Return the project whose rows alone are in a block, or 0, and the day on which it was received."""
        if not self._columns:
            self._columns = [column.to_numpy() for column in self._engine.lake.blocks().columns]
        at = int(np.searchsorted(self._columns[0], block, "right")) - 1
        if at < 0:
            return 0, ""
        number, first, last, time = (int(column[at]) for column in self._columns)
        day = datetime.fromtimestamp(time / MS_PER_S, UTC).date().isoformat()
        return first if number == block and first == last else 0, day
