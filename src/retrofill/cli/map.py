"""`retrofill map`: look at a source and write a first mapping."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from retrofill.cli import options

EXAMPLE = "Example: retrofill map history.ndjson.gz > history.map.yaml"


def command(
    source: Annotated[
        list[str], typer.Argument(help="Files, folders, globs, s3://… or database addresses.")
    ],
    query: options.Query = None,
    endpoint: options.Endpoint = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the mapping here instead of to standard output.")
    ] = None,
) -> None:
    """Look at a source and write a first mapping, each guess with its reason."""
    from retrofill.backfill import guess, intake
    from retrofill.backfill import source as sources

    with tempfile.TemporaryDirectory(prefix="retrofill-") as scratch:
        origins = sources.few(sources.locate(source, query=query, endpoint=endpoint))
        pieces = sources.pieces(origins, scratch=Path(scratch), endpoint=endpoint)
        text = guess.write(intake.look(pieces, None), " ".join(source))
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")
        typer.echo(f"Wrote {out}", err=True)
