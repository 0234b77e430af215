"""A tensor of torch's as boxes of a logical tensor, and as the flat array of numpy's that holds them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch

from ckptd.client.tensors import DTYPE_CODES, DTYPES, form_of, is_dtensor, local_of, plain, writable
from ckptd.errors import StateMismatch
from ckptd.layout import placements
from ckptd.layout.tiles import Tiles

_SLAB_BYTES: Final = 64 << 20  # of a tensor that cannot be written in place, at a time
_WORDS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Described:
    """Which boxes of a logical tensor a local tensor holds; array "" of one place."""

    name: str
    dtype: str  # safetensors' code
    shape: tuple[int, ...]  # logical
    local: torch.Tensor  # plain, detached; follows the live one
    tiles: Tiles  # as if `local` lay contiguous, row-major


def describe(name: str, tensor: torch.Tensor, rank: int) -> Described:
    """Returns where the elements of a plain tensor or a DTensor are.

    Raises:
        UnsafeObject: its bytes have no safe form.
    """
    local = plain(name, tensor)
    form = form_of(name, tensor)
    if form is None:
        tiles = _whole(tuple(local.shape))
        shape = tuple(local.shape)
    else:
        shape = form.shape
        tiles = _shard(form.shape, form.mesh_shape, form.placements, form.coordinate)
        if int(tiles.sizes.prod(axis=1).sum()) != local.numel():
            raise StateMismatch(
                f"{name} is not stored as its placements say",
                f"this rank has {list(local.shape)} of {list(shape)}, placed {form.placements}"
                f" on {form.mesh_shape}",
                "shard it with fully_shard or distribute_tensor",
            )
    places = np.full(len(tiles), rank, np.int64)
    return Described(name, DTYPE_CODES[local.dtype], shape, local, replace(tiles, place=places))


def flat(local: torch.Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """Returns the memory of a tensor in host memory, from its first element to its last, as a flat
    array of words."""
    live = writable(local)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(live.shape, live.stride(), strict=True))
    memory = live.as_strided((extent,), (1,))
    if memory.dtype == torch.complex64:
        memory = torch.view_as_real(memory).view(-1)
        return memory.numpy().view(np.int64)
    return memory.view(_WORDS[memory.element_size()]).numpy()


def in_place(described: Described, code: str) -> bool:
    """Whether stored elements of dtype `code` can be written straight into the tensor's memory."""
    local = described.local
    return local.device.type == "cpu" and described.dtype == code and not (local.is_conj() or local.is_neg())


def slabs(described: Described, code: str) -> list[tuple[Tiles, torch.Tensor, torch.Tensor]]:
    """Returns (boxes, buffer for them, part of the tensor) for a tensor that is filled through buffers.

    Each buffer is an empty tensor on the meta device, of the stored dtype: `torch.empty_like(..,
    device="cpu")`
    makes it when its turn comes.
    """
    local, dtype = described.local, DTYPES[code]
    rows = local.shape[0] if local.dim() else 1
    row_bytes = max(1, local.numel() // max(rows, 1) * dtype.itemsize)
    step = max(1, _SLAB_BYTES // row_bytes)
    if len(described.tiles) != 1 or step >= rows:
        buffer = torch.empty(local.shape, dtype=dtype, device="meta")
        return [(described.tiles, buffer, local)]
    found = []
    for begin in range(0, rows, step):
        part = local.narrow(0, begin, min(step, rows - begin))
        buffer = torch.empty(part.shape, dtype=dtype, device="meta")
        offsets, sizes = described.tiles.offsets.copy(), described.tiles.sizes.copy()
        offsets[:, 0] += begin
        sizes[:, 0] = part.shape[0]
        found.append((replace(described.tiles, offsets=offsets, sizes=sizes), buffer, part))
    return found


def write(part: torch.Tensor, buffer: torch.Tensor) -> None:
    """Copies a buffer to a tensor; of equal slices in one place, one is written."""
    live = writable(part)
    for dim, size in enumerate(live.shape):
        buffer = buffer.narrow(dim, 0, size)
    live.copy_(buffer)


@lru_cache(maxsize=4096)
def _whole(shape: tuple[int, ...]) -> Tiles:
    return placements.tiles(shape, (), (), "")


@lru_cache(maxsize=4096)
def _shard(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    kinds: tuple[tuple[Any, ...], ...],
    coordinate: tuple[int, ...],
) -> Tiles:
    """The boxes of one rank; of all of its mesh they are computed and thrown away, so they are kept."""
    made: list[placements.Placement] = []
    for kind, *numbers in kinds:
        if kind == "replicate":
            made.append(placements.Replicate())
        else:
            made.append(placements.Shard(*numbers) if kind == "shard" else placements.Strided(*numbers))
    tiles = placements.tiles(
        shape, mesh_shape, made, "", fully_shard=placements.by_fully_shard(mesh_shape, made)
    )
    if not coordinate:  # this process is not in the mesh
        return tiles.at(np.zeros(0, np.int64))
    return tiles.at(tiles.place == int(np.ravel_multi_index(coordinate, mesh_shape)))


def memory_tiles(described: Described) -> Tiles:
    """Returns the boxes with starts and strides of the tensor's own memory, as `flat` gives it.

    A dim that is expanded is cut to one of its equal slices.
    """
    tiles, shape, live = described.tiles, tuple(described.local.shape), writable(described.local)
    if not len(tiles) or described.local.is_contiguous():
        return tiles
    at = (
        np.stack(np.unravel_index(tiles.start, shape), axis=1)
        if shape
        else np.zeros((len(tiles), 0), np.int64)
    )
    strides = np.array(live.stride(), np.int64).reshape(1, len(shape))
    expanded = np.array([a != b for a, b in zip(live.shape, shape, strict=True)], bool)
    return replace(
        tiles,
        sizes=np.where(expanded, 1, tiles.sizes),
        start=(at * strides * ~expanded).sum(axis=1),
        strides=np.repeat(strides, len(tiles), axis=0),
    )


def stored_bytes(local: torch.Tensor) -> memoryview:
    """Returns the tensor's elements as contiguous bytes in host memory; a copy where they are not so
    already."""
    there = local.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    if there.numel() == 0:
        return memoryview(b"")
    array: Any = there.view(-1).view(torch.uint8).numpy()  # a buffer, which numpy's types do not say
    return memoryview(array)


def check_materialized(name: str, tensor: torch.Tensor) -> None:
    """Returns if there is memory behind a tensor.

    Raises:
        StateMismatch: it is on the meta device.
    """
    if local_of(tensor).device.type == "meta":
        kind = "DTensor" if is_dtensor(tensor) else "tensor"
        raise StateMismatch(
            f"the {kind} {name} has no memory", "it is on the meta device", "call to_empty() before loading"
        )
