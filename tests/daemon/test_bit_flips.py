"""Random bit flips in memory, records and on the wire: all detected, healed where m allows, none loaded."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
from cluster import JOB, image, until
from daemonkit import looped
from flipping import SHORT_S, Flip, FlipCluster, column, encoded

from ckptd.daemon.adopt import adopt
from ckptd.errors import NotEnoughCells
from ckptd.image.digest import CELL_BYTES
from ckptd.memory import records
from ckptd.memory.holding import Holding, chunk_cells
from ckptd.memory.rebuild import Rebuild
from ckptd.v1 import common_pb2, coordinator_pb2

NAMES = ["n0", "n1", "n2", "n3"]
SIZE = 5 * CELL_BYTES + 17
VERIFIED, FAILED = coordinator_pb2.Transfer.VERIFIED, coordinator_pb2.Transfer.FAILED
# (in every run, with --soak): 60 and 1,000 in all.
COUNTS = {"memory": (20, 400), "decode": (10, 200), "restore": (4, 60), "records": (8, 140)}
COUNTS |= {"contributions": (9, 140), "fetches": (6, 30), "shares": (3, 30)}
FRAMES = [
    ("seal", "length"),
    ("seal", "header"),
    ("seal", "payload"),
    ("accepted", "header"),
    ("offer", "header"),
    ("terms", "length"),
    ("terms", "header"),
    ("contribution", "header"),
    ("contribution", "payload"),
]
FETCH_FRAMES = [("fetch", "header"), ("cells", "header"), ("cells", "payload")]
SHARE_FRAMES = [("decode", "header"), ("cells", "header"), ("cells", "payload")]


class Tally(Counter[str]):
    """What was injected, and what became of it."""

    def __init__(self, kind: str, soak: bool, seed: int) -> None:
        super().__init__()
        self.kind, self.wanted = kind, COUNTS[kind][soak]
        self.rng = random.Random(seed)
        self.seed = seed

    @property
    def open(self) -> bool:
        return self["injected"] < self.wanted

    def end(self) -> None:
        assert self["detected"] == self["injected"], dict(self)
        assert self["healed"] + self["refused"] == self["injected"], dict(self)
        assert not self["loaded wrong"], dict(self)
        print(
            f"seed {self.seed}, {self['injected']} flips ({self.kind}): {self['detected']} detected,"
            f" {self['healed']} healed, {self['refused']} refused, {self['loaded wrong']} loaded wrong"
        )


def flip(view: memoryview, rng: random.Random) -> int:
    """Flips one bit; returns which.  Every fourth is near the front, where an image has its header."""
    bit = rng.randrange(8 * min(len(view), 64) if rng.random() < 0.25 else 8 * len(view))
    view[bit // 8] ^= 1 << bit % 8
    return bit


async def begin(cluster: FlipCluster, names: list[str]) -> None:
    cluster.direct(names, cluster.roster(names, 1))
    for name in names:
        cluster.plan(name, SIZE)


async def protect(cluster: FlipCluster, names: list[str], step: int, watermark: int | None = None) -> None:
    """All nodes capture `step` and fold it."""
    cluster.schedule(names, 1, [step], watermark)
    for name in names:
        cluster.capture(name, step)
    await until(lambda: cluster.folded(step, names), f"step {step} folded")


def right(held: Mapping[str, Holding], names: list[str], step: int) -> bool:
    """Whether every image and every parity is, byte for byte, what it has to be."""
    for rank, name in enumerate(names):
        parity = held[name].parity
        assert parity is not None
        if bytes(held[name].places[rank].image) != image(rank, step, SIZE):
            return False
        if [bytes(chunk) for chunk in parity.chunks] != encoded(held[name], held):
            return False
    return True


def columns(
    held: Mapping[str, Holding], names: list[str], count: int, rng: random.Random
) -> list[memoryview]:
    """The cells that `count` of these nodes have of one column of one stripe."""
    holding = held[names[0]]
    stripe = rng.randrange(holding.geometry.nodes)
    cell = rng.randrange(holding.chunk_bytes // CELL_BYTES)
    found = [column(held[name], stripe, cell) for name in rng.sample(names, count)]
    return [view for view in found if not view.readonly]  # beyond an image there is nothing that could flip


@looped
async def test_flips_in_memory_are_healed_by_the_scrub(tmp_path: Path, soak: bool) -> None:
    """One, two or three of a column, with m = 2: a third is one too many until it is good again."""
    tally = Tally("memory", soak, 70)
    cluster = FlipCluster(tmp_path, 4, 2)
    try:
        await begin(cluster, NAMES)
        await protect(cluster, NAMES, 7)
        held = {name: cluster.holding(name, 1, 7) for name in NAMES}
        while tally.open:
            cells = columns(held, NAMES, min(tally.rng.choice([1, 1, 2, 3]), tally.wanted), tally.rng)
            cells = cells[: tally.wanted - tally["injected"]]
            bits = [flip(cell, tally.rng) for cell in cells]
            found, healed = await _scrub(cluster)
            tally.update(injected=len(cells), detected=found)
            if len(cells) > 2:
                assert healed == 0
                tally["refused"] += 1
                cells[0][bits[0] // 8] ^= 1 << bits[0] % 8
                _, healed = await _scrub(cluster)
            tally["healed"] += healed
            tally["loaded wrong"] += not right(held, NAMES, 7)
        tally.end()
    finally:
        cluster.close()


async def _scrub(cluster: FlipCluster) -> tuple[int, int]:
    """One round everywhere; returns how many damaged cells were new, and how many were healed."""
    scrubs = [node.scrub for node in cluster.nodes.values()]
    before = [(scrub.corrupt_cells, scrub.healed_cells) for scrub in scrubs]
    for scrub in scrubs:
        await scrub.round()
    after = [(scrub.corrupt_cells, scrub.healed_cells) for scrub in scrubs]
    found, healed = (sum(a[i] - b[i] for a, b in zip(after, before, strict=True)) for i in (0, 1))
    return found, healed


@looped
async def test_flips_in_what_a_decode_reads_are_left_out(
    tmp_path: Path, soak: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """One node of four is lost and m is two: one wrong cell of a column can be spared, a second cannot."""
    tally = Tally("decode", soak, 72)
    cluster = FlipCluster(tmp_path, 4, 2)
    try:
        await begin(cluster, NAMES)
        await protect(cluster, NAMES, 7)
        held = {name: cluster.holding(name, 1, 7) for name in NAMES}
        while tally.open:
            lost = tally.rng.randrange(4)
            alive = [name for name in NAMES if name != NAMES[lost]]
            chunk = tally.rng.randrange(2)
            stripe = held[NAMES[0]].geometry.stripe_of(lost, chunk)
            cell = tally.rng.randrange(held[NAMES[0]].chunk_bytes // CELL_BYTES)
            cells = [column(held[name], stripe, cell) for name in alive]
            if any(view.readonly for view in cells) or column(held[NAMES[lost]], stripe, cell).readonly:
                continue
            cells = tally.rng.sample(
                cells, min(tally.rng.choice([1, 1, 2]), tally.wanted - tally["injected"])
            )
            for view in cells:
                flip(view, tally.rng)
            tally["injected"] += len(cells)
            caplog.clear()
            decoded = await _decode(cluster, lost, alive, tally)
            assert decoded == (len(cells) == 1)
            tally["healed" if decoded else "refused"] += len(cells)
            # A symbol that was not needed was not looked at: then the scrub finds what is wrong there.
            read = any(record.name == "ckptd.rebuild" for record in caplog.records)
            found, _ = await _scrub(cluster)
            tally["detected"] += found
            tally["met by the decode"] += len(cells) if read else 0
        assert right(held, NAMES, 7)
        tally.end()
    finally:
        cluster.close()


async def _decode(cluster: FlipCluster, lost: int, alive: list[str], tally: Tally) -> bool:
    """Whether the lost node's image could be decoded; what was written of it is compared."""
    rebuild = Rebuild(
        header=common_pb2.Header(job=JOB, generation=1, timeout_ms=5000),
        sender="test",
        snapshot=(1, 7),
        position=NAMES[lost],
        group=NAMES,
        parity=2,
        sources=[(name, cluster.nodes[name].bulk_address) for name in alive],
        timeout_s=5.0,
    )
    truth = image(lost, 7, SIZE).ljust(6 * CELL_BYTES, b"\0")
    written: dict[int, bytes] = {}

    def run() -> None:
        seal = rebuild.fetch_seals()
        for chunk in range(rebuild.geometry.data_chunks):
            first, count = chunk_cells(seal, chunk, rebuild.chunk_bytes)
            written[first] = bytes(rebuild.cells(chunk, 0, count))

    try:
        await asyncio.get_running_loop().run_in_executor(None, run)
        decoded = True
    except NotEnoughCells:
        decoded = False
    for first, cells in written.items():
        start = first * CELL_BYTES
        tally["loaded wrong"] += cells != truth[start : start + len(cells)]
    return decoded


