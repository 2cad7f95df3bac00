"""`retrofill resend`: what the destination lost after its 200, or refused, once more."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from retrofill.cli import options
from retrofill.cli.run import WORK, Display, end, resumable, say
from retrofill.errors import InputError

EXAMPLE = "Example: retrofill resend --work retrofill-work --from 2026-03-01T10:00Z --to 2026-03-01T12:00Z"


def command(  # noqa: PLR0917 - typer makes options of them, nobody calls it by position
    from_: Annotated[
        str | None, typer.Option("--from", help="First upload time of the window, UTC.")
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", help="Last upload time of the window, UTC.")
    ] = None,
    refused: Annotated[
        bool, typer.Option("--refused", help="What the destination refused, not a window.")
    ] = False,
    work: options.Work = WORK,
    api_key: options.ApiKey = None,
    key_file: options.KeyFile = None,
    yes: options.Yes = False,
    as_json: options.AsJson = False,
) -> None:
    """Send again what was acknowledged in a window of upload time, or what was refused: the same insert_ids, in order."""
    import sys

    from retrofill.backfill import drive, imports, resend
    from retrofill.backfill import keys as key_ring

    keys = key_ring.find(api_key, None, key_file)
    key_ring.need_api_key(keys)
    window = _window(from_, to, refused=refused)
    where, profile = drive.remembered(work)
    imports.need_not_undone(work, where, keys)
    if not yes:
        if not sys.stdin.isatty():
            raise InputError("Nobody is here to be asked", mend="Give --yes")
        what = "what it has refused" if window is None else "that window"
        typer.confirm(f"Send {what} to {where.name} again?", abort=True, err=True)
    if window is None:
        say(f"{resend.revive(work):,} events were refused")
    else:
        now_ms = int(time.time() * 1000)
        events = resend.lose(work, from_ms=window[0], to_ms=window[1], now_ms=now_ms)
        say(f"{events:,} events were acknowledged in that window")
    with resumable(as_json=as_json), Display(as_json=as_json) as display:
        outcome = drive.drive(
            drive.Drive(
                work=work, to=where, profile=profile, api_key=keys.api_key, show=display.show
            )
        )
    end(outcome, work, as_json=as_json)


def _window(from_: str | None, to: str | None, *, refused: bool) -> tuple[int, int] | None:
    """Return the window that was asked for, None if what was refused was."""
    from retrofill.backfill.resend import parse_time

    if refused and not (from_ or to):
        return None
    if refused or from_ is None or to is None:
        raise InputError(
            "It is not said what to send again",
            mend="Give --from and --to, or --refused, which has no window",
        )
    return parse_time(from_), parse_time(to)
