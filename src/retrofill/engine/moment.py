"""A project as it stands after one block: all of its rows in one snapshot of the lake, and the state beside them.

Values of state are never changed in place, so those that the checkpoint may not have yet are references, and the
checkpoint is read as it was then. Commits wait only while what has arrived since the last seal is sealed; whoever
holds a moment may take as long as they like.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import msgspec
from msgspec import Struct

from retrofill.core import person as people_codec
from retrofill.core.fold import Group
from retrofill.core.person import Person
from retrofill.engine.admission import ProjectSettings
from retrofill.hot.checkpoint import Changed, Checkpoint, Meta
from retrofill.lake.ducklake import Snapshot
from retrofill.limits import Limits


class Moment(Struct):
    """One project after block `meta.block`. For one thread at a time; close it.

    looks_up: whether places are looked up by address. barred: (device, user) of merges taken back. now_ms: the server's clock then. window_from: the first block whose keys count as duplicates of live events then.
    """

    project: int
    meta: Meta
    now_ms: int
    window_from: int
    settings: ProjectSettings
    limits: Limits
    snapshot: Snapshot
    unsaved: Changed
    saved: Checkpoint
    held: ExitStack
    looks_up: bool = False
    barred: frozenset[tuple[str, str]] = frozenset()

    @property
    def aliases(self) -> dict[str, str]:
        """Return user_id → global_user_id."""
        return self.unsaved.aliases

    def close(self) -> None:
        """Let go of everything."""
        self.held.close()

    def devices(self, ids: Iterable[str]) -> dict[str, int]:
        """Return device_id → amplitude_id of the ids known."""
        return self._ids("devices", self.unsaved.devices, ids)

    def users(self, ids: Iterable[str]) -> dict[str, int]:
        """Return user_id → amplitude_id of the ids known."""
        return self._ids("users", self.unsaved.users, ids)

    def _ids(self, table: str, unsaved: dict[str, int], ids: Iterable[str]) -> dict[str, int]:
        wanted = set(ids)
        found = self.saved.ids(table, self.project, wanted - unsaved.keys())
        found |= {one: unsaved[one] for one in wanted & unsaved.keys()}
        return {one: number for one, number in found.items() if number}

    def people(self, amplitude_ids: Iterable[int]) -> dict[int, Person]:
        """Return the people known among these."""
        wanted, unsaved = set(amplitude_ids), self.unsaved.people
        found = self.saved.people(wanted - unsaved.keys())
        return found | {one: unsaved[one] for one in wanted & unsaved.keys()}

    def every_user(self) -> Iterator[tuple[str, int]]:
        """Yield every (user_id, amplitude_id)."""
        unsaved = self.unsaved.users
        yield from ((user, number) for user, number in unsaved.items() if number)
        for user, number in self.saved.every_id("users", self.project):
            if number and user not in unsaved:
                yield user, number

    def every_person(self) -> Iterator[Person]:
        """Yield every person, absorbed and deleted ones too."""
        unsaved = self.unsaved.people
        yield from unsaved.values()
        for number, blob in self.saved.every_person(self.project):
            if number not in unsaved:
                yield people_codec.decode(blob)

    def every_group(self) -> Iterator[tuple[Group, dict[str, Any]]]:
        """Yield every group with its properties."""
        unsaved = self.unsaved.groups
        yield from unsaved.items()
        for key, text in self.saved.every_group(self.project):
            if key not in unsaved:
                yield key, msgspec.json.decode(text)
