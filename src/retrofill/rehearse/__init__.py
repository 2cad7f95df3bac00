"""Rehearsal: an engine on a scratch directory, seeded with live history, takes the import; the difference is reported."""
