"""Freed memory goes back to the system when it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# Pieces between others that stay: the library keeps what lies between them, in an arena for each thread.
_ASKED = """
import threading
from retrofill import glibc

def work(kept):
    pieces = [bytes(4000 + at % 3000) for at in range(8000)]
    kept += pieces[::40]

def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20

kept = []
for _ in range(4):
    thread = threading.Thread(target=work, args=(kept,))
    thread.start()
    thread.join()
before = resident_mb()
glibc.trim()
print(before, resident_mb(), len(kept))
"""


def test_what_was_freed_between_pieces_that_stay_is_given_back() -> None:
    found = subprocess.run([sys.executable, "-c", _ASKED], capture_output=True, check=True)
    before, after, kept = map(int, found.stdout.split())
    assert kept == 800
    assert after < before - 20
