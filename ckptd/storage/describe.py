"""Which boxes of which logical tensors lie in a rank's image, as the image itself says.

The client keeps with each image what changes only with its plan: the other names of its tensors, and the form
of those that are shards (`ckptd.client.state`).  A tensor without a form is whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from xxhash import xxh3_128_digest

from ckptd.errors import CorruptCheckpoint, CorruptImage
from ckptd.image import ImagePlan, decode
from ckptd.layout import placements
from ckptd.storage.parts import LocalTensor

STATIC_NAME: Final = "ckptd.static"  # the tensor that holds it, as encoded objects
_MAX_RANKS: Final = 1 << 20


def tensors_of_image(image: memoryview) -> list[LocalTensor]:
    """Returns the tensors of a rank's image, other names included.

    Raises:
        CorruptImage: this is no image.
        CorruptCheckpoint: what it says of its own tensors does not fit them.
    """
    plan = ImagePlan.parse(image)
    aliases, forms = _static(plan, lambda array: plan.tensor(image, array))
    digests = {
        spec.name: xxh3_128_digest(plan.tensor(image, spec.name))
        for spec in plan.tensors
        if spec.name != STATIC_NAME
    }
    found = []
    for name, array in _named(plan, aliases):
        spec = plan.spec_of[array]
        if name in forms:
            local = _shard(name, spec.dtype, spec.shape, array, forms[name], digests[array])
        else:
            local = LocalTensor.whole(name, spec.dtype, spec.shape, array, digests[array])
        found.append(local.fingerprinted(plan.tensor(image, array)))
    return found


def names_of_image(plan: ImagePlan, load: Callable[[str], bytes | memoryview]) -> list[tuple[str, str]]:
    """Returns name and array of the tensors that `tensors_of_image` returns, in that order.

    Args:
        load: gives an array's bytes; called for `STATIC_NAME` alone.

    Raises:
        CorruptCheckpoint: what the image says of its own tensors does not fit them.
    """
    return _named(plan, _static(plan, load)[0])


def _named(plan: ImagePlan, aliases: Mapping[str, str]) -> list[tuple[str, str]]:
    for name, array in aliases.items():
        if array not in plan.spec_of:
            raise _wrong(f"{name!a} is another name of {array!a}, which it lacks")
    own = [(spec.name, spec.name) for spec in plan.tensors if spec.name != STATIC_NAME]
    return [*own, *aliases.items()]


def _static(
    plan: ImagePlan, load: Callable[[str], bytes | memoryview]
) -> tuple[dict[str, str], dict[str, Any]]:
    if STATIC_NAME not in plan.spec_of:
        return {}, {}
    tree = decode(load(STATIC_NAME))
    aliases = tree.get("aliases") if isinstance(tree, dict) else None
    forms = tree.get("forms") if isinstance(tree, dict) else None
    if not isinstance(aliases, dict) or not isinstance(forms, dict):
        raise _wrong("it does not list aliases and forms")
    if any(type(a) is not str or type(b) is not str for a, b in aliases.items()):
        raise _wrong("an alias is no name")
    return aliases, forms


def _shard(
    name: str, dtype: str, local: tuple[int, ...], array: str, form: Any, digest: bytes
) -> LocalTensor:
    """The boxes of a DTensor's shard: those that its placements give to its coordinate of the mesh."""
    try:
        shape, _, kinds, mesh_shape, _, coordinate = form
        numbers = [*shape, *mesh_shape, *coordinate]
        if any(type(n) is not int or n < 0 for n in numbers) or math.prod(mesh_shape) > _MAX_RANKS:
            raise ValueError("its numbers are out of range")
        rank = int(np.ravel_multi_index(coordinate, mesh_shape)) if mesh_shape else 0
        chosen = [_placement(*kind) for kind in kinds]
        fsdp = placements.by_fully_shard(mesh_shape, chosen)
        tiles = placements.tiles(shape, mesh_shape, chosen, array, fully_shard=fsdp)
        expected = placements.local_shape(shape, mesh_shape, chosen, coordinate, fully_shard=fsdp)
    except (TypeError, ValueError) as error:
        raise _wrong(f"the form of {name!a} cannot be read: {error}") from error
    if tuple(expected) != tuple(local):
        raise _wrong(f"{name!a} is of shape {local}, its form gives {tuple(expected)}")
    return LocalTensor.of_tiles(name, dtype, tiles.at(tiles.place == rank), array, digest)


def _placement(kind: str, dim: int = 0, factor: int = 1) -> placements.Placement:
    if kind == "replicate":
        return placements.Replicate()
    if kind == "shard":
        return placements.Shard(dim)
    if kind == "strided":
        return placements.Strided(dim, factor)
    raise ValueError(f"the placement {kind!a} is unknown")


def _wrong(why: str) -> CorruptCheckpoint:
    return CorruptCheckpoint("this image's description of its tensors cannot be used", why)


__all__ = ["STATIC_NAME", "CorruptImage", "tensors_of_image"]
