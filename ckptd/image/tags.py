"""The words of the objects' format: tags, limits, arrays, and the reference to a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ckptd.image.names import check_tensor_name

TAG: Final = "$"  # the one key that makes a JSON object something else than a dict
VERSION: Final = 1
MAX_BYTES: Final = 64 << 20  # of one encoded tree
MAX_DEPTH: Final = 64  # containers inside containers
MAX_ITEMS: Final = 1_000_000  # values of all containers together; a dict's item counts twice
MAX_ARRAY_BYTES: Final = 16 << 20  # of one numpy array; larger ones belong among the tensors
MAX_ARRAY_DIMS: Final = 64  # numpy's own limit
PLAIN_INT: Final = 1 << 1024  # integers below it in magnitude are written in decimal

# The factories of a defaultdict that may be written: known types that take no arguments.
FACTORIES: Final[dict[str, type]] = {
    t.__name__: t for t in (bool, int, float, complex, str, bytes, list, tuple, dict, set)
}

# Every `numpy.dtype.str` that may be written: bool, integers, floats and complex numbers.
ARRAY_DTYPES: Final = frozenset(
    {"|b1", "|i1", "|u1"}
    | {
        order + code
        for order in "<>"
        for code in ("i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
    }
)


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Stands in a tree of objects for the tensor `name` of the same image.

    Raises:
        InvalidRequest: the name cannot be used (`ckptd.image.names.check_tensor_name`).
    """

    name: str

    def __post_init__(self) -> None:
        check_tensor_name(self.name)
