"""Seal, fold and rebuild over real sockets: what is folded can be lost."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from cluster import SIZES, Cluster, image, until
from daemonkit import looped
from reedsolo import RSCodec

from ckptd.erasure.stripe import Geometry
from ckptd.image.digest import CELL_BYTES
from ckptd.v1 import coordinator_pb2

VERIFIED = coordinator_pb2.Transfer.VERIFIED
FAILED = coordinator_pb2.Transfer.FAILED


async def _protect(cluster: Cluster, names: list[str], step: int, sizes: list[int]) -> None:
    cluster.direct(names, cluster.roster(names, 1))
    for name, size in zip(names, sizes, strict=True):
        cluster.plan(name, size)
    cluster.schedule(names, 1, [step])
    for name in names:
        cluster.capture(name, step)
    await until(lambda: cluster.folded(step, names), f"step {step} folded")


def _order(
    cluster: Cluster, lost: list[str], alive: list[str], group: list[str], mine: list[str]
) -> dict[str, object]:
    sources = [
        coordinator_pb2.Source(node=name, bulk_address=cluster.nodes[name].bulk_address, position=name)
        for name in alive
    ]
    order = coordinator_pb2.TransferOrder(
        generation=2, positions=mine, sources=sources, group=group, parity=cluster.parity
    )
    return {"transfer": order}


async def _recover(cluster: Cluster, names: list[str], lost: list[str], step: int) -> list[str]:
    """Spares take the places of the lost; returns the new members in rank order."""
    spares = {name: f"s{i}" for i, name in enumerate(lost)}
    for name in lost:
        cluster.kill(name)
        cluster.add(spares[name])
    alive = [name for name in names if name not in lost]
    members = [spares.get(name, name) for name in names]
    roster = cluster.roster(members, 2, (1, step))
    cluster.direct(alive, roster, **_order(cluster, lost, alive, names, []))
    for name in lost:
        cluster.direct([spares[name]], roster, **_order(cluster, lost, alive, names, [name]))
    await until(
        lambda: all(cluster.job(name).transfer.state in (VERIFIED, FAILED) for name in members),
        "transfers end",
    )
    return members


@pytest.mark.parametrize(("count", "parity"), [(2, 1), (4, 1), (4, 2), (5, 2)])
def test_any_m_nodes_of_a_group_can_vanish(tmp_path: Path, count: int, parity: int) -> None:
    names = [f"n{i}" for i in range(count)]
    sizes = [SIZES[i % len(SIZES)] for i in range(count)]
    tried = 0

    async def lose(lost: list[str], root: Path) -> None:
        cluster = Cluster(root, count, parity, ranks_per_node=2)
        try:
            await _protect(cluster, names, 7, sizes)
            members = await _recover(cluster, names, lost, 7)
            for i, name in enumerate(members):
                job = cluster.job(name)
                assert job.transfer.state == VERIFIED, job.transfer.reason
                holding = job.memory.holdings[2, 7]
                for rank in holding.ranks:
                    assert bytes(holding.places[rank].image) == image(rank, 7, sizes[i])
            # The new group is protected again without any new capture.
            await until(lambda: cluster.folded(7, members, 2), "step 7 folded again in generation 2")
        finally:
            cluster.close()

    for lost in itertools.combinations(names, parity):
        looped(lose)(list(lost), tmp_path / "-".join(lost))
        tried += 1
    print(f"{tried} losses of {parity} of {count} nodes")


def test_one_loss_more_than_parity_is_an_error_with_numbers(tmp_path: Path) -> None:
    names = ["n0", "n1", "n2", "n3"]

    async def run() -> None:
        cluster = Cluster(tmp_path, 4, 1)
        try:
            await _protect(cluster, names, 3, [SIZES[2]] * 4)
            members = await _recover(cluster, names, ["n1", "n2"], 3)
            reasons = [
                cluster.job(name).transfer.reason
                for name in members
                if cluster.job(name).transfer.state == FAILED
            ]
            assert len(reasons) == 2
            assert all("3 good symbols needed, 2 found" in reason for reason in reasons), reasons
        finally:
            cluster.close()

    looped(run)()


def test_every_stripe_is_a_reedsolo_codeword(tmp_path: Path) -> None:
    names = ["n0", "n1", "n2", "n3", "n4"]

    async def run() -> None:
        cluster = Cluster(tmp_path, 5, 2)
        try:
            await _protect(cluster, names, 1, [SIZES[2]] * 5)
            holdings = [cluster.job(name).memory.holdings[1, 1] for name in names]
            geometry = Geometry(5, 2)
            chunk_bytes = holdings[0].chunk_bytes
            codec = RSCodec(2)
            for stripe in range(5):
                symbols = []
                for symbol in range(3):
                    node, chunk = geometry.data_source(stripe, symbol)
                    first = chunk * chunk_bytes // CELL_BYTES
                    symbols.append(b"".join(holdings[node].data_cells(first, chunk_bytes // CELL_BYTES)))
                for p, node in enumerate(geometry.parity_nodes(stripe)):
                    parity = holdings[node].parity
                    assert parity is not None
                    symbols.append(bytes(parity.chunks[p]))
                for column in (0, 1, 17, CELL_BYTES, chunk_bytes - 1):
                    word = bytearray(symbol[column] for symbol in symbols)
                    assert codec.encode(word[:3]) == word, f"stripe {stripe}, byte {column}"
        finally:
            cluster.close()

    looped(run)()


@pytest.mark.parametrize("what", ["data", "parity"])
def test_a_wrong_cell_is_an_erased_cell(tmp_path: Path, what: str) -> None:
    """With m = 2 and one node lost there is one symbol to spare: a flipped bit costs it, no more."""
    names = ["n0", "n1", "n2", "n3"]

    async def run() -> None:
        cluster = Cluster(tmp_path, 4, 2)
        try:
            await _protect(cluster, names, 5, [SIZES[3]] * 4)
            holding = cluster.job("n2").memory.holdings[1, 5]
            assert holding.parity is not None
            target = holding.places[2].image if what == "data" else holding.parity.chunks[0]
            for at in range(0, len(target), CELL_BYTES):
                target[at] ^= 1
            alive = ["n0", "n2", "n3"]
            cluster.kill("n1")
            cluster.add("s0")
            roster = cluster.roster(["n0", "s0", "n2", "n3"], 2, (1, 5))
            cluster.direct(alive, roster)
            cluster.direct(["s0"], roster, **_order(cluster, ["n1"], alive, names, ["n1"]))
            await until(lambda: cluster.job("s0").transfer.state in (VERIFIED, FAILED), "transfer ends")
            assert cluster.job("s0").transfer.state == VERIFIED, cluster.job("s0").transfer.reason
            place = cluster.job("s0").memory.holdings[1, 5].places[1]
            assert bytes(place.image) == image(1, 5, SIZES[3])
        finally:
            cluster.close()

    looped(run)()


def test_a_damaged_own_image_is_refused_and_named(tmp_path: Path) -> None:
    names = ["n0", "n1", "n2"]

    async def run() -> None:
        cluster = Cluster(tmp_path, 3, 1)
        try:
            await _protect(cluster, names, 2, [SIZES[2]] * 3)
            cluster.job("n1").memory.holdings[1, 2].places[1].image[CELL_BYTES + 3] ^= 0x10
            cluster.direct(
                names, cluster.roster(names, 2, (1, 2)), transfer=coordinator_pb2.TransferOrder(generation=2)
            )
            await until(lambda: cluster.job("n1").transfer.state == FAILED, "the damage is found")
            reason = cluster.job("n1").transfer.reason
            assert "rank 1" in reason and "1 of 4 cells differ, first cell 1" in reason
            # It is no longer offered: the coordinator will have it decoded instead.
            assert not cluster.job("n1").memory.holdings[1, 2].sealed
        finally:
            cluster.close()

    looped(run)()


def test_a_damaged_own_image_is_decoded_and_the_parity_beside_it_stays(tmp_path: Path) -> None:
    """Two nodes with a damaged image each: both decode, and each needs the other's parity."""
    names = ["n0", "n1", "n2", "n3"]

    async def run() -> None:
        cluster = Cluster(tmp_path, 4, 2)
        try:
            await _protect(cluster, names, 2, [SIZES[3]] * 4)
            broken = ["n1", "n2"]
            for name in broken:
                holding = cluster.job(name).memory.holdings[1, 2]
                (place,) = holding.places.values()
                place.image[5] ^= 1
                holding.rank_seals.clear()  # as the failed verification leaves it
                del holding.seals[name]
            roster = cluster.roster(names, 2, (1, 2))
            cluster.direct([n for n in names if n not in broken], roster)
            for name in broken:
                alive = [n for n in names if n != name]
                cluster.direct([name], roster, **_order(cluster, broken, alive, names, [name]))
            await until(
                lambda: all(cluster.job(n).transfer.state in (VERIFIED, FAILED) for n in broken), "they end"
            )
            for rank, name in ((1, "n1"), (2, "n2")):
                job = cluster.job(name)
                assert job.transfer.state == VERIFIED, job.transfer.reason
                assert bytes(job.memory.holdings[1, 2].places[rank].image) == image(rank, 2, SIZES[3])
                assert job.memory.holdings[1, 2].folded
        finally:
            cluster.close()

    looped(run)()
