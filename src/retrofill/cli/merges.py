"""`retrofill merges` and `retrofill unmerge`: who was shown to be one person, and that taken back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retrofill.cli import options
from retrofill.cli.run import emit, say
from retrofill.cli.undo import asked_at_terminal
from retrofill.errors import InputError

if TYPE_CHECKING:
    from retrofill.backfill.keys import Keys
    from retrofill.backfill.merges import Held, Merge
    from retrofill.backfill.profile import Target

EXAMPLE = "Example: retrofill merges --user ann --to http://localhost:8090"
EXAMPLE_BACK = "Example: retrofill unmerge 1204-3 --to http://localhost:8090"


def command(  # noqa: PLR0917 - typer makes options of them, nobody calls it by position
    to: options.Server,
    user: Annotated[str, typer.Option(help="Of this user alone.")] = "",
    amplitude_id: Annotated[int, typer.Option(help="Of this person alone.")] = 0,
    held: Annotated[bool, typer.Option("--held", help="Users who join too many, instead.")] = False,
    unmerged: Annotated[bool, typer.Option("--unmerged", help="Those taken back.")] = False,
    before: Annotated[str, typer.Option(metavar="ID", help="Those before this one.")] = "",
    limit: Annotated[int, typer.Option(help="At most so many.", min=1, max=1000)] = 100,
    api_key: options.ApiKey = None,
    secret_key: options.SecretKey = None,
    key_file: options.KeyFile = None,
    as_json: options.AsJson = False,
) -> None:
    """List merges, the newest first: who was absorbed by whom, and the event that proved it."""
    from retrofill.backfill import merges

    where, keys = _server(to, api_key, secret_key, key_file, "list merges")
    if held:
        if user or amplitude_id or unmerged or before:
            raise InputError("--held lists users: it goes with --limit alone")
        holding = merges.held(where, keys, limit)
        for each in holding:
            _tell_held(each, as_json=as_json)
        if not holding and not as_json:
            say("nobody is held")
        return
    asked = {
        "state": "unmerged" if unmerged else "",
        "user_id": user,
        "amplitude_id": str(amplitude_id or ""),
        "before": before,
        "limit": str(limit),
    }
    found = merges.merges(where, keys, asked)
    for one in found:
        _tell(one, as_json=as_json)
    if not found and not as_json:
        say("no merges")


def unmerge(  # noqa: PLR0917 - as above
    id_: Annotated[str, typer.Argument(metavar="ID", help="Of a merge, as `merges` lists it.")],
    to: options.Server,
    restore: Annotated[bool, typer.Option("--restore", help="Let it stand again instead.")] = False,
    api_key: options.ApiKey = None,
    secret_key: options.SecretKey = None,
    key_file: options.KeyFile = None,
    yes: options.Yes = False,
    as_json: options.AsJson = False,
) -> None:
    """Take a merge back: both people are folded again, and these two ids join nobody any more."""
    from retrofill.backfill import merges

    where, keys = _server(to, api_key, secret_key, key_file, "take a merge back")
    if not yes:
        if not asked_at_terminal():
            raise InputError(
                "Nobody is here to be asked", mend="Give --yes to do it without asking"
            )
        verb = "Let stand again" if restore else "Take back"
        if not typer.confirm(f"{verb} merge {id_} at {where.name}?", err=True):
            raise InputError("Nothing was changed")
    found = merges.restore(where, keys, id_) if restore else [merges.unmerge(where, keys, id_)]
    for one in found:
        _tell(one, as_json=as_json)
    if not found and not as_json:
        say("its ids may join people again; its event joins nobody now")


def _server(
    to: str, api_key: str | None, secret_key: str | None, key_file: Path | None, what: str
) -> tuple[Target, Keys]:
    from retrofill.backfill import keys as key_ring
    from retrofill.backfill import ours
    from retrofill.backfill import profile as profiles

    keys = key_ring.find(api_key, secret_key, key_file)
    key_ring.need_both(keys)
    where = profiles.target(to)
    ours.need(where, what)
    return where, keys


def _tell_held(one: Held, *, as_json: bool) -> None:
    if as_json:
        import msgspec

        emit({"event": "held", **msgspec.structs.asdict(one)})
        return
    from retrofill.backfill.status import moment

    typer.echo(
        f"user {one.user_id} · {one.amplitude_id} · {one.merged:,} merged · "
        f"held {one.devices:,} devices in {one.events:,} events, "
        f"{moment(one.first_event_time_ms)} to {moment(one.last_event_time_ms)}"
        f"{' · allowed since' if one.allowed else ''}"
    )


def _tell(one: Merge, *, as_json: bool) -> None:
    if as_json:
        import msgspec

        emit({"event": "merge", **msgspec.structs.asdict(one)})
        return
    from retrofill.backfill.status import moment

    by = f" of import {one.imported_by}" if one.imported_by else ""
    at = one.unmerged_ms or one.server_upload_time_ms
    typer.echo(
        f"{one.id} · {one.state} {moment(at)} · {one.absorbed} into {one.surviving} · "
        f"user {one.user_id} on device {one.device_id} · {one.event_type} {one.uuid}{by}"
    )
