"""`retrofill status`: how far a work directory is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retrofill.cli.run import WORK, emit

EXAMPLE = "Example: retrofill status --work retrofill-work"


def command(
    work: Annotated[Path, typer.Option(help="Directory of a run.")] = WORK,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
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
