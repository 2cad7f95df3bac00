"""Gives the requests that the tester makes a key that exists: without it none comes further than the key."""

from __future__ import annotations

from typing import Any

import schemathesis
from tests.faults.process import API_KEY


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """Put the project's key in place of any other text."""
    del context
    return _keyed(body)


@schemathesis.hook
def map_query(context: schemathesis.HookContext, query: Any) -> Any:
    """The same for forms that come in the address."""
    del context
    return _keyed(query)


def _keyed(fields: Any) -> Any:
    if isinstance(fields, dict) and isinstance(fields.get("api_key"), str) and fields["api_key"]:
        return {**fields, "api_key": API_KEY}
    return fields
