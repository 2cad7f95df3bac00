"""`retrofill undo-recipe`: what a deletion request at Amplitude needs to name."""

from __future__ import annotations

import typer

from retrofill.cli import options
from retrofill.cli.run import WORK, emit

EXAMPLE = "Example: retrofill undo-recipe --work retrofill-work"


def command(
    work: options.Work = WORK,
    as_json: options.AsJson = False,
) -> None:
    """Print the event types and upload times of an import, for a destination that cannot undo it itself."""
    from retrofill.backfill.resend import recipe

    found = recipe(work)
    if as_json:
        emit(found)
        return
    typer.echo(
        f"Import {found['import']}: {found['events']:,} events sent to {found['destination']}"
    )
    times = found["event_time"]
    typer.echo(f"Event times {times['from']} to {times['to']} (UTC days)")
    typer.echo("Upload times (server_upload_time, UTC):")
    for window in found["upload_windows"]:
        typer.echo(f"  {window['from']} to {window['to']}")
    typer.echo("Event types:")
    for name, count in found["event_types"].items():
        typer.echo(f"  {name}  {count:,}")
    typer.echo("Ask the destination to delete these types within these upload times.")
    typer.echo("Live events of the same types that arrived in these hours would go as well.")
