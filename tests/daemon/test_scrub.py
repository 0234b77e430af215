"""The scrub: flipped bits in what is held are found, rebuilt from the group, and counted once."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster import PLAN, image, until
from daemonkit import Daemon, Trainee, eventually, looped
from flipping import FlipCluster, column, encoded

from ckptd.daemon.scrub import Scrub
from ckptd.image.digest import CELL_BYTES
from ckptd.v1 import common_pb2, coordinator_pb2, local_pb2

SIZE = 9 * CELL_BYTES + 17  # per rank; with two ranks a chunk ends within a rank's image


def names_of(count: int) -> list[str]:
    return [f"n{i}" for i in range(count)]


def capture(cluster: FlipCluster, name: str, step: int, content: Callable[[int], bytes]) -> None:
    """All ranks of a node capture `content(rank)`."""
    job = cluster.job(name)
    for trainer in job.living():
        place = job.grants[trainer.rank][step]
        place.image[:] = content(trainer.rank)
        captured = local_pb2.Captured(step=step, slot=place.slot, plan_hash=PLAN)
        cluster.nodes[name].protection.captured(job, job.captured(trainer, captured), trainer.rank)


async def protected(root: Path, count: int, parity: int, ranks_per_node: int = 2) -> FlipCluster:
    """A cluster that holds step 7, folded everywhere."""
    cluster = FlipCluster(root, count, parity, ranks_per_node=ranks_per_node)
    names = names_of(count)
    cluster.direct(names, cluster.roster(names, 1))
    for name in names:
        cluster.plan(name, SIZE)
    cluster.schedule(names, 1, [7])
    for name in names:
        cluster.capture(name, 7)
    await until(lambda: cluster.folded(7, names), "step 7 folded")
    return cluster


def check(cluster: FlipCluster, step: int = 7) -> None:
    """Every byte of every image and every parity is what it has to be."""
    held = {name: cluster.holding(name, 1, step) for name in cluster.nodes}
    for holding in held.values():
        for rank in holding.ranks:
            assert bytes(holding.places[rank].image) == image(rank, step, SIZE)
            assert not any(holding.places[rank].cells[SIZE:])
        if holding.protected_group:
            assert holding.parity is not None
            assert [bytes(chunk) for chunk in holding.parity.chunks] == encoded(holding, held)


@pytest.mark.parametrize(("count", "parity"), [(2, 1), (3, 1), (4, 2)])
@looped
async def test_wrong_cells_are_rebuilt_in_their_place_and_counted(
    tmp_path: Path, count: int, parity: int
) -> None:
    cluster = await protected(tmp_path, count, parity)
    try:
        node = cluster.nodes["n1"]
        holding = cluster.holding("n1", 1, 7)
        assert holding.parity is not None
        first, second = (holding.places[rank] for rank in holding.ranks)
        first.image[5] ^= 1
        first.image[4 * CELL_BYTES : 7 * CELL_BYTES] = bytes(3 * CELL_BYTES)
        first.cells[SIZE + 1] ^= 0x40  # zeros behind the image: they are part of the code, too
        second.image[-1] ^= 0x80
        for chunk in holding.parity.chunks:
            chunk[-1] ^= 2
        await node.scrub.round()
        check(cluster)
        assert node.scrub.corrupt_cells == node.scrub.healed_cells == 6 + parity
        cells = sum(len(part) for part in [first.cells, second.cells, *holding.parity.chunks])
        assert node.scrub.scrubbed_bytes == cells
        await node.scrub.round()
        assert (node.scrub.corrupt_cells, node.scrub.scrubbed_bytes) == (6 + parity, 2 * cells)
        assert holding.sealed and holding.folded
    finally:
        cluster.close()


@looped
async def test_a_whole_image_that_is_wrong_is_rebuilt(tmp_path: Path) -> None:
    cluster = await protected(tmp_path, 3, 1)
    try:
        holding = cluster.holding("n2", 1, 7)
        for place in holding.places.values():
            place.cells[:] = b"\xff" * len(place.cells)
        await cluster.nodes["n2"].scrub.round()
        check(cluster)
        assert cluster.nodes["n2"].scrub.healed_cells == 20
    finally:
        cluster.close()


@looped
async def test_more_than_m_is_reported_once_and_healed_when_a_peer_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = await protected(tmp_path, 4, 2)
    try:
        for name in ("n0", "n1", "n2"):
            column(cluster.holding(name, 1, 7), 3, 2)[100] ^= 8
        scrub = cluster.nodes["n0"].scrub
        with caplog.at_level(logging.ERROR, "ckptd.scrub"):
            await scrub.round()
            await scrub.round()
        (record,) = (record for record in caplog.records if record.name == "ckptd.scrub")
        assert "1 damaged cells stay" in record.getMessage() and "needed" in record.getMessage()
        assert (scrub.corrupt_cells, scrub.healed_cells) == (1, 0)
        holding = cluster.holding("n0", 1, 7)
        assert holding.sealed and holding.folded and not cluster.job("n0").aborted
        # One of the three is good again: now two are wrong, and m is two.
        column(cluster.holding("n2", 1, 7), 3, 2)[100] ^= 8
        await scrub.round()
        await cluster.nodes["n1"].scrub.round()
        check(cluster)
        assert (scrub.corrupt_cells, scrub.healed_cells) == (1, 1)
    finally:
        cluster.close()


@looped
async def test_a_peer_that_is_away_is_done_without(tmp_path: Path) -> None:
    cluster = await protected(tmp_path, 4, 2)
    try:
        holding = cluster.holding("n0", 1, 7)
        (cell,) = holding.data_cells(3, 1)
        cell[9] ^= 1
        before = {name: cluster.holding(name, 1, 7) for name in cluster.nodes}
        cluster.kill("n3")
        await cluster.nodes["n0"].scrub.round()
        assert bytes(holding.places[0].image) == image(0, 7, SIZE)
        assert cluster.nodes["n0"].scrub.healed_cells == 1
        assert [bytes(c) for c in holding.parity.chunks] == encoded(holding, before)  # type: ignore[union-attr]
    finally:
        cluster.close()


def _between(scrub: Scrub, call: int, act: Callable[[], None]) -> None:
    """`act` happens on the loop when the scrub's thread has just done its `call`-th work."""
    off_loop, seen = scrub._off_loop, [0]

    async def watched(work: Callable[[], Any]) -> Any:
        result = await off_loop(work)
        seen[0] += 1
        if seen[0] == call:
            act()
        return result

    scrub._off_loop = watched  # type: ignore[method-assign]


