"""Key files: the dedupe keys of blocks that are in the lake, on disk, sorted.

A file holds the keys of a range of blocks in rising order of their first half, as three arrays after a header: first
halves, second halves, and what `dedupe.slot_value` makes of each block: its number, whether the key never expires, and
whether it is the ordinary key of an import's row. So a start reads sorted runs for its table of
fingerprints, and a key is found in a mapped file by a binary search on both halves. Files are written new, synced,
renamed, and the folder synced; they are never changed. All of them can be made again from lake rows: `missing` names
the blocks of files that are missing or damaged, and these are the caller's to write again. A damaged file is set aside
under another name until its blocks are written, so that a start that is cut off does not lose sight of them.

Small neighbours are merged, to bound the number of files. A merged file stands beside those it replaces for a moment;
whatever lies inside another file's range is removed at the next start. The files in use are one tuple, replaced
whole: one thread may write, merge and remove while others search.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
import structlog
import xxhash

from retrofill.core.dedupe import (
    Bools,
    Ints,
    Keys,
    Run,
    U32s,
    U64s,
    slot_value,
    sorted_index,
    table_of,
)
from retrofill.errors import CorruptError, Error, FullError, StoreError
from retrofill.limits import KEY_FILE_KEYS_MAX, KEY_FILES_MERGED, LAKE_SYNC_BYTES

log = structlog.get_logger()

_MAGIC = b"rf-keys\n"
_VERSION = 2  # 1 did not say which keys are of imports' rows: such a file is made again
_HEADER = struct.Struct("<8sIIqqqq")  # magic, version, zero, first, last, keys, of them for ever
_CHECKSUM = struct.Struct("<Q")  # over the header and the three arrays
_START = 64
_NAMES = "keys-" + "-".join(["[0-9]" * 12 + "*"] * 2)
ENDING = ".next-"  # of files written anew for a change of history, before its number
_KEY_SIZE = 8 + 8 + 4
_STEP_BYTES = 1024 * 1024  # written at a time
_FOREVER = np.uint32(1 << 31)
_IMPORTED = np.uint32(1 << 30)
_LOW = (1 << 30) - 1


class KeyFile:
    """One key file, mapped into memory and checked. Raises CorruptError, StoreError if it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as problem:  # ValueError: an empty file cannot be mapped
            raise _corrupt(path, f"It cannot be mapped: {problem}") from problem
        if len(data) < _START:
            raise _corrupt(path, f"It has {len(data)} bytes, not even a header")
        magic, version, _, first, last, count, forever = _HEADER.unpack_from(data)
        if magic != _MAGIC or version != _VERSION:
            raise _corrupt(path, "It is no key file of this version")
        if len(data) != _START + count * _KEY_SIZE:
            raise _corrupt(path, f"It has {len(data):,} bytes, {count:,} keys need another number")
        (expected,) = _CHECKSUM.unpack_from(data, _HEADER.size)
        found = _checksum(data[: _HEADER.size], memoryview(data)[_START:])
        if found != expected:
            raise _corrupt(path, f"Its checksum is {found:016x}, expected {expected:016x}")
        self.first: int = first
        self.last: int = last
        self.count: int = count
        self.forever: int = forever
        self.high: U64s = np.frombuffer(data, "<u8", count, _START)
        self.low: U64s = np.frombuffer(data, "<u8", count, _START + 8 * count)
        self.values: U32s = np.frombuffer(data, "<u4", count, _START + 16 * count)
        self._data = data
        self.rest()

    def rest(self) -> None:
        """Let the pages go that were read from end to end: few of them are asked for again, and those come back."""
        self._data.madvise(mmap.MADV_DONTNEED)

    def blocks(self, index: Ints | slice = slice(None)) -> Ints:
        """Return the block numbers at these places."""
        return self.first + ((self.values[index].astype(np.int64) - self.first) & _LOW)

    def find(self, wanted: Keys) -> tuple[Ints, Bools]:
        """Return the last block that holds each key, 0 for none, and whether it is there the key of an import's row."""
        index = sorted_index(self.high, self.low, wanted)
        found, imported = np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
        hit = np.flatnonzero(index >= 0)
        found[hit] = self.blocks(index[hit])
        imported[hit] = self.values[index[hit]] & _IMPORTED != 0
        return found, imported

    def places(self, keys: Keys, blocks: Ints) -> Ints:
        """Return where these keys of these blocks stand, of those that do."""
        at = np.searchsorted(self.high, keys[:, 0])
        open_ = np.flatnonzero(keys.any(axis=1) & (at < self.count))
        found = []
        while len(open_):  # once for nearly all: a key stands there once for each of its blocks
            open_ = open_[self.high[at[open_]] == keys[open_, 0]]
            here = at[open_]
            same = (self.low[here] == keys[open_, 1]) & (self.blocks(here) == blocks[open_])
            found.append(here[same])
            at[open_] += 1
            open_ = open_[at[open_] < self.count]
        return np.concatenate([np.zeros(0, np.int64), *found])


