"""Bytes to records: the text of each row with its file and line, thousands at a time, never a whole file in memory.

The cutting is done on arrays of positions, so that its cost is that of looking at each byte once. What cannot be cut or
read (broken UTF-8, a record too long, a row with the wrong number of cells, a file that ends in the middle) goes to the
dead letters with its place, and the rest is read on.

Lines count from 1. In a JSON array and in the answer of a query, rows have no lines: there the row's number counts.

Reading can be left between two batches and gone on with at the place where it was. What is packed is unpacked again up to
there, which costs a twentieth of what was done with it.
"""

from __future__ import annotations

import io
from collections.abc import Generator, Iterator
from itertools import chain, dropwhile, islice
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from msgspec import Struct
from numpy.typing import NDArray

from retrofill.backfill import database, unpack
from retrofill.backfill.deadletter import DeadLetters
from retrofill.backfill.source import Piece
from retrofill.errors import InputError

if TYPE_CHECKING:
    import duckdb

CHUNK_BYTES = 1024 * 1024  # read at once; more would be fresh memory each time
RECORD_BYTES_MAX = 16 * 1024 * 1024  # a longer record is no event: Amplitude takes 20 MB a request
CUT_OFF = "rest of the file"  # the kind of a letter that stands for all that follows
_EMPTY_BYTES_MAX = 2  # \r\n
_HEADER_BYTES_MAX = 256 * 1024  # of a CSV file
_BOM = b"\xef\xbb\xbf"
_NEWLINE, _QUOTE, _BACKSLASH = 10, 34, 92
_MARKS = b",;\t|"  # that may stand between cells where nobody says which

_PLACE: Final = [("file", pa.int32()), ("line", pa.int64()), ("text", pa.string())]
# at: the byte of the file at which the text stands as it is, -1 where it does not.
JSON_SCHEMA: Final = pa.schema([*_PLACE, ("at", pa.int64())])


class Place(Struct):
    """Where the next record of a piece begins: its byte, unpacked, and its line or number. Reading moves it on.

    last: what comes now are the last records, and reading cannot be gone on with in between.
    """

    offset: int = 0
    line: int = 1
    last: bool = False


def as_json(connection: duckdb.DuckDBPyConnection, rows: pa.Table) -> list[str]:
    """Return rows of Parquet as JSON. Python has no value for some of theirs: nanoseconds, years after 9999."""
    connection.register("rows", rows)
    told = "rows of Parquet"  # no column's name, which would be taken first
    found = connection.execute(f'SELECT to_json("{told}") FROM rows "{told}"').fetchall()
    connection.unregister("rows")
    return [text for (text,) in found]


def cells_schema(names: list[str]) -> pa.Schema:
    """Return the schema of CSV records: place, text as it was, and one text column a name."""
    return pa.schema([*_PLACE, *((f"cell_{at}", pa.string()) for at in range(len(names)))])


