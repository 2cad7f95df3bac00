"""Bodies of requests: unpacked within a bound, and form fields found wherever a client puts them.

A packed body is unpacked piece by piece and given up at the limit, so that a bomb costs no more than an honest
request. A form may come as a query string, url-encoded, multipart, or as JSON with the same keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl

from isal import igzip_lib, isal_zlib
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from retrofill.errors import InputError, SizeError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks
    from starlette.requests import Request

T = TypeVar("T")

_FIELDS_MAX = 64  # of one form; the largest we know has five
_GZIP, _ZLIB, _RAW = 31, 15, -15  # what zlib calls wbits: which frame to expect
_ZLIB_METHOD = 8  # the low four bits of a zlib stream's first byte


class Plain:
    """Puts one body of at most `most` bytes together. Raises SizeError beyond it."""

    def __init__(self, *, most: int) -> None:
        self._most = most
        self._pieces: list[bytes] = []
        self.size = 0

    def feed(self, data: bytes) -> None:
        """Take a piece of the body."""
        self._pieces.append(data)
        self.size += len(data)
        if self.size > self._most:
            raise SizeError(f"The body is larger than {self._most:,} bytes")

    def finish(self) -> bytes:
        """Return the whole body."""
        return b"".join(self._pieces)


def unpacker(encoding: bytes, *, most: int) -> Plain:
    """Return what puts a body of this Content-Encoding together. Raises InputError if nobody knows it."""
    name = encoding.strip().lower()
    if name in {b"", b"identity"}:
        return Plain(most=most)
    if name in {b"gzip", b"x-gzip", b"deflate"}:
        return Packed(most=most, gzip=name != b"deflate")
    raise InputError(f"Content-Encoding {name[:32].decode('latin-1')!r} is unknown")


class Packed(Plain):
    """Unpacks one body. Raises InputError for bytes that are not packed so, SizeError beyond `most`."""

    def __init__(self, *, most: int, gzip: bool) -> None:
        super().__init__(most=most)
        self._gzip = gzip
        self._stream: Any = None  # isal's decompressor

    def feed(self, data: bytes) -> None:
        """Take a piece of the packed body."""
        while data:
            if self._stream is None:
                self._stream = isal_zlib.decompressobj(self._frame(data))
            try:
                piece = self._stream.decompress(data, self._most + 1 - self.size)
            except igzip_lib.IsalError as problem:  # type: ignore[misc] # its stub has no base
                raise InputError(f"The body cannot be unpacked: {problem}") from problem
            self._pieces.append(piece)
            self.size += len(piece)
            if self.size > self._most:
                raise SizeError(f"The body is larger than {self._most:,} bytes when unpacked")
            if not self._stream.eof:
                return
            # Several members, one after another, are one gzip file.
            data = self._stream.unused_data
            self._stream = None

    def finish(self) -> bytes:
        """Return the whole body. Raises InputError if it was cut off."""
        if self._stream is not None:
            raise InputError("The body is cut off")
        return b"".join(self._pieces)

    def _frame(self, data: bytes) -> int:
        if self._gzip:
            return _GZIP
        # "deflate" means zlib's frame; some clients send the bare stream.
        return _ZLIB if data[0] & 0x0F == _ZLIB_METHOD else _RAW


async def gather(request: Request, *, most: int, mend: str = "") -> bytes:
    """Return the body of a request to Starlette. Raises SizeError if it is larger than `most` bytes."""
    pieces: list[bytes] = []
    size = 0
    async for piece in request.stream():
        pieces.append(piece)
        size += len(piece)
        if size > most:
            raise SizeError(f"The body is larger than {most:,} bytes", mend=mend)
    return b"".join(pieces)


def read_json(body: bytes, decode: Callable[[bytes], T], *, wrong: str, mend: str = "") -> T:
    """Return what a JSON body says. Raises InputError that begins with `wrong` if it says nothing of that form."""
    try:
        return decode(body)
    # Text that is not UTF-8 and arrays without end are no DecodeError.
    except (ValueError, RecursionError) as problem:
        raise InputError(f"{wrong}: {problem}", mend=mend) from problem


def query(text: bytes) -> dict[str, str]:
    """Return the fields of a query string or an url-encoded form, the last of equal names."""
    try:
        return dict(
            parse_qsl(
                text.decode(),
                keep_blank_values=True,
                max_num_fields=_FIELDS_MAX,
                errors="strict",
            )
        )
    except ValueError as problem:
        raise InputError(f"The form cannot be read: {problem}") from problem


def form(body: bytes, content_type: bytes) -> dict[str, str]:
    """Return the fields of a form, the last of equal names. Raises InputError if it is none."""
    if content_type.lstrip()[:19].lower() == b"multipart/form-data":
        return _multipart(body, content_type)
    return query(body)


def _multipart(body: bytes, content_type: bytes) -> dict[str, str]:
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise InputError("The form has no boundary")
    form = _Form()
    try:
        parser = MultipartParser(boundary, form.callbacks())
        parser.write(body)
        parser.finalize()
        return {name.decode(): value.decode() for name, value in form.found.items()}
    except (FormParserError, ValueError) as problem:
        raise InputError(f"The form cannot be read: {problem}") from problem


class _Form:
    """What a multipart parser has found."""

    def __init__(self) -> None:
        self.found: dict[bytes, bytes] = {}
        self._header = b""
        self._value = b""
        self._name = b""
        self._data: list[bytes] = []

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_part_data": self._part,
            "on_part_end": self._end,
            "on_header_field": self._field,
            "on_header_value": self._content,
            "on_header_end": self._header_end,
        }

    def _begin(self) -> None:
        self._name = b""
        self._data = []

    def _part(self, data: bytes, start: int, end: int) -> None:
        self._data.append(data[start:end])

    def _field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _content(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            self._name = options.get(b"name", b"")
        self._header = self._value = b""

    def _end(self) -> None:
        self.found[self._name] = b"".join(self._data)
        if len(self.found) > _FIELDS_MAX:
            raise ValueError(f"more than {_FIELDS_MAX} fields")
