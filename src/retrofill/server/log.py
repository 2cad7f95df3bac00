"""Structured logs on stderr: a time, a level, a name and `key=value`, one line a batch, never a key or a secret.

Lines are kept for a moment and written together: a system call for each request would cost more than its answer. The
server flushes once a second; a warning or an error is written at once, with all that came before it.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import MutableMapping
from typing import Any, Final, TextIO

import structlog

from retrofill.server.answer import CutError

LEVELS: Final = ("debug", "info", "warning", "error")

_LINES_MAX = 512  # kept before they are written, whatever the time
_PLAIN = re.compile(r"[\w./:+@*-]+", re.ASCII)


class Lines:
    """Lines on their way to a stream, what is stderr then if None. Each method of structlog's loggers is here."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._waiting: list[str] = []

    def msg(self, line: str) -> None:
        """Keep a line for the next flush."""
        self._waiting.append(line)
        if len(self._waiting) >= _LINES_MAX:
            self.flush()

    def urgent(self, line: str) -> None:
        """Write a line at once."""
        self._waiting.append(line)
        self.flush()

    debug = info = msg
    warning = warn = error = critical = exception = fatal = urgent

    def flush(self) -> None:
        """Write what waits."""
        if self._waiting:
            lines, self._waiting = self._waiting, []
            stream = self._stream or sys.stderr
            stream.write("\n".join(lines) + "\n")
            stream.flush()


class _Log:
    """What is configured: where lines go, whether batches are logged, and the time as text, made once a second."""

    def __init__(self) -> None:
        self.lines = Lines()
        self.batches = True
        self._second = -1
        self._text = ""

    def stamp(self) -> str:
        now_ns = time.time_ns()
        second, rest_ns = divmod(now_ns, 1_000_000_000)
        if second != self._second:
            self._second = second
            self._text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._text}.{rest_ns // 1_000_000:03}Z"


_log = _Log()


def configure(level: str = "info", stream: TextIO | None = None) -> None:
    """Send everything at or above `level` (one of LEVELS) to `stream`, stderr if None."""
    number = logging.getLevelNamesMapping()[level.upper()]
    _log.lines = lines = Lines(stream)
    _log.batches = number <= logging.INFO
    structlog.configure(
        processors=[structlog.processors.format_exc_info, _render],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *_: lines,
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    for handler in [one for one in root.handlers if isinstance(one, _Bridge)]:
        root.removeHandler(handler)
    root.addHandler(_Bridge(max(number, logging.WARNING)))


def flush() -> None:
    """Write what waits; the server does so once a second and when it ends."""
    _log.lines.flush()


def batch(*, project: str, path: str, events: int, size: int, ms: float) -> None:
    """Log one stored request.

    The same line as `log.info("batch_accepted", …)` makes, at a tenth of its cost: this one is written thousands of
    times a second.
    """
    if _log.batches:
        _log.lines.msg(
            f"{_log.stamp()} info batch_accepted project={project} path={path}"
            f" events={events} bytes={size} ms={ms:.1f}"
        )


def _render(_: object, level: str, fields: MutableMapping[str, Any]) -> str:
    trace = fields.pop("exception", None)
    event = fields.pop("event", "")
    text = "".join(f" {key}={_value(value)}" for key, value in fields.items())
    line = f"{_log.stamp()} {level} {event}{text}"
    return f"{line}\n{trace}" if trace else line


def _value(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


class _Bridge(logging.Handler):
    """Takes what libraries log through the standard library."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and isinstance(record.exc_info[1], CutError):
            return
        structlog.get_logger().warning(
            "library", name=record.name, said=record.getMessage(), exc_info=record.exc_info or None
        )
