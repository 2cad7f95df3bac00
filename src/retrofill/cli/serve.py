"""`retrofill serve`: one server on one data directory."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from retrofill.errors import Error, InputError

if TYPE_CHECKING:
    from retrofill.config import Settings
    from retrofill.engine.ingest import Engine
    from retrofill.server.run import Opened

EXAMPLE = "Example: retrofill serve --data ./data --project shop:API_KEY:SECRET_KEY"

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"[\x21-\x39\x3b-\x7e]{1,128}")  # printable, no space and no colon
_KEY_BYTES = 16


def serve(  # noqa: PLR0917 - typer makes options of them, nobody calls it by position
    data: Annotated[Path, typer.Option(help="Directory of all data; made if missing.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8090,
    project: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:API_KEY:SECRET_KEY",
            help="A project; may be repeated. Also @FILE, one a line, and RETROFILL_PROJECTS,"
            " separated by spaces. Without any a first start makes `default`.",
        ),
    ] = None,
    limits: Annotated[
        Literal["amplitude", "starter", "none"],
        typer.Option(help="Rates and quotas; `none` keeps sizes, counts and lengths."),
    ] = "amplitude",
    geoip: Annotated[Path | None, typer.Option(help="MaxMind city database for locations.")] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        typer.Option(help="Lowest level that is logged to stderr; one line a batch is `info`."),
    ] = "info",
) -> None:
    """Take events, keep them, and answer for them."""
    named = projects_of([*(project or ()), *os.environ.get("RETROFILL_PROJECTS", "").split()])
    if geoip is not None and not geoip.is_file():
        raise InputError("There is no such database", where=str(geoip), mend="Mend --geoip")

    from retrofill.clock import SystemClock
    from retrofill.config import Settings
    from retrofill.server import log, run

    log.configure(log_level)
    listening = run.listen(host, port)
    address = run.address(listening)
    settings = Settings(data=data, host=host, port=port, limits=limits, geoip=geoip)
    try:
        run.serve(
            listening,
            lambda: _open(settings, named),
            clock=SystemClock(),
            ready=lambda _: _say(f"Retrofill listens on {address}"),
        )
    finally:
        log.flush()


def projects_of(texts: list[str]) -> list[tuple[str, str, str]]:
    """Read NAME:API_KEY:SECRET_KEY, or @FILE with one a line. Raises InputError; it never repeats a key."""
    found = []
    for text in texts:
        if text.startswith("@"):
            found += projects_of(_lines(Path(text[1:])))
            continue
        parts = text.split(":")
        wrong = len(parts) != 3 or not _NAME.fullmatch(parts[0])  # noqa: PLR2004 - three parts
        if wrong or not all(_KEY.fullmatch(key) for key in parts[1:]):
            raise InputError(
                "A project is NAME:API_KEY:SECRET_KEY",
                where=f"--project {parts[0][:64]}:…",
                mend="Name: letters, digits, dot, dash, underscore; keys: no space, no colon",
            )
        found.append((parts[0], parts[1], parts[2]))
    return found


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text()
    except OSError as problem:
        raise InputError(
            f"The file of projects cannot be read: {problem.strerror}",
            where=str(path),
            mend="Mend --project @FILE",
        ) from problem
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "@"))]


def _open(settings: Settings, named: list[tuple[str, str, str]]) -> Opened:
    """Open the engine with its projects; a first start without any makes `default`."""
    from retrofill.clock import SystemClock
    from retrofill.engine.deletion import Deletions
    from retrofill.engine.ingest import Engine
    from retrofill.server import merges, project, why
    from retrofill.server.history import HistoryRoutes
    from retrofill.server.imports import ImportRoutes
    from retrofill.server.read import Reads
    from retrofill.server.run import Opened

    clock = SystemClock()
    engine = Engine.open(settings, clock=clock)
    try:
        _projects(engine, named)
        deletions = Deletions(
            settings.data / "deletions.sqlite",
            clock,
            days=lambda number: engine.limits(number).deletion_days,
        )
    except Error:
        asyncio.run(engine.close())
        raise
    reader = engine.reader()
    late = engine.event_time
    reads = Reads(
        reader,
        deletions,
        limits=engine.limits,
        clock=clock,
        settle=late.settle,
        export_goes_on=engine.export_goes_on,
    )

    def close() -> None:
        reads.close()
        deletions.close()

    return Opened(
        engine,
        [
            *reads.routes(),
            *project.routes(engine),
            *why.routes(engine, reader, reads),
            *merges.routes(engine, reader, reads),
            *ImportRoutes(engine, reader, reads, clock).routes(),
            *HistoryRoutes(engine, reader, reads).routes(),
        ],
        (
            lambda: deletions.run_due(reader, engine.forget),
            engine.counting.save,
            engine.purge,
        ),
        close,
    )


def _projects(engine: Engine, named: list[tuple[str, str, str]]) -> None:
    """Make the projects that are named and new; on a first start without any make `default` and tell its keys."""
    for name, api_key, secret_key in named:
        engine.add_project(engine.projects_store.add(name, api_key, secret_key))
    if not engine.all_projects():
        keys = (secrets.token_hex(_KEY_BYTES), secrets.token_hex(_KEY_BYTES))
        made = engine.projects_store.add("default", *keys)
        engine.add_project(made)
        _say("Project `default` is new. Its keys are told this once:")
        _say(f"  api key     {made.api_key}\n  secret key  {made.secret_key}")


def _say(text: str) -> None:
    """Tell the operator, on stdout: stderr is the log, and a key never stands there."""
    print(text, flush=True)  # noqa: T201 - this is the command line
