"""`retrofill status`: how far a work directory is."""

from __future__ import annotations

import typer

from retrofill.cli import options
from retrofill.cli.run import WORK, emit

EXAMPLE = "Example: retrofill status --work retrofill-work"


def command(
    work: options.Work = WORK,
    as_json: options.AsJson = False,
) -> None:
    """Show how far a run is, also while it goes on."""
    from retrofill.backfill.status import status

    found = status(work)
    if as_json:
        emit(found)
        return
    for name, value in found.items():
        if isinstance(value, dict):
            for key, one in value.items():
                count = one["requests"] if isinstance(one, dict) else one
                typer.echo(f"{name.rstrip('s'):<14} {key}: {count:,}")
        elif value is not None:
            typer.echo(f"{name:<14} {value:,}" if isinstance(value, int) else f"{name:<14} {value}")