def write(
    folder: Path,
    first: int,
    last: int,
    packed: bytes | Keys,
    blocks: Ints,
    *,
    forever: Bools | bool = False,
    imported: Bools | bool = False,
) -> Path:
    """Write the keys of blocks first … last (both included); on disk when this returns.

    packed, blocks, forever, imported: one entry a key, in order of arrival; those without a key (zeros) are left out.
    A range without keys gets a file too: it says so. Raises StoreError, FullError.
    """
    keys = table_of(packed)
    assert len(keys) == len(blocks)
    some = np.flatnonzero(keys.any(axis=1))
    kept = forever if isinstance(forever, bool) else forever[some]
    marked = imported if isinstance(imported, bool) else imported[some]
    chosen = blocks[some]
    assert not len(chosen) or first <= chosen.min() <= chosen.max() <= last
    values = slot_value(chosen, forever=kept, imported=marked)
    return _write(folder, first, last, keys[some, 0], keys[some, 1], values)


def rewritten(
    folder: Path,
    files: Sequence[KeyFile],
    gone: bytes,
    gone_blocks: Ints,
    added: bytes,
    added_blocks: Ints,
    *,
    forever: Bools,
    imported: Bools,
    ending: str,
) -> list[Path]:
    """Write files anew that lose or gain keys, each beside the old one under another ending; on disk when this returns.

    gone, added: packed keys, each with its block; a key stays where it is that of another block too. files: all of the
    folder, in order. Added keys of blocks that are in no file get files of their own.
    """
    out, wanted = table_of(gone), table_of(added)
    order = np.lexsort([gone_blocks, out[:, 1], out[:, 0]])
    out, gone_blocks = out[order], gone_blocks[order]
    values = slot_value(added_blocks, forever=forever, imported=imported)
    written = []
    left = wanted.any(axis=1)
    for file in files:
        stays = ~_holds(file, out, gone_blocks)
        mine = left & (added_blocks >= file.first) & (added_blocks <= file.last)
        left &= ~mine
        if not stays.all() or mine.any():
            parts = (
                np.concatenate([file.high[stays], wanted[mine, 0]]),
                np.concatenate([file.low[stays], wanted[mine, 1]]),
                np.concatenate([file.values[stays], values[mine]]),
            )
            written.append(_write(folder, file.first, file.last, *parts, ending=ending))
        file.rest()
    if left.any():
        rest = added_blocks[left]
        for first, last in _gaps(files, int(rest.min()), int(rest.max())):
            mine = left & (added_blocks >= first) & (added_blocks <= last)
            if mine.any():
                parts = wanted[mine, 0], wanted[mine, 1], values[mine]
                written.append(_write(folder, first, last, *parts, ending=ending))
    return written


def _holds(file: KeyFile, keys: Keys, blocks: Ints) -> Bools:
    """Say which entries of a file are these keys of these blocks, given in rising order."""
    found = np.zeros(file.count, bool)
    at = np.searchsorted(keys[:, 0], file.high)
    open_ = np.flatnonzero(at < len(keys))
    while len(
        open_
    ):  # once for nearly all: a fingerprint stands there as often as its key has blocks
        open_ = open_[keys[at[open_], 0] == file.high[open_]]
        here = at[open_]
        same = (keys[here, 1] == file.low[open_]) & (blocks[here] == file.blocks(open_))
        found[open_[same]] = True
        open_ = open_[~same]
        at[open_] += 1
        open_ = open_[at[open_] < len(keys)]
    return found


