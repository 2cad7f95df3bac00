"""Who must be folded again: everyone who shares a device or user id with somebody who must, and so on.

People, devices and user ids are nodes, rows and merges the edges between them. All of a project's edges up to some
block are read once and labelled by component, in numpy: some ten bytes a distinct (person, device, user), however many
events. Whoever joins later, by rows that came since, is put together by a union-find over labels and new nodes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Struct
from numpy.typing import NDArray

from retrofill.core.block import Kind

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
_LINKING = ", ".join(
    str(int(kind)) for kind in (Kind.EVENT, Kind.IDENTIFY, Kind.GROUP_IDENTIFY, Kind.DISPLACED)
)
_Node = int | tuple[str, str] | tuple[str, int]  # a label, or an id that was not seen before


class Members(Struct):
    """Some people with all their ids."""

    people: Ints
    devices: pa.Array
    users: pa.Array

    @property
    def count(self) -> int:
        """How many nodes there are."""
        return len(self.people) + len(self.devices) + len(self.users)

    def __add__(self, other: Members) -> Members:
        """Return both together."""
        return Members(
            np.concatenate([self.people, other.people]),
            pa.concat_arrays([self.devices, other.devices]),
            pa.concat_arrays([self.users, other.users]),
        )


class _Names(Struct):
    person: list[Any]
    device: list[Any]
    user: list[Any]

    def add(self, node: tuple[str, Any]) -> None:
        getattr(self, node[0]).append(node[1])

    def members(self) -> Members:
        return Members(
            np.array(self.person, np.int64),
            pa.array(self.device, pa.string()),
            pa.array(self.user, pa.string()),
        )


class Closure:
    """The components of one project, and which of them are inside.

    links: distinct amplitude_id (0 for nobody), device_id, user_id of its rows. merges: absorbed, surviving.
    """

    def __init__(self, links: pa.Table, merges: pa.Table) -> None:
        ids = links["amplitude_id"].to_numpy()
        both = np.concatenate([merges["absorbed"].to_numpy(), merges["surviving"].to_numpy()])
        self.nobody = links.slice(0, 0)
        self._people: Ints = np.unique(np.concatenate([ids[ids > 0], both]))
        self._devices, devices = _coded(links["device_id"])
        self._users, users = _coded(links["user_id"])
        self._first_device = len(self._people)
        self._first_user = self._first_device + len(self._devices)
        count = self._first_user + len(self._users)
        person = np.where(ids > 0, np.searchsorted(self._people, ids), -1)
        device = np.where(devices >= 0, devices + self._first_device, -1)
        user = np.where(users >= 0, users + self._first_user, -1)
        absorbed, surviving = np.searchsorted(self._people, both).reshape(2, -1)
        self._labels = _components(
            count, [(person, device), (person, user), (device, user), (absorbed, surviving)]
        )
        self._inside: Bools = np.zeros(count, bool)  # by label
        self._parents: dict[_Node, _Node] = {}
        self._marked: set[_Node] = set()  # roots in `_parents` that are inside
        self._new: set[_Node] = set()  # unseen nodes that are inside
        self._born: dict[
            _Node, int
        ] = {}  # unseen nodes, by the call of `join` that showed them first
        self._joins = 0

    def begin(self, links: pa.Table, people: Ints, *, whole: bool = False) -> Members:
        """Take the components of these rows' ids and of these people inside; return all who are."""
        if whole:
            self._inside[:] = True
        else:
            here = np.flatnonzero(np.isin(self._people, people))
            seen = np.concatenate([self._nodes(links).ravel(), here])
            self._inside[self._labels[seen[seen >= 0]]] = True
        return self._members(self._inside)

    def join(self, links: pa.Table, seeds: Bools) -> tuple[Members, Members]:
        """Learn rows that came since; those of `seeds` are inside by themselves.

        links: as at first, of every row since. Returns who is inside now and was not, though there were rows of them
        before; and which of the ids that these rows show first are inside.
        """
        self._joins += 1
        nodes = self._nodes(links)
        telling = self._telling(links, nodes, seeds)
        links, nodes, seeds = links.take(pa.array(telling)), nodes[telling], seeds[telling]
        names = (
            ("person", links["amplitude_id"].to_pylist()),
            ("device", links["device_id"].to_pylist()),
            ("user", links["user_id"].to_pylist()),
        )
        for row, is_seed in enumerate(seeds.tolist()):
            roots: list[_Node] = []
            for side, (kind, ids) in enumerate(names):
                at, one = int(nodes[row, side]), ids[row]
                if at >= 0:
                    roots.append(self._root(int(self._labels[at])))
                elif one and (kind != "person" or one > 0):
                    roots.append(self._root((kind, one)))
            if not roots:
                continue
            first = roots[0]
            marked = is_seed or any(root in self._marked for root in roots)
            for root in roots[1:]:
                if root != first:
                    self._parents[root] = first
            if marked:
                self._marked.add(first)
        return self._grown()

    def _telling(self, links: pa.Table, nodes: NDArray[np.int64], seeds: Bools) -> Ints:
        """Return the rows that may say something new: nearly all are of people whose ids were together before."""
        if not len(self._labels):
            return np.arange(links.num_rows)
        there = [np.asarray(links["amplitude_id"].to_numpy() > 0)]
        for name in ("device_id", "user_id"):
            said = pc.fill_null(pc.not_equal(links[name], ""), fill_value=False)
            there.append(np.asarray(said.to_numpy(zero_copy_only=False), bool))
        unseen = (np.stack(there, axis=1) & (nodes < 0)).any(axis=1)
        labels = np.where(nodes >= 0, self._labels[nodes], -1)
        highest = labels.max(axis=1, initial=-1)
        apart = ((labels >= 0) & (labels != highest[:, None])).any(axis=1)
        outside = (highest >= 0) & ~self._inside[highest]
        return np.flatnonzero(unseen | apart | (seeds & outside))

    def _grown(self) -> tuple[Members, Members]:
        grown = np.zeros(len(self._inside), bool)
        fresh = _Names([], [], [])
        earlier = _Names([], [], [])  # who came outside, and is inside now
        for node in list(self._parents):
            if self._root(node) not in self._marked:
                continue
            if isinstance(node, tuple):
                if node not in self._new:
                    self._new.add(node)
                    (fresh if self._born[node] == self._joins else earlier).add(node)
            elif not self._inside[node]:
                grown[node] = self._inside[node] = True
        return self._members(grown) + earlier.members(), fresh.members()

    def _root(self, node: _Node) -> _Node:
        parents = self._parents
        root = parents.setdefault(node, node)
        if isinstance(node, tuple):
            self._born.setdefault(node, self._joins)
        if root is node and isinstance(node, int) and self._inside[node]:
            self._marked.add(node)
        while parents[root] != root:
            root = parents[root]
        while parents[node] != root:
            parents[node], node = root, parents[node]
        return root

    def _nodes(self, links: pa.Table) -> NDArray[np.int64]:
        """Return the node of each row's person, device and user, -1 where it has none or it was not seen before."""
        ids = links["amplitude_id"].to_numpy()
        at = np.searchsorted(self._people, ids)
        known = at < len(self._people)
        known[known] = self._people[at[known]] == ids[known]
        sides = [np.where(known, at, -1)]
        for name, values, first in (
            ("device_id", self._devices, self._first_device),
            ("user_id", self._users, self._first_user),
        ):
            found = pc.index_in(links[name].combine_chunks(), value_set=values, skip_nulls=True)
            places = pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)
            sides.append(np.where(places >= 0, places + first, -1))
        return np.stack(sides, axis=1)

    def _members(self, inside: Bools) -> Members:
        mine = inside[self._labels]
        return Members(
            self._people[mine[: self._first_device]],
            self._devices.filter(pa.array(mine[self._first_device : self._first_user])),
            self._users.filter(pa.array(mine[self._first_user :])),
        )


