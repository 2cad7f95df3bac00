"""What a fold of history remembers of imports' rows: enough to know what repeats them, and little."""

from __future__ import annotations

import random

import numpy as np
import pytest

from retrofill.core.dedupe import KEY_BYTES, NO_KEY, table_of
from retrofill.engine.refold import Imported


@pytest.mark.parametrize("seed", range(5))
def test_keys_of_imports_rows_are_found_whenever_they_came(seed: int) -> None:
    seeded = random.Random(seed)
    # Some begin alike, so that their fingerprints are the same.
    keys = [
        seeded.choice([seeded.randbytes(8), b"fingerpr"]) + seeded.randbytes(8) for _ in range(300)
    ]
    subject: Imported = Imported()
    known: dict[bytes, set[int]] = {}
    assert list(subject.held(keys)) == []
    for _ in range(20):
        some = seeded.sample(keys, seeded.choice([0, 1, 20]))
        times = [seeded.randrange(10**12) for _ in some]
        for key, time in zip(some, times, strict=True):
            known.setdefault(key, set()).add(time)
        subject.add(table_of(b"".join(some)), np.array(times, np.int64))
        wanted = set(seeded.sample(keys, 50))
        found: dict[bytes, set[int]] = {}
        for key, time in subject.held(wanted):
            found.setdefault(key, set()).add(time)
        assert found == {key: known[key] for key in wanted & known.keys()}
        asked = [*wanted, NO_KEY]
        may = subject.may_hold(table_of(b"".join(asked))[:, 0]).tolist()
        firsts = {key[: KEY_BYTES // 2] for key in known}
        assert may == [key[: KEY_BYTES // 2] in firsts for key in asked]
