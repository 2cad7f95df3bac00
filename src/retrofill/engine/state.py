"""What the engine knows of every project's people, in memory in front of the checkpoint.

Each kind of value (device ids, user ids, people, groups) lies on a `Shelf`: what changed since the last checkpoint is
kept for certain, what is clean is kept up to a bound and read back from the checkpoint when it is wanted again. A
block first brings everything its ids name onto the shelves (`known`), is folded over that without changing it, and is
laid on the shelves (`apply`) once it is on disk: memory never knows more than the disk.

`capture` takes the changes between two blocks; values are never changed in place, so references are enough, and the
next block may be folded while the old values are written.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from operator import attrgetter
from typing import Any, Generic, Never, TypeVar

from retrofill.core.event import Batch
from retrofill.core.fold import Changes, Folded, Group, Known
from retrofill.core.order import CHANGED, EVERYBODY, FIRST, SHOWN, Key, Place
from retrofill.core.person import FORGOTTEN, Person, decode
from retrofill.hot.checkpoint import Changed, Checkpoint, Meta
from retrofill.limits import IDS_IN_MEMORY, LATE_MARKS_KEPT, MS_PER_S, PEOPLE_IN_MEMORY

_device_of, _user_of = attrgetter("device_id"), attrgetter("user_id")

K = TypeVar("K")
V = TypeVar("V")


class _NoGroups(dict[Group, dict[str, Any]]):
    """Stands for groups that nobody looked up."""

    def get(self, key: Group, _default: object = None) -> Never:
        raise KeyError(key)


_NO_GROUPS = _NoGroups()


class Shelf(Generic[K, V]):
    """Values by key: all that changed since the last checkpoint, and the clean ones used last.

    Clean values live in two generations: what is used moves to `young`; when that is full it becomes `old` and what
    was old is forgotten. `absent` stands for a key that the checkpoint does not have.
    """

    def __init__(
        self, load: Callable[[Iterable[K]], dict[K, V]], *, absent: V | None, bound: int
    ) -> None:
        self._load = load
        self._absent = absent
        self._bound = bound
        self.young: dict[K, V] = {}
        self._old: dict[K, V] = {}
        self._changed: dict[K, V] = {}
        self._saving: dict[K, V] = {}

    def want(self, keys: Iterable[K]) -> bool:
        """Bring the values of these keys into `young`; say whether all of them were there."""
        young = self.young
        missing = set(keys).difference(young)
        if not missing:
            return True
        unknown = []
        for key in missing:
            value = self._held(key)
            if value is None:
                unknown.append(key)
            else:
                young[key] = value
        if unknown:
            loaded = self._load(unknown)
            if self._absent is not None:
                young.update(dict.fromkeys(unknown, self._absent))
            young.update(loaded)
        return False

    def get(self, key: K) -> V | None:
        """Return one value wherever it is, the checkpoint included; None if nowhere. For readers in any thread."""
        value = self.young.get(key) or self._held(key)
        return value if value is not None else self._load([key]).get(key)

    def _held(self, key: K) -> V | None:
        for place in (self._changed, self._saving, self._old):
            value = place.get(key)
            if value is not None:
                return value
        return None

    def lay(self, changed: Mapping[K, V]) -> None:
        """Take new values."""
        self.young.update(changed)
        self._changed.update(changed)

    def rest(self) -> None:
        """Between two blocks: keep the clean ones within their bound."""
        if len(self.young) > self._bound:
            self._old, self.young = self.young, {}

    def capture(self) -> dict[K, V]:
        """Return what changed since the last capture; it stays held until `saved`."""
        self._saving, self._changed = self._changed, {}
        return self._saving

    def saved(self) -> None:
        """The captured values are in the checkpoint."""
        self._saving = {}

    def unsaved(self) -> dict[K, V]:
        """Return what the checkpoint may not have yet."""
        return self._saving | self._changed


class ProjectState:
    """The people of one project.

    by_time: whether its properties go by event time; then `late` is whom late events have marked, each with the block
    that did, and `late_since` the first of these blocks, 0 if there is none: see `core.order`. Beyond LATE_MARKS_KEPT it
    is EVERYBODY, with the block at which there were so many.
    """

    def __init__(self, project: int, checkpoint: Checkpoint) -> None:
        self._number, self._checkpoint = project, checkpoint
        self.devices: Shelf[str, int] = Shelf(
            lambda ids: checkpoint.ids("devices", project, ids), absent=0, bound=IDS_IN_MEMORY
        )
        self.users: Shelf[str, int] = Shelf(
            lambda ids: checkpoint.ids("users", project, ids), absent=0, bound=IDS_IN_MEMORY
        )
        self.people: Shelf[int, Person] = Shelf(
            checkpoint.people, absent=None, bound=PEOPLE_IN_MEMORY
        )
        self.groups: Shelf[Group, dict[str, Any]] = Shelf(
            lambda keys: checkpoint.groups(project, keys), absent={}, bound=IDS_IN_MEMORY
        )
        self.aliases: dict[str, str] = checkpoint.aliases(project)
        self._aliases_changed: dict[str, str] = {}
        self.by_time = False
        self.barred: frozenset[tuple[str, str]] = frozenset()
        self.last: Shelf[Place, Key] = Shelf(
            lambda places: checkpoint.last(project, places), absent=FIRST, bound=PEOPLE_IN_MEMORY
        )
        self.late: dict[Place, int] = checkpoint.late(project)
        self.late_since = min(self.late.values(), default=0)
        self._late_changed = False
        self.settled_times = 0
        self._settled = False

    def at_hand(self, batches: Iterable[Batch]) -> Known | None:
        """Return what lies in memory, if that may well be all that these batches name; None if not.

        A fold over it raises KeyError where it is not: nothing there stands for what has to be looked up first.
        """
        self.rest()
        if not self._settled or any(batch.path == "/usermap" for batch in batches):
            return None
        last = self.last.young if self.by_time else None
        young = (self.devices.young, self.users.young, self.people.young)
        return Known(*young, _NO_GROUPS, last, self.barred)

    def known(self, batches: Iterable[Batch]) -> Known:
        """Bring everything that these batches name into memory, complete for the fold."""
        self.rest()
        events = [event for batch in batches for event in batch.events]
        # One pass in C for each: every event of the server comes by here.
        devices = set(map(_device_of, events)) - {None, ""}
        users = set(map(_user_of, events)) - {None}
        settled = self.devices.want(devices) & self.users.want(users)
        device_of, user_of = self.devices.young, self.users.young
        named = set(map(device_of.__getitem__, devices))
        named.update(map(user_of.__getitem__, users))
        named.discard(0)
        people = self.people.young
        settled &= self.people.want(named)
        survivors = {people[one].merged_into for one in named}
        settled &= self.people.want(one for one in survivors if one > 0)
        groups = {
            (group_type, value)
            for event in events
            if event.groups
            for group_type, values in event.groups.items()
            for value in (values if isinstance(values, list) else [values])
        }
        for one in (*named, *survivors):
            if one > 0 and people[one].groups:
                groups.update(
                    (group_type, value)
                    for group_type, values in people[one].groups.items()
                    for value in values
                )
        self.groups.want(groups)
        last = None
        if self.by_time:
            settled &= self.last.want(named)
            settled &= self.last.want(one for one in survivors if one > 0)
            self.last.want((what, *group) for group in groups for what in (SHOWN, CHANGED))
            last = self.last.young
        self._settled = settled and not groups
        return Known(device_of, user_of, people, self.groups.young, last, self.barred)

    def rest(self) -> None:
        """Keep what is clean within its bounds."""
        self.devices.rest()
        self.users.rest()
        self.people.rest()
        self.groups.rest()
        self.last.rest()

    def forgotten(self) -> set[int]:
        """Return everyone who was deleted, or of whom a change of history has left nothing. Reads the whole checkpoint."""
        unsaved = self.people.unsaved()
        saved = self._checkpoint.every_person(self._number)
        gone = {one for one, blob in saved if decode(blob).merged_into == FORGOTTEN}
        now = {one for one, who in unsaved.items() if who.merged_into == FORGOTTEN}
        return gone.difference(unsaved) | now

    def owned_by(self, people: Collection[int]) -> dict[str, int]:
        """Return the devices of these people, with the owner. Reads the whole checkpoint."""
        unsaved = self.devices.unsaved()
        saved = self._checkpoint.every_id("devices", self._number)
        owners = itertools.chain((one for one in saved if one[0] not in unsaved), unsaved.items())
        return {one: owner for one, owner in owners if owner in people}

    def owners(self, devices: Iterable[str], users: Iterable[str]) -> set[int]:
        """Return the people whom these ids name."""
        found: set[int] = set()
        for shelf, ids in ((self.devices, devices), (self.users, users)):
            shelf.want(ids)
            found.update(shelf.young[one] for one in ids)
        return found - {0}

    def apply(self, changes: Changes, *, block: int) -> None:
        """Take what a block changed, after it is on disk."""
        if (
            changes.late
        ):  # before the values: who reads one after the other finds that they are marked
            if EVERYBODY not in self.late:
                self.late.update(dict.fromkeys(changes.late - self.late.keys(), block))
                self.late = _bounded(self.late, block)
            self.late_since = self.late_since or block
            self._late_changed = True
        self.last.lay(changes.last)
        self.devices.lay(changes.devices)
        self.users.lay(changes.users)
        self.people.lay(changes.people)
        self.groups.lay(changes.groups)
        for user, to in changes.aliases.items():
            self._aliases_changed[user] = to
            if to:
                self.aliases[user] = to
            else:
                self.aliases.pop(user, None)

    def capture(self) -> Changed:
        """Return what changed since the last checkpoint."""
        aliases, self._aliases_changed = self._aliases_changed, {}
        return Changed(
            self.devices.capture(),
            self.users.capture(),
            self.people.capture(),
            self.groups.capture(),
            aliases,
            self.last.capture(),
            self._captured_late(),
        )

    def _captured_late(self) -> dict[Place, int] | None:
        changed, self._late_changed = self._late_changed, False
        return dict(self.late) if changed else None

    def settle(self, settled: int, late: Collection[Place], *, block: int) -> None:
        """Take the marks off that blocks up to `settled` made; those in `late` stay, as of a block."""
        self.settled_times += 1  # before the marks: who finds none must see that they were there
        left = {place: at for place, at in self.late.items() if at > settled}
        # When everybody was marked, others were already, by whichever blocks.
        since = settled + 1 if EVERYBODY in left else block
        left = _bounded(dict.fromkeys(late, block) | left, block)
        self._late_changed |= left != self.late
        self.late, self.late_since = left, min([since, *left.values()]) if left else 0

    @property
    def marked(self) -> int:
        """How many people and groups late events have marked, as far as they are kept apart."""
        return LATE_MARKS_KEPT if EVERYBODY in self.late else len(self.late)

    def unsaved(self) -> Changed:
        """Return what the checkpoint may not have yet, and every alias; it stays as it is now."""
        return Changed(
            self.devices.unsaved(),
            self.users.unsaved(),
            self.people.unsaved(),
            self.groups.unsaved(),
            dict(self.aliases),
        )

    def saved(self) -> None:
        """What was captured is in the checkpoint."""
        for shelf in (self.devices, self.users, self.people, self.groups, self.last):
            shelf.saved()


def _bounded(late: dict[Place, int], block: int) -> dict[Place, int]:
    """Return marks, or everybody's as of a block if there are too many."""
    return late if len(late) <= LATE_MARKS_KEPT else {EVERYBODY: block}


