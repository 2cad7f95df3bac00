"""Thirty-two bytes looked at in one step, for code that Numba compiles: which of them are such that reading must stop there.

What each function says is a number of 32 bits, the lowest for the first byte. They read so many bytes from a place on, whatever those
are: the caller sees to it that all are there. Every processor has registers of that size, or two of half of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from retrofill.backfill.layout import WIDE

ir: Any = vars(cgutils)["ir"]  # LLVM's own words, which Numba builds on
_BYTE, _MASK, _LONG = ir.IntType(8), ir.IntType(WIDE), ir.IntType(64)
_VECTOR = ir.VectorType(_BYTE, WIDE)


def _vector(context: Any, builder: Any, array_type: Any, array: Any, at: Any) -> Any:
    """Load bytes from a place of an array on."""
    data = context.make_array(array_type)(context, builder, array).data
    place = builder.bitcast(builder.gep(data, [at]), _VECTOR.as_pointer())
    return builder.load(place, align=1)


def _each(byte: int) -> Any:
    return ir.Constant(_VECTOR, [byte] * WIDE)


def _told(look: Callable[[Any, Any], Any]) -> Any:
    """Make a function of what says of each byte of a vector whether it is wanted."""

    def made(_typing: Any, data: Any, _at: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            found = look(builder, _vector(context, builder, signature.args[0], *given))
            return builder.bitcast(found, _MASK)

        return types.uint32(data, types.int64), code

    return intrinsic(made)


def _same(_typing: Any, one: Any, _at: Any, other: Any, _there: Any) -> Any:
    """Say which bytes are the same from a place in one array on and from a place in another: one, at, other, there."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        first = _vector(context, builder, signature.args[0], given[0], given[1])
        second = _vector(context, builder, signature.args[2], given[2], given[3])
        return builder.bitcast(builder.icmp_unsigned("==", first, second), _MASK)

    return types.uint32(one, types.int64, other, types.int64), code


def _lowest(_typing: Any, _mask: Any) -> Any:
    """Return which is the lowest bit of a number that is not 0."""

    def code(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        return builder.zext(builder.cttz(given[0], ir.Constant(ir.IntType(1), 1)), _LONG)

    return types.int64(types.uint32), code


def _word(_typing: Any, data: Any, _at: Any) -> Any:
    """Return eight bytes as a number, the first one lowest."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        found = context.make_array(signature.args[0])(context, builder, given[0]).data
        place = builder.bitcast(builder.gep(found, [given[1]]), _LONG.as_pointer())
        return builder.load(place, align=1)

    return types.uint64(data, types.int64), code


def _mover(kind: Any) -> Any:
    """Make a function that copies so many bytes from a place in one array to a place in another."""

    def made(_typing: Any, source: Any, _at: Any, target: Any, _place: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            pointers = []
            for array, at in ((0, 1), (2, 3)):
                data = context.make_array(signature.args[array])(
                    context, builder, given[array]
                ).data
                place = builder.gep(data, [given[at]])
                pointers.append(builder.bitcast(place, kind.as_pointer()))
            builder.store(builder.load(pointers[0], align=1), pointers[1], align=1)
            return ir.Constant(_MASK, 0)

        return types.uint32(source, types.int64, target, types.int64), code

    return intrinsic(made)


def _ends_string(builder: Any, bytes_: Any) -> Any:
    quote = builder.icmp_unsigned("==", bytes_, _each(ord('"')))
    escape = builder.icmp_unsigned("==", bytes_, _each(ord("\\")))
    control = builder.icmp_unsigned("<", bytes_, _each(ord(" ")))
    return builder.or_(builder.or_(quote, escape), control)


def _ends_digits(builder: Any, bytes_: Any) -> Any:
    return builder.icmp_unsigned(">", builder.sub(bytes_, _each(ord("0"))), _each(9))


same: Any = intrinsic(_same)
lowest: Any = intrinsic(_lowest)
word: Any = intrinsic(_word)
move = _mover(_VECTOR)
move_word = _mover(_LONG)
ends_string = _told(_ends_string)  # a quote, a backslash or a control character
ends_digits = _told(_ends_digits)  # none of 0 … 9