@pytest.mark.parametrize("call", [1, 2])
@looped
async def test_a_slot_that_changed_hands_meanwhile_is_left_alone(tmp_path: Path, call: int) -> None:
    """Released and granted again while its cells were digested (1), or while they were rebuilt (2)."""
    cluster = await protected(tmp_path, 3, 1, ranks_per_node=1)
    try:
        place = cluster.holding("n1", 1, 7).places[1]
        place.image[3] ^= 1
        stranger = b"\xab" * len(place.image)

        def reuse() -> None:
            cluster.job("n1").memory.release((1, 7))
            place.image[:] = stranger

        scrub = cluster.nodes["n1"].scrub
        _between(scrub, call, reuse)
        await scrub.round()
        assert bytes(place.image) == stranger
        assert scrub.healed_cells == 0
        assert scrub.corrupt_cells == call - 1
    finally:
        cluster.close()


@looped
async def test_a_damaged_image_of_an_unprotected_step_gives_the_step_up(tmp_path: Path) -> None:
    names = names_of(3)
    cluster = FlipCluster(tmp_path, 3, 1)
    try:
        cluster.direct(names, cluster.roster(names, 1))
        for name in names:
            cluster.plan(name, SIZE)
        cluster.schedule(names, 1, [7])
        cluster.capture("n0", 7)
        await until(lambda: cluster.holding("n0", 1, 7).sealed, "sealed")
        cluster.holding("n0", 1, 7).places[0].image[0] ^= 1
        await cluster.nodes["n0"].scrub.round()
        assert cluster.job("n0").aborted == {7}
        assert (1, 7) not in cluster.job("n0").memory.holdings
    finally:
        cluster.close()


@looped
async def test_a_node_alone_can_only_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cluster = FlipCluster(tmp_path, 1, 0)
    try:
        cluster.direct(["n0"], cluster.roster(["n0"], 1))
        cluster.plan("n0", SIZE)
        cluster.schedule(["n0"], 1, [7])
        cluster.capture("n0", 7)
        await until(lambda: cluster.folded(7, ["n0"]), "folded")
        cluster.holding("n0", 1, 7).places[0].image[0] ^= 1
        await cluster.nodes["n0"].scrub.round()
        assert "it has no parity" in caplog.text
        assert cluster.nodes["n0"].scrub.corrupt_cells == 1
        assert (1, 7) in cluster.job("n0").memory.holdings
    finally:
        cluster.close()


@looped
async def test_the_watermark_comes_first_and_what_was_suspected_before_it(tmp_path: Path) -> None:
    cluster = FlipCluster(tmp_path, 3, 1, slots=4)
    names = names_of(3)
    try:
        cluster.direct(names, cluster.roster(names, 1))
        for name in names:
            cluster.plan(name, SIZE)
        cluster.schedule(names, 1, [1, 2, 3])
        for step in (1, 2, 3):
            for name in names:
                cluster.capture(name, step)
            await until(lambda step=step: cluster.folded(step, names), "folded")  # type: ignore[misc]
        cluster.schedule(names, 1, [], watermark=2)
        await until(lambda: (1, 1) not in cluster.job("n0").memory.holdings, "step 1 is released")
        scrub, job = cluster.nodes["n0"].scrub, cluster.job("n0")
        looked: list[int] = []

        async def walk(part: Any, *, urgent: bool = False) -> None:
            looked.append(part.holding.step)

        scrub._walk = walk  # type: ignore[method-assign]
        await scrub.round()
        assert looked == [2, 2, 3, 3]
        looked.clear()
        job.suspects = {(1, 3), (1, 9)}
        await scrub._suspected()
        assert looked == [3, 3] and not job.suspects
    finally:
        cluster.close()


