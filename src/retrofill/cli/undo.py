"""`retrofill undo`: an import is taken back, with all that it did, or brought back again."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrofill.cli import options
from retrofill.cli.run import emit, say
from retrofill.errors import InputError

if TYPE_CHECKING:
    from retrofill.backfill.imports import Effects, Shown

EXAMPLE = "Example: retrofill undo old-shop --to http://localhost:8090"


def command(  # noqa: PLR0917 - typer makes options of them, nobody calls it by position
    import_: Annotated[str, typer.Argument(metavar="IMPORT", help="The import's name.")],
    to: options.Server,
    api_key: options.ApiKey = None,
    secret_key: options.SecretKey = None,
    key_file: options.KeyFile = None,
    restore: Annotated[bool, typer.Option("--restore", help="Bring it back instead.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="Call off an undo or restore.")] = False,
    yes: options.Yes = False,
    as_json: options.AsJson = False,
) -> None:
    """Take an import back from a Retrofill server without a trace: shown first, then one question."""
    from retrofill.backfill import imports, ours
    from retrofill.backfill import keys as key_ring
    from retrofill.backfill import profile as profiles

    if restore and cancel:
        raise InputError("--restore brings back and --cancel calls off", mend="Give one of them")
    keys = key_ring.find(api_key, secret_key, key_file)
    key_ring.need_both(keys)
    where = profiles.target(to)
    ours.need(
        where,
        "undo an import",
        mend="; for any other destination `retrofill undo-recipe` prints what to ask it to delete",
    )
    before = imports.show(where, keys, import_)
    if before is None:
        raise imports.unknown(import_)
    _tell("import", before, as_json=as_json)
    if cancel:
        _called_off(imports.cancel(where, keys, import_), as_json=as_json)
        return
    if before.undone and not restore:
        if as_json:
            _tell("undone", before, as_json=True, seconds=0.0)
        else:
            say("it is undone already: nothing is left to do")
        return
    if not restore:
        _tell_effects(imports.effects(where, keys, import_), as_json=as_json)
    if not yes:
        _ask(before, where.name, restore=restore)
    started = time.monotonic()
    after = (imports.restore if restore else imports.undo)(where, keys, import_)
    seconds = time.monotonic() - started
    _end(before, after, seconds, as_json=as_json)


def _tell(what: str, one: Shown, *, as_json: bool, **more: float) -> None:
    if as_json:
        import msgspec

        emit({"event": what, **msgspec.structs.asdict(one), **more})
    else:
        say(f"import {one.name}, generation {one.generation}, {one.state}: {_figures(one)}")
        if one.reason:
            say(f"tried {one.tries} times, the last one failed: {one.reason}")


def _tell_effects(found: Effects | None, *, as_json: bool) -> None:
    if found is None:
        return
    if as_json:
        import msgspec

        emit({"event": "effects", **msgspec.structs.asdict(found)})
        return
    say(
        f"with it go {found.only_here:,} people whom nothing else shows and {found.merges:,} merges; of the others it has"
        f" the first event of {found.first_seen:,} and set properties of {found.properties:,}"
    )
    if found.repeats:
        say(f"{found.repeats:,} events come back that were left out as repeats of it")


def _called_off(after: Shown, *, as_json: bool) -> None:
    if as_json:
        _tell("called_off", after, as_json=True)
    else:
        say(f"called off, nothing has changed: the import is {after.state}")


def _figures(one: Shown) -> str:
    from retrofill.backfill.status import moment

    text = f"{one.events:,} events"
    if one.identifies:
        text += f" and {one.identifies:,} identify calls"
    text += f" of {one.people:,} people"
    if one.first_event_ms is not None:
        text += f", {moment(one.first_event_ms)} to {moment(one.last_event_ms)}"
    return text


def asked_at_terminal() -> bool:
    """Whether somebody is there to answer a question."""
    return sys.stdin.isatty()


def _ask(one: Shown, to: str, *, restore: bool) -> None:
    verb = "restore" if restore else "undo"
    if not asked_at_terminal():
        raise InputError("Nobody is here to be asked", mend=f"Give --yes to {verb} without asking")
    if not typer.confirm(f"{verb.capitalize()} {one.name} at {to}?", err=True):
        raise InputError("Nothing was changed")


def _end(before: Shown, after: Shown, seconds: float, *, as_json: bool) -> None:
    if as_json:
        facts: dict[str, Any] = {"seconds": round(seconds, 3)}
        _tell("undone" if after.undone else "restored", after, as_json=True, **facts)
    elif after.undone:
        say(
            f"undone in {seconds:.1f} s: {_figures(before)} are gone, with all that they had changed"
        )
        say(
            "the same line with --restore brings it back, as long as nothing new came under its name"
        )
    else:
        say(f"restored in {seconds:.1f} s: {_figures(after)} are there again")
