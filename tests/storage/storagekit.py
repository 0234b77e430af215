"""Small checkpoints for the tests of storage, and forged ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from ckptd.image import ImagePlan, TensorSpec, Variable, cell_digests, encode
from ckptd.image.digest import digest_of_digests
from ckptd.image.digest_table import write_table
from ckptd.image.manifest import Manifest, StoredObject, StoredTensor
from ckptd.image.tile_classes import TileClass
from ckptd.image.variable import write_variable
from ckptd.layout import placements
from ckptd.layout.tiles import Tiles
from ckptd.storage import place, writing
from ckptd.storage.local_store import LocalStore
from ckptd.storage.parts import LocalTensor, Part
from ckptd.storage.reading import Checkpoint
from ckptd.storage.snapshot import SealedImage

Arrays = dict[str, NDArray[Any]]
CODES = {"<i4": "I32", "<f8": "F64", "|u1": "U8", "<i2": "I16"}


def arrays(seed: int, count: int = 6) -> Arrays:
    """Named arrays of random dtypes and shapes; some larger than a few blocks."""
    generator = np.random.default_rng(seed)
    found: Arrays = {}
    for number in range(count):
        shape = tuple(int(n) for n in generator.integers(1, 90, int(generator.integers(1, 4))))
        dtype = np.dtype(list(CODES)[int(generator.integers(len(CODES)))])
        found[f"t.{number}"] = np.frombuffer(
            generator.bytes(int(np.prod(shape)) * dtype.itemsize), dtype
        ).reshape(shape)
    found["scalar"] = np.array(7, "<f8")
    found["empty"] = np.zeros((0, 3), "<i4")
    return found


def local(tiles: Tiles, whole: NDArray[Any], rank: int, shape: Sequence[int]) -> NDArray[Any]:
    """What a rank holds, cut out the slow and obvious way."""
    held = np.zeros(int(np.prod(shape)), whole.dtype)
    mine = tiles.at(tiles.place == rank)
    for box in range(len(mine)):
        for x in np.ndindex(*mine.sizes[box].tolist()):
            at = mine.start[box] + int(np.dot(x, mine.strides[box]))
            held[at] = whole[tuple((mine.offsets[box] + x).tolist())]
    return held.reshape(tuple(shape))


def write_split(
    directory: Path,
    state: Arrays,
    mesh: Sequence[int],
    split: Sequence[placements.Placement],
    *,
    publish: bool = True,
    step: int = 3,
) -> list[Part]:
    """Writes `state` split over a mesh where its dims allow, one file per rank; publishes it."""
    store, _, _ = writing.target(str(directory))
    ranks = int(np.prod(mesh))
    parts = []
    for rank in range(ranks):
        tensors, held = [], {}
        for name, whole in state.items():
            kinds = split_of(whole.ndim, split)
            tiles = placements.tiles(whole.shape, mesh, kinds, name)
            coordinate = tuple(int(c) for c in np.unravel_index(rank, tuple(mesh)))
            shape = placements.local_shape(whole.shape, mesh, kinds, coordinate)
            held[name] = local(tiles, whole, rank, shape)
            digest = xxh3_128_digest(np.ascontiguousarray(held[name]))
            tensors.append(
                LocalTensor.of_tiles(
                    name, CODES[whole.dtype.str], tiles.at(tiles.place == rank), name, digest
                )
            )
        head = Variable("job", 0, step, rank, ranks, writing.empty_objects())
        part = writing.write_arrays(store, head, tensors, _shapes(held), held.__getitem__)
        parts.append(Part.read(part.write()))
    if publish:
        writing.publish(store, writing.Heading("job", step, world_size=ranks), parts)
    return parts


def split_of(dims: int, split: Sequence[placements.Placement]) -> list[placements.Placement]:
    """The placements, with replication where a tensor lacks the dim."""
    return [
        p if isinstance(p, placements.Replicate) or p.dim < dims else placements.Replicate() for p in split
    ]


def _shapes(held: Arrays) -> Any:
    return lambda name: held[name].shape


def forge(
    directory: Path,
    file: bytes,
    *,
    dtype: str = "I32",
    shape: tuple[int, ...] = (4,),
    tiles: Tiles | None = None,
) -> None:
    """A checkpoint of one hostile file with a right table and manifest, which says that `a` is in it."""
    store = LocalStore(directory)
    name = place.object_name(0)
    digests = cell_digests(file)
    store.put(name, [file])
    store.put(name + ".digests", [write_table(len(file), digests)])
    whole = tiles or placements.tiles(shape, (1,), [placements.Replicate()], "a")
    manifest = Manifest(
        "job", 0, 3, "consolidated", 1,
        (StoredObject(name, len(file), digest_of_digests(digests), 0),),
        (StoredTensor("a", dtype, shape, 0),),
        (TileClass.from_tiles("a", whole),),
    )  # fmt: skip
    store.put_if_absent("manifest.json", manifest.write())


def sealed(seed: int, rank: int, ranks: int, step: int, *, generation: int = 0) -> SealedImage:
    """A rank's image as it lies in memory: two tensors of its own, of a few cells."""
    rng = np.random.default_rng([seed, rank, step])
    held = {f"r{rank}.w": rng.integers(0, 99, 25_000, "i4"), f"r{rank}.m": rng.random(1001)}
    specs = [TensorSpec(name, CODES[a.dtype.str], a.shape) for name, a in held.items()]
    objects = encode({"step": step})
    plan = ImagePlan.build(specs, objects_capacity=len(objects))
    image = memoryview(bytearray(plan.image_bytes))
    image[: len(plan.header)] = plan.header
    for name, array in held.items():
        at = plan.offset_of[name]
        image[at : at + array.nbytes] = memoryview(array).cast("B")
    write_variable(plan, image, Variable("job", generation, step, rank, ranks, objects))
    return SealedImage(rank, image, cell_digests(image))


def same(checkpoint: Checkpoint, images: Sequence[SealedImage]) -> bool:
    """Whether a checkpoint's files are these images, byte for byte."""
    for index, one in enumerate(images):
        with checkpoint.open(index) as reader:
            found = bytearray(reader.size)
            reader.read_into(0, memoryview(found))
        if found != one.image:
            return False
    return checkpoint.verify() == []