def json_records(
    piece: Piece, letters: DeadLetters, *, chunk: int = CHUNK_BYTES, place: Place | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield the records of NDJSON, a JSON array or a query, in order, with JSON_SCHEMA. place: where to begin."""
    place = place or Place()
    lies = lies_there(piece)
    for cut, numbers in _cut_json(piece, letters, chunk, place):
        starts = _starts(cut, place) if lies else np.full(len(cut), -1, np.int64)
        texts, lines = _readable(piece, cut, numbers, letters)
        if len(texts):
            file = pa.array(np.full(len(texts), piece.number, np.int32))
            at = pa.array(starts if len(texts) == len(cut) else starts[lines - numbers[0]])
            yield pa.RecordBatch.from_arrays([file, pa.array(lines), texts, at], schema=JSON_SCHEMA)


def lies_there(piece: Piece) -> bool:
    """Say whether the texts of the records stand in the file as they are."""
    return piece.format == "ndjson" and not piece.packing and piece.member is None


def _starts(texts: pa.StringArray, place: Place) -> NDArray[np.int64]:
    """Return where in the file each text begins. place: where the last one ends."""
    edges = np.frombuffer(texts.buffers()[1], np.int32)[: len(texts) + 1]
    return place.offset - int(edges[-1]) + edges[:-1].astype(np.int64)


def _cut_json(
    piece: Piece, letters: DeadLetters, chunk: int, place: Place
) -> Iterator[tuple[pa.StringArray, NDArray[np.int64]]]:
    if piece.query is not None:
        yield from _lines(_answer(piece.place, piece.query, place), piece, letters, place)
        return
    cut = _elements if piece.format == "json" else _lines
    yield from cut(_blocks(piece, letters, chunk, place), piece, letters, place)


def _answer(place: str, query: str, at: Place) -> Iterator[tuple[int, bytes]]:
    """Yield a database's rows, each block with where it ends. Asked again it may give them in another order."""
    at.last, end = True, 0
    for block in database.lines(place, query):
        end += len(block)
        yield end, block


def _blocks(
    piece: Piece, letters: DeadLetters, chunk: int, place: Place
) -> Iterator[tuple[int, bytes]]:
    """Yield the file's bytes from the place on, each block with where it ends: the same blocks wherever that is.

    A file that cannot be read on ends there, with a dead letter.
    """
    start, end = place.offset, 0
    if not piece.packing and piece.member is None:
        end = start - start % unpack.PLAIN_BYTES
    waiting: list[bytes] = []
    size = 0
    parts = unpack.chunks(piece.place, piece.packing, piece.member, start=end)
    while part := _next(parts, piece, letters):
        for at in range(0, len(part), chunk):
            waiting.append(part[at : at + chunk] if len(part) > chunk else part)
            size += len(waiting[-1])
            if size >= max(chunk, len(_BOM)):
                end += size
                if end > start:
                    yield end, _from(start, end - size, b"".join(waiting))
                waiting, size = [], 0
    place.last = True
    if waiting and end + size > start:
        yield end + size, _from(start, end, b"".join(waiting))


def _from(start: int, begin: int, block: bytes) -> bytes:
    """Return a block from a byte of the file on; the first one without the mark that may stand there."""
    return (
        block[start - begin :] if start > begin else block.removeprefix(_BOM if not begin else b"")
    )


def _next(parts: Iterator[bytes], piece: Piece, letters: DeadLetters) -> bytes:
    """Return the next bytes that are some, b"" at the end."""
    try:
        return next(filter(None, parts), b"")
    except unpack.BROKEN as error:
        letters.add(piece.name, 0, CUT_OFF, str(error), "")
        return b""


def _lines(
    blocks: Iterator[tuple[int, bytes]], piece: Piece, letters: DeadLetters, place: Place
) -> Iterator[tuple[pa.StringArray, NDArray[np.int64]]]:
    line, rest, end = place.line, b"", 0
    marks = np.zeros(
        0, np.bool_
    )  # used again: fresh memory for each block took longer than looking
    for end, block in blocks:
        buffer = rest + block if rest else block
        if len(marks) < len(buffer):
            marks = np.empty(len(buffer) + len(buffer) // 8, np.bool_)
        found = np.equal(np.frombuffer(buffer, np.uint8), _NEWLINE, out=marks[: len(buffer)])
        ends = np.flatnonzero(found) + 1
        if len(ends) == 0:
            rest = _bounded(buffer, piece, line, letters)
            continue
        numbers = np.arange(line, line + len(ends), dtype=np.int64)
        line += len(ends)
        place.offset, place.line = end - len(buffer) + int(ends[-1]), line
        yield _texts(buffer, ends), numbers
        rest = _bounded(buffer[ends[-1] :], piece, line, letters)
    if rest:
        place.offset = end
        yield _texts(rest, np.array([len(rest)])), np.array([line], np.int64)


def _bounded(rest: bytes, piece: Piece, line: int, letters: DeadLetters) -> bytes:
    """Return the beginning of a record whose end has not been read yet.

    Beyond the bound its first bytes become a dead letter, and what follows a broken record of its own.
    """
    if len(rest) <= RECORD_BYTES_MAX:
        return rest
    shown = rest[:1000].decode(errors="replace")
    letters.add(piece.name, line, "unreadable", f"no end within {RECORD_BYTES_MAX:,} bytes", shown)
    return b""


def _texts(buffer: bytes, ends: NDArray[np.int64]) -> pa.StringArray:
    offsets = np.zeros(len(ends) + 1, np.int32)
    offsets[1:] = ends
    return pa.StringArray.from_buffers(len(ends), pa.py_buffer(offsets), pa.py_buffer(buffer))


def _elements(
    blocks: Iterator[tuple[int, bytes]], piece: Piece, letters: DeadLetters, place: Place
) -> Iterator[tuple[pa.StringArray, NDArray[np.int64]]]:
    """Cut a JSON array into its elements, and tell if that was not all of the file."""
    cut_off = letters.counts[CUT_OFF]
    if place.offset:
        blocks = _behind_comma(blocks)
    else:
        blocks = dropwhile(lambda one: not one[1].strip(), blocks)
    row, opened, behind = yield from _array(blocks, piece, letters, place)
    following = (block for _end, block in blocks)
    others = (part for part in chain((behind,), following) if part.strip())
    shown = next(others, b"").strip()[:1000].decode(errors="replace")
    if (opened or shown) and letters.counts[CUT_OFF] == cut_off:  # else it was told why
        reason = "the array has no end" if opened else "it stands in no array, or behind one"
        letters.add(piece.name, row, CUT_OFF, reason, shown)


def _behind_comma(blocks: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """Yield the blocks, less the comma with which they begin where reading goes on."""
    for end, block in islice(blocks, 1):
        yield end, b" " + block[1:]
    yield from blocks


def _array(
    blocks: Iterator[tuple[int, bytes]], piece: Piece, letters: DeadLetters, place: Place
) -> Generator[tuple[pa.StringArray, NDArray[np.int64]], None, tuple[int, bool, bytes]]:
    """Cut at the commas that stand in nothing but the array. Returns the last row, whether it is open still, and what follows."""
    row, rest, opened, behind = place.line, b"", place.offset > 0, b""
    for block_end, block in blocks:
        buffer = bytearray(rest + block)
        if not opened:
            start = len(buffer) - len(buffer.lstrip())
            if not buffer.startswith(b"[", start):
                behind = bytes(buffer)
                break
            buffer[start] = 32
            opened = True
        commas, end = _borders(buffer)
        for at in commas:
            buffer[at] = 32  # what is left between the commas is an element and white space
        if len(commas):
            numbers = np.arange(row, row + len(commas), dtype=np.int64)
            row += len(commas)
            place.offset, place.line = block_end - len(buffer) + int(commas[-1]), row
            yield _texts(bytes(buffer), commas), numbers
        rest = bytes(buffer[commas[-1] if len(commas) else 0 :])
        if end is not None:
            rest = rest[: end - (int(commas[-1]) if len(commas) else 0)]
            behind = bytes(buffer[end + 1 :])
            opened = False
            break
        if rest and not _bounded(rest, piece, row, letters):
            rest = _nested(rest)
            if len(rest) > _NESTED_MAX:
                letters.add(piece.name, row, CUT_OFF, "this element is too deep", "")
                return row, opened, b""
    place.last = True
    if rest.strip():
        yield _texts(rest, np.array([len(rest)])), np.array([row], np.int64)
    return row, opened, behind


def _nested(rest: bytes) -> bytes:
    """Return short bytes that are as deep inside of arrays, objects and a string: there its element goes on."""
    data = np.frombuffer(rest, np.uint8)
    at = np.flatnonzero(_STRUCTURE[data])
    marks = data[at[~_escaped(data, at)]]
    inside = np.cumsum(marks == _QUOTE) % 2 == 1
    depth = int(_DEPTH[marks[~inside & (marks != _QUOTE)]].sum(dtype=np.int64))
    behind = len(rest) - len(rest.rstrip(b"\\"))
    text = b'"' + b"\\" * (behind % 2) if len(inside) and inside[-1] else b""
    return b"[" * depth + text


_NESTED_MAX = 1024  # deeper than any event may be
_STRUCTURE = np.zeros(256, np.bool_)
_STRUCTURE[list(b'"[]{},')] = True
_DEPTH = np.zeros(256, np.int8)
_DEPTH[list(b"[{")] = 1
_DEPTH[list(b"]}")] = -1


def _borders(buffer: bytearray) -> tuple[NDArray[np.int64], int | None]:
    """Return where commas part the elements, and where the array ends, if it does here."""
    data = np.frombuffer(buffer, np.uint8)
    at = np.flatnonzero(_STRUCTURE[data])
    at = at[~_escaped(data, at)]
    marks = data[at]
    outside = np.cumsum(marks == _QUOTE) % 2 == 0
    at, marks = at[outside & (marks != _QUOTE)], marks[outside & (marks != _QUOTE)]
    depth = np.cumsum(_DEPTH[marks], dtype=np.int64)
    closing = np.flatnonzero(depth < 0)
    end = int(at[closing[0]]) if len(closing) else None
    commas = at[(marks == ord(",")) & (depth == 0)]
    return (commas if end is None else commas[commas < end]), end


def _escaped(data: NDArray[np.uint8], at: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Say which positions hold a quote behind an odd number of backslashes."""
    behind = (data[at] == _QUOTE) & (at > 0) & (data[np.maximum(at - 1, 0)] == _BACKSLASH)
    if not behind.any():
        return np.asarray(behind)
    plain = np.where(data != _BACKSLASH, np.arange(len(data)), -1)
    last = np.maximum.accumulate(plain)[np.maximum(at - 1, 0)]
    return np.asarray(behind & ((at - 1 - last) % 2 == 1))


def _readable(
    piece: Piece, texts: pa.StringArray, lines: NDArray[np.int64], letters: DeadLetters
) -> tuple[pa.StringArray, NDArray[np.int64]]:
    """Leave out empty lines, and what is no UTF-8, with a dead letter each."""
    short = np.asarray(pc.binary_length(texts)) <= _EMPTY_BYTES_MAX
    if short.any():
        blank = [
            not text.strip() for text in texts.filter(pa.array(short)).cast(pa.binary()).to_pylist()
        ]
        short[short] = blank
        texts, lines = texts.filter(pa.array(~short)), lines[~short]
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        pass
    else:
        return texts, lines
    kept = np.ones(len(texts), np.bool_)
    for at, raw in enumerate(texts.cast(pa.binary()).to_pylist()):
        try:
            raw.decode()
        except UnicodeDecodeError as error:
            kept[at] = False
            shown = raw.decode(errors="replace").rstrip("\r\n")
            letters.add(
                piece.name, int(lines[at]), "unreadable", f"not UTF-8: {error.reason}", shown
            )
    return texts.filter(pa.array(kept)), lines[kept]


def delimiter(piece: Piece, told: str | None) -> str:
    """Return what stands between the cells of a CSV file: as told, by its format, or by its first line."""
    if told:
        return told
    if piece.format == "tsv":
        return "\t"
    line = _first_line(piece)
    return max(_MARKS.decode(), key=line.count)


def header(piece: Piece, told: str | None) -> list[str]:
    """Return the names of the cells. Raises InputError where two are the same, or there is no line of them."""
    if not _start(piece).strip():
        return []
    line = _first_line(piece)
    if not line.strip():
        raise InputError(
            "Its first line is empty", where=piece.name, mend="Begin with the names of the columns"
        )
    if "\r" in line.rstrip("\r\n") and '"' not in line:
        raise InputError("Its lines end in returns alone", where=piece.name, mend="End them in \\n")
    parsed = _parse(line.rstrip("\r\n").encode() + b"\n", None, delimiter(piece, told), None)
    names = [str(one) for one in parsed.column_names]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"Two columns are named {twice[0]!r}", where=piece.name)
    return names


def _start(piece: Piece) -> bytes:
    start = unpack.start(piece.place, piece.packing, piece.member, size=_HEADER_BYTES_MAX)
    return start.removeprefix(_BOM)


def _first_line(piece: Piece) -> str:
    start = _start(piece)
    ends = _record_ends(start, _MARKS) if b"\n" in start else np.array([len(start)])
    if len(ends) == 0:
        raise InputError("Its first line opens a quote and does not close it", where=piece.name)
    return start[: int(ends[0])].decode(errors="replace")


def csv_records(  # what a cell is takes this many words
    piece: Piece,
    names: list[str],
    letters: DeadLetters,
    *,
    told: str | None = None,
    chunk: int = CHUNK_BYTES,
    place: Place | None = None,
) -> Iterator[pa.RecordBatch]:
    """Yield the records of a CSV or TSV file, in order, with `cells_schema(names)`. place: where to begin.

    names: the columns of all files of the source; those that this one lacks are null. An empty cell is null, too.
    """
    place = place or Place()
    own, mark = header(piece, told), delimiter(piece, told)
    if not own:
        for _ in _blocks(piece, letters, chunk, place):
            pass  # nothing is in it, and if it cannot be read, that is told
        return
    blocks = _blocks(piece, letters, chunk, place)
    for buffer, ends, lines in _csv_cut(blocks, piece, mark.encode(), letters, place):
        texts, lines = _readable(piece, _texts(buffer, ends), lines, letters)  # noqa: PLW2901  # less what is broken
        cells = list(_cells(piece, own, names, texts, lines, mark, letters)) if len(texts) else []
        if cells:  # together: the place is behind all of them
            yield cells[0] if len(cells) == 1 else pa.concat_batches(cells)


def _csv_cut(
    blocks: Iterator[tuple[int, bytes]],
    piece: Piece,
    mark: bytes,
    letters: DeadLetters,
    place: Place,
) -> Iterator[tuple[bytes, NDArray[np.int64], NDArray[np.int64]]]:
    """Yield buffers with the ends of their records and the lines on which those begin, without the header."""
    line, rest, headed = place.line, b"", place.offset > 0
    for end, block in chain(blocks, ((0, b""),)):  # the last line may have no end
        rest += block or b"\n"
        while rest:
            ends = _record_ends(rest, mark)
            if len(ends):
                starts = line + _newlines_before(rest, ends)
                line = int(starts[-1])
                place.offset, place.line = end - len(rest) + int(ends[-1]), line
                yield _without_header(rest, ends, starts[:-1], headed=headed)
                rest, headed = rest[int(ends[-1]) :], True
            newline = rest.find(b"\n") + 1
            if not newline or (block and len(rest) <= RECORD_BYTES_MAX):
                break
            # What is quoted here has no end, hence the line with the quote is the odd one and not all that follows it.
            shown = rest[:newline].decode(errors="replace").rstrip("\r\n")
            letters.add(piece.name, line, "unreadable", "a quote is opened and not closed", shown)
            rest, line, headed = rest[newline:], line + 1, True
        rest = _bounded(rest, piece, line, letters)


def _without_header(
    buffer: bytes, ends: NDArray[np.int64], lines: NDArray[np.int64], *, headed: bool
) -> tuple[bytes, NDArray[np.int64], NDArray[np.int64]]:
    if headed:
        return buffer, ends, lines
    cut = int(ends[0])
    return buffer[cut:], ends[1:] - cut, lines[1:]


def _newlines_before(buffer: bytes, ends: NDArray[np.int64]) -> NDArray[np.int64]:
    newlines = np.flatnonzero(np.frombuffer(buffer, np.uint8) == _NEWLINE)
    return np.searchsorted(newlines, np.concatenate(([0], ends))).astype(np.int64)


def _record_ends(buffer: bytes, marks: bytes) -> NDArray[np.int64]:
    """Return the ends of the records that end in the buffer: newlines outside of quoted cells. marks: between cells."""
    data = np.frombuffer(buffer, np.uint8)
    ends = np.flatnonzero(data == _NEWLINE) + 1
    if len(ends) == 0 or b'"' not in buffer:
        return ends
    quotes = np.searchsorted(np.flatnonzero(data == _QUOTE), ends)
    odd = np.flatnonzero(np.diff(quotes, prepend=0) % 2)
    if len(odd) == 0:
        return ends
    return _joined(buffer, marks, ends, odd)


def _joined(
    buffer: bytes, marks: bytes, ends: NDArray[np.int64], odd: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Leave out the ends of lines that stand inside a quoted cell. Only lines with odd quotes can open one."""
    kept = np.ones(len(ends), np.bool_)
    at = 0
    while at < len(odd):
        opening = int(odd[at])
        start = int(ends[opening - 1]) if opening else 0
        if not _open(buffer[start : int(ends[opening])], marks):  # a stray quote inside of a cell
            at += 1
            continue
        closing = int(odd[at + 1]) if at + 1 < len(odd) else len(ends)
        kept[opening:closing] = False
        at += 2
    return ends[kept]


def _open(line: bytes, marks: bytes) -> bool:
    """Say whether a quoted cell is still open at the end of the line. A cell is quoted if it begins so."""
    inside, at, beginning = False, 0, True
    while at < len(line):
        byte = line[at]
        if inside:
            if byte == _QUOTE and line[at + 1 : at + 2] == b'"':
                at += 1
            elif byte == _QUOTE:
                inside = False
        elif byte == _QUOTE and beginning:
            inside = True
        beginning = not inside and byte in marks
        at += 1
    return inside


def _cells(  # noqa: PLR0917  # a record's cells need its place, its names and its text
    piece: Piece,
    own: list[str],
    names: list[str],
    texts: pa.StringArray,
    lines: NDArray[np.int64],
    mark: str,
    letters: DeadLetters,
) -> Iterator[pa.RecordBatch]:
    wrong: list[pyarrow.csv.InvalidRow] = []
    data = b"".join(texts.cast(pa.binary()).to_pylist())
    table = _parse(data, own, mark, wrong)
    kept = np.ones(len(texts), np.bool_)
    as_many = table.num_rows + len(wrong) == len(texts)
    if as_many and wrong:
        kept[[row.number - 1 for row in wrong]] = False
    good = texts.filter(pa.array(kept)) if wrong else texts
    if not (as_many and _match(table, good, data, mark)):  # a stray quote or return: whose is it?
        if len(texts) == 1:
            text = texts[0].as_py().rstrip("\r\n")
            letters.add(piece.name, int(lines[0]), "unreadable", "a quote or return is odd", text)
            return
        half = len(texts) // 2
        yield from _cells(piece, own, names, texts[:half], lines[:half], mark, letters)
        yield from _cells(piece, own, names, texts[half:], lines[half:], mark, letters)
        return
    for row in wrong:
        at = row.number - 1
        reason = f"{row.actual_columns} cells instead of {row.expected_columns}"
        text = texts[at].as_py().rstrip("\r\n")
        letters.add(piece.name, int(lines[at]), "unreadable", reason, text)
    texts, lines = good, lines[kept]
    place = [pa.array(np.full(len(texts), piece.number, np.int32)), pa.array(lines), texts]
    cells = [
        table[name].combine_chunks() if name in own else pa.nulls(len(texts), pa.string())
        for name in names
    ]
    cells = [one.chunk(0) if isinstance(one, pa.ChunkedArray) else one for one in cells]
    yield pa.RecordBatch.from_arrays([*place, *cells], schema=cells_schema(names))


def _match(table: pa.Table, texts: pa.StringArray, data: bytes, mark: str) -> bool:
    """Say whether each row has the cells of its own text. One that is two rows and two that are one leave their number."""
    if b'"' not in data and data.count(b"\r") == data.count(b"\r\n"):
        return True
    texts = pc.replace_substring(pc.ascii_rtrim(texts, "\r\n"), '"', "")
    cells = [pc.fill_null(column, "") for column in table.columns]
    joined = pc.replace_substring(pc.binary_join_element_wise(*cells, mark), '"', "")
    return bool(pc.all(pc.equal(joined, texts)).as_py())


def _parse(
    data: bytes, names: list[str] | None, mark: str, wrong: list[pyarrow.csv.InvalidRow] | None
) -> pa.Table:
    def skip(row: pyarrow.csv.InvalidRow) -> str:
        if wrong is not None:
            wrong.append(row)
        return "skip"

    return pyarrow.csv.read_csv(
        io.BytesIO(data),
        read_options=pyarrow.csv.ReadOptions(
            column_names=names, use_threads=False, block_size=max(len(data) + 1, 1024)
        ),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=mark,
            newlines_in_values=True,
            ignore_empty_lines=False,
            invalid_row_handler=skip,
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names or [], pa.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
            check_utf8=False,
        ),
    )
