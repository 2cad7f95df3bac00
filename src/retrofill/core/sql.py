"""Texts and names inside of SQL, where a statement cannot bind them."""

from __future__ import annotations


def literal(text: str) -> str:
    """Return the text as a constant of SQL."""
    return "'" + text.replace("'", "''") + "'"


def quoted(name: str) -> str:
    """Return the name as an identifier of SQL."""
    return '"' + name.replace('"', '""') + '"'