@looped
async def test_flips_in_an_own_image_are_refused_and_rebuilt_by_peers(tmp_path: Path, soak: bool) -> None:
    tally = Tally("restore", soak, 73)
    cluster = FlipCluster(tmp_path, 4, 2)
    try:
        await begin(cluster, NAMES)
        await protect(cluster, NAMES, 7)
        generation = 1
        while tally.open:
            rank = tally.rng.randrange(4)
            victim = NAMES[rank]
            flip(cluster.holding(victim, generation, 7).places[rank].image, tally.rng)
            tally["injected"] += 1
            start = (generation, 7)
            await _transfer(cluster, generation + 1, start, None)
            refused = cluster.job(victim).transfer
            assert refused.state == FAILED and "1 of 6 cells differ" in refused.reason, refused
            tally["detected"] += 1
            await _transfer(cluster, generation + 2, start, victim)
            generation += 2
            assert cluster.job(victim).transfer.state == VERIFIED, cluster.job(victim).transfer
            await until(lambda: cluster.folded(7, NAMES, generation), "protected again")  # noqa: B023
            held = {name: cluster.holding(name, generation, 7) for name in NAMES}
            ok = right(held, NAMES, 7)
            tally["healed" if ok else "loaded wrong"] += 1
            cluster.schedule(NAMES, generation, [], watermark=7)
        tally.end()
    finally:
        cluster.close()


