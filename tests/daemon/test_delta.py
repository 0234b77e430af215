"""Unchanged cells cost nothing, and what is folded from differences can be lost like anything else."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from cluster import JOB, PLAN, Cluster, until
from daemonkit import looped
from test_protection import VERIFIED, _recover

from ckptd.daemon.job import rank_seal
from ckptd.image.digest import CELL_BYTES, cell_digests
from ckptd.memory.bulk import Connection
from ckptd.v1 import bulk_pb2, local_pb2

NAMES = ["n0", "n1", "n2", "n3"]


class Traffic:
    """Bytes of cells that contributions carried, counted where they are sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._sent: list[int] = []  # many threads append; none of them may undo what another one adds
        send = Connection.send

        def counted(
            connection: Connection, header: bulk_pb2.BulkHeader, payload: Sequence[memoryview] = ()
        ) -> None:
            if header.WhichOneof("body") == "contribution":
                self._sent.append(sum(view.nbytes for view in payload))
            send(connection, header, payload)

        monkeypatch.setattr(Connection, "send", counted)

    def take(self) -> int:
        found, self._sent[:] = sum(self._sent), []
        return found


def _begin(cluster: Cluster, names: list[str], nbytes: int) -> None:
    cluster.direct(names, cluster.roster(names, 1))
    for name in names:
        cluster.plan(name, nbytes)


async def _protect(
    cluster: Cluster, names: list[str], step: int, contents: dict[int, bytes], watermark: int | None
) -> None:
    """All nodes capture `contents` (by rank) as `step`; returns when it is folded everywhere."""
    cluster.schedule(names, 1, [step], watermark)
    for name in names:
        job = cluster.job(name)
        for trainer in job.living():
            place = job.grants[trainer.rank][step]
            place.image[:] = contents[trainer.rank]
            captured = local_pb2.Captured(step=step, slot=place.slot, plan_hash=PLAN)
            cluster.nodes[name].protection.captured(job, job.captured(trainer, captured), trainer.rank)
    await until(lambda: cluster.folded(step, names), f"step {step} folded")


def _changed(old: dict[int, bytes], cells: dict[int, Sequence[int]], rng: random.Random) -> dict[int, bytes]:
    """Some bytes of these cells of each rank differ."""
    new = {}
    for rank, content in old.items():
        image = bytearray(content)
        for cell in cells[rank]:
            at = min(cell * CELL_BYTES + rng.randrange(CELL_BYTES), len(image) - 1)
            image[at] ^= rng.randrange(1, 256)
        new[rank] = bytes(image)
    return new


@pytest.mark.parametrize(("count", "parity"), [(2, 1), (4, 1), (4, 2)])
@looped
async def test_adapters_on_a_frozen_trunk_cost_what_they_weigh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, parity: int
) -> None:
    """1 % of the bytes changed as whole tensors: at most 3 % of the full traffic."""
    names, cells, rng = NAMES[:count], 200, random.Random(5)
    traffic = Traffic(monkeypatch)
    cluster = Cluster(tmp_path, count, parity)
    try:
        _begin(cluster, names, cells * CELL_BYTES)
        contents = {rank: rng.randbytes(cells * CELL_BYTES) for rank in range(count)}
        await _protect(cluster, names, 1, contents, None)
        full = traffic.take()
        assert full == count * parity * cells * CELL_BYTES  # every image, m times
        # The adapters lie together, in the same place of every rank, as one model makes them.
        contents = _changed(contents, dict.fromkeys(range(count), (100, 101)), rng)
        await _protect(cluster, names, 2, contents, 1)
        small = traffic.take()
        print(f"{count} nodes, m = {parity}: 1 % changed, {100 * small / full:.2f} % of {full} bytes sent")
        assert 0 < small <= 0.03 * full
        await _protect(cluster, names, 3, contents, 2)
        assert traffic.take() == 0, "nothing changed"
        await _protect(cluster, names, 4, {r: rng.randbytes(len(c)) for r, c in contents.items()}, 3)
        assert traffic.take() == full, "all changed: as they lie"
    finally:
        cluster.close()


