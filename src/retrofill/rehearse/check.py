"""Whether the rows that a server tells fold to the state that it tells: what the prediction stands on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec.structs import replace

from retrofill.core import person as people_codec
from retrofill.core.block import Kind
from retrofill.core.fold import Changes
from retrofill.core.refold import Refold
from retrofill.engine.refold import rows_of
from retrofill.engine.seeding import PROJECT, complete
from retrofill.rehearse.given import Given

ROWS_MAX = 200_000  # ours: more are not folded again
_SEEN = pa.array([Kind.EVENT, Kind.IDENTIFY, Kind.GROUP_IDENTIFY], pa.uint8())
_NUMBERS_FROM = 1 << 60


class Checked:
    """The rows of a history on their way, folded again as they pass, in order of position."""

    def __init__(self, given: Given) -> None:
        self._given = given
        self._numbers = count(_NUMBERS_FROM)
        self._refold = Refold(PROJECT, lambda: next(self._numbers), barred=frozenset(given.barred))
        self._known = np.fromiter(given.people, np.int64)
        self._left: pa.Table | None = None  # the rows of the last block: more of it may follow
        self._rows = 0

    def watch(self, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """Pass rows on."""
        for table in tables:
            self._rows += table.num_rows
            if self._rows <= ROWS_MAX and table.num_rows:
                self._add(table.filter(pc.is_in(table["kind"], value_set=_SEEN)))
            yield table

    def _add(self, table: pa.Table) -> None:
        rows = table if self._left is None else pa.concat_tables([self._left, table])
        if not rows.num_rows:
            return
        last = rows["block"][-1]
        self._fold(rows.filter(pc.less(rows["block"], last)))
        self._left = rows.filter(pc.equal(rows["block"], last))

    def _fold(self, rows: pa.Table) -> None:
        if rows.num_rows:
            group = rows["kind"].to_numpy() == Kind.GROUP_IDENTIFY
            foreign = group & ~np.isin(rows["amplitude_id"].to_numpy(), self._known)
            self._refold.fold(rows_of(complete(rows), foreign))

    def problems(self) -> list[str]:
        """Say what the rows do not fold to, once all have passed; nothing if they do, or were too many."""
        if self._rows > ROWS_MAX or self._given.property_time != "arrival":
            return []
        if self._left is not None:
            self._fold(self._left)
        found = self._refold.changes(Changes({}, {}, {}, {}, {}))
        given = self._given
        deleted = {number for number, one in given.people.items() if one.merged_into < 0}
        wrong = [
            number
            for number in given.people.keys() | found.people.keys()
            if number not in deleted
            and _told(given.people.get(number)) != _told(found.people.get(number))
        ]
        ids = [
            one
            for told, folded in ((given.devices, found.devices), (given.users, found.users))
            for one in told.keys() | folded.keys()
            if told.get(one) != folded.get(one) and told.get(one) not in deleted
        ]
        if not wrong and not ids:
            return []
        said = f"The server's state of {len(wrong):,} people and {len(ids):,} ids is not what their rows fold to"
        return [f"{said}, and the prediction stands on it: `retrofill check` says more"]


def _told(one: people_codec.Person | None) -> bytes:
    return b"" if one is None else people_codec.encode(replace(one, shown=b"", sent=None))
