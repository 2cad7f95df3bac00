"""`retrofill why`: the events, imports, requests and rules that made a value."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from retrofill.cli import options
from retrofill.cli.run import emit, say, tables
from retrofill.errors import InputError

EXAMPLE = "Example: retrofill why plan --user ann --to http://localhost:8090"
_MARKS = {True: "yes", False: "no", None: "?"}


def command(  # noqa: PLR0913, PLR0917 - typer makes options of them, nobody calls it by position
    to: options.Server,
    property_: Annotated[
        str, typer.Argument(metavar="[PROPERTY]", help="Of the person, the event or the group.")
    ] = "",
    column: Annotated[str, typer.Option(help="A built-in one: platform, city …")] = "",
    first_seen: Annotated[bool, typer.Option("--first-seen", help="The first-seen date.")] = False,
    merge: Annotated[int, typer.Option(help="AMPLITUDE_ID that was merged away.")] = 0,
    user: Annotated[str, typer.Option(help="The person, by user id.")] = "",
    device: Annotated[str, typer.Option(help="By device id; with --insert-id, of the event.")] = "",
    amplitude_id: Annotated[int, typer.Option(help="By amplitude_id.")] = 0,
    event: Annotated[str, typer.Option(metavar="UUID", help="As this event shows it.")] = "",
    insert_id: Annotated[str, typer.Option(help="As the event with this insert_id shows it.")] = "",
    group: Annotated[str, typer.Option(metavar="TYPE/VALUE", help="Property of a group.")] = "",
    api_key: options.ApiKey = None,
    secret_key: options.SecretKey = None,
    key_file: options.KeyFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Say which events of which imports and requests made a value, and by which rule."""
    from retrofill.backfill import keys as key_ring
    from retrofill.backfill import ours, why
    from retrofill.backfill import profile as profiles

    keys = key_ring.find(api_key, secret_key, key_file)
    key_ring.need_both(keys)
    where = profiles.target(to)
    ours.need(where, "say why")
    group_type, mark, group_value = group.partition("/")
    if group and not (group_type and mark and group_value):
        raise InputError(f"--group {group!r} is no group", mend="Give --group TYPE/VALUE")
    if sum(map(bool, (property_, column, first_seen, merge))) != 1:
        raise InputError(
            "It must be one thing that is asked for",
            mend="Give PROPERTY, or one of --column, --first-seen and --merge",
        )
    asked = {
        "property": property_,
        "column": column,
        "first_seen": "true" if first_seen else "",
        "merge": str(merge or ""),
        "group_type": group_type,
        "group_value": group_value,
        "user_id": user,
        "device_id": device,
        "amplitude_id": str(amplitude_id or ""),
        "uuid": event,
        "insert_id": insert_id,
    }
    found = why.why(where, keys, asked)
    causes = found.pop("causes")
    if as_json:
        emit({"event": "value", **found})
        for one in causes:
            emit({"event": "cause", "of": one.pop("event"), **one})
        return
    _show(found, causes, times=first_seen)


def _show(found: dict[str, Any], causes: list[dict[str, Any]], *, times: bool) -> None:
    from rich.table import Table

    whose = f" of {found['user_id'] or found['amplitude_id']}" if found["amplitude_id"] else ""
    typer.echo(f"value{whose}: {_text(found['value'], times=times)}")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("arrived (UTC)", "event", "import", "request", "rule", "said", "value", "needed"):
        table.add_column(name, overflow="fold")
    for one in causes:
        table.add_row(*_cells(one, times=times))
    if causes:
        tables().print(table)
    else:
        typer.echo("no event ever said it")
    for rule, means in {one["rule"]: one["means"] for one in causes}.items():
        typer.echo(f"{rule}: {means}")
    if found["left_out"]:
        say(f"{found['left_out']:,} causes before these are not shown")
    if not found["tried"]:
        say(f"{found['rows']:,} rows: only the newest causes were tried whether they are needed")


def _cells(one: dict[str, Any], *, times: bool) -> list[str]:
    from rich.markup import escape

    from retrofill.backfill.status import moment

    request, event, merge = one["request"], one["event"], one["merge"]
    said = " ".join(
        said["operation"]
        if said["value"] is None
        else f"{said['operation']} {_text(said['value'], times=times)}"
        for said in one["operations"]
    )
    if merge:
        with_ = f"{merge['absorbed']} into {merge['surviving']}"
        said = f"{with_} {said}".strip()
    at = (moment(request["server_upload_time_ms"]) or "").removesuffix(" UTC")
    return [
        escape(text)
        for text in (
            at,
            f"{event['event_type']} {event['uuid']}",
            one["imported_by"] or "",
            f"{request['path']} {request['block']}:{request['row']}",
            one["rule"],
            said,
            f"{_text(one['before'], times=times)} → {_text(one['after'], times=times)}",
            _MARKS[one["needed"]],
        )
    ]


def _text(value: object, *, times: bool) -> str:
    import msgspec

    from retrofill.backfill.status import moment

    if value is None:
        return "nothing"
    if times and isinstance(value, int):
        return moment(value) or ""
    return msgspec.json.encode(value).decode()
