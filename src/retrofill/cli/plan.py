"""`retrofill plan`: stage a source, say what its import will do and take, send nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retrofill.cli.run import WORK, profile_of, say, seam_of, stage_of, warn_of_updates

if TYPE_CHECKING:
    from rich.console import Console

    from retrofill.backfill.plan import Plan

EXAMPLE = (
    "Example: retrofill plan history.ndjson.gz --map history.map.yaml --to http://localhost:8090"
)
_BAR = 24  # characters of the longest bar
_DAYS_SHOWN = 31


def command(  # noqa: PLR0913, PLR0917 - typer makes options of them, nobody calls it by position
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE…", help="Files, folders, s3://, databases.")
    ],
    to: Annotated[str, typer.Option(help="amplitude, amplitude-eu or a URL.")] = "amplitude",
    map_: Annotated[
        str | None, typer.Option("--map", help="A mapping file or a preset; else what fits.")
    ] = None,
    query: Annotated[str | None, typer.Option(help="SQL, for a database.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="Endpoint of S3-compatible storage.")] = None,
    work: Annotated[Path, typer.Option(help="Directory of stage and dead letters.")] = WORK,
    import_: Annotated[str | None, typer.Option("--import", help="The import's name.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Also RETROFILL_API_KEY.")] = None,
    secret_key: Annotated[str | None, typer.Option(help="Also RETROFILL_SECRET_KEY.")] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="File with api_key=… and secret_key=….")
    ] = None,
    since: Annotated[str | None, typer.Option(help="Leave out events before this time.")] = None,
    until: Annotated[
        str | None,
        typer.Option(help="Leave out events from this time on; live: from their type's first on."),
    ] = None,
    live: Annotated[
        str | None, typer.Option(help="An export of the destination, for --until live.")
    ] = None,
    sample: Annotated[str | None, typer.Option(metavar="N%", help="A part of the people.")] = None,
    profile: Annotated[
        str | None, typer.Option(help="amplitude, amplitude-enterprise, retrofill.")
    ] = None,
    events_per_s: Annotated[int | None, typer.Option(help="Over all; 0 = no limit.")] = None,
    requests_per_s: Annotated[int | None, typer.Option(help="Over all.")] = None,
    device_per_s: Annotated[int | None, typer.Option(help="Events of one device.")] = None,
    user_per_s: Annotated[int | None, typer.Option(help="Events of one user.")] = None,
    events_per_request: Annotated[int | None, typer.Option(help="1 to 2000.")] = None,
    quota_per_day: Annotated[int | None, typer.Option(help="Events of one id in 24 h.")] = None,
    updates_per_h: Annotated[
        int | None, typer.Option(help="Property updates of one person.")
    ] = None,
    skip_user_properties_sync: Annotated[
        bool | None,
        typer.Option(help="Keep live user properties as they are. On unless nothing is live."),
    ] = None,
    kiosk_limit: Annotated[int, typer.Option(help="An id of more people joins nobody.")] = 10,
    min_id_length: Annotated[int, typer.Option(min=1, help="Shorter ids are none.")] = 5,
    bad_rows: Annotated[str, typer.Option(help="Part of the rows that may be refused.")] = "5%",
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Stage a history and say what its import will do and take. Nothing is sent; `run` goes on from there."""
    from rich.console import Console

    from retrofill.backfill import keys as key_ring
    from retrofill.backfill import plan
    from retrofill.backfill import profile as profiles

    keys = key_ring.find(api_key, secret_key, key_file)
    where = profiles.target(to)
    chosen = profile_of(where, profile, keys, work)
    seams = seam_of(until, live, work, where, keys, tell=(lambda _: None) if as_json else say)
    found = stage_of(
        sources,
        mapping=map_,
        query=query,
        endpoint=endpoint,
        work=work,
        import_id=import_,
        skip=skip_user_properties_sync,
        sync_is_safe=lambda: profiles.sync_is_safe(where, chosen, keys.api_key, keys.secret_key),
        since=since,
        until=None if seams is not None else until,
        until_types={} if seams is None else seams.until,
        sample=sample,
        kiosk_limit=kiosk_limit,
        min_id_length=min_id_length,
        bad_rows=bad_rows,
        as_json=as_json,
    )
    chosen = profiles.adjust(
        chosen,
        events_per_s=events_per_s,
        requests_per_s=requests_per_s,
        device_per_s=device_per_s,
        user_per_s=user_per_s,
        events_per_request=events_per_request,
        quota_per_day=quota_per_day,
        updates_per_h=updates_per_h,
        skip_sync=found.options.skip_user_properties_sync,
    )
    warn_of_updates(found, chosen, keys)
    made = plan.plan(
        found, chosen, destination=where.name, stage=work / "stage", start_s=time.time()
    )
    if as_json:
        typer.echo(plan.to_json(made))
    else:
        show(made, Console(), work=work)


