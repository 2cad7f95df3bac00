"""What all tests share: which of them run by default.

`slow` tests use processes or sockets, `long` ones take minutes. Long tests run only when asked for: `-m long`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("default", deadline=None, print_blob=True)
settings.register_profile("long", deadline=None, print_blob=True, max_examples=1000)
settings.load_profile("default")

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
