"""`retrofill report`: one HTML page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retrofill.cli import options
from retrofill.cli.run import WORK

EXAMPLE = "Example: retrofill report --work retrofill-work --out report.html"


def command(
    work: options.Work = WORK,
    out: Annotated[
        Path | None, typer.Option(help="The page; WORK/report.html if left out.")
    ] = None,
) -> None:
    """Write one self-contained HTML page: plan beside outcome, days, progress, refused rows, verification."""
    from retrofill.backfill import report

    path = out or work / "report.html"
    report.write(work, path)
    typer.echo(str(path))