async def _transfer(
    cluster: FlipCluster, generation: int, start: tuple[int, int], rebuilt: str | None
) -> None:
    """All nodes go on from `start` in a new generation; `rebuilt` gets its image from the others."""
    roster = cluster.roster(NAMES, generation, start)
    for name in NAMES:
        order = coordinator_pb2.TransferOrder(generation=generation)
        if name == rebuilt:
            order.positions.append(name)
            order.group.extend(NAMES)
            order.parity = cluster.parity
            for other in NAMES:
                if other != name:
                    order.sources.add(
                        node=other, bulk_address=cluster.nodes[other].bulk_address, position=other
                    )
        cluster.direct([name], roster, transfer=order)
    await until(
        lambda: all(cluster.job(name).transfer.state in (VERIFIED, FAILED) for name in NAMES), "transfers end"
    )


@looped
async def test_flips_in_records_are_refused_and_the_group_gives_back_what_they_named(
    tmp_path: Path, soak: bool
) -> None:
    tally = Tally("records", soak, 74)
    cluster = FlipCluster(tmp_path, 4, 2)
    try:
        await begin(cluster, NAMES)
        await protect(cluster, NAMES, 7)
        job = cluster.job("n1")
        job.stop_through, job.owner_uid = 0, 1234
        job.save()
        record = job.directory / "job.record"
        holding = records.holding_path(job.directory, 1, 7)
        report, content = job.report(), {path: path.read_bytes() for path in (record, holding)}
        while tally.open:
            path = tally.rng.choice([record, holding])
            damaged = bytearray(content[path])
            flip(memoryview(damaged), tally.rng)
            path.write_bytes(damaged)
            tally["injected"] += 1
            found = adopt(tmp_path / "n1", "n1", lambda: None)[JOB]
            if path == holding:  # nothing is believed of it, and it is gone
                assert not found.memory.holdings and not path.exists()
                tally["refused"] += 1
            else:  # it lies there twice
                assert found.owner_uid == 1234 and found.report().holdings == report.holdings
                tally["healed"] += 1
            tally["detected"] += 1
            path.write_bytes(content[path])
        # A node whose record is damaged while no daemon is there: its peers give everything back.
        damaged = bytearray(content[holding])
        flip(memoryview(damaged), tally.rng)
        holding.write_bytes(damaged)
        cluster.kill("n1")
        cluster.add("n1").adopt()
        assert not cluster.job("n1").memory.holdings
        await _transfer(cluster, 2, (1, 7), "n1")
        assert all(cluster.job(name).transfer.state == VERIFIED for name in NAMES)
        await until(lambda: cluster.folded(7, NAMES, 2), "protected again")
        assert right({name: cluster.holding(name, 2, 7) for name in NAMES}, NAMES, 7)
        tally.end()
    finally:
        cluster.close()


