"""`retrofill check`: whether a data directory holds what its history says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retrofill.cli.run import emit

EXAMPLE = "Example: retrofill check --data ./data"


def command(
    data: Annotated[Path, typer.Option(help="Directory of all data, of a server that is stopped.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Read every file, fold all history again and compare. Exit 1 if anything differs."""
    import msgspec

    from retrofill.clock import SystemClock
    from retrofill.engine.check import check
    from retrofill.server import log

    log.configure("warning")
    try:
        report = check(data, SystemClock())
    finally:
        log.flush()
    facts = msgspec.structs.asdict(report)
    differences = facts.pop("differences")
    if as_json:
        emit({"event": "checked", **facts})
        for one in differences:
            emit({"event": "difference", **msgspec.structs.asdict(one)})
        raise typer.Exit(1 if report.count else 0)
    for one in differences:
        typer.echo(one.line())
    if report.count > len(differences):
        typer.echo(f"… {report.count - len(differences):,} more")
    names = ("blocks", "lake_files", "key_files", "rows", "people", "merges")
    typer.echo(" · ".join(f"{facts[name]:,} {name.replace('_', ' ')}" for name in names))
    if not report.refolded:
        typer.echo("Files are damaged, so nothing was folded again")
    if report.unknown:
        typer.echo(f"{report.unknown:,} values cannot be known: deleted people may have made them")
    typer.echo(f"{report.count:,} differences" if report.count else "no differences")
    raise typer.Exit(1 if report.count else 0)