class KeyFiles:
    """The key files of one folder. damaged: files that were set aside, until their blocks are written again.

    adopted: endings of files of `rewritten` that count although nobody came to `adopt` them; others of the kind go.
    Raises StoreError if the folder cannot be read or written.
    """

    def __init__(self, folder: Path, adopted: Collection[str] = ()) -> None:
        self.folder = folder
        self.damaged: list[Path] = []
        self._files: tuple[KeyFile, ...] = ()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"{_NAMES}.new"):
                left.unlink()
            for left in folder.glob(f"{_NAMES}{ENDING}*"):
                if left.suffix in adopted:
                    left.replace(left.with_suffix(".bin"))
                else:
                    left.unlink()
            _sync_folder(folder)
            self.damaged = sorted(folder.glob(f"{_NAMES}.damaged"))
            paths = sorted(folder.glob(f"{_NAMES}.bin"))
        except OSError as problem:
            raise _store_error(problem, folder) from problem
        for path in paths:
            self._open(path)
        self._remove_covered()
        self._forget_mended()

    @property
    def files(self) -> tuple[KeyFile, ...]:
        """The files in order of their blocks."""
        return self._files

    @property
    def count(self) -> int:
        """How many keys all files hold."""
        return sum(file.count for file in self._files)

    @property
    def last(self) -> int:
        """The last block of all files, 0 if there is none."""
        return max((file.last for file in self._files), default=0)

    def missing(self, first: int, last: int) -> list[tuple[int, int]]:
        """Return the ranges of blocks that no file holds: within first … last, and of damaged files of any age."""
        gaps: list[tuple[int, int]] = []
        done = 0
        for start, end in sorted([(first, last), *map(_range_of, self.damaged)]):
            gaps += self._gaps(max(start, done + 1), end)
            done = max(done, end)
        return gaps

    def _gaps(self, first: int, last: int) -> list[tuple[int, int]]:
        return _gaps(self._files, first, last)

    def write(
        self,
        first: int,
        last: int,
        packed: bytes | Keys,
        blocks: Ints,
        *,
        forever: Bools | bool = False,
        imported: Bools | bool = False,
    ) -> None:
        """Write a file, as `write` does, and use it from now on."""
        self.use(
            write(self.folder, first, last, packed, blocks, forever=forever, imported=imported)
        )

    def use(self, path: Path) -> None:
        """Use a file that was written; it takes the place of any of the same range. Raises CorruptError."""
        file = KeyFile(path)
        others = [one for one in self._files if (one.first, one.last) != (file.first, file.last)]
        self._files = _in_order([*others, file])
        self._forget_mended()

    def adopt(self, written: Sequence[Path]) -> None:
        """Use files that `rewritten` wrote in place of those beside them; again is nothing. On disk when this returns."""
        try:
            for path in written:
                if path.exists():
                    path.replace(path.with_suffix(".bin"))
            _sync_folder(self.folder)
        except OSError as problem:
            raise _store_error(problem, self.folder) from problem
        for path in written:
            self.use(path.with_suffix(".bin"))

    def change(
        self,
        gone: bytes,
        added: bytes,
        blocks: Ints,
        *,
        forever: Bools,
        imported: Bools,
        oldest_block: int,
    ) -> None:
        """Take keys out of every file, then put others in where their blocks are. On disk when this returns.

        gone, added: packed keys. blocks, forever, imported: one entry for each of `added`. Cut off, it leaves some files
        changed and others not, each whole: doing it again ends it. What expired is not put in again.
        """
        removed = {gone[at : at + 16] for at in range(0, len(gone), 16)}
        removed.discard(bytes(16))
        high, low = table_of(b"".join(removed))[:, 0], table_of(b"".join(removed))[:, 1]
        table = table_of(added)
        values = slot_value(blocks, forever=forever, imported=imported)
        fresh = table.any(axis=1) & (forever | (blocks >= oldest_block))
        for file in self._files:
            hit = np.flatnonzero(np.isin(file.high, high) & np.isin(file.low, low))
            stays = np.ones(file.count, bool)
            for at in hit.tolist():
                stays[at] = _pair(file.high[at], file.low[at]) not in removed
            mine = fresh & (blocks >= file.first) & (blocks <= file.last)
            fresh &= ~mine
            if stays.all() and not mine.any():
                continue
            path = _write(
                self.folder,
                file.first,
                file.last,
                np.concatenate([file.high[stays], table[mine, 0]]),
                np.concatenate([file.low[stays], table[mine, 1]]),
                np.concatenate([file.values[stays], values[mine]]),
            )
            self.use(path)
        if fresh.any():
            for first, last in self._gaps(int(blocks[fresh].min()), int(blocks[fresh].max())):
                mine = fresh & (blocks >= first) & (blocks <= last)
                if mine.any():
                    self.write(
                        first,
                        last,
                        table[mine],
                        blocks[mine],
                        forever=forever[mine],
                        imported=imported[mine],
                    )

    def drop(self, file: KeyFile, places: Ints) -> None:
        """Write a file anew without the keys at these places. On disk when this returns."""
        stays = np.ones(file.count, bool)
        stays[places] = False
        parts = file.high[stays], file.low[stays], file.values[stays]
        self.use(_write(self.folder, file.first, file.last, *parts))

    def find(self, packed: bytes | Keys, *, first: int = 1, last: int | None = None) -> Ints:
        """Return the last block that holds each key, 0 for none; only files with blocks of first … last are asked.

        A block outside of first … last can be the answer: files are asked whole.
        """
        return self.holders(packed, first=first, last=last)[0]

    def holders(
        self, packed: bytes | Keys, *, first: int = 1, last: int | None = None
    ) -> tuple[Ints, Bools]:
        """Return what `find` does, and of each key whether it is the one of an import's row in that block."""
        wanted = table_of(packed)
        found, imported = np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
        open_ = np.flatnonzero(wanted.any(axis=1))
        for file in reversed(self._files):
            if not len(open_):
                break
            if file.last < first or (last is not None and file.first > last):
                continue
            found[open_], imported[open_] = file.find(wanted[open_])
            open_ = open_[found[open_] == 0]
        return found, imported

    def runs(self, from_block: int = 1) -> list[Run]:
        """Return the sorted runs of every file with blocks of `from_block` or later, or with keys that never expire."""
        return [
            (file.high, file.values)
            for file in self._files
            if file.last >= from_block or file.forever
        ]

    def rest(self) -> None:
        """Let the memory go into which the files were read, see `KeyFile.rest`."""
        for file in self._files:
            file.rest()

    def memory_from(self, most: int) -> int:
        """Return the first block from which on the keys of all files are at most `most`."""
        total, first = 0, self.last + 1
        for file in reversed(self._files):
            total += file.count
            if total > most:
                return first
            first = file.first
        return 1

    def expire(self, oldest_block: int) -> int:
        """Remove files of blocks before `oldest_block` without keys that never expire. Returns how many."""
        gone = [file for file in self._files if file.last < oldest_block and not file.forever]
        self._remove(gone)
        return len(gone)

    def merge(self, oldest_block: int = 1) -> bool:
        """Make one file of KEY_FILES_MERGED small neighbours; what expired is left out. False if there are none."""
        group = self._small_neighbours()
        if not group:
            return False
        parts = [
            np.flatnonzero((file.blocks() >= oldest_block) | (file.values >= _FOREVER))
            for file in group
        ]
        pairs = list(zip(group, parts, strict=True))
        path = _write(
            self.folder,
            group[0].first,
            group[-1].last,
            np.concatenate([file.high[part] for file, part in pairs]),
            np.concatenate([file.low[part] for file, part in pairs]),
            np.concatenate([file.values[part] for file, part in pairs]),
        )
        merged = KeyFile(path)
        self._files = _in_order([merged, *(file for file in self._files if file not in group)])
        self._unlink([file.path for file in group])
        return True

    def _small_neighbours(self) -> Sequence[KeyFile]:
        group: list[KeyFile] = []
        total = 0
        for file in self._files:
            joins = not group or group[-1].last + 1 == file.first
            if file.count > KEY_FILE_KEYS_MAX // 4 or total + file.count > KEY_FILE_KEYS_MAX:
                joins = False
            if not joins:
                group, total = [], 0
            if file.count <= KEY_FILE_KEYS_MAX // 4:
                group.append(file)
                total += file.count
            if len(group) == KEY_FILES_MERGED:
                return group
        return ()

    def _open(self, path: Path) -> None:
        try:
            self._files = _in_order([*self._files, KeyFile(path)])
        except CorruptError as problem:
            log.warning("key_file_damaged", reason=str(problem))
            aside = path.with_suffix(".damaged")
            try:
                path.replace(aside)
            except OSError as other:
                raise _store_error(other, path) from other
            self.damaged.append(aside)

    def _remove_covered(self) -> None:
        """Remove files that lie inside another's range: a merge was cut off before it could."""
        covered: list[KeyFile] = []
        for file in self._files:
            if any(
                other.first <= file.first and file.last <= other.last
                for other in self._files
                if other is not file and other not in covered
            ):
                covered.append(file)
        self._remove(covered)

    def _forget_mended(self) -> None:
        mended = [path for path in self.damaged if not self._gaps(*_range_of(path))]
        if mended:
            self.damaged = [path for path in self.damaged if path not in mended]
            self._unlink(mended)

    def _remove(self, gone: Iterable[KeyFile]) -> None:
        gone = list(gone)
        if gone:
            self._files = tuple(file for file in self._files if file not in gone)
            self._unlink([file.path for file in gone])

    def _unlink(self, gone: Iterable[Path]) -> None:
        try:
            for path in gone:
                path.unlink(missing_ok=True)
            _sync_folder(self.folder)
        except OSError as problem:
            raise _store_error(problem, self.folder) from problem


