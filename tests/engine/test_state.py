"""State's memory of when blocks were committed."""

from __future__ import annotations

from pathlib import Path

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