def show(made: Plan, console: Console, *, work: Path) -> None:
    """Print the plan as tables."""
    from rich.table import Table

    from retrofill.backfill.plan import sentence

    head = Table.grid(padding=(0, 2))
    for label, value in _figures(made, sentence):
        head.add_row(label, value)
    console.print(head)
    _table(console, "Events by day (UTC)", _shortened(made.days))
    _table(console, "Events by type", dict(list(made.types.items())[:20]))
    _table(console, f"Refused rows: {work / 'dead-letters.ndjson'}", made.refused)
    _table(
        console, "Ids that are none: taken away, the event kept unless it has no other", made.ids
    )
    _table(console, "Left out", made.left_out)
    _table(console, "Devices with most events", {one.id: one.events for one in made.hot_devices})
    _table(console, "Users with most events", {one.id: one.events for one in made.hot_users})
    _table(console, "People with most events", {one.name: one.events for one in made.hot_people})
    _table(
        console,
        "Held back by the limits: events, days of quota",
        {f"{one.kind} {one.id}, {one.days} days": one.events for one in made.throttled[:10]},
    )
    _table(
        console,
        "Shared ids that join nobody",
        {f"{one.kind} {one.id}": one.events for one in made.kiosks},
    )
    for warning in made.warnings:
        console.print(f"[yellow]![/] {warning}")
    console.print(f"Import [bold]{made.import_id}[/] is staged in {work}; nothing was sent.")


def _figures(made: Plan, sentence: Callable[[float], str]) -> Sequence[tuple[str, str]]:
    first, last = (_date(moment_ms) for moment_ms in (made.first_ms, made.last_ms))
    sync = (
        "left as they are ($skip_user_properties_sync)"
        if made.skip_user_properties_sync
        else "[bold yellow]changed by these events[/]"
    )
    return (
        ("Import", f"{made.import_id} to {made.destination}, limits of {made.profile}"),
        (
            "Rows",
            f"{made.rows:,}: {made.events:,} events, {made.dead_letters:,} dead letters, {made.duplicates:,} duplicates",
        ),
        ("Time", f"{first} to {last}"),
        ("People", f"{made.people:,}, of {made.users:,} user ids and {made.devices:,} device ids"),
        (
            "Volume",
            f"{made.billed:,} events count; {made.bytes / 1e6:,.1f} MB in {made.requests:,} requests",
        ),
        (
            "Duration",
            (
                f"about {sentence(made.duration_s)} ({made.because}); the limits alone take "
                f"{sentence(made.least_s)} ({made.least_because}); days of quota: {made.quota_days}"
            ),
        ),
        ("Profiles", f"User properties at the destination are {sync}"),
    )


def _date(moment_ms: int | None) -> str:
    return (
        "–"
        if moment_ms is None
        else f"{datetime.fromtimestamp(moment_ms / 1000, UTC):%Y-%m-%d %H:%M:%S}"
    )


def _shortened(days: dict[str, int]) -> dict[str, int]:
    """Count by month, or by year, what has too many days."""
    for letters in (10, 7, 4):
        counted: dict[str, int] = {}
        for day, events in days.items():
            counted[day[:letters]] = counted.get(day[:letters], 0) + events
        if len(counted) <= _DAYS_SHOWN:
            break
    return counted


def _table(console: Console, title: str, counts: dict[str, int]) -> None:
    from rich.markup import escape
    from rich.table import Table

    if not counts:
        return
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    largest = max(counts.values()) or 1
    for name, count in counts.items():
        table.add_row(escape(name), f"{count:,}", "█" * round(_BAR * count / largest))
    console.print(table)
