"""Damaged files: what a replica holds comes back to the byte, what nothing holds is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from storagekit import Arrays, write_split

import ckptd
from ckptd.errors import CorruptCheckpoint, NotFound
from ckptd.image.digest_table import BLOCK_BYTES, TABLE_SUFFIX
from ckptd.layout.placements import Replicate, Shard
from ckptd.storage import repair
from ckptd.storage.reading import Checkpoint, open_checkpoint

FIRST, THIRD = "rank-00000.safetensors", "rank-00002.safetensors"


def state() -> Arrays:
    generator = np.random.default_rng(31)
    return {
        "a": generator.integers(0, 1 << 30, (512, 300)).astype("<i4"),  # 600 KiB, 300 KiB per rank
        "b": generator.random((331, 97)),
        "c": generator.integers(0, 255, (40_000,)).astype("|u1"),
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("written") / "c"
    write_split(directory, state(), (2, 2), (Replicate(), Shard(0)))
    return directory


@pytest.fixture
def hsdp(written: Path, tmp_path: Path) -> Path:
    """Two replicas of two shards: ranks 0 and 2 hold the same, as do 1 and 3."""
    return Path(shutil.copytree(written, tmp_path / "c"))


def flip(file: Path, *positions: int) -> None:
    data = bytearray(file.read_bytes())
    for at in positions:
        data[at] ^= 0x40
    file.write_bytes(data)


@dataclass(frozen=True)
class Cells:
    """A peer that knows cells, and of no rank what they belong to."""

    get: Callable[[bytes, int], bytes | None]

    def by_digest(self, digest: bytes, length: int) -> bytes | None:
        return self.get(digest, length)

    def image_size(self, rank: int) -> int:
        raise NotFound(f"rank {rank} is not here")

    def image_bytes(self, rank: int, begin: int, end: int) -> bytes:
        raise NotFound(f"rank {rank} is not here")


def repaired(directory: Path, source: repair.Source | None = None) -> repair.Repair:
    with open_checkpoint(str(directory)) as checkpoint:
        made = repair.plan(checkpoint, checkpoint.verify(), source)
        repair.execute(checkpoint, made)
        return made


def verified(directory: Path) -> list[object]:
    with open_checkpoint(str(directory)) as checkpoint:
        return list(checkpoint.verify())


@pytest.mark.parametrize("where", ["memory", "local"])
def test_flipped_bytes_come_back_from_a_replica(hsdp: Path, where: str) -> None:
    before = (hsdp / FIRST).read_bytes()
    flip(hsdp / FIRST, 70_000, 200_000, 300_001)
    url = str(hsdp)
    if where == "memory":
        import fsspec

        url = "memory://repair"
        fsspec.filesystem("memory").put(f"{hsdp}/", "/repair/", recursive=True)
    with open_checkpoint(url) as checkpoint:
        damage = checkpoint.verify()
        assert {found.begin // BLOCK_BYTES for found in damage} == {1, 3, 4}
        made = repair.plan(checkpoint, damage)
        assert made.blocks == 3 and made.lost == ()
        repair.execute(checkpoint, made)
        assert checkpoint.verify() == []
        with checkpoint.store.open(FIRST) as reader:
            found = bytearray(reader.size)
            reader.read_into(0, memoryview(found))
    assert found == before
    assert FIRST + ".repaired" not in checkpoint.store.list()
    checkpoint.store.delete(FIRST)


def test_replicas_that_lie_elsewhere_in_their_files_serve_too(tmp_path: Path) -> None:
    """Rank 1 has one more tensor first: no block of its file equals one of rank 0's."""
    values = state()
    store = tmp_path / "c"
    from xxhash import xxh3_128_digest

    from ckptd.image import Variable
    from ckptd.storage import writing
    from ckptd.storage.parts import LocalTensor

    target, _, _ = writing.target(str(store))
    parts = []
    for rank in range(2):
        held = ({"extra": np.arange(1000, dtype="<i4")} if rank else {}) | values
        codes = {"<i4": "I32", "<f8": "F64", "|u1": "U8"}
        tensors = [
            LocalTensor.whole(n, codes[v.dtype.str], v.shape, n, xxh3_128_digest(np.ascontiguousarray(v)))
            for n, v in held.items()
        ]
        head = Variable("job", 0, 3, rank, 2, writing.empty_objects())
        parts.append(
            writing.write_arrays(target, head, tensors, lambda n, h=held: h[n].shape, held.__getitem__)
        )
    writing.publish(target, writing.Heading("job", 3, world_size=2), parts)
    before = (store / FIRST).read_bytes()
    flip(store / FIRST, 130_000, 131_500, 655_000)
    made = repaired(store)
    assert made.lost == () and made.blocks >= 2
    assert (store / FIRST).read_bytes() == before