def of_lake(cursor: duckdb.DuckDBPyConnection, project: int) -> Closure:
    """Read a project's components from a snapshot of the lake that every block is in."""
    links = cursor.execute(
        "SELECT DISTINCT amplitude_id, device_id, user_id FROM lake.events "
        f"WHERE project = ? AND kind IN ({_LINKING})",
        [project],
    ).to_arrow_table()
    merges = cursor.execute(
        "SELECT absorbed, surviving FROM lake.merges WHERE project = ?", [project]
    ).to_arrow_table()
    return Closure(links, merges)


def _coded(side: pa.ChunkedArray) -> tuple[pa.Array, Ints]:
    """Return the distinct texts of a column and the place of each row's among them, -1 for none; "" is none."""
    side = pc.if_else(pc.equal(side, ""), pa.scalar(None, pa.string()), side)
    if isinstance(side, pa.ChunkedArray):
        side = side.combine_chunks()
    coded = side.dictionary_encode()
    places = pc.fill_null(coded.indices, -1).to_numpy(zero_copy_only=False)
    return coded.dictionary, places.astype(np.int64)


def _components(count: int, edges: Iterable[tuple[Ints, Ints]]) -> Ints:
    """Return for each of `count` nodes the least node of its component; edges with a -1 are none."""
    pairs = [
        (one[there], other[there])
        for one, other in edges
        if (there := (one >= 0) & (other >= 0)) is not None
    ]
    left = np.concatenate([one for one, _ in pairs])
    right = np.concatenate([other for _, other in pairs])
    labels = np.arange(count, dtype=np.int64)
    while len(left):
        ends, others = labels[left], labels[right]
        apart = ends != others
        left, right, ends, others = left[apart], right[apart], ends[apart], others[apart]
        if not len(left):
            break
        least = np.minimum(ends, others)
        np.minimum.at(labels, ends, least)
        np.minimum.at(labels, others, least)
        while True:  # everyone directly at its root
            further = labels[labels]
            if (further == labels).all():
                break
            labels = further
    return labels
