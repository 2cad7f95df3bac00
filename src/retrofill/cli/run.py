"""`retrofill run`: a plan, one question, then everything is sent; the same line again resumes."""

from __future__ import annotations

import contextlib
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from retrofill.backfill import memory
from retrofill.cli import options
from retrofill.errors import Error, InputError, SendError, StoreError

if TYPE_CHECKING:
    from rich.console import Console

    from retrofill.backfill.keys import Keys
    from retrofill.backfill.manifest import Manifest
    from retrofill.backfill.profile import Profile, Target
    from retrofill.backfill.seam import Live
    from retrofill.backfill.send import Outcome, Progress

EXAMPLE = "Example: retrofill run events.ndjson.gz --map map.yaml --to http://localhost:8090 --api-key KEY"
WORK = Path("retrofill-work")
_PASSWORD = re.compile(r"(://[^/@:]*:)[^/]*(?=@)|([?&](?:ssl)?password=)[^&]*")  # of a database
FILE_COLUMNS = 250  # of a table that goes into a file
UPDATES_PER_H = 1800  # property updates of a person in an hour that our server takes by default


def command(  # noqa: PLR0913, PLR0917 - typer makes options of them, nobody calls it by position
    sources: options.Sources,
    to: options.To,
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
    give_up_after: Annotated[
        str | None,
        typer.Option(metavar="5s|10m|2h", help="End when nothing was taken for so long."),
    ] = None,
    gzip: Annotated[bool, typer.Option("--gzip", help="Compress requests.")] = False,
    yes: options.Yes = False,
    as_json: options.AsJson = False,
) -> None:
    """Send a history: plan, one question, then in order, exactly once. The same line again resumes."""
    memory.settle()
    from retrofill.backfill import imports
    from retrofill.backfill import keys as key_ring
    from retrofill.backfill import profile as profiles
    from retrofill.backfill.drive import Drive, drive

    keys = key_ring.find(api_key, secret_key, key_file)
    key_ring.need_api_key(keys)
    where = profiles.target(to)
    chosen = profile_of(where, profile, keys, work)
    pause = None if give_up_after is None else seconds(give_up_after)
    staged = (work / "stage").exists()
    generation = generation_of(work, import_, where, keys, as_json=as_json)
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
    # With a journal it was asked before, unless somebody has removed the stage.
    if generation is None and not (staged and (work / "journal.db").exists()):
        generation = generation_of(work, import_, where, keys, as_json=as_json)
    resuming = (work / "journal.db").exists()
    tell_plan(found, where, chosen, work=work, as_json=as_json, resuming=resuming)
    if not (yes or resuming):
        _ask(found, where)
    if generation is not None:
        _note(imports.opened, where, keys, found.import_id)
    memory.give_back()
    with resumable(as_json=as_json), Display(as_json=as_json) as display:
        outcome = drive(
            Drive(
                work=work,
                to=where,
                profile=chosen,
                api_key=keys.api_key,
                gzip=gzip,
                give_up_after_s=pause,
                generation=generation,
                show=display.show,
            )
        )
    if outcome.progress.dead and query is None:
        _show_rows(work, sources, map_)
    if generation is not None and outcome.complete:
        outcome = _closed(outcome, where, keys, found.import_id, generation)
    end(outcome, work, as_json=as_json)


def profile_of(to: Target, name: str | None, keys: Keys, work: Path) -> Profile:
    """Return the limits to keep. Where nobody can say what the destination is, those of the run so far, and that is said.

    Raises InputError.
    """
    from retrofill.backfill import drive
    from retrofill.backfill import profile as profiles

    if name is None and to.ours and profiles.health(to.read) is None:
        name = "amplitude"
        with contextlib.suppress(InputError):  # nothing was sent from here yet
            before, limits = drive.remembered(work)
            name = limits.name if before == to else name
        say(f"! {to.name} does not answer: the limits of {name} are kept, --profile sets others")
    return profiles.choose(to, name, keys.api_key, keys.secret_key)


