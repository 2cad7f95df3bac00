"""`retrofill map`: look at a source and write a first mapping."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: retrofill map history.ndjson.gz > history.map.yaml"


def command(
    source: Annotated[
        list[str], typer.Argument(help="Files, folders, globs, s3://… or database addresses.")
    ],
    query: Annotated[
        str | None, typer.Option(help="The SQL whose rows are the source, for a database.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="The S3 endpoint, where it is not AWS.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the mapping here instead of to standard output.")
    ] = None,
) -> None:
    """Look at a source and write a first mapping, each guess with its reason."""
    from retrofill.backfill import guess, intake
    from retrofill.backfill import source as sources

    with tempfile.TemporaryDirectory(prefix="retrofill-") as scratch:
        origins = sources.locate(source, query=query, endpoint=endpoint)
        pieces = sources.pieces(origins, scratch=Path(scratch), endpoint=endpoint)
        text = guess.write(intake.look(pieces, None), " ".join(source))
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")
        typer.echo(f"Wrote {out}", err=True)
