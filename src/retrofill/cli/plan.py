"""`retrofill plan`: stage a source, say what its import will do and take, send nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from retrofill.backfill import memory
from retrofill.cli import options
from retrofill.cli.run import WORK, profile_of, say, seam_of, stage_of, tables, warn_of_updates

if TYPE_CHECKING:
    from rich.console import Console

    from retrofill.backfill.plan import Plan

EXAMPLE = (
    "Example: retrofill plan history.ndjson.gz --map history.map.yaml --to http://localhost:8090"
)
_BAR = 24  # characters of the longest bar
_DAYS_SHOWN = 31


def command(  # noqa: PLR0913, PLR0917 - typer makes options of them, nobody calls it by position
    sources: options.Sources,
    to: options.To = "amplitude",
    map_: options.Mapping = None,
    query: options.Query = None,
    endpoint: options.Endpoint = None,
    work: options.Work = WORK,
    import_: options.ImportName = None,
    api_key: options.ApiKey = None,
    secret_key: options.SecretKey = None,
    key_file: options.KeyFile = None,
    since: options.Since = None,
    until: options.Until = None,
    live: options.LiveExport = None,
    sample: options.Sample = None,
    profile: options.ProfileName = None,
    events_per_s: options.EventsPerS = None,
    requests_per_s: options.RequestsPerS = None,
    device_per_s: options.DevicePerS = None,
    user_per_s: options.UserPerS = None,
    events_per_request: options.EventsPerRequest = None,
    quota_per_day: options.QuotaPerDay = None,
    updates_per_h: options.UpdatesPerH = None,
    skip_user_properties_sync: options.SkipSync = None,
    kiosk_limit: options.KioskLimit = 10,
    min_id_length: options.MinIdLength = 5,
    bad_rows: options.BadRows = "5%",
    as_json: options.AsJson = False,
) -> None:
    """Stage a history and say what its import will do and take. Nothing is sent; `run` goes on from there."""
    memory.settle()
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
        updates=found.updates,
    )
    warn_of_updates(found, chosen, keys)
    made = plan.plan(
        found, chosen, destination=where.name, stage=work / "stage", start_s=time.time()
    )
    if as_json:
        typer.echo(plan.to_json(made))
    else:
        show(made, tables(), work=work)


def show(made: Plan, console: Console, *, work: Path) -> None:
    """Print the plan as tables."""
    from rich.markup import escape
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
        console.print(f"[yellow]![/] {escape(warning)}")
    console.print(
        f"Import [bold]{made.import_id}[/] is staged in {escape(str(work))}; nothing was sent."
    )


def _figures(made: Plan, sentence: Callable[[float], str]) -> Sequence[tuple[str, str]]:
    from rich.markup import escape

    first, last = (_date(moment_ms) for moment_ms in (made.first_ms, made.last_ms))
    sync = (
        "[bold yellow]changed by these events[/]"
        if not made.skip_user_properties_sync
        else "[bold yellow]changed by the identify calls alone[/] ($skip_user_properties_sync)"
        if "$identify" in made.types
        else "left as they are ($skip_user_properties_sync)"
    )
    return (
        ("Import", escape(f"{made.import_id} to {made.destination}, limits of {made.profile}")),
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
    table = Table(title=escape(title), title_justify="left", show_header=False, box=None)
    largest = max(counts.values()) or 1
    for name, count in counts.items():
        table.add_row(escape(name), f"{count:,}", "█" * round(_BAR * count / largest))
    console.print(table)
