"""`retrofill check`: whether a data directory holds what its history says, and mending it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retrofill.cli import options
from retrofill.cli.run import emit

if TYPE_CHECKING:
    from retrofill.engine.check import Report

EXAMPLE = "Example: retrofill check --data ./data"


def command(
    data: Annotated[Path, typer.Option(help="Directory of all data, of a server that is stopped.")],
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend what differs, set aside what is damaged.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Read every file, fold all history again and compare. Exit 1 if anything differs, or is left so."""
    from retrofill.clock import SystemClock
    from retrofill.engine import check as checking
    from retrofill.engine import repair as repairing
    from retrofill.server import log

    log.configure("warning")
    try:
        if not repair:
            found = checking.check(data, SystemClock())
            _tell(found, "checked", as_json=as_json)
            raise typer.Exit(1 if found.count else 0)
        done = repairing.repair(data, SystemClock())
    finally:
        log.flush()
    _tell(done.found, "checked", as_json=as_json)
    if as_json:
        emit({"event": "repaired", "left": done.left.count, "set_aside": done.aside})
    else:
        for name in done.aside:
            typer.echo(f"set aside: {data / 'set-aside' / name}")
    if done.left.count:
        _tell(done.left, "left", as_json=as_json)
    elif not as_json:
        typer.echo("repaired: no differences are left" if done.found.count else "nothing to repair")
    raise typer.Exit(1 if done.left.count else 0)


def _tell(report: Report, event: str, *, as_json: bool) -> None:
    import msgspec

    facts = msgspec.structs.asdict(report)
    differences = facts.pop("differences")
    if as_json:
        emit({"event": event, **facts})
        for one in differences:
            emit({"event": "difference", **msgspec.structs.asdict(one)})
        return
    if event == "left":
        typer.echo("left as it is:")
    for one in differences:
        typer.echo(one.line())
    if report.count > len(differences):
        typer.echo(f"… {report.count - len(differences):,} more")
    names = ("blocks", "lake_files", "key_files", "rows", "people", "merges")
    typer.echo(" · ".join(f"{facts[name]:,} {name.replace('_', ' ')}" for name in names))
    if not report.refolded:
        typer.echo("Files are damaged, so nothing was folded again")
    if report.lost:
        typer.echo("Nothing else holds what they say: restore the data directory from a copy")
    if report.unknown:
        typer.echo(f"{report.unknown:,} values cannot be known: deleted people may have made them")
    typer.echo(f"{report.count:,} differences" if report.count else "no differences")
