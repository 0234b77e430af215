"""The geometry of an image: which bytes of a safetensors file hold which tensor.

An image is a valid safetensors file whose geometry depends on nothing but the
names, dtypes and shapes of its tensors and the capacity reserved for what varies:

    8 bytes    header length, little-endian
    JSON       padded with spaces, so that the tensors begin at a multiple of 4 KiB
    tensors    in the given order, each at a multiple of 64 bytes, `__ckptd.pad.N` (U8) between
    variable   `__ckptd.variable` (U8), always last: see `ckptd.image.variable`

The header is canonical: of all JSON texts that say the same, exactly one is
written and only that one is read (`ckptd.image.header`).  So equal plans have
equal hashes, and a hostile header has no room to say anything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from xxhash import xxh3_128_digest

from ckptd.errors import InvalidRequest
from ckptd.image import header as headers
from ckptd.image.header import MAX_DIMS, Entry, corrupt
from ckptd.image.names import RESERVED_PREFIX, check_tensor_name

ALIGN_BYTES: Final = 64  # of every tensor, in the file and so in the arena
VARIABLE_HEAD_BYTES: Final = 256  # of the variable tensor, before its objects
MAX_TENSORS: Final = 200_000
MAX_IMAGE_BYTES: Final = 1 << 48
PAD_PREFIX: Final = "__ckptd.pad."
VARIABLE_NAME: Final = "__ckptd.variable"

# Every dtype code that safetensors 0.8 knows, and its width.
DTYPE_BITS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "F4": 4,
        **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
        **dict.fromkeys(("BOOL", "U8", "I8"), 8),
        **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
        **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
        **dict.fromkeys(("I32", "U32", "F32"), 32),
        **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    }
)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of an image: its name, its safetensors dtype code and its shape.

    Raises:
        InvalidRequest: the name cannot be used (`ckptd.image.names.check_tensor_name`).
        ValueError: the dtype code is unknown, the shape is not one, or the tensor does
            not end at a byte (only F4 and the F6 types can).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        check_tensor_name(self.name)
        bits = DTYPE_BITS.get(self.dtype)
        if bits is None:
            raise ValueError(
                f"{self.name}: no safetensors dtype {self.dtype!r}; known are {', '.join(DTYPE_BITS)}"
            )
        if len(self.shape) > MAX_DIMS:
            raise ValueError(f"{self.name}: {len(self.shape)} dims, at most {MAX_DIMS} are kept")
        if any(type(size) is not int or size < 0 for size in self.shape):
            raise ValueError(
                f"{self.name}: a shape is made of plain ints of at least 0, found {self.shape!r}"
            )
        # Dims of 0 are passed over, since other readers multiply from the left and check every product.
        if math.prod(filter(None, self.shape)) * bits > MAX_IMAGE_BYTES * 8:
            raise ValueError(
                f"{self.name}: {self.dtype} of shape {self.shape} is beyond {MAX_IMAGE_BYTES} bytes"
            )
        if math.prod(self.shape) * bits % 8:
            raise ValueError(f"{self.name}: {self.dtype} of shape {self.shape} does not end at a byte")

    @property
    def nbytes(self) -> int:
        """Size of the content in bytes; 0 where a dim is 0."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Pad:
    """A gap between two tensors; always zeros."""

    offset: int  # in the image
    nbytes: int  # below ALIGN_BYTES


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """The geometry of one rank's image, fixed for the life of the plan.

    Made by `build` or `parse`; equal plans have equal hashes.
    """

    header: bytes = field(repr=False)  # everything before the first tensor, length and padding included
    # The rest follows from the header.
    tensors: tuple[TensorSpec, ...] = field(compare=False, repr=False)
    spec_of: Mapping[str, TensorSpec] = field(compare=False, repr=False)
    offset_of: Mapping[str, int] = field(compare=False, repr=False)  # of each tensor, in bytes of the image
    pads: tuple[Pad, ...] = field(compare=False, repr=False)
    variable_offset: int = field(compare=False)  # of the variable tensor; its end is the image's end
    objects_capacity: int = field(compare=False)  # bytes for encoded objects
    image_bytes: int = field(compare=False)
    plan_hash: bytes = field(compare=False)  # xxh3_128 of `header`, 16 bytes

    @property
    def objects_offset(self) -> int:
        """Offset of the objects' first byte in the image."""
        return self.variable_offset + VARIABLE_HEAD_BYTES

    @classmethod
    def build(cls, tensors: Sequence[TensorSpec], *, objects_capacity: int) -> ImagePlan:
        """Returns the plan of an image that holds `tensors` in this order.

        Args:
            objects_capacity: bytes reserved for the encoded objects, at least; rounded
                up to a multiple of 64.  See `ckptd.image.variable.roomy_capacity`.

        Raises:
            ValueError: a name is given twice, there are more than 200,000 tensors, the
                header or the image is beyond its limit, or the capacity is negative.
        """
        if len(tensors) > MAX_TENSORS:
            raise ValueError(f"{len(tensors)} tensors, at most {MAX_TENSORS} fit one image")
        if objects_capacity < 0:
            raise ValueError(f"a capacity cannot be negative, found {objects_capacity}")
        capacity = _aligned(objects_capacity)
        entries, end = _entries(tensors, VARIABLE_HEAD_BYTES + capacity)
        header = headers.write(entries)
        base = len(header)
        if base + end > MAX_IMAGE_BYTES:
            raise ValueError(f"the image takes {base + end} bytes, at most {MAX_IMAGE_BYTES} are addressed")
        offset_of = {entry.name: base + entry.begin for entry in entries}
        variable_offset = offset_of.pop(VARIABLE_NAME)
        pads = [entry for entry in entries if entry.name.startswith(PAD_PREFIX)]
        for pad in pads:
            del offset_of[pad.name]
        if len(offset_of) != len(tensors):
            raise ValueError(f"the tensor name {_twice(tensors)!r} is given twice")
        return cls(
            header=header,
            tensors=tuple(tensors),
            spec_of=MappingProxyType({tensor.name: tensor for tensor in tensors}),
            offset_of=MappingProxyType(offset_of),
            pads=tuple(Pad(base + pad.begin, pad.end - pad.begin) for pad in pads),
            variable_offset=variable_offset,
            objects_capacity=capacity,
            image_bytes=base + end,
            plan_hash=xxh3_128_digest(header),
        )

    @classmethod
    def parse(cls, image: memoryview, image_bytes: int | None = None) -> ImagePlan:
        """Returns the plan of `image`, after checking all of its header.

        The header's length is checked against limit and image before it is looked
        at; nothing is allocated in proportion to what the header only claims.

        Args:
            image: one whole image, exactly: a slot is cut to the image's length first.
            image_bytes: the image's length, where `image` is only its beginning with all of the header.

        Raises:
            CorruptImage: this is not an image as `build` lays it out.
        """
        image_bytes = len(image) if image_bytes is None else image_bytes
        header, entries = headers.read(image, 2 * MAX_TENSORS + 1, image_bytes)
        end = _contiguous_end(entries)
        if len(header) + end != image_bytes:
            raise corrupt(f"its header describes {len(header) + end} bytes, the image has {image_bytes}")
        if not entries or entries[-1].name != VARIABLE_NAME:
            found_name = entries[-1].name if entries else None
            raise corrupt(f"its last tensor is {found_name!a}, expected {VARIABLE_NAME}")
        last = entries[-1]
        # Only tensors are believed; what lies between and behind them must then be what we
        # would write for them, to the byte.
        try:
            theirs = [entry for entry in entries if not entry.name.startswith(RESERVED_PREFIX)]
            tensors = [TensorSpec(entry.name, entry.dtype, entry.shape) for entry in theirs]
            plan = cls.build(tensors, objects_capacity=max(0, last.end - last.begin - VARIABLE_HEAD_BYTES))
        except InvalidRequest as error:
            raise corrupt(f"{error.what}, since {error.why}") from error
        except ValueError as error:
            raise corrupt(str(error)) from error
        if len(plan.header) != len(header):
            raise corrupt(f"its data begins at byte {len(header)}, expected {len(plan.header)}")
        if plan.header != header:
            at = next(i for i, (a, b) in enumerate(zip(header, plan.header, strict=False)) if a != b)
            found, expected = header[at : at + 80], plan.header[at : at + 80]
            raise corrupt(f"byte {at} of its header: found {found!r}, expected {expected!r}")
        return plan

    def lay_out(self, image: memoryview) -> None:
        """Writes header and zeroed pads into `image`; tensors and variable stay untouched.

        Raises:
            ValueError: `image` is not `image_bytes` long.
        """
        self.check_length(image)
        image[: len(self.header)] = self.header
        for pad in self.pads:
            image[pad.offset : pad.offset + pad.nbytes] = bytes(pad.nbytes)

    def tensor(self, image: memoryview, name: str) -> memoryview:
        """Returns the bytes of one tensor of `image`, as a view.

        Raises:
            KeyError: the plan has no such tensor.
            ValueError: `image` is not `image_bytes` long.
        """
        self.check_length(image)
        begin = self.offset_of[name]
        return image[begin : begin + self.spec_of[name].nbytes]

    def check_length(self, image: memoryview) -> None:
        """Returns if `image` has the plan's length.

        Raises:
            ValueError: it has not, or it is not a view of single bytes.
        """
        if image.format != "B" or image.ndim != 1 or len(image) != self.image_bytes:
            raise ValueError(
                f"this plan's image is a flat view of {self.image_bytes} bytes, "
                f"found shape {image.shape} of format {image.format!r}"
            )