def test_what_no_replica_holds_is_named(hsdp: Path) -> None:
    flip(hsdp / FIRST, 200_000, 300_001)
    flip(hsdp / THIRD, 200_500)  # the same block of the only replica
    made = repaired(hsdp)
    assert made.blocks == 1
    assert [(each.object, each.rank, each.begin, each.end, each.tensors) for each in made.lost] == [
        (name, rank, 3 * BLOCK_BYTES, 4 * BLOCK_BYTES, ("a",)) for name, rank in ((FIRST, 0), (THIRD, 2))
    ]
    assert len(verified(hsdp)) == 2, "nothing else is damaged any more, and nothing was made up"


def test_a_peer_is_asked_by_digest(hsdp: Path) -> None:
    whole = (hsdp / FIRST).read_bytes()
    from ckptd.image.digest import cell_digests

    cells = {}
    for begin in range(0, len(whole), BLOCK_BYTES):
        cells[cell_digests(whole[begin : begin + BLOCK_BYTES])] = whole[begin : begin + BLOCK_BYTES]
    flip(hsdp / FIRST, 200_000)
    flip(hsdp / THIRD, 200_500)
    liar = repaired(hsdp, Cells(lambda digest, length: bytes(length)))
    assert liar.blocks == 0 and len(liar.lost) == 2, "what a source gives is compared with the digest"
    made = repaired(hsdp, Cells(lambda digest, length: cells.get(digest)))
    assert made.lost == () and verified(hsdp) == []


@pytest.mark.parametrize("kind", ["truncated", "too long", "head", "table", "table gone"])
def test_every_kind_of_damage_with_a_replica(hsdp: Path, kind: str) -> None:
    before = {path.name: path.read_bytes() for path in hsdp.iterdir()}
    file, table = hsdp / FIRST, hsdp / (FIRST + TABLE_SUFFIX)
    data = file.read_bytes()
    if kind == "truncated":
        tail = len(data) // BLOCK_BYTES * BLOCK_BYTES  # the last block holds what only this rank has
        file.write_bytes(data[:80_000] + bytes(tail - 80_000) + data[tail:])
    elif kind == "too long":
        file.write_bytes(data + b"more")
    elif kind == "head":
        flip(file, 20, 200_000)
    elif kind == "table":
        flip(table, 100)
    else:
        table.unlink()
    assert verified(hsdp)
    made = repaired(hsdp)
    assert made.lost == ()
    assert {path.name: path.read_bytes() for path in hsdp.iterdir()} == before


def test_a_file_that_is_gone_loses_only_what_was_its_own(hsdp: Path) -> None:
    (hsdp / FIRST).unlink()
    made = repaired(hsdp)
    assert made.blocks > 3
    assert [each.object for each in made.lost] == [FIRST]
    assert made.lost[0].end - made.lost[0].begin <= BLOCK_BYTES, "the head of its own rank, and no more"
    assert dict(open_checkpoint(str(hsdp)).salvage())["a"].tobytes() == state()["a"].tobytes()


def test_a_repair_that_fails_half_way_changes_nothing(hsdp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(hsdp / FIRST, 200_000)
    damaged = (hsdp / FIRST).read_bytes()
    from ckptd.storage import local_store

    def full(descriptor: int, view: memoryview) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local_store, "_write_all", full)
    with pytest.raises(ckptd.errors.NoSpace):
        repaired(hsdp)
    assert (hsdp / FIRST).read_bytes() == damaged
    assert not list(hsdp.glob(".ckptd-part*"))


def test_salvage_yields_what_verifies_and_names_the_rest(tmp_path: Path) -> None:
    values = state()
    write_split(tmp_path, values, (1,), (Replicate(),))
    flip(tmp_path / FIRST, 200_000)  # in a, and no replica
    checkpoint = open_checkpoint(str(tmp_path))
    kept = checkpoint.salvage()
    found = dict(kept)
    assert set(found) == {"b", "c"} and set(kept.lost) == {"a"}
    assert all(found[name].tobytes() == values[name].tobytes() for name in found)
    with pytest.raises(CorruptCheckpoint):
        checkpoint["a"][...]


def test_salvage_pieces_a_tensor_together_from_damaged_replicas(hsdp: Path) -> None:
    flip(hsdp / FIRST, 200_000)  # a's first half, in one replica
    flip(hsdp / "rank-00003.safetensors", 200_000)  # a's second half, in the other
    kept = open_checkpoint(str(hsdp)).salvage()
    found = dict(kept)
    assert kept.lost == {}
    assert all(found[name].tobytes() == whole.tobytes() for name, whole in state().items())


def test_salvage_of_a_checkpoint_without_files(hsdp: Path) -> None:
    for file in hsdp.glob("rank-*"):
        file.unlink()
    checkpoint: Checkpoint = open_checkpoint(str(hsdp))
    kept = checkpoint.salvage()
    assert dict(kept) == {} and set(kept.lost) == set(state())
    shutil.rmtree(hsdp)
    with pytest.raises(NotFound):
        open_checkpoint(str(hsdp))
