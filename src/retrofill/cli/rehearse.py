"""`retrofill rehearse`: what an import would change, said before anything is sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retrofill.cli import options
from retrofill.cli.run import WORK, emit, say, seam_of, stage_of, tables
from retrofill.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from retrofill.backfill.profile import Target
    from retrofill.rehearse.outcome import ByDay, Outcome, Properties

EXAMPLE = "Example: retrofill rehearse old.ndjson.gz --map old.map.yaml --against http://localhost:8090 --key-file keys"
_SHOWN = 10


def command(  # noqa: PLR0913, PLR0917 - typer makes options of them, nobody calls it by position
    sources: options.Sources,
    against: Annotated[
        str,
        typer.Option(help="URL of a Retrofill server, an export's zip, or none: an empty project."),
    ],
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
    sample: options.Sample = None,
    profile: options.ProfileName = None,
    events_per_request: options.EventsPerRequest = None,
    skip_user_properties_sync: options.SkipSync = None,
    min_id_length: options.MinIdLength = 5,
    kiosk_limit: options.KioskLimit = 10,
    bad_rows: options.BadRows = "5%",
    as_json: options.AsJson = False,
) -> None:
    """Stage a history and say what its import would change there. Nothing is sent; `run` goes on from here."""
    import time

    import msgspec

    from retrofill.backfill import keys as key_ring
    from retrofill.backfill import profile as profiles
    from retrofill.rehearse import given
    from retrofill.rehearse.rehearsal import Order, rehearse
    from retrofill.server import log

    log.configure("error")
    keys = key_ring.find(api_key, secret_key, key_file)
    to, archive = destination(against)
    if to is not None:
        key_ring.need_both(keys)
        given.need_ours(to)
    where = to or profiles.target("amplitude")
    tell = (lambda _: None) if as_json else say
    live = None if archive is None or until != "live" else str(archive)
    seams = seam_of(until, live, work, where, keys, tell=tell)
    chosen = profiles.choose(where, profile, keys.api_key, keys.secret_key)
    found = stage_of(
        sources,
        mapping=map_,
        query=query,
        endpoint=endpoint,
        work=work,
        import_id=import_,
        skip=skip_user_properties_sync,
        sync_is_safe=lambda: (
            against == "none" or profiles.sync_is_safe(where, chosen, keys.api_key, keys.secret_key)
        ),
        since=since,
        until=None if seams is not None else until,
        until_types={} if seams is None else seams.until,
        sample=sample,
        min_id_length=min_id_length,
        kiosk_limit=kiosk_limit,
        bad_rows=bad_rows,
        as_json=as_json,
    )
    made = rehearse(
        Order(
            work=work,
            against=against,
            profile=profiles.adjust(
                chosen,
                events_per_request=events_per_request,
                updates=found.updates,
            ),
            to=to,
            archive=archive,
            keys=keys,
            now_ms=int(time.time() * 1000),
            step=tell,
        )
    )
    if as_json:
        emit(msgspec.to_builtins(made))
    else:
        show(made, tables(), work=work)


def destination(against: str) -> tuple[Target | None, Path | None]:
    """Say what `--against` names: a server, an export, or neither. Raises InputError."""
    from retrofill.backfill import profile as profiles

    if against == "none":
        return None, None
    if "://" in against or against in {"amplitude", "amplitude-eu"}:
        return profiles.target(against), None
    path = Path(against)
    if not path.exists():
        raise InputError(
            f"There is no {against!r} to rehearse against",
            mend="Give --against the URL of a Retrofill server, the zip of an export, or none",
        )
    return None, path


def show(made: Outcome, console: Console, *, work: Path) -> None:
    """Print a rehearsal as tables."""
    from rich.markup import escape
    from rich.table import Table

    head = Table.grid(padding=(0, 2))
    for label, value in _head(made):
        head.add_row(label, escape(value))
    console.print(head)
    for title, names, rows in _tables(made):
        if rows:
            table = Table(title=title, title_justify="left", box=None)
            for at, name in enumerate(names):
                number = isinstance(rows[0][at], int)
                table.add_column(name, justify="right" if number else "left")
            for row in rows:
                table.add_row(*map(_cell, row))
            console.print(table)
    for warning in _warnings(made):
        console.print(f"[yellow]![/] {escape(warning)}")
    console.print(
        f"Nothing was sent. The rehearsal is kept in {escape(str(work))}; `retrofill report` shows it."
    )


def _cell(value: object) -> str:
    from rich.markup import escape

    return f"{value:,}" if isinstance(value, int) else escape(str(value))


def _head(made: Outcome) -> Sequence[tuple[str, str]]:
    from retrofill.backfill.plan import sentence

    volume = made.volume
    sent = f"{volume.events:,} events of {volume.people:,} people in {volume.requests:,} requests"
    refused, before = sum(made.refused.values()), sum(made.refused_before.values())
    return (
        ("Import", f"{made.import_id} against {made.against}{_position(made)}"),
        ("Volume", f"{sent}, {volume.bytes / 1e6:,.1f} MB; {volume.billed:,} count"),
        (
            "Stored",
            (
                f"{volume.stored:,}; {made.duplicates:,} are there already; {refused:,} would be refused,"
                f" {before:,} rows were before"
            ),
        ),
        (
            "People",
            (
                f"{made.new_people:,} new; {made.merged:,} merged; {made.doubled:,} probably counted twice;"
                f" {made.shared_devices:,} devices shared by many"
            ),
        ),
        ("First seen", _first_seen(made)),
        ("Profiles", _profiles(made)),
        (
            "Duration",
            (
                f"{sentence(made.duration_s)} at the destination's limits; {made.throttled:,} ids have to"
                f" wait; days of quota: {made.quota_days}"
            ),
        ),
    )


def _tables(made: Outcome) -> Iterator[tuple[str, Sequence[str], Sequence[Sequence[object]]]]:
    days = ("", "before", "after", "change")
    for title, found in (("New users", made.new_users), ("Active users", made.active_users)):
        changed, shown = _days(found)
        most = f", the {len(shown)} of {changed:,} that change most" if changed > len(shown) else ""
        yield f"{title} by day (UTC){most}", days, shown
    spread = list(made.first_seen.spread.items())
    yield "First seen earlier or later by", ("", "people"), spread
    yield "Properties of live people that would change", *_names(made)
    changes = made.properties.listed[:_SHOWN]
    yield (
        "Most frequent changes",
        ("property", "from", "to", "people"),
        [(one.name, one.old or "–", one.new or "–", one.people) for one in changes],
    )
    yield "Merged into", ("user",), [(one.user_id or "–",) for one in made.merges[:_SHOWN]]
    yield (
        "Probably counted twice",
        ("evidence", "", "ids"),
        [(one.evidence, one.value, ", ".join(one.ids)) for one in made.doubles[:_SHOWN]],
    )
    yield (
        "Devices shared by many",
        ("device", "users", "before"),
        [(one.device_id, one.users, one.before) for one in made.shared[:_SHOWN]],
    )
    yield (
        "Users who join too many",
        ("user", "devices that stay apart"),
        [(one.user_id, one.devices) for one in made.held[:_SHOWN]],
    )
    refused = list(made.refused.items())[:_SHOWN]
    yield "Refused by the destination", ("reason", "events"), refused
    waiting = [(one.kind, one.id, one.why) for one in made.waiting[:_SHOWN]]
    yield "Ids that have to wait", ("", "id", "for"), waiting


def _warnings(made: Outcome) -> Iterator[str]:
    yield from made.warnings
    if made.sample < 1:
        yield f"All figures are of a sample: {made.sample:.3g} of the people."
    if not made.exact:
        yield "This is an estimate."
    yield from (f"not known: {one}" for one in made.unknown)


def _position(made: Outcome) -> str:
    from retrofill.backfill.status import moment

    if made.kind != "server":
        return ""
    return f" as of block {made.block:,}, {moment(made.at_ms)}"


def _first_seen(made: Outcome) -> str:
    one = made.first_seen
    if not one.moved:
        return "nobody's moves"
    return f"{one.moved:,} people's moves, by {one.days_median:,.1f} days in the middle and {one.days_max:,.1f} at most"


def _profiles(made: Outcome) -> str:
    def said(found: Properties | None) -> str:
        return "not rehearsed" if found is None else f"{found.people:,} live people change"

    own = "skipped" if made.skip_user_properties_sync else "synced"
    return f"synced: {said(made.synced)}; skipped: {said(made.skipped)}. As staged: {own}"


def _names(made: Outcome) -> tuple[Sequence[str], list[tuple[object, ...]]]:
    """Return columns and rows: people by property, for each setting that was rehearsed."""
    both = (("people, synced", made.synced), ("people, skipped", made.skipped))
    sides = [(label, one.names) for label, one in both if one is not None]
    first = sides[0][1] if sides else {}
    every = {name for _, names in sides for name in names}
    most = sorted(every, key=lambda one: (-first.get(one, 0), one))[: 2 * _SHOWN]
    rows = [(one, *(names.get(one, 0) for _, names in sides)) for one in most]
    return ("property", *(label for label, _ in sides)), rows


def _days(found: ByDay) -> tuple[int, list[tuple[str, int, int, str]]]:
    """Return how many days change, and those that change most, in order."""
    rows = [
        (day, found.before.get(day, 0), found.after.get(day, 0))
        for day in {*found.before, *found.after}
        if found.before.get(day, 0) != found.after.get(day, 0)
    ]
    most = sorted(sorted(rows, key=lambda row: -abs(row[2] - row[1]))[:_SHOWN])
    return len(rows), [(day, then, now, f"{now - then:+,}") for day, then, now in most]