def warn_of_updates(found: Manifest, profile: Profile, keys: Keys) -> None:
    """Say what without the secret key nobody can know: our server takes so many property updates an hour, and no more."""
    # What is said of groups is nobody's.
    most = max((one.events for one in found.hot_people if one.person), default=0)
    if found.options.skip_user_properties_sync:
        most = min(most, found.types.get("$identify", 0))
    if profile.name == "retrofill" and not keys.secret_key and most > UPDATES_PER_H:
        say(
            f"! One person may have {most:,} property updates: beyond {UPDATES_PER_H:,} an hour, unless it is set"
            " otherwise, a server leaves user profiles as they are. With --secret-key it is asked, or set --updates-per-h"
        )


def _show_rows(work: Path, sources: list[str], mapping: str | None) -> None:
    """Let the dead letters of sending show the rows of the source, where these can be read once more."""
    from retrofill.backfill import mapping_file, original

    with contextlib.suppress(Error, OSError, ValueError):  # then they show the events
        told = mapping_file.load(mapping or fitting(sources, None, None))
        original.sent(work, sources, told.delimiter, told.format)


def _closed(outcome: Outcome, to: Target, keys: Keys, name: str, generation: int) -> Outcome:
    """Close an import at our own server. What was undone while it was sent is not complete, and stays as it is."""
    from msgspec.structs import replace

    from retrofill.backfill import imports

    undone = False
    with contextlib.suppress(
        SendError, InputError
    ):  # then nobody knows, and the next run asks again
        undone = imports.undone_meanwhile(to, keys, name, generation)
    if undone:
        reason = f"import {name} was undone at {to.name} while it was sent; the same line sends all of it anew"
        return replace(outcome, complete=False, reason=reason)
    _note(imports.closed, to, keys, name)
    return outcome


def _note(tell: Callable[[Target, Keys, str], None], to: Target, keys: Keys, name: str) -> None:
    """Tell our own server how far an import is. A run does not depend on that."""
    try:
        tell(to, keys, name)
    except (SendError, InputError) as problem:
        say(f"! the state of import {name} at {to.name} is not up to date: {problem.what}")


def stage_of(  # noqa: PLR0913 - one call's options, passed on
    sources: list[str],
    *,
    mapping: str | None,
    query: str | None,
    endpoint: str | None,
    work: Path,
    import_id: str | None,
    skip: bool | None,
    sync_is_safe: Callable[[], bool],
    since: str | None,
    until: str | None,
    until_types: dict[str, int],
    sample: str | None,
    kiosk_limit: int,
    min_id_length: int,
    bad_rows: str,
    as_json: bool,
) -> Manifest:
    """Stage what a line asks for, or find it staged: `plan` and `run` mean the same by the same words.

    What is left out is as before in this work directory: the import's name, whether properties are synced.
    skip: None asks sync_is_safe. Raises InputError.
    """
    from retrofill.backfill import manifest as manifests
    from retrofill.backfill import mapping_file
    from retrofill.backfill.manifest import Options
    from retrofill.backfill.resend import parse_time
    from retrofill.backfill.stage import Asked, import_name, stage
    from retrofill.clock import SystemClock

    memory.loaded()
    before = manifests.read(work / "stage")
    since_ms = None if since is None else parse_time(since)
    until_ms = None if until is None else parse_time(until)
    if since_ms is not None and until_ms is not None and until_ms <= since_ms:
        raise InputError(
            "No time lies between --since and --until", mend="Give --since before --until"
        )
    if before is not None and skip is None and import_id in {None, before.import_id}:
        skip = before.options.skip_user_properties_sync
    wanted = Options(
        import_id=import_name(work, import_id, now_ms=SystemClock().now_ms()),
        kiosk_limit=kiosk_limit,
        id_length_min=min_id_length,
        bad_rows=part(bad_rows, "--bad-rows"),
        since_ms=since_ms,
        until_ms=until_ms,
        until_types=until_types,
        sample=1.0 if sample is None else part(sample, "--sample", some=True),
        skip_user_properties_sync=not sync_is_safe() if skip is None else skip,
    )
    asked = Asked(
        named=sources,
        mapping=mapping_file.load(mapping or fitting(sources, query, endpoint)),
        query=query,
        endpoint=endpoint,
    )
    with Staging(as_json=as_json) as staging:
        try:
            return stage(work, asked, wanted, progress=staging.show)
        except KeyboardInterrupt:
            say(f"stopped; staging goes on from here: {resume_line()}")
            raise


