"""The data directory: where each file lives, and the lock that makes one process its owner."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from retrofill.errors import BusyError, InputError


class Directory:
    """One data directory, owned while this object is open.

    Raises BusyError if another process holds it, InputError if it cannot be made or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as problem:
            raise InputError(
                f"The data directory cannot be opened: {problem.strerror}",
                where=str(root),
                mend="Give a directory that this user can write with --data",
            ) from problem
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            os.close(self._lock)
            raise BusyError(
                "Another process is using this data directory",
                where=str(root),
                mend="Stop the other server first, or give another directory with --data",
            ) from problem

    @property
    def blocks(self) -> Path:
        """The SQLite file of unsealed blocks and projects."""
        return self.root / "hot.sqlite"

    @property
    def checkpoint(self) -> Path:
        """The SQLite file of the checkpoint: its long transactions never hold the lock of the block writer."""
        return self.root / "checkpoint.sqlite"

    @property
    def keys(self) -> Path:
        """The folder of dedupe key files."""
        return self.root / "keys"

    @property
    def imports(self) -> Path:
        """The SQLite file of what is known of imports."""
        return self.root / "imports.sqlite"

    @property
    def intents(self) -> Path:
        """The SQLite file of changes of history that are not ended."""
        return self.root / "intents.sqlite"

    @property
    def deletions(self) -> Path:
        """The SQLite file of deletions of people that were asked for."""
        return self.root / "deletions.sqlite"

    @property
    def repairing(self) -> Path:
        """A file that is there while a repair makes the checkpoint anew: nobody else may open the directory then."""
        return self.root / "repairing"

    @property
    def rewriting(self) -> Path:
        """The folder of what a change of history keeps beside the lake while it is under way."""
        return self.root / "rewriting"

    @property
    def lake(self) -> Path:
        """The folder of the lake."""
        return self.root / "lake"

    def close(self) -> None:
        """Give the directory up; again is nothing."""
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1