@looped
async def test_damaged_parity_that_a_fold_starts_from_is_healed_and_protection_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without healing every later step would start from the same damaged base, and be given up."""
    monkeypatch.setattr("ckptd.daemon.scrub._PAUSE_S", 600.0)  # no round comes before the fold does
    cluster = FlipCluster(tmp_path, 3, 1, slots=4)
    names = names_of(3)
    trunk = os.urandom(SIZE)

    def content(step: int) -> Callable[[int], bytes]:
        return lambda rank: bytes([step]) * 40 + trunk[40:]

    try:
        cluster.direct(names, cluster.roster(names, 1))
        for name in names:
            cluster.plan(name, SIZE)
        cluster.schedule(names, 1, [1, 2, 3])
        for name in names:
            capture(cluster, name, 1, content(1))
        await until(lambda: cluster.folded(1, names), "step 1 folded")
        parity = cluster.holding("n1", 1, 1).parity
        assert parity is not None
        parity.chunks[0][CELL_BYTES + 1] ^= 1
        task = asyncio.get_running_loop().create_task(cluster.nodes["n1"].scrub.run())
        try:
            await until(lambda: cluster.nodes["n1"].scrub.healed_cells == 1, "healed by the first round")
            parity.chunks[0][CELL_BYTES + 1] ^= 1
            for name in names:
                capture(cluster, name, 2, content(2))
            await until(lambda: 2 in cluster.job("n1").aborted, "step 2 is given up")
            for name in names:  # as the coordinator tells everybody
                cluster.job(name).apply(common_pb2.Schedule(generation=1, due=[3], aborted=[2]))
            await until(lambda: cluster.nodes["n1"].scrub.healed_cells == 2, "healed on suspicion")
            for name in names:
                capture(cluster, name, 3, content(3))
            await until(lambda: cluster.folded(3, names), "step 3 folded")
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        held = {name: cluster.holding(name, 1, 3) for name in names}
        for holding in held.values():
            assert holding.parity is not None
            assert [bytes(chunk) for chunk in holding.parity.chunks] == encoded(holding, held)
    finally:
        cluster.close()


@looped
async def test_an_image_that_a_generation_starts_from_is_healed_by_the_group_of_the_older_one(
    tmp_path: Path,
) -> None:
    """It was verified, then a bit flipped: the new group cannot fold it; the old parity is still there."""
    cluster = await protected(tmp_path, 3, 1, ranks_per_node=1)
    names = names_of(3)
    scrub = cluster.nodes["n0"].scrub
    task = asyncio.get_running_loop().create_task(scrub.run())
    try:
        roster = cluster.roster(names, 2, (1, 7))
        order = coordinator_pb2.TransferOrder(generation=2)
        cluster.direct(["n0"], roster, transfer=order)
        await until(lambda: (2, 7) in cluster.job("n0").memory.holdings, "n0 has verified its image")
        cluster.holding("n0", 2, 7).places[0].image[CELL_BYTES] ^= 1
        cluster.direct(["n1", "n2"], roster, transfer=order)
        await until(lambda: cluster.folded(7, names, 2), "folded by the new group")
        assert bytes(cluster.holding("n0", 2, 7).places[0].image) == image(0, 7, SIZE)
        assert scrub.healed_cells >= 1
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        cluster.close()


@looped
async def test_the_scrub_keeps_to_its_bandwidth(tmp_path: Path) -> None:
    cluster = await protected(tmp_path, 2, 1, ranks_per_node=1)
    try:
        node = cluster.nodes["n0"]
        node.scrub._settings = node.settings.model_copy(update={"scrub_bytes_per_s": 10 << 20})
        began = time.monotonic()
        await node.scrub.round()
        assert time.monotonic() - began >= node.scrub.scrubbed_bytes / (10 << 20)
    finally:
        cluster.close()


def test_a_real_daemon_scrubs_and_says_what_it_found() -> None:
    daemon = Daemon()
    try:
        trainee = Trainee(daemon, "job")
        trainee.plan(SIZE)
        slot = trainee.capture(1)
        trainee.protected(1)
        os.pwrite(trainee.arena, b"\x00\xff", slot * trainee.slot_bytes + CELL_BYTES)
        # A cell is counted when it is found, and the reason is told once a repair was tried.
        eventually(lambda: "it has no parity" in daemon.log.read_text(), "why it stays damaged is told")
        status = daemon.status()
        assert (status.cells_damaged, status.cells_healed, status.cells_refused) == (1, 0, 0)
        assert status.scrubbed_bytes >= SIZE
        trainee.close()
    finally:
        daemon.close()
