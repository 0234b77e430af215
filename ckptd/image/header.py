"""The JSON header of an image, written and read in one canonical spelling.

A safetensors header may be spelled in many ways, and readers differ in what they
make of duplicate keys, huge counts or deep nesting.  Ours is spelled in one way:

    {"__metadata__":{"format":"pt","ckptd":"image/1"},"NAME":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},...}

in the order of the offsets, without white space, ASCII with `\\u` escapes, plain
decimal numbers, then spaces up to the reserved length.  Reading is therefore a walk
with one regular expression: linear, without recursion, and refusing at the first
byte that differs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from ckptd.errors import CorruptImage

LENGTH_BYTES: Final = 8
HEADER_ALIGN_BYTES: Final = 4096  # of length and JSON together: the data begins on a page
MAX_HEADER_BYTES: Final = 64 << 20  # stock safetensors reads up to 100 MB
MAX_DIMS: Final = 64

_START: Final = b'{"__metadata__":{"format":"pt","ckptd":"image/1"}'
_COUNTED: Final = b'"data_offsets":'  # once per entry: inside a name its quotes would be escaped
_NUMBER: Final = rb"(?:0|[1-9][0-9]{0,14})"
_ENTRY: Final = re.compile(
    rb',"((?:[ !#-\[\]-~]|\\["\\]|\\u[0-9a-f]{4}){1,6144}+)":'
    rb'\{"dtype":"([A-Z0-9_]{1,16})","shape":\[((?:%b(?:,%b){0,%d}+)?+)\],"data_offsets":\[(%b),(%b)\]\}'
    % (_NUMBER, _NUMBER, MAX_DIMS - 1, _NUMBER, _NUMBER)
)


class Entry(NamedTuple):
    """One tensor of a header, as it is written there; offsets count from the data's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def write(entries: Iterable[Entry]) -> bytes:
    """Returns the header of `entries`: its length, its JSON and its padding.

    Raises:
        ValueError: the header would be longer than 64 MiB.
    """
    text = b"".join([_START, *map(_spelled, entries), b"}"])
    total = -(-(LENGTH_BYTES + len(text)) // HEADER_ALIGN_BYTES) * HEADER_ALIGN_BYTES
    reserved = total - LENGTH_BYTES
    if reserved > MAX_HEADER_BYTES:
        raise ValueError(f"the header takes {reserved} bytes, at most {MAX_HEADER_BYTES} are written")
    return reserved.to_bytes(LENGTH_BYTES, "little") + text.ljust(reserved)


def reserved_bytes(image: memoryview, image_bytes: int) -> int:
    """Returns how many bytes header and length take, as the first 8 bytes of `image` say.

    Args:
        image_bytes: of the whole image, of which `image` may be the beginning.

    Raises:
        CorruptImage: it cannot be so many.
    """
    if image_bytes < LENGTH_BYTES:
        raise corrupt(f"{image_bytes} bytes are too few to hold even the length of a header")
    reserved = int.from_bytes(image[:LENGTH_BYTES], "little")
    if reserved > MAX_HEADER_BYTES:
        raise corrupt(f"its header claims {reserved} bytes, at most {MAX_HEADER_BYTES} are read")
    total = LENGTH_BYTES + reserved
    if total > image_bytes:
        raise corrupt(f"its header claims {reserved} bytes, the image has {image_bytes}")
    if total % HEADER_ALIGN_BYTES:
        raise corrupt(f"its data begins at byte {total}, expected a multiple of {HEADER_ALIGN_BYTES}")
    return total


def read(image: memoryview, max_entries: int, image_bytes: int | None = None) -> tuple[bytes, list[Entry]]:
    """Returns the header's bytes, and its entries in the order of the header.

    Checks the spelling, the length and the count, in order of danger; what the
    entries say is the caller's to check.

    Args:
        image_bytes: of the whole image, where `image` is only its beginning with all of the header.

    Raises:
        CorruptImage: no canonical header of at most `max_entries` entries is here.
    """
    total = reserved_bytes(image, len(image) if image_bytes is None else image_bytes)
    # One private copy: what is checked is what is used, whoever writes to the arena.
    header = bytes(image[:total])
    count = header.count(_COUNTED)
    if count > max_entries:
        raise corrupt(f"its header has {count} entries, at most {max_entries} are read")
    return header, _walk(header)


def corrupt(why: str) -> CorruptImage:
    """Returns the error that says why these bytes are not an image."""
    return CorruptImage("this is no image of ckptd's", why, "recover it from another copy, or from parity")


def _walk(header: bytes) -> list[Entry]:
    if not header.startswith(_START, LENGTH_BYTES):
        raise _unexpected(header, LENGTH_BYTES, _START.decode())
    at, entries = LENGTH_BYTES + len(_START), []
    while (found := _ENTRY.match(header, at)) is not None:
        name, dtype, shape, begin, end = found.groups()
        try:
            text = json.loads(b'"%b"' % name) if b"\\" in name else name.decode("ascii")
        except ValueError as error:
            raise corrupt(f"the name at byte {at} of its header cannot be read: {error}") from error
        dims = tuple(map(int, shape.split(b","))) if shape else ()
        entries.append(Entry(text, dtype.decode("ascii"), dims, int(begin), int(end)))
        at = found.end()
    if header[at : at + 1] != b"}":
        raise _unexpected(
            header, at, '}, or an entry like ,"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
        )
    if header[at + 1 :].strip(b" "):
        raise _unexpected(header, at + 1, "spaces up to the end of the header")
    return entries


def _spelled(entry: Entry) -> bytes:
    shape = ",".join(map(str, entry.shape))
    return (
        f',{json.dumps(entry.name)}:{{"dtype":"{entry.dtype}","shape":[{shape}],'
        f'"data_offsets":[{entry.begin},{entry.end}]}}'
    ).encode("ascii")


def _unexpected(header: bytes, at: int, expected: str) -> CorruptImage:
    return corrupt(f"byte {at} of its header: found {header[at : at + 80]!r}, expected {expected}")
