"""What all tests share: which of them run by default, what Hypothesis searches, and what makes lakes quick.

`slow` tests use processes or sockets, `long` ones take minutes. Long tests run only when asked for: `-m long`.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from retrofill.lake import Lake, ducklake, history
from retrofill.lake.files import Files

# How long something takes says how busy the machine is, and nothing of the code.
_UNHURRIED = settings(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
# The same examples each time: who changes one thing shall not meet the fault of another. The long run searches anew.
settings.register_profile("default", _UNHURRIED, derandomize=True)
settings.register_profile("long", _UNHURRIED, max_examples=1000)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "default")
settings.load_profile(PROFILE)

# Where memory can be had as a folder, nobody waits for the disk. What is synced there outlives a killed process as well,
# and that is what tests kill; in which order things are synced they see at the file port.
MEMORY = Path("/dev/shm")
MEMORY_FREE_BYTES = 4 * 1024**3  # of which three tests at a time take a tenth
if (
    "TMPDIR" not in os.environ
    and os.access(MEMORY, os.W_OK)
    and shutil.disk_usage(MEMORY).free >= MEMORY_FREE_BYTES
):
    os.environ["TMPDIR"] = str(MEMORY)
    tempfile.tempdir = None  # asked for anew

BUSY = ("demo", "faults")  # folders of tests that start servers under load, and wait for them

DATA = Path(__file__).parent / "data"


@pytest.hookimpl(trylast=True)  # what was asked for is chosen by then
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "long" not in config.getoption("markexpr"):
        left_out = [item for item in items if item.get_closest_marker("long")]
        items[:] = [item for item in items if not item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)
    _in_turn(items)


def pytest_collection_finish() -> None:
    gc.freeze()  # some 100,000 objects that stay to the end


def _in_turn(items: list[pytest.Item]) -> None:
    """Put what is slow first, so that all processes end together, and what keeps both cores busy evenly among it."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    busy = [item for item in slow if item.path.parent.name in BUSY]
    others = [item for item in slow if item.path.parent.name not in BUSY]
    place = {item: at / len(part) for part in (busy, others) for at, item in enumerate(part)}
    items.sort(key=lambda item: place.get(item, 1))


@pytest.fixture(scope="session", autouse=True)
def _quick_lakes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let the lakes of this process have one thread, and begin with a copy of an empty catalog.

    A second thread costs a fifth more for a few rows, and tables cost more than all else that a short test does. The
    processes that tests start have it all as it is, and so has the long run.
    """
    if PROFILE == "long":
        yield
        return
    empty = tmp_path_factory.mktemp("empty") / "lake"
    made = Lake.open(empty)
    made.close()
    real = Lake.open.__func__  # type: ignore[attr-defined] # it is a classmethod

    def opened(cls: type[Lake], folder: Path, files: Files | None = None) -> Lake:
        catalog = folder / "catalog.duckdb"
        if not catalog.exists() and not any((folder / "files").rglob("*.parquet")):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(empty / catalog.name, catalog)
        return real(cls, folder, files)

    with pytest.MonkeyPatch.context() as patch:
        for module in (ducklake, history):
            patch.setattr(module, "LAKE_THREADS", 1)
        patch.setattr(Lake, "open", classmethod(opened))
        yield


@pytest.fixture
def data() -> Path:
    """The folder of real histories."""
    return DATA
