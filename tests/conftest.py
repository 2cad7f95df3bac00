"""What all tests share: which of them run by default, and what Hypothesis searches.

`slow` tests use processes or sockets, `long` ones take minutes. Long tests run only when asked for: `-m long`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long something takes says how busy the machine is, and nothing of the code.
_UNHURRIED = settings(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
# The same examples each time: who changes one thing shall not meet the fault of another. The long run searches anew.
settings.register_profile("default", _UNHURRIED, derandomize=True)
settings.register_profile("long", _UNHURRIED, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

DATA = Path(__file__).parent / "data"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "long" in config.getoption("markexpr"):
        return
    chosen, left_out = [], []
    for item in items:
        (left_out if item.get_closest_marker("long") else chosen).append(item)
    items[:] = chosen
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def data() -> Path:
    """The folder of real histories."""
    return DATA
