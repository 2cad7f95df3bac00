"""Dead letters: rows that will not be sent, each with the place it stood, why, and the row as it was.

One file of JSON lines beside the stage. Counts by kind are kept for the plan; the rows themselves go straight to the file.
"""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

_ROW_CHARS_MAX = 1_000_000
_EVENTS_MAX = 100_000  # places kept in memory


class Letter(msgspec.Struct, frozen=True):
    """One line of the file. file, line: where it stood. row: the source's text."""

    file: str
    line: int
    reason: str
    row: str


_letter = msgspec.json.Decoder(Letter).decode


class Written(msgspec.Struct):
    """How far a file of letters is: its bytes, and what is kept in memory beside it."""

    bytes: int = 0
    counts: dict[str, int] = {}
    events: dict[str, set[int]] = {}


class DeadLetters:
    """Writes one file of letters, made anew or gone on with. Threads may share it.

    counts: letters by kind, a word or two without any value in it. firsts: the one that stood first in each file,
    whenever it came. events: lines of those that hold an event instead of the row, by file.
    """

    def __init__(
        self, path: Path, before: Written | None = None, *, shown: Path | None = None
    ) -> None:
        """before: how far the file was; what follows there is cut off. shown: where people will find it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        before = before or Written()
        self.path, self.shown = path, shown or path
        self.counts = Counter(before.counts)
        self.firsts: dict[str, Letter] = {}
        self.events = {file: set(lines) for file, lines in before.events.items()}
        self._lock = threading.Lock()
        if before.bytes:
            with path.open("r+b") as file:
                file.truncate(before.bytes)
                for line in file:
                    self._first(_letter(line))
        self._file = path.open("ab" if before.bytes else "wb")

    def add(
        self, file: str, line: int, kind: str, reason: str, row: str
    ) -> None:  # one letter's parts
        """Write one letter. The reason on the line is `kind: reason`."""
        letter = Letter(file, line, f"{kind}: {reason}" if reason else kind, row[:_ROW_CHARS_MAX])
        with self._lock:
            self.counts[kind] += 1
            self._first(letter)
            self._file.write(msgspec.json.encode(letter) + b"\n")

    def _first(self, letter: Letter) -> None:
        first = self.firsts.get(letter.file)
        # Line 0 is the end of a file that breaks off.
        if first is None or 0 < letter.line < (first.line or letter.line + 1):
            self.firsts[letter.file] = letter

    def add_event(self, file: str, line: int, kind: str, reason: str, event: str) -> None:
        """Write a letter of which only the event is at hand. Its place is noted, as long as there are not too many."""
        self.add(file, line, kind, reason, event)
        with self._lock:
            if sum(map(len, self.events.values())) < _EVENTS_MAX:
                self.events.setdefault(file, set()).add(line)

    def written(self) -> Written:
        """Bring all letters to the file and return how far it is."""
        with self._lock:
            self._file.flush()
            return Written(self._file.tell(), dict(self.counts), self.events)

    @property
    def total(self) -> int:
        """How many letters were written."""
        return self.counts.total()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """All letters are in the file."""
        self._file.close()
