"""Finished events at the core's border: the same rules that a server's requests meet, `core.event.parse`.

A thousand events at a time are glanced at, as the core does it (`core.glance`), with less to decode: that plain fields
have their types, and that ids are usable, the mapping's query has seen to. Where the glance doubts, the core is asked, and
where that mends or refuses, the thousand is halved until the odd events stand alone: one the core refuses is refused here, one it mends (a text too long, a number beyond 64 bits) is staged as mended,
so that what will be read back is what was staged. Events come and go without their opening brace: see `mapping.assemble`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Raw, Struct

from retrofill.core import event, glance, mend
from retrofill.core.event import Batch, Event, Refusal
from retrofill.limits import Limits

_EVENTS = 1000  # looked at together
_HEAD: Final = b'{"api_key":"-","events":[{'
_KNOWN: Final = tuple(field.encode_name for field in msgspec.structs.fields(Event))

# A whole number that may be beyond 64 bits, which a property table does not hold.
_ZERO, _TEN = np.uint8(0x30), 10
_HUGE = re.compile(rb"\d{19}").search
_ENDLESS = re.compile(r"\b(nan|inf(inity)?)\b", re.IGNORECASE)  # Python and DuckDB write these


class _Shape(Struct, gc=False):
    """The parts of an event that the mapping passes on as the source has them."""

    event_properties: Raw = Raw()
    user_properties: Raw = Raw()
    group_properties: Raw = Raw()
    groups: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None


class _Shapes(Struct, gc=False):
    events: list[_Shape]


_decode = msgspec.json.Decoder(_Shapes).decode

Refused = Callable[[int, int, str, str, str], None]  # file, line, kind, reason, event


class Checker:
    """Checks batches of events. id_length_min: the shortest id that the destination is told to take."""

    def __init__(self, refused: Refused, *, id_length_min: int) -> None:
        self._refused = refused
        self._exposed = False  # whether exposures are among the events looked at, which are stored as something else
        self.id_length_min = id_length_min
        # A body here is as large as a thousand events are; a request's bound is the sender's care.
        self._limits = Limits(id_length_min=id_length_min, batch_bytes=1 << 40)

    def mended(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return the batch as the core takes it: less the refused events, with mended ones in place of what was odd."""
        body = batch.column("body")
        odd: dict[int, bytes | None] = {}
        exposed = pc.equal(batch.column("event_type"), event.EXPOSURE)
        self._exposed = exposed.true_count > 0
        for start in range(0, len(body), _EVENTS):
            self._look(batch, start, min(_EVENTS, len(body) - start), odd)
        if self._exposed:
            kinds = pc.if_else(exposed, event.EXPOSED, batch.column("event_type"))
            at = batch.schema.get_field_index("event_type")
            batch = batch.set_column(at, "event_type", kinds)
        if not odd:
            return batch
        texts = body.to_pylist()
        for at, text in odd.items():
            texts[at] = text.decode() if text is not None else None
        place = batch.schema.get_field_index("body")
        batch = batch.set_column(place, "body", pa.array(texts, pa.string()))
        return batch.filter(pc.is_valid(batch.column("body")))

    def _look(
        self, batch: pa.RecordBatch, start: int, count: int, odd: dict[int, bytes | None]
    ) -> None:
        part = batch.column("body").slice(start, count)
        sent = _body(part)
        if not self._exposed and _good(sent):
            return
        found = self._parse(sent)
        if isinstance(found, Batch) and found.body is sent:
            return
        if count > 1:
            half = count // 2
            self._look(batch, start, half, odd)
            self._look(batch, start + half, count - half, odd)
        elif isinstance(found, Batch):
            odd[start] = _overlaid(part[0].as_py(), found.events[0])
        else:
            odd[start] = None
            self._refuse(batch, start, found)

    def _parse(self, body: bytes) -> Batch | Refusal:
        opened = event.open_envelope(body)
        if isinstance(opened, Refusal):
            return opened
        return event.parse(
            opened,
            project=0,
            path="/batch",
            limits=self._limits,
            received_ms=0,
            remote=None,
            payload_bytes=len(body),
        )

    def _refuse(self, batch: pa.RecordBatch, at: int, refusal: Refusal) -> None:
        file, line, text = (batch.column(name)[at].as_py() for name in ("file", "line", "body"))
        for fault in refusal.faults[:1]:
            self._refused(file, line, fault.field, fault.reason, "{" + text)
        if not refusal.faults:
            endless = _ENDLESS.search(text) is not None
            reason = "JSON has no NaN or Infinity" if endless else refusal.kind.replace("_", " ")
            self._refused(file, line, "event", reason, "{" + text)


def _good(body: bytes) -> bool:
    """Say whether the events are good as they stand. May doubt good ones, never passes bad ones."""
    try:
        shapes = _decode(body).events
    except (ValueError, RecursionError):
        return False
    return glance.strings(body) and good(
        raws=[shape.event_properties for shape in shapes if shape.event_properties],
        tables=[
            raw
            for shape in shapes
            for raw in (shape.user_properties, shape.group_properties)
            if raw
        ],
        groups=[shape.groups for shape in shapes if shape.groups],
        plans=[shape.plan for shape in shapes if shape.plan],
    )


def good(
    *,
    raws: Sequence[Raw],
    tables: Sequence[Raw],
    groups: Sequence[dict[str, Any]],
    plans: Sequence[dict[str, Any]],
) -> bool:
    """Say the same of the parts of events that have no string too long.

    raws: their event properties; tables: other property objects.
    """
    objects = [*raws, *tables]
    return (
        glance.groups(groups)
        and all(plan.keys() <= mend.PLAN for plan in plans)
        and not _huge(b"".join(tables))
        and (not objects or glance.raws(objects))
    )


def _huge(text: bytes) -> bool:
    """Say whether 19 digits may stand in a row: three of them at every sixth place, looked at closer."""
    digit = (
        np.frombuffer(text, np.uint8)[::6] - _ZERO < _TEN
    )  # unsigned: what is below 0 is far above 9
    return bool((digit[2:] & digit[1:-1] & digit[:-2]).any()) and _HUGE(text) is not None


def _body(part: pa.StringArray) -> bytes:
    whole = pa.ListArray.from_arrays(pa.array([0, len(part)], pa.int32()), part)
    return b"".join((_HEAD, pc.binary_join(whole, ",{")[0].as_buffer(), b"]}"))


def _overlaid(text: str, mended: Event) -> bytes:
    """Return the event with its known keys as mended and all others as they were. Both less their opening brace."""
    sent = msgspec.json.decode("{" + text)
    good = msgspec.json.decode(msgspec.json.encode(mended))
    kept = {name: value for name, value in sent.items() if name not in _KNOWN}
    ordered = {name: good[name] for name in sent if name in good}
    return msgspec.json.encode({**ordered, **good, **kept})[1:]
