"""Finished events at the core's border: the same rules that a server's requests meet, `core.event.parse`.

A thousand events at a time go through its fast way. Where that doubts, the thousand is halved until the odd events stand
alone: one the core refuses is refused here, one it mends (a text too long, a number beyond 64 bits) is staged as mended,
so that what will be read back is what was staged. Events come and go without their opening brace: see `mapping.assemble`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from retrofill.core import event
from retrofill.core.event import Batch, Event, Refusal
from retrofill.limits import Limits

_EVENTS = 1000  # looked at together
_HEAD: Final = b'{"api_key":"-","events":[{'
_KNOWN: Final = tuple(field.encode_name for field in msgspec.structs.fields(Event))

Refused = Callable[[int, int, str, str, str], None]  # file, line, kind, reason, event


class Checker:
    """Checks batches of events. id_length_min: the shortest id that the destination is told to take."""

    def __init__(self, refused: Refused, *, id_length_min: int) -> None:
        self._refused = refused
        # A body here is as large as a thousand events are; a request's bound is the sender's care.
        self._limits = Limits(id_length_min=id_length_min, batch_bytes=1 << 40)

    def mended(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return the batch as the core takes it: less the refused events, with mended ones in place of what was odd."""
        body = batch.column("body")
        odd: dict[int, bytes | None] = {}
        for start in range(0, len(body), _EVENTS):
            self._look(batch, start, min(_EVENTS, len(body) - start), odd)
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
            self._refused(file, line, "event", refusal.kind.replace("_", " "), "{" + text)


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
