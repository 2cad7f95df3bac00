"""The hand-off inside one process: bounded, in order, each request with the future that its reply waits for.

Nothing is kept here that was answered: the reply waits for the commit, so a crash loses nothing that anybody was
told. At the bound the request is refused, never dropped.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

from retrofill.core.event import Batch
from retrofill.errors import BusyError, Error
from retrofill.limits import QUEUE_BYTES_MAX, QUEUE_REQUESTS_MAX

T = TypeVar("T")


class Queue(Generic[T]):
    """Requests in order of arrival. Belongs to one asyncio loop."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Batch, asyncio.Future[T]]] = deque()
        self.waiting_bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, batch: Batch) -> asyncio.Future[T]:
        """Add a request; the future holds its outcome. Raises BusyError at the bound."""
        if self.waiting_bytes > QUEUE_BYTES_MAX or len(self._waiting) >= QUEUE_REQUESTS_MAX:
            raise BusyError("Too much is waiting", mend="Send the request again later")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((batch, future))
        self.waiting_bytes += len(batch.body)
        return future

    def first(self) -> Batch:
        """Return the request that came first, which stays."""
        return self._waiting[0][0]

    def take(self) -> tuple[Batch, asyncio.Future[T]]:
        """Take the request that came first."""
        batch, future = self._waiting.popleft()
        self.waiting_bytes -= len(batch.body)
        return batch, future

    def fail(self, problem: Error) -> None:
        """Answer everything that waits with an error."""
        while self._waiting:
            _, future = self.take()
            if not future.done():
                future.set_exception(problem)
