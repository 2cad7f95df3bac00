"""`retrofill resend`: a window that the destination lost after its 200, once more."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from retrofill.cli import options
from retrofill.cli.run import WORK, Display, end, resumable, say
from retrofill.errors import InputError

EXAMPLE = "Example: retrofill resend --work retrofill-work --from 2026-03-01T10:00Z --to 2026-03-01T12:00Z"


def command(  # noqa: PLR0917 - typer makes options of them, nobody calls it by position
    from_: Annotated[str, typer.Option("--from", help="First upload time of the window, UTC.")],
    to: Annotated[str, typer.Option("--to", help="Last upload time of the window, UTC.")],
    work: options.Work = WORK,
    api_key: options.ApiKey = None,
    key_file: options.KeyFile = None,
    yes: options.Yes = False,
    as_json: options.AsJson = False,
) -> None:
    """Send again what was acknowledged in a window of upload time: the same insert_ids, in the same order."""
    import sys

    from retrofill.backfill import drive, imports, resend
    from retrofill.backfill import keys as key_ring

    keys = key_ring.find(api_key, None, key_file)
    key_ring.need_api_key(keys)
    window = (resend.parse_time(from_), resend.parse_time(to))
    where, profile = drive.remembered(work)
    imports.need_not_undone(work, where, keys)
    if not yes:
        if not sys.stdin.isatty():
            raise InputError("Nobody is here to be asked", mend="Give --yes")
        typer.confirm(f"Send that window to {where.name} again?", abort=True, err=True)
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
