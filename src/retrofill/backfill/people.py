"""Who is one person in a source: a connected component of its device and user ids.

A row that names a device and a user joins them. Whoever is joined keeps one order of events, so that what a device did
before its login and what its user did elsewhere arrive in time order. Two kinds of id would join strangers and so hold
each other back: a device of more users than the kiosk limit, and a user that shares its devices with more other users than
that. They join nobody. A row belongs to its user's component, or, without a user, to its device's.

Ids are 63-bit hashes here, 0 for none. A collision would put two people into one lane, no more: order is kept, nothing lost.
A component's number is the smallest hash of its users, or of its device when it has no user, hence spread evenly over
63 bits: senders' sets are ranges of it.
"""

from __future__ import annotations

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_COMPACT_AT = 500_000  # pairs gathered before equal ones are counted together
_ODD = np.int64(-7046029254386353131)  # spreads the device over all bits
_EMPTY: Ints = np.zeros(0, np.int64)


class Pairs:
    """Counts of (device, user) pairs, gathered a batch at a time. Memory: up to 48 bytes for each different pair."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Ints, Ints, Ints]] = []
        self._size = self._known = 0  # pairs in all, and those that were counted together

    def add(self, device: Ints, user: Ints) -> None:
        """Count one pair a row."""
        self._waiting.append((device, user, np.ones(len(device), np.int64)))
        self._size += len(device)
        if self._size > max(_COMPACT_AT, 2 * self._known):
            self.compact()

    def compact(self) -> tuple[Ints, Ints, Ints]:
        """Return devices, users and counts, each pair once."""
        if not self._waiting:
            return _EMPTY, _EMPTY, _EMPTY
        parts = [np.concatenate(column) for column in zip(*self._waiting, strict=True)]
        triple = _grouped(parts[0], parts[1], parts[2])
        self._waiting, self._size = [triple], len(triple[0])
        self._known = self._size
        return triple


def _grouped(device: Ints, user: Ints, count: Ints) -> tuple[Ints, Ints, Ints]:
    if len(device) == 0:
        return device, user, count
    order = np.argsort(device * _ODD + user)  # one key is sorted several times faster than two
    device, user, count = device[order], user[order], count[order]
    first = np.ones(len(device), np.bool_)
    first[1:] = (device[1:] != device[:-1]) | (user[1:] != user[:-1])
    at = np.flatnonzero(first)
    return device[at], user[at], np.add.reduceat(count, at)


class People(Struct, frozen=True):
    """The components. nodes: sorted ids whose component is not their own number; persons: theirs."""

    nodes: Ints
    persons: Ints
    kiosks: Ints  # devices and users that would have joined more people than the limit

    def of(self, device: Ints, user: Ints) -> Ints:
        """Return each row's component. Rows without any id share component 0."""
        node = np.where(user != 0, user, device)
        if len(self.nodes) == 0:
            return node
        at = np.minimum(np.searchsorted(self.nodes, node), len(self.nodes) - 1)
        return np.where(self.nodes[at] == node, self.persons[at], node)


def join(device: Ints, user: Ints, *, kiosk_limit: int) -> People:
    """Join devices and users that stand in one pair. Each pair is given once; 0 stands for no id."""
    both = (device != 0) & (user != 0)
    kiosks = _kiosks(device[both], user[both], kiosk_limit)
    edge = both & ~np.isin(device, kiosks) & ~np.isin(user, kiosks)
    nodes, inverse = np.unique(np.concatenate((device[edge], user[edge])), return_inverse=True)
    is_user = np.isin(nodes, user[edge])
    # Users first, so that a component's smallest label is a user's.
    rank = np.argsort(np.lexsort((nodes, ~is_user))).astype(np.int64)
    half = len(inverse) // 2
    label = _smallest(rank[inverse[:half]], rank[inverse[half:]], len(nodes))
    by_rank = np.empty(len(nodes), np.int64)
    by_rank[rank] = nodes
    persons = by_rank[label[rank]]
    moved = persons != nodes
    return People(nodes[moved], persons[moved], kiosks)


def _smallest(left: Ints, right: Ints, size: int) -> Ints:
    """Return for each node the smallest node that edges lead to: hooking and jumping, all edges at once."""
    label = np.arange(size, dtype=np.int64)
    while True:
        low = np.minimum(label[left], label[right])
        high = np.maximum(label[left], label[right])
        apart = low != high
        if not apart.any():
            return label
        left, right = left[apart], right[apart]
        np.minimum.at(label, high[apart], low[apart])
        while True:
            further = label[label]
            if np.array_equal(further, label):
                break
            label = further


def _kiosks(device: Ints, user: Ints, limit: int) -> Ints:
    """Return devices of more users than the limit, and users who share devices with more others than it."""
    devices, users = np.unique(device, return_counts=True)
    crowded = devices[users > limit]
    kept = ~np.isin(device, crowded) & np.isin(device, devices[users > 1])
    return np.unique(np.concatenate((crowded, _mixed(device[kept], user[kept], limit))))


def _mixed(device: Ints, user: Ints, limit: int) -> Ints:
    """Return the users who meet more than `limit` others. No device here has more users than that."""
    order = np.lexsort((user, device))
    device, user = device[order], user[order]
    met: list[tuple[Ints, Ints]] = []
    for step in range(1, limit):  # each pair of users on a device stands at most limit - 1 apart
        same = device[step:] == device[:-step]
        one, other = user[:-step][same], user[step:][same]
        if len(one) == 0:
            break
        met += [(one, other), (other, one)]
    if not met:
        return _EMPTY
    ones, _others, _counts = _grouped(
        np.concatenate([pair[0] for pair in met]),
        np.concatenate([pair[1] for pair in met]),
        np.ones(sum(len(pair[0]) for pair in met), np.int64),
    )
    names, others = np.unique(ones, return_counts=True)
    return names[others > limit]
