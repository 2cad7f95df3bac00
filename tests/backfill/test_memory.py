"""How the process is set up before much is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from retrofill.backfill import memory

BLAS = "OPENBLAS_NUM_THREADS"


def test_no_threads_are_made_for_matrices_unless_somebody_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(BLAS, "")  # put back at the end, whatever comes
    monkeypatch.delenv(BLAS)
    memory.settle()
    assert os.environ[BLAS] == "1"
    monkeypatch.setenv(BLAS, "2")
    memory.settle()
    assert os.environ[BLAS] == "2"


@pytest.mark.slow
def test_the_verbs_are_loaded_without_what_must_be_set_up_first() -> None:
    asked = "import retrofill.cli.main, sys; print('numpy' in sys.modules, 'duckdb' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", asked], capture_output=True, check=True)
    assert found.stdout.split() == [b"False", b"False"]