def generation_of(
    work: Path, import_id: str | None, to: Target, keys: Keys, *, as_json: bool
) -> int | None:
    """Return which generation of the staged import is sent now, None if nothing is staged or it cannot be known.

    If the destination has undone the one that the journal speaks of, the journal is set aside, and that is said: all is
    sent anew. Raises BusyError, FinalError, RetryError.
    """
    from retrofill.backfill import imports
    from retrofill.backfill import manifest as manifests

    staged = manifests.read(work / "stage")
    if staged is None or import_id not in {None, staged.import_id}:
        return None
    begun = imports.begin(work, to, keys, staged.import_id)
    if begun.aside is not None:
        from retrofill.backfill.report import VERIFIED  # which loads what draws charts

        (work / VERIFIED).unlink(missing_ok=True)  # it spoke of what is undone
    if as_json:
        if begun.aside is not None:
            emit({"event": "undone", "generation": begun.generation, "journal": str(begun.aside)})
    elif begun.aside is not None:
        say(
            f"import {staged.import_id} was undone at {to.name}: all of it is sent anew, as generation"
            f" {begun.generation}; the old journal is {begun.aside}"
        )
    elif begun.problem and (work / "journal.db").exists():
        say(f"! whether this import was undone is not known: {begun.problem}")
    return begun.generation


def seam_of(
    until: str | None,
    file: str | None,
    work: Path,
    to: Target,
    keys: Keys,
    *,
    tell: Callable[[str], None],
) -> Live | None:
    """Find the seam with live data if `--until live` asks for it, and say it. Raises InputError, FinalError."""
    from retrofill.backfill import keys as key_ring
    from retrofill.backfill import seam
    from retrofill.backfill.status import moment

    if until != seam.LIVE:
        if file is not None:
            raise InputError("--live says nothing without --until live", mend="Give both")
        return None

    def both() -> Keys:
        key_ring.need_both(keys)
        return keys

    found = seam.find(work, to, both, file=file, now=datetime.now(UTC), step=tell)
    tell(
        f"live at {found.where}: {sum(found.days.values()):,} events of {len(found.types):,} types;"
        f" {found.imported:,} more are of imports and do not count"
    )
    if not to.ours and file is None:
        tell("Amplitude's export does not mark imports: rows of an earlier import count as live")
    for name, one in found.types.items():
        tell(f"  {name}: history until {moment(one.first_ms)}, {one.events:,} live events")
        if one.late:
            tell(
                f"  ! its first row arrived only at {moment(one.arrived_ms)}: if it came late,"
                " take --until DATE"
            )
    return found


def fitting(sources: list[str], query: str | None, endpoint: str | None) -> str:
    """Return the name of the preset that the source looks like, and say so. Raises InputError."""
    import tempfile

    from retrofill.backfill import guess, intake
    from retrofill.backfill import source as kinds

    with tempfile.TemporaryDirectory(prefix="retrofill-") as scratch:
        origins = kinds.locate(sources, query=query, endpoint=endpoint)
        some = kinds.few(origins)
        pieces = kinds.pieces(some, scratch=Path(scratch), endpoint=endpoint)
        name = guess.preset(intake.look(pieces, None))
    say(f"The source looks like {name}: --map {name}")
    return name