class State:
    """The state of every project, exactly as of the last applied block."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        meta = checkpoint.meta()
        self.saved_block = meta.block
        self.block = meta.block
        self.server_upload_ms = meta.server_upload_ms
        self.fresh = meta.fresh
        self.projects: dict[int, ProjectState] = {}
        self.block_times = checkpoint.block_times()
        self._times_saved = len(self.block_times)
        self._touched = False

    def project(self, number: int) -> ProjectState:
        """Return the state of a project, empty at first."""
        state = self.projects.get(number)
        if state is None:  # readers ask in threads of their own: whoever is first made the only one
            state = self.projects.setdefault(number, ProjectState(number, self._checkpoint))
        return state

    def moment(self, number: int) -> tuple[Meta, Changed]:
        """Return what the state of a project is now, as far as the checkpoint may not have it. Between two blocks."""
        meta = Meta(self.block, self.server_upload_ms, self.fresh)
        return meta, self.project(number).unsaved()

    def known(self, batches: list[Batch]) -> dict[int, Known]:
        """Everything the fold of these batches may read, by project."""
        return {
            number: self.project(number).known(theirs)
            for number, theirs in _by_project(batches).items()
        }

    def fold(self, batches: list[Batch], over: Callable[[Mapping[int, Known]], Folded]) -> Folded:
        """Fold these batches over what they name, which must not change anything.

        Nearly every block is of people who are in memory. Making sure of it costs as much as a quarter of the fold, so
        where the block before found everything there, the fold itself is let find out.
        """
        by_project = _by_project(batches)
        at_hand = {
            number: known
            for number, theirs in by_project.items()
            if (known := self.project(number).at_hand(theirs)) is not None
        }
        if len(at_hand) == len(by_project):
            with contextlib.suppress(KeyError):
                return over(at_hand)
        return over(self.known(batches))

    def apply(self, folded: Folded) -> None:
        """Take what a block changed, after it is on disk."""
        for number, changes in folded.changes.items():
            self.project(number).apply(changes, block=folded.block.number)
        block = folded.block
        self.block = block.number
        self.server_upload_ms = block.server_upload_ms
        self.fresh = folded.fresh
        if not self.block_times or (block.server_upload_ms >= self.block_times[-1][1] + MS_PER_S):
            self.block_times.append((block.number, block.server_upload_ms))

    def oldest_block(self, after_ms: int) -> int:
        """Return the first block committed after this time.

        Times are kept once a second, so blocks that follow within a second of one count for up to a second longer.
        """
        times = self.block_times
        low, high = 0, len(times)
        while low < high:
            middle = (low + high) // 2
            if times[middle][1] <= after_ms:
                low = middle + 1
            else:
                high = middle
        if low:
            number, ms = times[low - 1]
            if after_ms < ms + MS_PER_S:
                return number + 1
            return times[low][0] if low < len(times) else self.block + 1
        # Times that no window reaches any more are let go (`saved`), and so are the blocks before the first one kept.
        return times[0][0] if times else self.block + 1

    def draw(self) -> int:
        """Return an amplitude_id that nobody ever had."""
        self.fresh += 1
        return self.fresh - 1

    def replace(
        self, number: int, changes: Changes, *, settled: int, by_time: bool | None = None
    ) -> None:
        """Take a project's values that changed without a block: the next checkpoint must be written.

        settled: marks of late events that blocks up to this one made are done with; `changes` has those that came of
        it. by_time: the next block is folded so; None: as before.

        They may have been made by a process that died: its numbers were drawn, and whom its ids named before is gone.
        """
        project = self.project(number)
        were = project.owners(changes.devices, changes.users) - changes.people.keys()
        people = changes.people | {one: Person(one, merged_into=FORGOTTEN) for one in were}
        # Of a group, rows of people who are not folded again may be the last to show it; of who was deleted, rows are gone.
        last = {
            place: key
            if isinstance(place, int) and not _is_gone(people.get(place))
            else max(key, project.last.get(place) or FIRST)
            for place, key in changes.last.items()
        }
        late = (
            changes.late
        )  # they come before the values, and the others go after them: nobody reads between
        new = Changes(changes.devices, changes.users, people, changes.groups, {}, last, late)
        self.mend(number, new)
        project.settle(settled, late, block=self.block)
        if by_time is not None:
            project.by_time = by_time

    def mend(self, number: int, changes: Changes) -> None:
        """Take values of a project, these and no others, without a block: the next checkpoint must be written."""
        self.project(number).apply(changes, block=self.block)
        self.fresh = max(self.fresh, max(changes.people, default=0) + 1)
        self._touched = True

    @property
    def saved_all(self) -> bool:
        """Whether the checkpoint has everything."""
        return self.block == self.saved_block and not self._touched

    def capture(self) -> tuple[Meta, dict[int, Changed], list[tuple[int, int]]]:
        """Take what the next checkpoint must write, between two blocks."""
        meta = Meta(self.block, self.server_upload_ms, self.fresh)
        self._touched = False
        times = self.block_times[self._times_saved :]
        self._times_saved = len(self.block_times)
        return meta, {number: state.capture() for number, state in self.projects.items()}, times

    def saved(self, meta: Meta, *, times_after_ms: int) -> None:
        """What was captured is on disk; times before `times_after_ms` are no longer wanted."""
        self.saved_block = meta.block
        for state in self.projects.values():
            state.saved()
        gone = sum(1 for _, ms in self.block_times if ms < times_after_ms)
        del self.block_times[:gone]
        self._times_saved -= gone


def _is_gone(who: Person | None) -> bool:
    return who is not None and who.merged_into == FORGOTTEN


def _by_project(batches: list[Batch]) -> dict[int, list[Batch]]:
    found: dict[int, list[Batch]] = {}
    for batch in batches:
        found.setdefault(batch.project, []).append(batch)
    return found