@looped
async def test_flips_in_contributions_are_detected_and_sent_again(tmp_path: Path, soak: bool) -> None:
    tally = Tally("contributions", soak, 71)
    names = NAMES[:3]
    cluster = FlipCluster(tmp_path, 3, 1, wired=True, timeout_s=SHORT_S)
    try:
        await begin(cluster, names)
        while tally.open:
            tally["injected"] += 1
            step = tally["injected"]
            damage = Flip(*FRAMES[step % len(FRAMES)], tally.rng)
            cluster.flips.append(damage)
            await protect(cluster, names, step, watermark=step - 1 if step > 1 else None)
            await until(damage.done.is_set, f"{damage} happened")
            await until(damage.ended.is_set, f"{damage} ended its connection")
            tally["detected"] += 1
            held = {name: cluster.holding(name, 1, step) for name in names}
            seals = all(
                held[name].seals[other] == held[other].seals[other] for name in names for other in names
            )
            tally["healed" if seals and right(held, names, step) else "loaded wrong"] += 1
        tally.end()
    finally:
        cluster.close()


@looped
async def test_flips_in_what_is_fetched_are_detected_and_another_symbol_is_used(
    tmp_path: Path, soak: bool
) -> None:
    tally = Tally("fetches", soak, 75)
    cluster = FlipCluster(tmp_path, 4, 2, wired=True)
    try:
        await begin(cluster, NAMES)
        await protect(cluster, NAMES, 7)
        held = {name: cluster.holding(name, 1, 7) for name in NAMES}
        while tally.open:
            tally["injected"] += 1
            (cell,) = columns(held, NAMES, 1, tally.rng) or (held["n0"].places[0].cells[:CELL_BYTES],)
            flip(cell, tally.rng)
            damage = Flip(*FETCH_FRAMES[tally["injected"] % len(FETCH_FRAMES)], tally.rng)
            cluster.flips.append(damage)
            _, healed = await _scrub(cluster)
            assert damage.done.is_set(), damage
            tally["detected"] += 1
            tally["healed" if healed == 1 and right(held, NAMES, 7) else "loaded wrong"] += 1
        tally.end()
    finally:
        cluster.close()


@looped
async def test_flips_in_a_shared_decode_are_detected_and_its_image_is_right(
    tmp_path: Path, soak: bool
) -> None:
    """The whole of a lost image comes in shares from survivors, and a bit of that flips."""
    tally = Tally("shares", soak, 76)
    cluster = FlipCluster(tmp_path, 4, 2, wired=True)
    try:
        await begin(cluster, NAMES)
        await protect(cluster, NAMES, 7)
        generation = 1
        while tally.open:
            tally["injected"] += 1
            victim = tally.rng.choice(NAMES)
            lost = cluster.holding(victim, generation, 7)
            (place,) = lost.places.values()
            place.image[:] = bytes(len(place.image))
            lost.rank_seals.clear()  # as a failed verification leaves it
            del lost.seals[victim]
            damage = Flip(*SHARE_FRAMES[tally["injected"] % len(SHARE_FRAMES)], tally.rng)
            cluster.flips.append(damage)
            await _transfer(cluster, generation + 1, (generation, 7), victim)
            assert damage.done.is_set(), damage
            tally["detected"] += 1
            generation += 1
            transfer = cluster.job(victim).transfer
            assert transfer.state == VERIFIED, transfer.reason
            await until(lambda: cluster.folded(7, NAMES, generation), "protected again")  # noqa: B023
            held = {name: cluster.holding(name, generation, 7) for name in NAMES}
            tally["healed" if right(held, NAMES, 7) else "loaded wrong"] += 1
            cluster.schedule(NAMES, generation, [], watermark=7)
        tally.end()
    finally:
        cluster.close()


@looped
async def test_an_image_that_flips_before_it_is_contributed_costs_its_step_and_no_more(
    tmp_path: Path,
) -> None:
    cluster = FlipCluster(tmp_path, 3, 1)
    names = NAMES[:3]
    try:
        await begin(cluster, names)
        cluster.schedule(names, 1, [1, 2])
        cluster.capture("n0", 1)
        await until(lambda: cluster.job("n0").memory.holdings[1, 1].sealed, "n0 is sealed")
        cluster.holding("n0", 1, 1).places[0].image[CELL_BYTES + 5] ^= 4
        for name in names[1:]:
            cluster.capture(name, 1)
        await until(lambda: 1 in cluster.job("n0").aborted, "n0 gives the step up")
        for name in names:
            cluster.capture(name, 2)
        await until(lambda: cluster.folded(2, names), "step 2 folded")
    finally:
        cluster.close()
