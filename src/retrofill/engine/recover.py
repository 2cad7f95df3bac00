"""Folding a stored block again: recovery, and the proof that state is nothing but a fold of what is stored."""

from __future__ import annotations

from retrofill.core import fold, identity
from retrofill.core.block import Block, Kind, same
from retrofill.core.event import Batch, decode
from retrofill.engine.state import State
from retrofill.errors import CorruptError

# Of each stored kind: what the fold was told of duplicates.
_DROPPED = bytes(
    kind if kind in (Kind.DROPPED, Kind.DISPLACED) else 0 for kind in range(Kind.DROPPED + 1)
)


def fill_devices(batch: Batch) -> None:
    """Give every event its device_id: one derived from the user where none was sent, "" where there is neither."""
    derived = identity.derived_device
    for event in batch.events:
        if event.device_id is None:
            event.device_id = derived(event.user_id) if event.user_id is not None else ""


def batches_of(block: Block) -> list[Batch]:
    """Return the requests of a block as they were folded."""
    batches = []
    for part in block.parts:
        batch = Batch(
            part.project,
            part.path,
            part.body,
            decode(part.body),
            len(part.body),
            part.received_ms,
            part.client_upload_ms,
            part.remote,
        )
        fill_devices(batch)
        batches.append(batch)
    return batches


def _allowed(block: Block) -> dict[int, frozenset[str]]:
    """Return the users who could absorb any number of people, of those whom the block names."""
    found: dict[int, frozenset[str]] = {}
    for part in block.parts:
        if part.allowed:
            found[part.project] = found.get(part.project, frozenset()) | frozenset(part.allowed)
    return found


def refold(state: State, block: Block, batches: list[Batch]) -> None:
    """Fold the next block again and take what it changes.

    Raises CorruptError if the fold does not decide what the block says was decided.
    """
    folded = state.fold(
        batches,
        lambda known: fold.fold(
            batches,
            known,
            number=block.number,
            server_upload_ms=block.server_upload_ms,
            fresh=state.fresh,
            updates_max={part.project: part.updates_max for part in block.parts},
            merges_max={part.project: part.merges_max for part in block.parts},
            allowed=_allowed(block),
            dropped=block.kind.translate(_DROPPED),
            keys=block.keys,
            forgotten=block.forgotten,
            partition=block.partition,
        ),
    )
    if block.number != state.block + 1 or not same(folded.block, block):
        raise CorruptError(
            f"Block {block.number:,} does not fold to what it says",
            where=f"after block {state.block:,}",
            mend="Open the directory once with the version that wrote it, and stop it in good order",
        )
    state.apply(folded)
