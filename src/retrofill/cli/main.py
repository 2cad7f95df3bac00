"""The command `retrofill`: its verbs, and how it tells an error.

A verb's module imports what it needs inside the function, so that `--help` is quick. What we raise on purpose is
told in three lines without a traceback: what, where, how to mend it, and so is what the disk refuses, wherever a verb
wrote. Exit 0 done, 1 failed, 2 wrong usage or input.
"""

from __future__ import annotations

import errno
import sqlite3
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from retrofill import __version__
from retrofill.cli import (
    check,
    merges,
    plan,
    rehearse,
    report,
    resend,
    run,
    serve,
    status,
    undo,
    undo_recipe,
    verify,
    why,
)
from retrofill.cli import map as map_
from retrofill.errors import Error, FullError, StoreError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_CLOSED = frozenset(
    {
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ENOENT,
    }
)


class Verbs(TyperGroup):
    """The verbs in the order of their registration; errors told in our way."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - as in click
        """Run the verb. Ends the process with the error's code."""
        try:
            return super().invoke(ctx)
        except Error as problem:
            tell(problem)
            raise typer.Exit(problem.code) from problem
        except (OSError, sqlite3.Error) as problem:
            refused = of_disk(problem, ctx.invoked_subcommand or "")
            if refused is None:
                raise
            tell(refused)
            raise typer.Exit(refused.code) from problem


def of_disk(problem: OSError | sqlite3.Error, verb: str) -> Error | None:
    """Return an error of the file system in our words, None for one of something else."""
    if isinstance(problem, sqlite3.Error):
        if verb in {"serve", "check"}:
            return StoreError(
                f"A SQLite file of the data directory cannot be written or read: {problem}",
                mend="Mend the disk, or restore the data directory from a copy",
            )
        return StoreError(
            f"The journal of the work directory cannot be written or read: {problem}",
            mend="Free some space or mend the disk, and give the same line again; what was acknowledged is kept",
        )
    where = str(problem.filename or "")
    if problem.errno in _FULL:
        return FullError(
            "No room is left on the device",
            where=where,
            mend="Free some space and give the same line again; what was acknowledged is kept",
        )
    if problem.errno not in _CLOSED:
        return None
    return StoreError(
        f"A file cannot be written or read: {problem.strerror}",
        where=where,
        mend="Name a directory that this user can write, as --work",
    )


def tell(problem: Error) -> None:
    """Write an error to stderr."""
    print(f"retrofill: {problem.what}", file=sys.stderr)  # noqa: T201 - this is the command line
    for label, text in (("where", problem.where), ("mend", problem.mend)):
        if text:
            print(f"  {label + ':':<6} {text}", file=sys.stderr)  # noqa: T201


app = typer.Typer(
    name="retrofill",
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Event history filled in: in order, exactly once.",
    epilog="Example: retrofill serve --data ./retrofill-data",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"retrofill {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Event history filled in: in order, exactly once."""


app.command("serve", epilog=serve.EXAMPLE)(serve.serve)
app.command("map", epilog=map_.EXAMPLE)(map_.command)
app.command("plan", epilog=plan.EXAMPLE)(plan.command)
app.command("rehearse", epilog=rehearse.EXAMPLE)(rehearse.command)
app.command("run", epilog=run.EXAMPLE)(run.command)
app.command("status", epilog=status.EXAMPLE)(status.command)
app.command("verify", epilog=verify.EXAMPLE)(verify.command)
app.command("report", epilog=report.EXAMPLE)(report.command)
app.command("resend", epilog=resend.EXAMPLE)(resend.command)
app.command("undo", epilog=undo.EXAMPLE)(undo.command)
app.command("why", epilog=why.EXAMPLE)(why.command)
app.command("merges", epilog=merges.EXAMPLE)(merges.command)
app.command("unmerge", epilog=merges.EXAMPLE_BACK)(merges.unmerge)
app.command("check", epilog=check.EXAMPLE)(check.command)
app.command("undo-recipe", epilog=undo_recipe.EXAMPLE)(undo_recipe.command)
