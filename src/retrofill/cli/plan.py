"""`retrofill plan`: stage a source, say what its import will do and take, send nothing."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrofill.clock import SystemClock
from retrofill.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from retrofill.backfill.manifest import Manifest, Options
    from retrofill.backfill.plan import Plan

EXAMPLE = (
    "Example: retrofill plan history.ndjson.gz --map history.map.yaml --to http://localhost:8090"
)
_BAR = 24  # characters of the longest bar
_DAYS_SHOWN = 31


def command(  # noqa: PLR0913, PLR0917 - typer makes options of them, nobody calls it by position
    source: Annotated[
        list[str], typer.Argument(help="Files, folders, globs, s3://… or database addresses.")
    ],
    mapping: Annotated[
        str | None,
        typer.Option("--map", help="A mapping's file or a preset's name; else one that fits."),
    ] = None,
    to: Annotated[str, typer.Option(help="URL, amplitude or amplitude-eu.")] = "amplitude",
    profile: Annotated[
        str | None, typer.Option(help="Whose limits; else the destination's.")
    ] = None,
    work: Annotated[Path, typer.Option(help="The work directory.")] = Path("retrofill-work"),
    name: Annotated[str | None, typer.Option("--import", help="The import's id.")] = None,
    query: Annotated[str | None, typer.Option(help="The SQL of a database source.")] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="The S3 endpoint, where it is not AWS.")
    ] = None,
    since: Annotated[str | None, typer.Option(help="First day or time (UTC) taken.")] = None,
    until: Annotated[str | None, typer.Option(help="First day or time (UTC) not taken.")] = None,
    sample: Annotated[str, typer.Option(help="Part of the people, such as 5%.")] = "100%",
    bad_rows: Annotated[str, typer.Option(help="Part of the rows that may be refused.")] = "5%",
    kiosk_limit: Annotated[int, typer.Option(help="An id of more people joins nobody.")] = 10,
    skip_sync: Annotated[
        bool,
        typer.Option(
            "--skip-user-properties-sync/--user-properties-sync",
            help="Leave the destination's user profiles as they are.",
        ),
    ] = True,
    events_per_s: Annotated[int | None, typer.Option(help="Events a second in all.")] = None,
    requests_per_s: Annotated[int | None, typer.Option(help="Requests a second in all.")] = None,
    device_per_s: Annotated[int | None, typer.Option(help="Events a second of a device.")] = None,
    events_per_request: Annotated[int | None, typer.Option(help="Events in a request.")] = None,
    quota_per_day: Annotated[int | None, typer.Option(help="Events a day of an id.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Stage a source and say what its import will do and take; nothing is sent."""
    from rich.console import Console

    from retrofill.backfill import mapping_file, plan, stage
    from retrofill.backfill import profile as profiles
    from retrofill.backfill.manifest import Options

    now_ms = SystemClock().now_ms()
    options = Options(
        import_id=stage.import_name(work, name, now_ms=now_ms),
        skip_user_properties_sync=skip_sync,
        kiosk_limit=kiosk_limit,
        bad_rows=part(bad_rows, "--bad-rows"),
        since_ms=moment(since, "--since"),
        until_ms=moment(until, "--until"),
        sample=part(sample, "--sample"),
    )
    asked = stage.Asked(
        named=source,
        mapping=mapping_file.load(mapping or fitting(source, query, endpoint)),
        query=query,
        endpoint=endpoint,
    )
    console = Console(stderr=True)
    found = staged(work, asked, options, console)
    where = profiles.target(to)
    chosen = profiles.adjust(
        profiles.choose(where, profile),
        events_per_s=events_per_s,
        requests_per_s=requests_per_s,
        device_per_s=device_per_s,
        events_per_request=events_per_request,
        quota_per_day=quota_per_day,
        skip_sync=skip_sync,
    )
    made = plan.plan(found, chosen, destination=where.name, start_s=now_ms / 1000)
    if as_json:
        typer.echo(plan.to_json(made))
    else:
        show(made, Console(), work=work)


def fitting(source: list[str], query: str | None, endpoint: str | None) -> str:
    """Return the name of the preset that the source looks like, and say so. Raises InputError."""
    from retrofill.backfill import guess, intake
    from retrofill.backfill import source as sources

    with tempfile.TemporaryDirectory(prefix="retrofill-") as scratch:
        origins = sources.locate(source, query=query, endpoint=endpoint)
        pieces = sources.pieces(origins, scratch=Path(scratch), endpoint=endpoint)
        name = guess.preset(intake.look(pieces, None))
    typer.echo(f"The source looks like {name}: --map {name}", err=True)
    return name


def staged(work: Path, asked: Any, options: Options, console: Console) -> Manifest:  # noqa: ANN401 - stage.Asked, imported late
    """Stage with a line of progress on a terminal."""
    from retrofill.backfill import stage

    with console.status("Looking at the source") as status:

        def told(step: str, rows: int) -> None:
            words = {"read": "Reading", "sort": "Sorting"}
            status.update(f"{words.get(step, step)}: {rows:,} rows")

        return stage.stage(work, asked, options, progress=told)


def moment(text: str | None, option: str) -> int | None:
    """Read a day or a time in UTC as milliseconds. Raises InputError."""
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise InputError(
            f"{option} {text!r} is no date", mend="Write 2024-01-31 or 2024-01-31T12:00:00"
        ) from error
    aware = found if found.tzinfo else found.replace(tzinfo=UTC)
    return round(aware.timestamp() * 1000)


def part(text: str, option: str) -> float:
    """Read `5%` or `0.05` as a part of all. Raises InputError."""
    if re.fullmatch(r"\d+(\.\d+)?%?", text):
        found = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
        if found <= 1:
            return found
    raise InputError(f"{option} {text!r} is no part of all", mend="Write 5% or 0.05")


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
    _table(console, "Ids taken away, the event kept", made.ids)
    _table(console, "Left out", made.left_out)
    _table(console, "Devices with most events", {one.id: one.events for one in made.hot_devices})
    _table(console, "Users with most events", {one.id: one.events for one in made.hot_users})
    people = {f"rows {one.seq:,} … of set {one.set}": one.events for one in made.hot_people}
    _table(console, "People with most events", people)
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
            f"at least {sentence(made.duration_s)} ({made.because}); days of quota: {made.quota_days}",
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