def part(text: str, option: str, *, some: bool = False) -> float:
    """Read `5%` or `0.05` as a part of all; some: none of it is wrong. Raises InputError."""
    if re.fullmatch(r"\d+(\.\d+)?%?", text):
        found = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
        if found <= 1 and (found or not some):
            return found
    raise InputError(f"{option} {text!r} is no part of all", mend=f"Give {option} 5% or 0.05")


def seconds(text: str) -> float:
    """Read `5s`, `10m`, `2h` or `1d`. Raises InputError."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
    number, unit = (text[:-1], text[-1:]) if text[-1:] in units else (text, "s")
    try:
        value = float(number) * units[unit]
    except ValueError:
        value = -1.0
    if not 0 < value < math.inf:
        raise InputError(f"{text!r} is no time span", mend="Give one such as 5s, 10m or 2h")
    return value


def tell_plan(
    found: Manifest, to: Target, profile: Profile, *, work: Path, as_json: bool, resuming: bool
) -> None:
    """Say what will be sent, and what is notable about it."""
    from retrofill.backfill.plan import plan, sentence
    from retrofill.backfill.status import moment

    made = plan(found, profile, destination=to.name, stage=work / "stage", start_s=time.time())
    facts: dict[str, Any] = {
        "import": made.import_id,
        "to": made.destination,
        "profile": made.profile,
        "events": made.events,
        "people": made.people,
        "from": moment(made.first_ms),
        "until": moment(made.last_ms),
        "refused": made.dead_letters,
        "duplicates": made.duplicates,
        "requests": made.requests,
        "seconds": round(made.duration_s, 1),
        "limited_by": made.because,
        "seconds_at_least": round(made.least_s, 1),
        "skip_user_properties_sync": made.skip_user_properties_sync,
        "warnings": made.warnings,
        "resuming": resuming,
    }
    if as_json:
        emit({"event": "plan", **facts})
        return
    lines = [
        f"import {made.import_id}: {made.events:,} events of {made.people:,} people to {to.name}",
        (
            f"{facts['from'] or '–'} to {facts['until'] or '–'}; {made.dead_letters:,} rows refused,"
            f" {made.duplicates:,} duplicates in the source"
        ),
        (
            f"{made.requests:,} requests, profile {made.profile}; about"
            f" {sentence(made.duration_s)} ({made.because}); the limits alone take {sentence(made.least_s)}"
        ),
        "user properties: events leave live values as they are, $skip_user_properties_sync is set"
        if made.skip_user_properties_sync
        else "user properties are synced, by event time: no newer value changes"
        if profile.by_event_time
        else f"user properties are synced, {profile.rates.updates_per_h:,} updates an hour a person"
        if profile.rates.updates_per_h
        else "user properties are synced",
        *(f"! {warning}" for warning in made.warnings),
    ]
    if made.dead_letters:
        lines.append(f"dead letters: {work / 'dead-letters.ndjson'}")
    if resuming:
        lines.append("resuming: what was acknowledged is not sent again")
    for line in lines:
        say(line)


def _ask(found: Manifest, to: Target) -> None:
    if not sys.stdin.isatty():
        raise InputError("Nobody is here to be asked", mend="Give --yes to send without a question")
    if not typer.confirm(f"Send {found.events:,} events to {to.name}?", err=True):
        raise InputError("Nothing was sent", mend="The stage is kept; run the same line to go on")


class Staging:
    """Shows how far staging is: a line that changes on a terminal, elsewhere one for each step."""

    def __init__(self, *, as_json: bool) -> None:
        self._json = as_json
        self._said = ""
        self._status: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty() and not self._json:
            from rich.console import Console

            self._status = Console(stderr=True).status("Looking at the source")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def show(self, step: str, rows: int) -> None:
        """Show a step and how many rows it has seen."""
        if step == "go on":
            say(f"going on with a stage that was stopped: {rows:,} rows are read")
            return
        doing = {"read": "reading the source", "sort": f"sorting {rows:,} rows"}.get(step, step)
        if self._status is not None:
            self._status.update(f"{doing}: {rows:,} rows" if step == "read" else doing)
        elif doing != self._said and not self._json:
            say(doing)
        self._said = doing


class Display:
    """Shows how far a run is: a live bar on a terminal, a line now and then elsewhere, or JSON."""

    LINES_S = 5.0

    def __init__(self, *, as_json: bool) -> None:
        self._json = as_json
        self._bar: Any = None
        self._task: Any = None
        self._said = 0.0

    def __enter__(self) -> Self:
        if sys.stderr.isatty() and not self._json:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            self._bar = Progress(
                BarColumn(bar_width=30),
                TextColumn("{task.description}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, one: Progress) -> None:
        """Show it, if it is time."""
        from retrofill.backfill import status

        if self._bar is not None:
            done = one.total - one.left
            self._bar.update(
                self._task, total=one.total, completed=done, description=status.line(one)
            )
            return
        now = time.monotonic()
        if now - self._said < self.LINES_S and one.left:
            return
        self._said = now
        if self._json:
            emit({"event": "progress", **status.facts(one)})
        else:
            say(status.line(one))


def end(outcome: Outcome, work: Path, *, as_json: bool) -> None:
    """Say how a run ended. Ends the process with 1 unless every good row is acknowledged."""
    from retrofill.backfill import status, unsure

    one = outcome.progress
    listed = unsure.write(work)
    facts = {"event": "end", "complete": outcome.complete, "reason": outcome.reason}
    if as_json:
        resume = {} if outcome.complete else {"resume": resume_line()}
        emit({**facts, **resume, **status.facts(one)})
    else:
        say(f"{'complete' if outcome.complete else 'not complete'}: {status.line(one)}")
        if one.dead:
            say(f"dead letters: {work / 'dead-letters-send.ndjson'}")
        if listed is not None:
            say(
                f"unsure rows: {listed}; the destination may hold them,"
                " `retrofill verify --repair` finds out"
            )
        if not outcome.complete:
            say(f"{outcome.reason or 'something is left'}; to go on: {resume_line()}")
    if not outcome.complete:
        raise typer.Exit(1)


@contextlib.contextmanager
def resumable(*, as_json: bool) -> Iterator[None]:
    """Let an error that ends a run say how to go on, as every other end does."""
    try:
        yield
    except (SendError, StoreError) as problem:
        line = resume_line()
        if as_json:
            facts = {"event": "end", "complete": False, "reason": problem.what}
            emit({**facts, "resume": line})
        problem.mend = ". ".join(part for part in (problem.mend, f"To go on: {line}") if part)
        raise


def resume_line() -> str:
    """The line that was given, without keys: they come from where they came from, or the environment."""
    words: list[str] = []
    hidden = False
    for word in sys.argv[1:]:
        if hidden:
            word, hidden = "…", False  # noqa: PLW2901 - the value of a key
        elif word in {"--api-key", "--secret-key"}:
            hidden = True
        elif word.startswith(("--api-key=", "--secret-key=")):
            word = word.partition("=")[0] + "=…"  # noqa: PLW2901 - the same
        word = _PASSWORD.sub(r"\1\2…", word)  # noqa: PLW2901 - the same
        words.append(word if word == "…" else shlex.quote(word))
    return " ".join(["retrofill", *words])


def tables() -> Console:
    """Return what prints tables: as wide as the terminal, or so wide that a line of a file is one of a table."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else FILE_COLUMNS)


def say(text: str) -> None:
    """Talk goes to stderr."""
    typer.echo(text, err=True)


def emit(value: dict[str, Any]) -> None:
    """Data goes to stdout, one JSON object a line."""
    import msgspec

    typer.echo(msgspec.json.encode(value).decode())
