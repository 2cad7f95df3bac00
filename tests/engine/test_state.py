"""State's memory of when blocks were committed, and of people, who may have been let go."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from retrofill.core import fold, person
from retrofill.core.event import Batch, decode_one, encode
from retrofill.core.fold import Folded, Known
from retrofill.engine.recover import fill_devices
from retrofill.engine.state import State
from retrofill.hot.checkpoint import Checkpoint

# after_ms → the first block that is younger, when blocks 1, 9 and 12 began a second of their own.
OLDEST = {999: 1, 1000: 2, 1999: 2, 2000: 9, 499_999: 9, 500_000: 10, 900_000: 13, 901_000: 16}


def test_blocks_of_one_second_count_a_second_longer_and_no_more(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "checkpoint.sqlite")
    state = State(checkpoint)
    state.block, state.block_times = 15, [(1, 1000), (9, 500_000), (12, 900_000)]
    assert {after: state.oldest_block(after) for after in OLDEST} == OLDEST
    checkpoint.close()


def _request(rnd: random.Random) -> Batch:
    """Requests as they come: few people, shared devices, logins, group events, now and then somebody new."""
    found = []
    for _ in range(rnd.randrange(1, 6)):
        wire: dict[str, Any] = {"event_type": rnd.choice(["View", "View", "View", "$identify"])}
        who = rnd.randrange(12) if rnd.random() < 0.99 else rnd.randrange(10_000)
        if rnd.random() < 0.8:
            wire["device_id"] = f"device-{who % 8}"
        if rnd.random() < 0.5 or "device_id" not in wire:
            wire["user_id"] = f"user-{who}"
        wire["user_properties"] = {"plan": rnd.choice(["free", "pro"]), "n": rnd.choice([1, 1.0])}
        # An identify with groups stays with its person.
        if rnd.random() < (0.02 if wire["event_type"] == "View" else 0.001):
            wire["groups"] = {"org": rnd.choice(["acme", "duff"])}
        found.append(decode_one(msgspec.json.encode(wire)))
    batch = Batch(1, "/batch", encode(found), found, 0, 1_790_000_000_000)
    fill_devices(batch)
    return batch


def _meant(folded: Folded) -> list[Any]:
    """What a fold changes, without what a person remembers for speed."""
    change = folded.changes[1]
    people = {one: person.encode(who) for one, who in change.people.items()}
    return [change.devices, change.users, people, change.groups, folded.fresh]


@pytest.mark.parametrize("seed", range(8))
def test_a_fold_over_what_is_at_hand_is_one_over_what_was_looked_up(
    seed: int, tmp_path: Path
) -> None:
    rnd = random.Random(seed)
    checkpoints = [Checkpoint(tmp_path / name) for name in ("plain", "forgetful")]
    plain, forgetful = (State(one) for one in checkpoints)
    plain.project(1).at_hand = lambda _: None  # type: ignore[method-assign] # always looks up
    theirs = forgetful.project(1)
    # Bounds so small that people, devices and users are let go, each at another time.
    theirs.people._bound, theirs.devices._bound, theirs.users._bound = 18, 25, 22
    tried: Counter[bool] = Counter()  # whether a fold was over what is at hand

    def folded(state: State, batches: list[Batch]) -> Folded:
        def over(known: Mapping[int, Known]) -> Folded:
            if state is forgetful:
                tried[known[1].groups is not theirs.groups.young] += 1
            return fold.fold(
                batches,
                known,
                number=state.block + 1,
                server_upload_ms=1_790_000_000_000 + state.block,
                fresh=state.fresh,
                updates_max={1: 0},
                dropped=[0] * sum(len(batch.events) for batch in batches),
                keys=b"",
            )

        return state.fold(batches, over)

    for step in range(300):
        batches = [_request(rnd) for _ in range(rnd.randrange(1, 3))]
        one, other = folded(plain, batches), folded(forgetful, batches)
        assert one.block == other.block
        assert _meant(one) == _meant(other)
        plain.apply(one)
        forgetful.apply(other)
        if step % 40 == 39:  # what is clean from now on may be let go
            for state, checkpoint in zip((plain, forgetful), checkpoints, strict=True):
                meta, changed, times = state.capture()
                checkpoint.save(meta, changed, block_times=times, times_after_ms=0)
                state.saved(meta, times_after_ms=0)
    for checkpoint in checkpoints:
        checkpoint.close()
    assert tried[True] > 300 - tried[False] > 10, "the quick way sufficed, and did not"