@pytest.mark.parametrize("seed", range(1))
@pytest.mark.parametrize(("count", "parity"), [(2, 1), (3, 1), (4, 2)])
def test_a_step_made_of_differences_survives_the_loss_of_any_m_nodes(
    tmp_path: Path, count: int, parity: int, seed: int
) -> None:
    print(f"seed {seed}")
    names = NAMES[:count]

    async def lose(lost: list[str], root: Path, rng: random.Random) -> None:
        cluster = Cluster(root, count, parity, slots=2)
        nbytes = 9 * CELL_BYTES - 77
        try:
            _begin(cluster, names, nbytes)
            contents = {rank: rng.randbytes(nbytes) for rank in range(count)}
            await _protect(cluster, names, 1, contents, None)
            for step in (2, 3):
                # Whatever changes where: cells of one rank, of some, of all, of none.
                cells = {rank: rng.sample(range(9), rng.choice([0, 1, 4, 9])) for rank in range(count)}
                contents = _changed(contents, cells, rng)
                await _protect(cluster, names, step, contents, step - 1)
            members = await _recover(cluster, names, lost, 3)
            for rank, name in enumerate(members):
                job = cluster.job(name)
                assert job.transfer.state == VERIFIED, job.transfer.reason
                assert bytes(job.memory.holdings[2, 3].places[rank].image) == contents[rank]
        finally:
            cluster.close()

    for number, lost in enumerate(itertools.combinations(names, parity)):
        looped(lose)(list(lost), tmp_path / str(number), random.Random(seed * 100 + number))


@pytest.mark.parametrize("damaged", ["old", "new"])
@looped
async def test_a_damaged_cell_at_the_sender_is_never_folded(tmp_path: Path, damaged: str) -> None:
    """A difference of damaged bytes would make wrong parity that nobody could tell."""
    rng, names = random.Random(3), NAMES[:2]
    cluster = Cluster(tmp_path, 2, 1)
    try:
        _begin(cluster, names, 8 * CELL_BYTES)
        contents = {rank: rng.randbytes(8 * CELL_BYTES) for rank in range(2)}
        # With one data chunk a changed cell is always sent as it lies.
        await _protect(cluster, names, 1, contents, None)
        job = cluster.job("n0")
        contents = _changed(contents, {0: [3], 1: [3]}, rng)
        cluster.schedule(names, 1, [2], 1)
        victim = job.grants[0][2] if damaged == "new" else job.memory.holdings[1, 1].places[0]
        for name in names:
            at = cluster.job(name)
            rank = 0 if name == "n0" else 1
            place = at.grants[rank][2]
            place.image[:] = contents[rank]
            captured = local_pb2.Captured(step=2, slot=place.slot, plan_hash=PLAN)
            holding = at.captured(at.trainers[rank], captured)
            if name == "n0":
                # Sealed, and damaged before anything of it is sent.
                holding.seal_rank(rank_seal(0, place, cell_digests(place.image)), JOB)
                victim.image[3 * CELL_BYTES] ^= 1
                cluster.nodes[name].protection.sealed(at, holding)
            else:
                cluster.nodes[name].protection.captured(at, holding, rank)
        if damaged == "new":
            await until(lambda: 2 in job.aborted, "the step is given up")
            assert not cluster.folded(2, ["n1"])
        else:
            await until(lambda: cluster.folded(2, names), "the old bytes were not needed")
            parity = cluster.job("n1").memory.holdings[1, 2].parity
            assert parity is not None and bytes(parity.chunks[0][: 8 * CELL_BYTES]) == contents[0]
    finally:
        cluster.close()


def test_all_36_sets_of_one_or_two_of_eight_nodes_can_vanish(tmp_path: Path) -> None:
    """RS(6+2) over the daemons of eight nodes."""
    names = [f"n{i}" for i in range(8)]
    sets = [(name,) for name in names] + list(itertools.combinations(names, 2))
    assert len(sets) == 36

    async def lose(lost: tuple[str, ...], root: Path) -> None:
        cluster = Cluster(root, 8, 2, slots=2)
        nbytes = 13 * CELL_BYTES + 5
        try:
            _begin(cluster, names, nbytes)
            contents = {rank: random.Random(rank).randbytes(nbytes) for rank in range(8)}
            await _protect(cluster, names, 1, contents, None)
            members = await _recover(cluster, names, list(lost), 1)
            for rank, name in enumerate(members):
                job = cluster.job(name)
                assert job.transfer.state == VERIFIED, (lost, job.transfer.reason)
                assert bytes(job.memory.holdings[2, 1].places[rank].image) == contents[rank]
        finally:
            cluster.close()

    for number, lost in enumerate(sets):
        looped(lose)(lost, tmp_path / str(number))
    print(f"{len(sets)} sets of one or two of eight nodes lost, all restored")
