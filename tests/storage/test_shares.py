"""What several ranks hold alike is written once, in equal shares; what differs is everybody's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from xxhash import xxh3_128_digest

import ckptd
from ckptd.errors import CorruptCheckpoint, CorruptImage
from ckptd.image import ImagePlan, TensorSpec, Variable, cell_digests, encode
from ckptd.image.variable import write_variable
from ckptd.storage import shares, snapshot
from ckptd.storage.assemble import writers
from ckptd.storage.parts import LocalTensor
from ckptd.storage.store import Store, open_store
from ckptd.storage.writing import Heading

SIZES = {f"w{n}": 1000 + 300 * n for n in range(12)}
RANKS = [0, 1, 2]


def image_of(rank: int, *, seed: int = 1) -> snapshot.SealedImage:
    """A data-parallel rank: weights that all hold alike, and a random state of its own."""
    rng = np.random.default_rng(seed)
    arrays = {name: rng.random(size).astype(np.float32) for name, size in SIZES.items()}
    arrays["random"] = np.random.default_rng(100 + rank // 2).random(16).astype(np.float32)
    plan = ImagePlan.build(
        [TensorSpec(name, "F32", a.shape) for name, a in arrays.items()], objects_capacity=4096
    )
    image = memoryview(bytearray(plan.image_bytes))
    image[: len(plan.header)] = plan.header
    for name, array in arrays.items():
        plan.tensor(image, name)[:] = memoryview(array.tobytes())
    write_variable(plan, image, Variable("job", 1, 5, rank, len(RANKS), encode({"rank": rank})))
    return snapshot.SealedImage(rank, image, cell_digests(image))


def flush(store: Store, images: list[snapshot.SealedImage]) -> None:
    """As nodes of one rank each do it, the first one leading."""
    offered = [snapshot.described([image]) for image in images]
    for (one,) in offered:
        assert shares.read(store, [one.part]) is None
        assert not shares.put_when_whole(store, RANKS)
        shares.put_offers(store, [one.part])
    assert shares.put_when_whole(store, RANKS)
    for each in offered:
        snapshot.write_parts(store, each, shares.read(store, [one.part for one in each]))
    assert snapshot.publish_when_whole(store, Heading("job", 5, 1, world_size=3), RANKS)


def test_replicas_are_written_once_and_every_rank_writes_its_share(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "c"))
    images = [image_of(rank) for rank in RANKS]
    flush(store, images)
    nbytes = [(tmp_path / "c" / f"rank-{rank:05}.safetensors").stat().st_size for rank in RANKS]
    total = sum(SIZES.values()) * 4
    overhead = 3 * (40 << 10)
    assert total < sum(nbytes) < total + overhead
    assert max(nbytes) - min(nbytes) < 4 * max(SIZES.values()) + 4096
    assert sorted(p.name for p in (tmp_path / "c").iterdir() if p.suffix in (".offer", ".part")) == []
    with ckptd.open(str(tmp_path / "c")) as checkpoint:
        assert checkpoint.verify() == []
        for name, size in SIZES.items():
            expected = np.frombuffer(
                ImagePlan.parse(images[0].image).tensor(images[0].image, name), np.float32
            )
            assert np.array_equal(np.asarray(checkpoint[name][:]), expected) and len(expected) == size
        stored = {tensor.name: tensor for tensor in checkpoint.manifest.tensors}
        assert stored["random"].differs and not stored["w0"].differs
        # Ranks 0 and 1 hold the same random state, rank 2 does not: all three are kept.
        tiles = checkpoint.tiles("random")
        assert sorted(tiles.place.tolist()) == RANKS


def test_a_rank_that_shares_little_writes_its_image_as_it_lies() -> None:
    big = LocalTensor.whole("own", "F32", (1 << 16,), "own", b"d" * 16)
    small = LocalTensor.whole("step", "F32", (), "step", b"e" * 16)
    parts = []
    for rank in RANKS:
        mine = LocalTensor.whole(f"own.{rank}", "F32", (1 << 16,), "own", bytes([rank]) * 16)
        parts.append(snapshot.Part(rank, f"r{rank}", big.nbytes + 4, bytes(16), (mine, small)))
    assert [share.names for share in shares.reckon(parts).values()] == [None, None, None]


def test_an_array_of_two_names_is_written_by_one_rank() -> None:
    def tied() -> list[LocalTensor]:
        return [LocalTensor.whole(n, "F32", (100,), "a", b"d" * 16) for n in ("embed", "head")] + [
            LocalTensor.whole("other", "F32", (60,), "other", b"o" * 16)
        ]

    assert writers([tied(), tied()]) == [{"embed", "head"}, {"other"}]


def test_shares_of_another_snapshot_are_not_followed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "c"))
    old = [snapshot.described([image_of(rank, seed=2)])[0].part for rank in RANKS]
    shares.put_offers(store, old)
    assert shares.put_when_whole(store, RANKS)
    mine = snapshot.described([image_of(1)])
    assert shares.read(store, [mine[0].part]) is None
    assert shares.read(store, [old[1]]) is not None
    assert shares.roots(store)[1] == old[1].root


def test_damage_in_memory_is_never_written_as_good(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "c"))
    images = [image_of(rank) for rank in RANKS]
    offered = [snapshot.described([image])[0] for image in images]
    shares.put_offers(store, [one.part for one in offered])
    shares.put_when_whole(store, RANKS)
    given = shares.read(store, [offered[1].part])
    assert given is not None and given[1].names
    name = min(given[1].names - {"random"})
    plan = ImagePlan.parse(images[1].image)
    plan.tensor(images[1].image, name)[3] ^= 1
    with pytest.raises(CorruptImage, match=f"{name} of rank 1"):
        snapshot.write_parts(store, [offered[1]], given)
    with pytest.raises(CorruptImage, match="rank 1's image is damaged"):
        snapshot.described([images[1]])
    assert not snapshot.publish_when_whole(store, Heading("job", 5, 1, world_size=3), RANKS)


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"[]",
        b'{"ckptd.shares":2,"ranks":[]}',
        b'{"ckptd.shares":1,"ranks":[[1]]}',
        b'{"ckptd.shares":1,"ranks":[[1,"00"]]}',
        b'{"ckptd.shares":1,"ranks":[[0,"%s",1,[99]]]}' % (b"00" * 16),
        b'{"ckptd.shares":1,"ranks":[[0,"%s",4000000000,[[0,4000000000,1]]]]}' % (b"00" * 16),
    ],
)
def test_damaged_shares_are_a_typed_error(text: bytes, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "c"))
    store.put(shares.SHARES_NAME, [text])
    part = snapshot.Part(
        0, "r", 4, bytes(16), (LocalTensor.whole("a", "F32", (1,), "a", xxh3_128_digest(b"")),)
    )
    with pytest.raises(CorruptCheckpoint, match=r"shares\.json"):
        shares.read(store, [part])
