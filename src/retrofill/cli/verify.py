"""`retrofill verify`: what the destination holds, against what was sent."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retrofill.cli import options
from retrofill.cli.run import WORK, Display, emit, say
from retrofill.errors import SendError

if TYPE_CHECKING:
    from retrofill.backfill.journal import Rows
    from retrofill.backfill.keys import Keys
    from retrofill.backfill.profile import Target
    from retrofill.backfill.verify import Finding, Result

EXAMPLE = "Example: retrofill verify --work retrofill-work --api-key KEY --secret-key SECRET"
SHOWN = 1000  # findings printed; all of them are in WORK/verify.ndjson


def command(
    work: options.Work = WORK,
    api_key: options.ApiKey = None,
    secret_key: options.SecretKey = None,
    key_file: options.KeyFile = None,
    repair: Annotated[bool, typer.Option("--repair", help="Send what is missing.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Read everything back and compare it event by event. Exit 1 if anything is not as it was sent."""
    from retrofill.backfill import drive, imports, unsure, verify
    from retrofill.backfill import keys as key_ring
    from retrofill.backfill.profile import names_retrofill

    keys = key_ring.find(api_key, secret_key, key_file)
    key_ring.need_both(keys)
    to, profile = drive.remembered(work)
    result, missing = _verified(work, to, keys, as_json=as_json)
    _rehearsed(work, to, keys, as_json=as_json)
    if missing.count:
        imports.need_not_undone(work, to, keys)
    if not repair:
        raise typer.Exit(0 if result.clean else 1)
    verify.repair(work, missing, int(time.time() * 1000))
    unsure.write(work)
    if not missing.count:
        raise typer.Exit(0 if result.clean else 1)
    with Display(as_json=as_json) as display:
        outcome = drive.drive(
            drive.Drive(work=work, to=to, profile=profile, api_key=keys.api_key, show=display.show)
        )
    if not outcome.complete:
        say("not complete")
        raise typer.Exit(1)
    say(f"{missing.count:,} missing events sent again")
    if not (to.ours and names_retrofill(to.read)):
        say(
            "verify again once the destination's export shows them; Amplitude takes about two hours"
        )
        raise typer.Exit(1 if result.doubled or result.different or result.extra else 0)
    # An answer says that a row was taken, not that it was stored: a duplicate by its insert_id is not.
    result, missing = _verified(work, to, keys, as_json=as_json)
    if missing.count:
        say(
            f"! {missing.count:,} are missing still: another event holds the insert_id on the same device, "
            "so the server left them out as duplicates. Undo what brought it, or map another insert_id"
        )
    raise typer.Exit(0 if result.clean else 1)


def _verified(work: Path, to: Target, keys: Keys, *, as_json: bool) -> tuple[Result, Rows]:
    """Read back, compare, and say what was found. Returns the result and the missing rows."""
    import msgspec

    from retrofill.backfill import status, verify
    from retrofill.backfill.report import VERIFIED

    shown = 0
    kept: list[Finding] = []
    with (work / "verify.ndjson").open("wb") as file:

        def found(one: Finding) -> None:
            nonlocal shown
            line = msgspec.json.encode(one._asdict())
            file.write(line + b"\n")
            shown += 1
            if shown <= SHOWN:
                kept.append(one)

        result, missing = verify.verify(
            work, to, keys, found=found, step=lambda text: None if as_json else say(text)
        )
    facts = msgspec.structs.asdict(result)
    (work / VERIFIED).write_bytes(msgspec.json.encode(facts))
    if as_json:
        emit({"event": "verified", **facts})
        for one in kept:
            emit({"event": "finding", **one._asdict()})
    else:
        typer.echo(result.line())
        for one in kept:
            typer.echo(_line(one))
        if shown > SHOWN:
            typer.echo(f"… {shown - SHOWN:,} more in {work / 'verify.ndjson'}")
    left = status.status(work)["left"] if missing.count else 0
    if left:
        say(
            f"! {left:,} events were never acknowledged: the run is not complete, go on with it first"
        )
    return result, missing


def _rehearsed(work: Path, to: Target, keys: Keys, *, as_json: bool) -> None:
    """Say how the rehearsal did, if there was one of what is there."""
    from retrofill.backfill.report import REHEARSED

    if not (work / REHEARSED).exists():
        return
    import msgspec

    from retrofill.rehearse import verdict

    made = verdict.applies(work, to)
    if made is None:
        return
    try:
        figures = verdict.verdict(work, to, keys, made)
    except SendError as problem:  # what was verified stays verified
        say(f"! how the rehearsal did is not known: {problem}")
        return
    same = sum(one.same for one in figures)
    if as_json:
        for one in figures:
            emit({"event": "figure", **msgspec.to_builtins(one), "same": one.same})
        return
    typer.echo(f"rehearsal: {same} of {len(figures)} figures came as predicted")
    for one in figures:
        typer.echo(f"  {one.line()}")
    if same < len(figures) and made.sample == 1:
        typer.echo("  what arrived beside the import since the rehearsal is in what was found")


def _line(one: Finding) -> str:
    if one.kind == "doubled":
        return f"doubled    {one.insert_id}  {one.found} times"
    if one.kind == "missing":
        return f"missing    {one.insert_id}"
    return f"{one.kind:<10} {one.insert_id}  {one.field}: sent {one.sent!r}, found {one.found!r}"
