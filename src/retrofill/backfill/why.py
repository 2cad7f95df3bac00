"""Asking our own server why a value is what it is."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from retrofill.backfill import ours
from retrofill.backfill.keys import Keys
from retrofill.backfill.profile import Target

ASK_S = 600.0  # ours: millions of rows may be folded for one answer


def why(to: Target, keys: Keys, asked: dict[str, str]) -> dict[str, Any]:
    """Return the answer of `GET /api/1/why`. asked: its parameters.

    Raises InputError if they ask wrongly, FinalError if it knows none, RetryError.
    """
    given = {name: value for name, value in asked.items() if value}
    path = f"/api/1/why?{urlencode(given)}"
    found = ours.ask(to, keys, "GET", path, dict[str, Any], seconds=ASK_S, may_miss=False)
    assert found is not None
    return found
