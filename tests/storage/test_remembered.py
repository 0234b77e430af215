"""Files of shares come back from the images that they were written from, whatever of them is lost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from ckptd.errors import NotFound
from ckptd.image import CELL_BYTES, ImagePlan, TensorSpec, Variable, cell_digests, encode
from ckptd.image.variable import write_variable
from ckptd.storage import repair, shares, snapshot
from ckptd.storage.describe import STATIC_NAME
from ckptd.storage.reading import open_checkpoint
from ckptd.storage.store import open_store
from ckptd.storage.writing import Heading

RANKS = [0, 1, 2]
ALIASES = {"tied.1": "w9", "tied.0": "w3"}  # not in the order of their arrays


def image_of(rank: int) -> snapshot.SealedImage:
    rng = np.random.default_rng(3)
    arrays = {f"w{n}": rng.bytes(20_000 + 9_001 * n) for n in range(12)}
    arrays |= {"empty": b"", "own": np.random.default_rng(100 + rank).bytes(70_000 + rank)}
    arrays[STATIC_NAME] = encode({"aliases": ALIASES, "forms": {}})
    specs = [TensorSpec(name, "U8", (len(data),)) for name, data in arrays.items()]
    plan = ImagePlan.build(specs, objects_capacity=CELL_BYTES)
    image = memoryview(bytearray(plan.image_bytes))
    plan.lay_out(image)
    for name, data in arrays.items():
        plan.tensor(image, name)[:] = data
    objects = encode({"rank": rank, "text": "x" * 5000 * rank})
    write_variable(plan, image, Variable("job", 1, 5, rank, len(RANKS), objects))
    return snapshot.SealedImage(rank, image, cell_digests(image))


@dataclass
class Images:
    """A `Source`; of what is `gone` (rank and cell), nobody has anything."""

    images: dict[int, memoryview]
    gone: frozenset[tuple[int, int]] = frozenset()

    def by_digest(self, digest: bytes, length: int) -> bytes | None:
        return None  # no block of a share is a cell

    def image_size(self, rank: int) -> int:
        if rank not in self.images:
            raise NotFound(f"rank {rank}")
        return len(self.images[rank])

    def image_bytes(self, rank: int, begin: int, end: int) -> bytes:
        if any(rank == r and begin < (c + 1) * CELL_BYTES and end > c * CELL_BYTES for r, c in self.gone):
            raise NotFound("a cell")
        return bytes(self.images[rank][begin:end])


@pytest.fixture
def flushed(tmp_path: Path) -> tuple[Path, dict[int, memoryview]]:
    store, sealed = open_store(str(tmp_path / "c")), [image_of(rank) for rank in RANKS]
    offered = snapshot.described(sealed)
    shares.put_offers(store, [one.part for one in offered])
    assert shares.put_when_whole(store, RANKS)
    given = shares.read(store, [one.part for one in offered])
    assert given is not None and all(share.names is not None for share in given.values())
    snapshot.write_parts(store, offered, given)
    assert snapshot.publish_when_whole(store, Heading("job", 5, 1, world_size=3), RANKS)
    return tmp_path / "c", {one.rank: one.image for one in sealed}


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


def repaired(directory: Path, source: Images) -> repair.Repair:
    with open_checkpoint(str(directory)) as checkpoint:
        made = repair.plan(checkpoint, checkpoint.verify(), source)
        repair.execute(checkpoint, made)
        return made


@pytest.mark.parametrize("what", ["all gone", "all but the head", "shares gone"])
def test_files_come_back_to_the_byte(flushed: tuple[Path, dict[int, memoryview]], what: str) -> None:
    directory, images = flushed
    before = files(directory)
    if what == "shares gone":
        (directory / shares.SHARES_NAME).unlink()
    for name, data in before.items():
        if what == "all gone":
            (directory / name).unlink()
        else:
            (directory / name).write_bytes(data[:CELL_BYTES] + bytes(len(data) - CELL_BYTES))
    assert repaired(directory, Images(images)).lost == ()
    assert files(directory) == before


def test_what_memory_lacks_stays_lost_and_the_rest_comes_back(
    flushed: tuple[Path, dict[int, memoryview]],
) -> None:
    directory, images = flushed
    before = files(directory)
    for name, data in before.items():
        (directory / name).write_bytes(bytes(len(data)))
    del images[2]
    made = repaired(directory, Images(images, frozenset({(0, len(images[0]) // CELL_BYTES // 2)})))
    assert {each.rank for each in made.lost} <= {0, 2} and made.lost[-1].rank == 2
    found = files(directory)
    assert found["rank-00001.safetensors"] == before["rank-00001.safetensors"]
    assert made.lost[-1].end - made.lost[-1].begin == len(before["rank-00002.safetensors"])
    lost = sum(each.end - each.begin for each in made.lost if each.rank == 0)
    assert lost <= 3 * CELL_BYTES, "one cell's arrays, in a block or two"


def test_an_image_of_another_state_gives_nothing(flushed: tuple[Path, dict[int, memoryview]]) -> None:
    """A job of the same name, in an earlier life."""
    directory, images = flushed
    damaged = files(directory)["rank-00001.safetensors"]
    at = damaged.rindex(b"ckptdvar")  # the head of what varies
    damaged = damaged[: at + 300] + b"?" + damaged[at + 301 :]
    (directory / "rank-00001.safetensors").write_bytes(damaged)
    plan = ImagePlan.parse(images[1])
    other = Variable("job", 1, 5, 1, len(RANKS), encode({"text": "y" * 60_000}))
    write_variable(plan, images[1], other)
    made = repaired(directory, Images(images))
    assert [each.rank for each in made.lost] == [1]
    assert files(directory)["rank-00001.safetensors"] == damaged
