"""Every error we raise on purpose, as one tree.

A bad event is no exception but a `core.event.Fault`; an exception is for a call that cannot go on. Each says what
happened (with its numbers), where, and how to mend it. Neither a key nor a secret ever stands in a message.
"""

from __future__ import annotations


class Error(Exception):
    """Root of everything we raise on purpose.

    status: what the server answers. code: what the command line exits with.
    """

    status = 500
    code = 1

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        self.what, self.where, self.mend = what, where, mend
        super().__init__(". ".join(part for part in (what, where, mend) if part))


class InputError(Error):
    """The caller asked for something that cannot be: wrong argument, setting or request."""

    status = 400
    code = 2


class SizeError(InputError):
    """A request, file or answer is larger than its limit."""

    status = 413


class MissingError(InputError):
    """Nothing is stored under the name that was given."""

    status = 404


class ConflictError(InputError):
    """What was asked for does not go with the state of its object, now."""

    status = 409


class BusyError(Error):
    """Another process holds the data directory, or a queue is at its bound."""

    status = 503
    code = 2


class StoreError(Error):
    """The disk did not do what it was asked: nothing of the current work is acknowledged."""

    status = 503


class CorruptError(StoreError):
    """Bytes read back are not the bytes written."""


class FullError(StoreError):
    """No room is left on the device."""


class SendError(Error):
    """The destination did not take a request."""


class RetryError(SendError):
    """The destination may take the same request later."""


class FinalError(SendError):
    """The destination will never take this request."""