def _entries(tensors: Sequence[TensorSpec], variable_bytes: int) -> tuple[list[Entry], int]:
    """Returns the header's entries and the data's length; offsets count from the data's start."""
    entries: list[Entry] = []
    at = 0

    def align() -> int:
        start = _aligned(at)
        if start != at:
            entries.append(Entry(f"{PAD_PREFIX}{len(entries)}", "U8", (start - at,), at, start))
        return start

    for tensor in tensors:
        begin = align()
        at = begin + tensor.nbytes
        entries.append(Entry(tensor.name, tensor.dtype, tensor.shape, begin, at))
    begin = align()
    at = begin + variable_bytes
    entries.append(Entry(VARIABLE_NAME, "U8", (variable_bytes,), begin, at))
    return entries, at


def _contiguous_end(entries: Sequence[Entry]) -> int:
    """Returns where the last entry ends, if each begins where the one before it ends."""
    end = 0
    for entry in entries:
        if entry.begin != end:
            raise corrupt(f"{entry.name!a} begins at byte {entry.begin} of the data, expected {end}")
        bits = DTYPE_BITS.get(entry.dtype)
        if bits is None:
            raise corrupt(f"{entry.name!a} has the unknown dtype {entry.dtype}")
        size = -(-math.prod(entry.shape) * bits // 8)
        if entry.end != end + size:
            raise corrupt(
                f"{entry.name!a} ends at byte {entry.end} of the data, "
                f"expected {end + size}: {entry.dtype} of shape {list(entry.shape)} takes {size} bytes"
            )
        end = entry.end
    return end


def _twice(tensors: Sequence[TensorSpec]) -> str:
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            return tensor.name
        seen.add(tensor.name)
    raise AssertionError("all names differ")


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES
