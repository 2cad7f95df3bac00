"""What the lake asks of the file system, as a port: tests record its order and let it fail.

A file that the catalog names must be on disk first: its bytes (`sync_file`) and its name (`sync_folder`).
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from retrofill.errors import FullError, StoreError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class Files:
    """The file system of this machine. Every call raises StoreError (FullError: no room) if it cannot be done."""

    def make_folder(self, path: Path) -> None:
        """Make a folder and those above it; nothing happens if it is there."""
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise store_error(problem, path) from problem

    def sync_file(self, path: Path) -> None:
        """Return when the bytes of a file are on disk."""
        self._sync(path, os.O_RDONLY)

    def sync_folder(self, path: Path) -> None:
        """Return when the names in a folder are on disk."""
        self._sync(path, os.O_RDONLY | os.O_DIRECTORY)

    def remove(self, path: Path) -> None:
        """Remove a file; nothing happens if it is gone."""
        try:
            path.unlink(missing_ok=True)
        except OSError as problem:
            raise store_error(problem, path) from problem

    def list(self, folder: Path) -> list[Path]:
        """Return every file below a folder."""
        return [path for path in folder.rglob("*") if path.is_file()]

    def committing(self, path: Path) -> None:
        """Hear that the catalog of the lake in this folder commits next. It does its own syncs."""

    def _sync(self, path: Path, flags: int) -> None:
        try:
            opened = os.open(path, flags)
            try:
                os.fsync(opened)
            finally:
                os.close(opened)
        except OSError as problem:
            raise store_error(problem, path) from problem


def store_error(problem: OSError, where: Path) -> StoreError:
    """Say in our words what the file system could not do."""
    if problem.errno in _FULL:
        return FullError(
            "No room is left on the device",
            where=str(where),
            mend="Free some space; nothing that was acknowledged is lost",
        )
    return StoreError(
        f"The file system failed: {problem.strerror or problem}",
        where=str(where),
        mend="Mend the disk and start the server again; it recovers by itself",
    )
