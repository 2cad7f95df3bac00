"""Compiled functions (`bytewise`) that are kept as the machine's code and called without Numba.

Numba compiles a function in some seconds, once on a machine. What it makes here calls nothing and holds nothing, so its code is all
there is to keep: beside this file or in the user's cache, under a name that counts only for the same source, versions and
processor, and only where nobody could write it who could not as well write this program. Whoever comes next needs neither Numba nor what it makes of a cache of its own: 0.05 instead of 0.45 CPU s of each start.

Numba's functions take a place for the result, a place for an error, and of each array its holders (none), its length, the size of
an element, its address, and each side's length and step. Source: Numba's calling convention, `numba/core/callconv.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import secrets
import stat
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from llvmlite import binding
from msgspec import Struct
from numpy.typing import NDArray

Native = Callable[..., None]

_HERE: Final = Path(__file__).parent
_SOURCES: Final = ("bytewise.py", "members.py", "layout.py", "wide.py", "native.py")
_DIGEST_BYTES: Final = 32
# What each function takes: (r) bytes that are read, (w) bytes that are written, (i) whole numbers, (b) flags, (t) whole numbers in rows.
_TAKES: Final = {
    "look": "ririiiriiiibt",
    "copy": "riirwi",
    "cut": "riitiiriiiiiiwbti",
    "views": "riittb",
    "join": "ritittitriwi",
    "vouch": "riiiib",
    "hashed": "riiii",
}
_DTYPES: Final = {"r": "u1", "w": "u1", "i": "i8", "b": "?", "t": "i8"}


class Code(Struct, frozen=True):
    """A function as the machine's code. symbol: its name there."""

    symbol: str
    code: bytes


def native(name: str) -> Native:
    """Return a compiled function by its name: as it was kept, or compiled now."""
    found = _found(name)
    if found is None:
        found = compiled(name)
        _keep(found, _named(name))
    return _linked(found, _TAKES[name])


def there(name: str) -> bool:
    """Say whether a function need not be compiled first."""
    return _found(name) is not None


def compiled(name: str) -> Code:
    """Compile a function."""
    import numba  # noqa: PLC0415  # what is kept does without
    from numba import types  # noqa: PLC0415

    from retrofill.backfill import bytewise, members  # noqa: PLC0415

    kinds = {
        "r": types.Array(types.uint8, 1, "C", readonly=True),
        "w": types.Array(types.uint8, 1, "C"),
        "i": types.Array(types.int64, 1, "C"),
        "b": types.Array(types.boolean, 1, "C"),
        "t": types.Array(types.int64, 2, "C"),
    }
    # Only the function itself: what calls it from Python, or from C, would hold on to Numba.
    alone: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    made: Any = numba.njit(**bytewise.OPTIONS, **alone)(
        vars(members).get(name) or vars(bytewise)[name]
    )
    made.compile(tuple(kinds[kind] for kind in _TAKES[name]))
    (one,) = made.overloads.values()
    return Code(one.fndesc.llvm_func_name, one.library._get_compiled_object())  # noqa: SLF001  # as Numba's own cache


def _found(name: str) -> Code | None:
    path = _named(name)
    return next(filter(None, (_read(folder / path) for folder in _folders())), None)


def _named(name: str) -> str:
    """Return the name under which code is kept."""
    return f"{name}-{_counted()}.code"


@cache
def _counted() -> str:
    """Return what tells code that counts here from any other: neither program nor machine change while this runs."""
    digest = hashlib.sha256()
    for source in _SOURCES:
        digest.update((_HERE / source).read_bytes())
    said = (
        metadata.version("numba"),
        metadata.version("llvmlite"),
        sys.version,
        sys.platform,
        binding.get_host_cpu_name(),
        binding.get_host_cpu_features().flatten(),
    )
    digest.update("\n".join(said).encode())
    return digest.hexdigest()[:24]


def _folders() -> list[Path]:
    """Return where code is kept, the first choice first."""
    found = [_HERE / "__pycache__"]
    with contextlib.suppress(RuntimeError):  # a user without a home
        found.append(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retrofill")
    return found


def _read(path: Path) -> Code | None:
    """Return what was kept, None if there is nothing whole, or somebody else may have written it."""
    try:
        with path.open("rb") as file:
            data = file.read() if _trusted(os.fstat(file.fileno())) else b""
    except OSError:
        return None
    digest, said = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if hashlib.sha256(said).digest() != digest:
        return None
    return msgspec.msgpack.decode(said, type=Code)


def _trusted(said: os.stat_result) -> bool:
    """Say whether a file is of this user, the system's or the program's, and no more people may write it than the program."""
    program = Path(__file__).stat()
    loose = said.st_mode & ~program.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return said.st_uid in {0, os.geteuid(), program.st_uid} and not loose


def _keep(code: Code, name: str) -> None:
    """Keep code for the next process, where there is room."""
    said = msgspec.msgpack.encode(code)
    for folder in _folders():
        fresh = folder / f"{name}.{secrets.token_hex(8)}"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                fresh.touch(mode=0o644, exist_ok=False)
                fresh.write_bytes(hashlib.sha256(said).digest() + said)
                fresh.replace(folder / name)
            finally:
                fresh.unlink(missing_ok=True)
            return


def _linked(found: Code, takes: str) -> Native:
    """Return a function that calls the code."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(jit=True)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
    engine.add_object_file(binding.ObjectFileRef.from_data(found.code))
    engine.finalize_object()
    numbers = [
        number for kind in takes for number in _numbers(np.empty((0, 0) if kind == "t" else 0))
    ]
    kind = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * (2 + len(numbers)))
    call = kind(engine.get_function_address(found.symbol))
    result = (ctypes.c_int64 * 2)()  # and the error, of which there is none
    places = (ctypes.addressof(result), ctypes.addressof(result) + ctypes.sizeof(ctypes.c_int64))

    def native(*arrays: NDArray[Any]) -> None:
        for array, kind in zip(arrays, takes, strict=True):
            assert array.dtype == _DTYPES[kind], f"{array.dtype} in place of {_DTYPES[kind]}"
            assert array.ndim == 1 + (kind == "t")
            assert array.flags.c_contiguous
        status = call(*places, *(number for array in arrays for number in _numbers(array)))
        assert status == 0, f"{found.symbol} says {status}"

    vars(native)["engine"] = engine  # which holds the code
    vars(native)["result"] = result
    return native


def _numbers(array: NDArray[Any]) -> Sequence[int]:
    """Return what Numba's functions take for an array."""
    return (0, 0, array.size, array.itemsize, array.ctypes.data, *array.shape, *array.strides)
