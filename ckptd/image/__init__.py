"""Bytes at rest: the image of a rank's state as a safetensors file, and its digests."""

from __future__ import annotations

from ckptd.image.digest import CELL_BYTES, DIGEST_BYTES, cell_digests, cells_of, mismatches
from ckptd.image.names import check_name, check_tensor_name
from ckptd.image.objects import TensorRef, decode, encode
from ckptd.image.plan import ImagePlan, TensorSpec
from ckptd.image.variable import Outgrown, Variable, read_variable, roomy_capacity, write_variable

__all__ = [
    "CELL_BYTES",
    "DIGEST_BYTES",
    "ImagePlan",
    "Outgrown",
    "TensorRef",
    "TensorSpec",
    "Variable",
    "cell_digests",
    "cells_of",
    "check_name",
    "check_tensor_name",
    "decode",
    "encode",
    "mismatches",
    "read_variable",
    "roomy_capacity",
    "write_variable",
]
