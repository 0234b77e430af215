"""The caller's buffers as spans of bytes: no copy, and nothing that a kernel could stumble over."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from ckptd.erasure.galois import Bytes

if TYPE_CHECKING:
    # For type checkers only, which bring it along; collections.abc has it from Python 3.12 on.
    from typing_extensions import Buffer as _Buffer

# Anything with the buffer protocol.  numpy's stubs do not say that an array has it before Python 3.12.
Buffer: TypeAlias = "_Buffer | NDArray[Any]"


class Span(NamedTuple):
    """Bytes in memory: dtype uint8, one dimension, C-contiguous."""

    array: Bytes
    # Of the first byte; valid while `array` lives, since that holds the buffer in place.
    address: int

    @classmethod
    def of(cls, array: Bytes) -> Span:
        """The span of an array of the right form."""
        if array.size == 0:
            return cls(array, 0)
        if array.flags.writeable:
            # A third of the time of the way below; small cells are felt here.
            return cls(array, ctypes.addressof(ctypes.c_char.from_buffer(cast("_Buffer", array))))
        return cls(array, int(array.__array_interface__["data"][0]))


def spans(
    read: Iterable[Buffer], written: Iterable[Buffer], names: Callable[[], Sequence[str]]
) -> tuple[list[Span], list[Span]]:
    """The buffers that are read and those that are written, checked against each other.

    `names` gives a name for each, in order, and is called only for an error's message.

    Raises:
        ValueError: a buffer that is not contiguous, unequal lengths, one to be written
            that is read-only or overlaps another.
        TypeError: an object without the buffer protocol.
    """
    sources = _all_spans(read, names, 0)
    outputs = _all_spans(written, names, len(sources))
    everything = sources + outputs
    length = everything[0].array.size
    for position, span in enumerate(everything):
        if span.array.size != length:
            raise ValueError(
                f"buffers of one length needed: {names()[0]} has {length} bytes, "
                f"{names()[position]} has {span.array.size}"
            )
        if position >= len(sources) and not span.array.flags.writeable:
            raise ValueError(f"{names()[position]} is read-only and would be written; pass a writable buffer")
    _refuse_overlap([span.address for span in everything], len(sources), length, names)
    return sources, outputs


def _all_spans(buffers: Iterable[Buffer], names: Callable[[], Sequence[str]], first: int) -> list[Span]:
    result: list[Span] = []
    for buffer in buffers:
        try:
            # memoryview first: it refuses what is not contiguous bytes with an error of its own.
            result.append(Span.of(np.frombuffer(memoryview(cast("_Buffer", buffer)), dtype=np.uint8)))
        except (ValueError, BufferError) as error:
            name = names()[first + len(result)]
            raise ValueError(f"{name} is not one contiguous buffer: {error}") from error
    return result


def _refuse_overlap(
    addresses: Sequence[int], read: int, length: int, names: Callable[[], Sequence[str]]
) -> None:
    """A written buffer that overlaps another would change what is still to be read.

    Two read buffers (the first `read`) may be the same bytes: shorter nodes share one
    page of zeros.  All have one length, so comparing neighbours by address is enough.
    """
    order = sorted(range(len(addresses)), key=addresses.__getitem__)
    for low, high in itertools.pairwise(order):
        if addresses[high] - addresses[low] < length and (low >= read or high >= read):
            raise ValueError(
                f"{names()[low]} and {names()[high]} overlap; a buffer that is written must overlap none"
            )
