"""Who is inside a closure, step by step, is who shares ids with somebody inside in all rows so far."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from retrofill.engine.closure import Closure, Members

Link = tuple[int, str | None, str | None]
NO_MERGES = pa.table({"absorbed": pa.array([], pa.int64()), "surviving": pa.array([], pa.int64())})


def table(links: list[Link]) -> pa.Table:
    sides: list[tuple[Any, ...]] = list(zip(*links, strict=True)) or [(), (), ()]
    return pa.table(
        {
            "amplitude_id": pa.array(sides[0], pa.int64()),
            "device_id": pa.array(sides[1], pa.string()),
            "user_id": pa.array(sides[2], pa.string()),
        }
    )


def nodes(link: Link) -> list[tuple[str, Any]]:
    person, device, user = link
    found = [("person", person)] if person > 0 else []
    return [*found, *((kind, one) for kind, one in (("device", device), ("user", user)) if one)]


def inside(links: list[Link], seeds: list[Link]) -> set[tuple[str, Any]]:
    """The simplest thing that could be right: take in whoever shares a row with somebody inside, until nobody does."""
    found = {node for link in seeds for node in nodes(link)}
    while True:
        more = {node for link in links if not found.isdisjoint(nodes(link)) for node in nodes(link)}
        if more <= found:
            return found
        found |= more


def named(members: Members) -> set[tuple[str, Any]]:
    sides = (members.people.tolist(), members.devices.to_pylist(), members.users.to_pylist())
    kinds = ("person", "device", "user")
    found = [(kind, one) for kind, side in zip(kinds, sides, strict=True) for one in side]
    assert len(found) == len(set(found))  # each once
    return set(found)


@pytest.mark.parametrize("seed", range(60))
def test_a_closure_that_grows_holds_whom_all_rows_so_far_join(seed: int) -> None:
    seeded = random.Random(seed)
    many = seeded.choice([4, 12, 40])

    def some(count: int) -> list[Link]:
        return [
            (
                seeded.randrange(many),  # 0 is nobody
                seeded.choice([None, "", f"d{seeded.randrange(many)}"]),
                seeded.choice([None, f"u{seeded.randrange(many)}"]),
            )
            for _ in range(count)
        ]

    links = some(seeded.choice([0, 5, 30]))
    seeds = [link for link in links if seeded.random() < 0.1]
    closure = Closure(table(links), NO_MERGES)
    members = named(closure.begin(table(seeds), np.zeros(0, np.int64)))
    assert members == inside(links, seeds)
    for _ in range(4):
        before = {node for link in links for node in nodes(link)}
        coming = some(seeded.choice([0, 3, 10]))
        chosen = [seeded.random() < 0.1 for _ in coming]
        links += coming
        seeds += [link for link, is_seed in zip(coming, chosen, strict=True) if is_seed]
        known, new = (named(one) for one in closure.join(table(coming), np.array(chosen, bool)))
        assert members.isdisjoint(known | new)
        assert known.isdisjoint(new)
        assert known <= before
        assert before.isdisjoint(new)
        members |= known | new
        assert members == inside(links, seeds)
