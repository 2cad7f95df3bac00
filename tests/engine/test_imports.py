"""Figures of imports: from rows wherever they are, and from what left no row, also after a crash."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import zipfile
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.engine.stored import PROJECT, Stored, block
from tests.engine.test_ingest import batch, opened
from tests.lake.blocks import START_MS

from retrofill.core import event as events
from retrofill.core.block import Kind, Merge
from retrofill.core.throttle import Accepted, Throttled
from retrofill.engine import imports
from retrofill.engine.admission import ProjectSettings
from retrofill.engine.export import export, hours_of_import
from retrofill.engine.imports import Figures
from retrofill.engine.ingest import Engine
from retrofill.errors import ConflictError
from retrofill.hot.imports import Counted, Import, Imports, State

SEALED = pytest.mark.parametrize("sealed", [0, 1, 2])


def of(name: str | None, **event: Any) -> dict[str, Any]:
    """An event of an import, or a live one."""
    origin = {"source_name": "retrofill", "source_version": name}
    return {**event, **({"ingestion_metadata": origin} if name is not None else {})}


def exported(stored: Stored, name: str, project: int = PROJECT) -> list[str] | None:
    found = export(stored.reader, project, hours_of_import(name), bytes_max=0)
    if found is None:
        return None
    with closing(found):
        whole = zipfile.ZipFile(io.BytesIO(b"".join(found)))
    lines = [
        json.loads(line)
        for member in whole.namelist()
        for line in gzip.decompress(whole.read(member)).splitlines()
    ]
    return [line["$insert_id"] for line in lines]


def figures(stored: Stored, known: Imports, **counted: Counted) -> dict[str, Figures]:
    return {one.name: one for one in imports.figures(stored.reader, known, counted, PROJECT)}


@SEALED
def test_figures_are_those_of_the_rows(tmp_path: Path, sealed: int) -> None:
    first = block(
        1,
        [
            of("old", person=1, insert_id="a", time=START_MS + 5),
            of(None, person=3, insert_id="live", time=START_MS),
            of("old", person=2, insert_id="b", time=START_MS + 9),
            of("old", person=4, time=START_MS + 99),
            of("other", person=5, insert_id="c"),
            of("old", person=6, insert_id="again"),
        ],
        kinds=[*[Kind.EVENT] * 3, Kind.IDENTIFY, Kind.EVENT, Kind.DROPPED],
        merges=[Merge(2, PROJECT, 2, 1, START_MS)],
        upload_ms=START_MS + 100,
    )
    second = block(
        2,
        [
            of("old", person=1, insert_id="d", time=START_MS - 7),
            of("", person=7),
            of("old", person=0, insert_id="e"),  # nobody's: another row holds its place
        ],
        kinds=[Kind.EVENT, Kind.EVENT, Kind.DISPLACED],
        upload_ms=START_MS + 200,
    )
    elsewhere = block(3, [of("old", person=9, insert_id="f")], project=PROJECT + 1)
    stored = Stored(tmp_path, [first, second, elsewhere], sealed=sealed)
    with closing(Imports(tmp_path / "imports.sqlite")) as known:
        known.put(PROJECT, Import("planned", "open", START_MS + 150))
        found = figures(stored, known, old=Counted(3, 2), lost=Counted(0, 1))
        assert list(found) == ["old", "planned", "other", "lost"]
        assert found["old"] == Figures(
            "old", "open", 1, None, 3, 1, 2, START_MS - 7, START_MS + 9, START_MS + 100,
            START_MS + 200, 4, 2,
        )  # fmt: skip
        assert (found["other"].events, found["other"].people) == (1, 1)
        assert found["planned"] == Figures(
            "planned", "open", 1, START_MS + 150, 0, 0, 0, None, None, None, None, 0, 0
        )
        assert (found["lost"].events, found["lost"].refusals) == (0, 1)
        (one,) = imports.figures(stored.reader, known, {}, PROJECT, name="other")
        assert one == found["other"]
        assert imports.figures(stored.reader, known, {}, PROJECT, name="none") == []
    assert exported(stored, "old") == ["a", "b", "d"]
    assert exported(stored, "old", PROJECT + 1) == ["f"]
    assert exported(stored, "planned") is exported(stored, "' OR 1=1 --") is None


NAMES = (None, "old", "other", "o'ld\\ é", "")


@given(
    st.lists(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6), min_size=1, max_size=6),
    st.data(),
)
@settings(
    max_examples=5,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_an_export_holds_exactly_the_rows_of_its_import_in_order(
    tmp_path_factory: pytest.TempPathFactory, shape: list[list[str | None]], data: st.DataObject
) -> None:
    sealed = data.draw(st.integers(0, len(shape)))
    people = data.draw(st.randoms(use_true_random=False))
    blocks = [
        block(
            number,
            [
                of(name, person=people.randint(1, 3), insert_id=f"{number}-{row}")
                for row, name in enumerate(names)
            ],
        )
        for number, names in enumerate(shape, start=1)
    ]
    stored = Stored(tmp_path_factory.mktemp("lake"), blocks, sealed=sealed)
    for wanted in filter(None, NAMES):
        expected = [
            f"{number}-{row}"
            for number, names in enumerate(shape, start=1)
            for row, name in enumerate(names)
            if name == wanted
        ]
        assert (exported(stored, wanted) or []) == expected
        assert stored.ask(imports.stored).get(wanted, imports.Stored()).events == len(expected)
    stored.lake.close()


# The states.


def test_opening_again_changes_nothing_and_an_undone_import_begins_anew(tmp_path: Path) -> None:
    with closing(Imports(tmp_path / "imports.sqlite")) as known:
        assert imports.opened(known, 1, "a", now_ms=5) == Import("a", "open", 5)
        assert imports.opened(known, 1, "a", now_ms=6) == Import("a", "open", 5)
        assert imports.closed(known, 1, "a") == Import("a", "closed", 5)
        assert imports.opened(known, 1, "a", now_ms=7) == Import("a", "open", 5)
        assert imports.closed(known, 1, "b") == Import("b", "closed")
        assert imports.opened(known, 1, "b", now_ms=8) == Import("b", "open", 8)
        known.put(1, Import("a", "undoing", 5))
        with pytest.raises(ConflictError, match="is being undone"):
            imports.opened(known, 1, "a", now_ms=9)
        known.put(1, Import("a", "undone", 5))
        with pytest.raises(ConflictError, match="is undone"):
            imports.closed(known, 1, "a")
        anew = Import("a", "undone", 5, again="open", again_ms=9)
        for now_ms in (9, 10):
            assert imports.opened(known, 1, "a", now_ms=now_ms) == anew
        assert imports.closed(known, 1, "a") == replace(anew, again="closed")
        assert imports.opened(known, 1, "a", now_ms=11) == anew
        assert imports.closed(known, 1, "a", rows=True) == Import("a", "closed", 9, 2)


def test_what_was_undone_and_opened_again_is_kept_until_there_are_rows(tmp_path: Path) -> None:
    ago = Import("a", "undone", 5, 3, 2, 7, 9)
    with closing(Imports(tmp_path / "imports.sqlite")) as known:
        known.put(1, ago)
        anew = imports.opened(known, 1, "a", now_ms=11)
        assert imports.to_purge(anew, 12) == imports.to_purge(ago, 12) == 2
        assert imports.to_restore(known, 1, "a", again=False, now_ms=12) == anew
        assert imports.restored(anew) == Import("a", "open", 5, 3, 2, 2)
        imports.not_again(known, 1, "a")
        assert _known(known) == ago
        imports.opened(known, 1, "a", now_ms=13)
        imports.begun_again(known, 1, "a")
        assert _known(known) == Import("a", "open", 13, 4, 7, 7)
        with pytest.raises(ConflictError, match="is open, not undone"):
            imports.to_restore(known, 1, "a", again=False, now_ms=14)
        with pytest.raises(ConflictError, match="is open, not undone"):
            imports.to_restore(known, 1, "rows-alone", again=False, now_ms=14)


@pytest.mark.parametrize("state", ["open", "closed"])
def test_an_undone_import_comes_back_in_the_state_it_had(state: State, tmp_path: Path) -> None:
    """Each step said twice: a server that stops before it has noted one as done says it again."""
    with closing(Imports(tmp_path / "imports.sqlite")) as known:
        known.put(1, Import("a", state, 5))
        for _ in range(2):
            imports.under_way(known, 1, "a", "undoing")
        for _ in range(2):
            known.put(1, imports.undone(_known(known), until=7, now_ms=9))
        imports.under_way(known, 1, "a", "restoring")
        imports.as_before(known, 1, "a")
        assert _known(known).state == "undone"
        imports.under_way(known, 1, "a", "restoring")
        for _ in range(2):
            known.put(1, imports.restored(_known(known)))
        assert _known(known) == Import("a", state, 5)
        imports.under_way(known, 1, "a", "undoing")
        known.put(1, imports.undone(_known(known), until=8, now_ms=9))
        imports.begun_again(known, 1, "a")
        assert _known(known) == Import("a", "open", None, 2, 8, 8)


def _known(known: Imports) -> Import:
    found = known.get(1, "a")
    assert found is not None
    return found


@pytest.mark.parametrize("sealed", [0, 1])
def test_rows_that_come_after_an_undo_are_of_the_next_generation(
    tmp_path: Path, sealed: int
) -> None:
    stored = Stored(tmp_path, [block(1, [of("new")])], sealed=sealed)
    with closing(Imports(tmp_path / "imports.sqlite")) as known:
        for name in ("gone", "new"):
            known.put(PROJECT, Import(name, "undone", 1, 4))
        found = figures(stored, known)
        assert (found["gone"].state, found["gone"].generation) == ("undone", 4)
        assert (found["new"].state, found["new"].generation) == ("open", 5)


# What leaves no row.


async def send(engine: Engine, *wire: dict[str, Any]) -> object:
    return await engine.ingest(batch(*wire))


def view(name: str | None, insert_id: str) -> dict[str, Any]:
    return of(name, event_type="View", user_id="ann-111", insert_id=insert_id)


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["unsealed", "adopted", "saved"])
def test_duplicates_are_counted_once_wherever_it_stops(tmp_path: Path, stop: str) -> None:
    """Stop before a seal, within one (the lake has the blocks, the counts are not saved), and after it."""

    async def first() -> None:
        engine = opened(tmp_path)
        await engine.start()
        for _ in range(3):
            await send(engine, view("old", "a"), view(None, "live"), view("old", "b"))
        await send(engine, view("old", "live"), view("two", "a"))
        expected = {"old": Counted(5)}  # that of two is kept as a displaced row, and counted there
        assert engine.counting.of(1) == expected
        if stop == "adopted":
            engine.counting._known = None  # type: ignore[assignment] # the fault
            with pytest.raises(AttributeError):
                await engine.seal()
            await engine.checkpoint()
            await engine._delete_blocks()
        elif stop == "saved":
            await engine.seal()
            await engine.checkpoint()
            await engine._delete_blocks()
            assert engine.blocks.numbers() == []
        assert engine.counting.of(1) == expected
        await engine.abandon()

    async def again() -> None:
        engine = opened(tmp_path)
        await engine.start()
        assert engine.counting.of(1) == {"old": Counted(5)}
        await engine.checkpoint()
        await engine._delete_blocks()
        await send(engine, view("old", "a"))
        assert engine.counting.of(1)["old"] == Counted(6)
        await (engine.abandon() if stop == "adopted" else engine.close())

    asyncio.run(first())
    asyncio.run(again())
    engine = opened(tmp_path)
    assert engine.counting.of(1) == {"old": Counted(6)}
    assert bool(engine.blocks.numbers()) == (stop == "adopted")
    asyncio.run(engine.abandon())


@pytest.mark.slow
def test_refused_requests_are_counted_and_saved(tmp_path: Path) -> None:
    async def first() -> None:
        engine = opened(tmp_path)
        await engine.start()
        engine.set_settings(1, ProjectSettings({"batch_eps": 1, "window_s": 1}))
        outcomes = [
            await send(engine, *[view("old", str(n)) for n in range(count)]) for count in (1, 3)
        ]
        assert [type(one) for one in outcomes] == [Accepted, Throttled]
        for body in (
            {"event_type": 5, **of("old")},
            {"event_type": "View", **of("old"), "time": "x"},
            {"event_type": "View", **of("not a name")},
            {"ingestion_metadata": 5},
            [],
        ):
            text = msgspec.json.encode({"api_key": "key", "events": [body, 7]})
            envelope = events.open_envelope(text)
            assert isinstance(envelope, events.Envelope)
            engine.refused(1, envelope)
        assert engine.counting.of(1) == {"old": Counted(0, 3)}
        await engine.counting.save()
        engine.counting.refused(1, ["old"])
        await engine.abandon()

    async def again() -> None:
        engine = opened(tmp_path)
        assert engine.counting.of(1) == {"old": Counted(0, 3)}  # a crash forgets what was not saved
        await engine.counting.put_aside(1, "old", 1)
        engine.counting.refused(1, ["old"])
        await engine.close()

    asyncio.run(first())
    asyncio.run(again())
    engine = opened(tmp_path)
    assert engine.counting.of(1) == {"old": Counted(0, 1)}
    asyncio.run(engine.close())