def _write(
    folder: Path,
    first: int,
    last: int,
    high: U64s,
    low: U64s,
    values: U32s,
    *,
    ending: str = ".bin",
) -> Path:
    order = np.argsort(
        high, kind="stable"
    )  # stable: of equal keys the one that came last stays last
    body = [part[order].view(np.uint8).data for part in (high, low, values)]
    forever = int(np.count_nonzero(values >= _FOREVER))
    header = _HEADER.pack(_MAGIC, _VERSION, 0, first, last, len(high), forever)
    head = header + _CHECKSUM.pack(_checksum(header, *body))
    path = (folder / _name(first, last)).with_suffix(ending)
    new = path.with_suffix(".new")
    try:
        with new.open("wb") as file:
            file.write(head.ljust(_START, b"\0"))
            unsynced = 0
            for part in body:
                for at in range(0, len(part), _STEP_BYTES):
                    unsynced += file.write(part[at : at + _STEP_BYTES])
                    if unsynced >= LAKE_SYNC_BYTES:  # all at once at the end would hold up commits
                        file.flush()
                        os.fsync(file.fileno())
                        unsynced = 0
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        _sync_folder(folder)
    except OSError as problem:
        raise _store_error(problem, new) from problem
    return path


def _gaps(files: Sequence[KeyFile], first: int, last: int) -> list[tuple[int, int]]:
    gaps = []
    for file in files:
        if file.first > last:
            break
        if file.first > first:
            gaps.append((first, file.first - 1))
        first = max(first, file.last + 1)
    if first <= last:
        gaps.append((first, last))
    return gaps


def _pair(high: np.uint64, low: np.uint64) -> bytes:
    return high.tobytes() + low.tobytes()


def _name(first: int, last: int) -> str:
    return f"keys-{first:012}-{last:012}.bin"


def _range_of(path: Path) -> tuple[int, int]:
    _, first, last = path.stem.split("-")
    return int(first), int(last)


def _in_order(files: Iterable[KeyFile]) -> tuple[KeyFile, ...]:
    return tuple(sorted(files, key=lambda file: (file.first, file.last)))


def _checksum(header: bytes, *body: memoryview) -> int:
    digest = xxhash.xxh3_64(header)
    for part in body:
        digest.update(part)
    return digest.intdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _corrupt(path: Path, what: str) -> CorruptError:
    return CorruptError(
        f"A key file is damaged. {what}",
        where=str(path),
        mend="It is made again from the lake at the next start",
    )


def _store_error(problem: OSError, where: Path) -> Error:
    if problem.errno == errno.ENOSPC:
        return FullError("No room is left on the device", where=str(where), mend="Free some space")
    return StoreError(
        f"A key file could not be written or removed: {problem.strerror}",
        where=str(where),
        mend="Mend the disk and start the server again",
    )
