"""A node's bulk plane against peers that are wrong, late, stale or damaged: refused, counted, harmless."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cluster import JOB, SIZES, Cluster, image, until
from daemonkit import looped

from ckptd.errors import CkptdError, NotEnoughCells
from ckptd.image.digest import CELL_BYTES, cell_digests
from ckptd.memory.bulk import BLOCK_CELLS, Connection, Refusal, message
from ckptd.memory.holding import node_digests
from ckptd.memory.rebuild import Rebuild
from ckptd.memory.shares import collect
from ckptd.v1 import bulk_pb2, common_pb2

NAMES = ["n0", "n1", "n2"]
SIZE = 4 * CELL_BYTES
CHUNK = 2 * CELL_BYTES  # of three nodes with one parity: half an image


Lie = Callable[[Connection, bulk_pb2.BulkHeader], None]


class Mallory:
    """Speaks for n1 and n2 to n0, which has sealed step 5 itself and waits for the others."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.images = {node: random.Random(node).randbytes(SIZE) for node in ("n1", "n2")}

    @property
    def job(self) -> Any:
        return self.cluster.job("n0")

    @property
    def holding(self) -> Any:
        return self.job.memory.holdings[1, 5]

    def seal(self, node: str, **changes: Any) -> bulk_pb2.SealRecord:
        rank = bulk_pb2.RankSeal(
            rank=int(node[1]),
            image_bytes=SIZE,
            plan_hash=bytes(16),
            cell_digests=cell_digests(self.images[node]),
        )
        fields = {
            "job": JOB,
            "generation": 1,
            "step": 5,
            "node": node,
            "ranks": [rank],
            "cell_bytes": CELL_BYTES,
        }
        return bulk_pb2.SealRecord(**{**fields, **changes})

    async def send(
        self,
        body: dict[str, Any],
        payload: bytes = b"",
        sender: str = "n1",
        job: str = JOB,
        generation: int = 1,
    ) -> bulk_pb2.BulkHeader:
        """One frame on a connection of its own, and its answer."""

        def talk() -> bulk_pb2.BulkHeader:
            connection = Connection.open(self.cluster.nodes["n0"].bulk_address, 5.0)
            header = common_pb2.Header(job=job, generation=generation, timeout_ms=5000)
            try:
                frame = bulk_pb2.BulkHeader(header=header, sender=sender, **body)
                return connection.request(frame, [memoryview(payload)])
            finally:
                connection.close()

        return await asyncio.get_running_loop().run_in_executor(None, talk)

    async def send_seal(self, node: str, record: bulk_pb2.SealRecord | None = None, **where: Any) -> None:
        text = b"".join(message((record or self.seal(node)).SerializeToString()))
        await self.send({"seal": bulk_pb2.Seal(step=5)}, text, **{"sender": node, **where})

    async def contribute(
        self, node: str, cells: bytes | None = None, offer: dict[str, Any] | None = None, **changes: Any
    ) -> bulk_pb2.BulkHeader:
        """The node's whole chunk of n0's stripe: an offer, and one frame if it is wanted."""
        chunk = {"n1": 0, "n2": 1}[node]  # data symbols of stripe 0
        content = self.images[node][chunk * CHUNK : (chunk + 1) * CHUNK] if cells is None else cells
        fields = {"step": 5, "stripe": 0, "chunk": chunk, "chunk_bytes": CHUNK}
        opening = bulk_pb2.Offer(**{**fields, **(offer or {})})
        frame = bulk_pb2.Contribution(**{"final": True, **changes})

        def talk() -> bulk_pb2.BulkHeader:
            connection = Connection.open(self.cluster.nodes["n0"].bulk_address, 5.0)
            header = common_pb2.Header(job=JOB, generation=1, timeout_ms=5000)
            try:
                said = {"header": header, "sender": node}
                answer = connection.request(bulk_pb2.BulkHeader(offer=opening, **said))
                if not answer.terms.wanted:
                    return answer
                payload = [memoryview(content)]
                return connection.request(bulk_pb2.BulkHeader(contribution=frame, **said), payload)
            finally:
                connection.close()

        return await asyncio.get_running_loop().run_in_executor(None, talk)

    async def complete(self) -> None:
        """Everything right at last: the step is folded, with the right parity."""
        for node in ("n1", "n2"):
            await self.send_seal(node)
        for node in ("n1", "n2"):
            await self.contribute(node)
        await until(lambda: self.holding.folded, "folded")
        parity = bytes(self.holding.parity.chunks[0])
        first, second = self.images["n1"][:CHUNK], self.images["n2"][CHUNK:]
        assert parity == bytes(a ^ b for a, b in zip(first, second, strict=True))  # m = 1 is XOR


@asynccontextmanager
async def mallory(root: Path, peers: Lie | None = None) -> AsyncIterator[Mallory]:
    """With `peers`, somebody listens at the addresses of n1 and n2; nobody does otherwise."""
    cluster = Cluster(root, 3, 1)
    try:
        for name in ("n1", "n2"):
            if peers is None:
                cluster.servers[name].close()
            else:
                cluster.servers[name]._handler = peers
        cluster.direct(["n0"], cluster.roster(NAMES, 1))
        cluster.plan("n0", SIZE)
        cluster.schedule(["n0"], 1, [5])
        cluster.capture("n0", 5)
        one = Mallory(cluster)
        await until(lambda: one.holding.sealed, "n0 is sealed")
        yield one
    finally:
        cluster.close()


async def refused(call: Any, what: str) -> None:
    with pytest.raises(Refusal, match=what):
        await call


@looped
async def test_seals_that_are_wrong_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    async with mallory(tmp_path) as m:
        wrong = "seal record of n1 is wrong"
        await refused(m.send_seal("n1", m.seal("n1", job="other")), wrong)
        await refused(m.send_seal("n1", m.seal("n1", generation=2)), wrong)
        await refused(m.send_seal("n1", m.seal("n1", step=6)), wrong)
        await refused(m.send_seal("n1", m.seal("n2")), wrong)  # speaks for somebody else
        await refused(m.send_seal("n1", m.seal("n1", ranks=[])), wrong)
        await refused(m.send_seal("n1", m.seal("n1", cell_bytes=4096)), wrong)
        await refused(m.send_seal("n1", job="nobody"), "no job nobody")
        await refused(m.send_seal("n1", generation=2), "still at generation 1")
        garbage = b"".join(message(b"\xff" * 9))
        await refused(m.send({"seal": bulk_pb2.Seal(step=5)}, garbage), "does not parse")
        await refused(m.send({"accepted": bulk_pb2.Accepted()}), "is no request")
        m.images["n9"] = m.images["n1"]
        await refused(m.send_seal("n9"), "is no peer")
        # Nobody tells a node what it sealed itself.
        m.images["n0"] = m.images["n1"]
        await refused(m.send_seal("n0"), "is no peer")
        assert set(m.holding.seals) == {"n0"}
        assert m.holding.seals["n0"].ranks[0].cell_digests == cell_digests(image(0, 5, SIZE))
        await m.complete()


@looped
async def test_a_node_never_believes_to_be_sealed_by_others(tmp_path: Path) -> None:
    async with mallory(tmp_path) as m:
        m.images["n0"] = m.images["n1"]
        record = m.seal("n0", step=6)
        text = b"".join(message(record.SerializeToString()))
        await refused(m.send({"seal": bulk_pb2.Seal(step=6)}, text, sender="n0"), "is no peer")
        found = m.job.memory.holdings.get((1, 6))
        assert found is None or not found.sealed


@looped
async def test_a_stale_generation_changes_nothing(tmp_path: Path) -> None:
    async with mallory(tmp_path) as m:
        await m.send_seal("n1")
        m.cluster.direct(["n0"], m.cluster.roster(NAMES, 2))
        before = m.job.report().SerializeToString()
        stale = "generation 2"
        await refused(m.send_seal("n2"), stale)
        await refused(m.contribute("n1"), stale)
        fetch = bulk_pb2.Fetch(snapshot_generation=1, step=5, position="n0", cells=1, chunk_bytes=CHUNK)
        await refused(m.send({"fetch": fetch}), stale)
        assert m.job.report().SerializeToString() == before


@looped
async def test_contributions_that_are_wrong_are_refused_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptd.memory.bulk._PARTING_S", 20.0)  # both ends are held up together here
    async with mallory(tmp_path) as m:
        await refused(m.contribute("n1"), "no seal record of n1")
        for node in ("n1", "n2"):
            await m.send_seal(node)
        good = m.images["n1"][:CHUNK]
        await refused(m.contribute("n1", good[:-1]), "whole cells travel")
        await refused(m.contribute("n1", bytes((BLOCK_CELLS + 1) * CELL_BYTES)), "whole cells travel")
        for chunk_bytes in (0, CHUNK - 1, CHUNK + 1, CELL_BYTES, 1 << 62):
            await refused(m.contribute("n1", offer={"chunk_bytes": chunk_bytes}), "chunks of")
        await refused(m.contribute("n1", offer={"stripe": 1}), "is not of stripe 1")
        await refused(m.contribute("n1", offer={"chunk": 1}), "is not of stripe 0")
        await refused(m.contribute("n1", offer={"chunk": 7}), "is not of stripe 0")
        await refused(m.contribute("n1", first=1), "whole cells travel")
        await refused(m.contribute("n1", good[:CELL_BYTES], first=1), "out of turn|changed on their way")
        await refused(m.contribute("n1", first=2, cells=b""), "ends after 0 cells|out of turn")
        await refused(m.contribute("n1", first=1 << 60, cells=b""), "whole cells travel")
        await refused(m.contribute("n1", delta=True), "another mode")
        # The last word before the last cell: its parity would lack the rest.
        await refused(m.contribute("n1", good[:CELL_BYTES]), "ends after 1 cells, expected 2")
        await m.complete()


@looped
async def test_cells_that_changed_on_their_way_are_counted_and_never_folded(tmp_path: Path) -> None:
    async with mallory(tmp_path) as m:
        for node in ("n1", "n2"):
            await m.send_seal(node)
        for at in (0, CELL_BYTES - 1, CHUNK - 1):
            flipped = bytearray(m.images["n1"][:CHUNK])
            flipped[at] ^= 0x04
            await refused(m.contribute("n1", bytes(flipped)), "changed on their way")
        assert m.cluster.nodes["n0"].protection.corrupt_cells == 3
        await m.complete()


@looped
async def test_everything_sent_three_times_counts_once(tmp_path: Path) -> None:
    async with mallory(tmp_path) as m:
        for node in ("n1", "n2") * 3:
            await m.send_seal(node)
        await asyncio.gather(*(m.contribute("n1") for _ in range(3)))
        assert not m.holding.folded
        await m.complete()
        await m.contribute("n1")  # after the fold, too
        assert m.holding.folded


@looped
async def test_a_seal_that_comes_again_makes_nobody_send_again(tmp_path: Path) -> None:
    """Else one broken connection in a group would double everybody's traffic."""
    sent: list[str] = []

    def note(connection: Connection, frame: bulk_pb2.BulkHeader) -> None:
        connection.receive_into(memoryview(bytearray(frame.payload_bytes)))
        sent.append(frame.WhichOneof("body") or "")
        if frame.WhichOneof("body") == "offer":
            connection.send(bulk_pb2.BulkHeader(terms=bulk_pb2.Terms(wanted=False)))
        else:
            connection.send(bulk_pb2.BulkHeader(accepted=bulk_pb2.Accepted()))

    async with mallory(tmp_path, note) as m:
        for node in ("n1", "n2"):
            await m.send_seal(node)
        await until(lambda: sent.count("offer") == 2, "n0's two chunks are sent")
        for node in ("n1", "n2") * 2:
            await m.send_seal(node)
        m.cluster.nodes["n0"].protection.resend(m.job)  # what would come next, in order
        await until(lambda: sent.count("seal") == 4, "its seal record, once more to both")
        assert sent.count("offer") <= 4


@looped
async def test_what_nobody_needs_any_more_is_taken_and_dropped(tmp_path: Path) -> None:
    """A late peer is told that it is not wanted, so that it stops; nothing comes back to life."""
    async with mallory(tmp_path) as m:
        await m.send_seal("n1")
        m.job.abort(5)
        await m.send_seal("n2")
        answer = await m.contribute("n1")
        assert answer.WhichOneof("body") == "terms" and not answer.terms.wanted
        assert (1, 5) not in m.job.memory.holdings and not m.job.memory.folds
        m.cluster.schedule(["n0"], 1, [9], watermark=8)
        await m.send(
            {"seal": bulk_pb2.Seal(step=7)}, b"".join(message(m.seal("n1", step=7).SerializeToString()))
        )
        assert not m.job.memory.holdings


@looped
async def test_cells_are_given_only_where_they_are_certain(tmp_path: Path) -> None:
    async with mallory(tmp_path) as m:

        def fetch(**changes: Any) -> Any:
            fields = {"snapshot_generation": 1, "step": 5, "position": "n0", "cells": 1, "chunk_bytes": CHUNK}
            return m.send({"fetch": bulk_pb2.Fetch(**{**fields, **changes})})

        await refused(fetch(parity=True), "is not folded")
        await refused(fetch(position="n1"), "stands for n0, not n1")
        await refused(fetch(step=6), "holds no step 6")
        await refused(fetch(snapshot_generation=7), "of generation 7")
        await refused(fetch(seal_record=True, position="n2"), "no seal record of n2")
        for cells in (0, BLOCK_CELLS + 1, 1 << 40):
            await refused(fetch(cells=cells), "asked for")
        await refused(fetch(first_cell=1 << 40), "asked for")
        await refused(fetch(first_cell=1 << 40, chunk_bytes=1 << 62), "chunks of")
        answer = await fetch(cells=BLOCK_CELLS, index=1 << 20)  # beyond the image there are zeros
        assert answer.payload_bytes == BLOCK_CELLS * CELL_BYTES
        await m.complete()
        assert (await fetch(parity=True, cells=2)).payload_bytes == CHUNK
        await refused(fetch(parity=True, cells=3), "of a chunk of")
        await refused(fetch(parity=True, index=1), "is not folded")
        await refused(fetch(parity=True, chunk_bytes=CELL_BYTES), "of a chunk of")
        # A step of which only seals of others are here holds no image.
        await m.send(
            {"seal": bulk_pb2.Seal(step=6)}, b"".join(message(m.seal("n1", step=6).SerializeToString()))
        )
        await refused(fetch(step=6), "is not sealed")


# Rebuilding from damaged holders


class _Target:
    """A node's image in plain memory."""

    def __init__(self, out: bytearray) -> None:
        self.out = memoryview(out)

    def data_cells(self, first: int, count: int) -> list[memoryview]:
        return [self.out[first * CELL_BYTES : (first + count) * CELL_BYTES]]

    def write_cells(self, first: int, cells: memoryview) -> None:
        self.out[first * CELL_BYTES : first * CELL_BYTES + len(cells)] = cells


async def _rebuild(cluster: Cluster, lost: str, sources: list[str], step: int) -> tuple[Rebuild, bytes]:
    """The image of `lost` as a spare would rebuild it; cells beyond it are an error."""
    holding = cluster.job(sources[0]).memory.holdings[1, step]
    rebuild = Rebuild(
        header=common_pb2.Header(job=JOB, generation=1, timeout_ms=5000),
        sender="spare",
        snapshot=(1, step),
        position=lost,
        group=holding.group,
        parity=cluster.parity,
        sources=[(name, cluster.nodes[name].bulk_address) for name in sources],
        timeout_s=5.0,
    )
    loop = asyncio.get_running_loop()
    seal = await loop.run_in_executor(None, rebuild.fetch_seals)
    out = bytearray(len(node_digests(seal)) // 16 * CELL_BYTES)

    await loop.run_in_executor(None, collect, rebuild, _Target(out), lambda: None)
    return rebuild, bytes(out)


async def _protected(root: Path, count: int, parity: int, size: int) -> tuple[Cluster, list[str]]:
    cluster, names = Cluster(root, count, parity), [f"n{i}" for i in range(count)]
    cluster.direct(names, cluster.roster(names, 1))
    for name in names:
        cluster.plan(name, size)
    cluster.schedule(names, 1, [5])
    for name in names:
        cluster.capture(name, 5)
    await until(lambda: cluster.folded(5, names), "step 5")
    return cluster, names


@looped
async def test_a_wrong_cell_costs_that_cell_and_no_other(tmp_path: Path) -> None:
    """Every survivor is damaged in other cells: each cell alone has still enough good symbols."""
    cluster, names = await _protected(tmp_path, 4, 2, SIZES[3])
    try:
        for index, name in enumerate(["n0", "n2", "n3"]):
            holding = cluster.job(name).memory.holdings[1, 5]
            # Cell index mod 3 of every chunk, data and parity, is damaged on this node.
            cells_per_chunk = holding.chunk_bytes // CELL_BYTES
            whole = holding.places[names.index(name)].image
            for cell in range(len(whole) // CELL_BYTES):
                if cell % cells_per_chunk % 3 == index:
                    whole[cell * CELL_BYTES + 9] ^= 1
            for chunk in holding.parity.chunks if holding.parity else []:
                for cell in range(index, cells_per_chunk, 3):
                    chunk[cell * CELL_BYTES + 9] ^= 1
        _, found = await _rebuild(cluster, "n1", ["n0", "n2", "n3"], 5)
        assert found[: SIZES[3]] == image(1, 5, SIZES[3]) and not any(found[SIZES[3] :])
        # The same cell wrong on two of three: that cell is lost, and the message counts.
        other = cluster.job("n2").memory.holdings[1, 5]
        other.places[2].image[:CELL_BYTES] = bytes(CELL_BYTES)
        assert other.parity is not None
        for chunk in other.parity.chunks:
            chunk[:CELL_BYTES] = bytes(CELL_BYTES)
        with pytest.raises(NotEnoughCells, match="2 good symbols needed, 1 found"):
            await _rebuild(cluster, "n1", ["n0", "n2", "n3"], 5)
    finally:
        cluster.close()


@looped
async def test_seal_records_are_gathered_from_whoever_has_them(tmp_path: Path) -> None:
    """No survivor has all of them any more, and together they do."""
    cluster, _ = await _protected(tmp_path, 4, 2, SIZES[2])
    try:
        del cluster.job("n0").memory.holdings[1, 5].seals["n1"]
        del cluster.job("n2").memory.holdings[1, 5].seals["n3"]
        _, found = await _rebuild(cluster, "n1", ["n0", "n2"], 5)
        assert found[: SIZES[2]] == image(1, 5, SIZES[2])
        del cluster.job("n2").memory.holdings[1, 5].seals["n1"]
        with pytest.raises(NotEnoughCells, match="seal records of n1"):
            await _rebuild(cluster, "n1", ["n0", "n2"], 5)
    finally:
        cluster.close()


def _answering(header: bulk_pb2.BulkHeader, payload: bytes) -> Lie:
    def answer(connection: Connection, frame: bulk_pb2.BulkHeader) -> None:
        connection.send(header, [memoryview(payload)])

    return answer


@pytest.mark.parametrize(
    "lie",
    [
        _answering(bulk_pb2.BulkHeader(accepted=bulk_pb2.Accepted()), b""),
        _answering(bulk_pb2.BulkHeader(cells=bulk_pb2.Cells()), b"\xff" * 50),
        _answering(bulk_pb2.BulkHeader(cells=bulk_pb2.Cells(digests=b"x")), bytes(3 * CELL_BYTES)),
    ],
    ids=["no-cells", "no-record", "other-cells"],
)
@looped
async def test_a_source_that_lies_is_left_out(tmp_path: Path, lie: Lie) -> None:
    cluster, _ = await _protected(tmp_path, 4, 2, SIZES[2])
    try:
        cluster.servers["n0"]._handler = lie
        _, found = await _rebuild(cluster, "n1", ["n2", "n0", "n3"], 5)
        assert found[: SIZES[2]] == image(1, 5, SIZES[2])
        with pytest.raises(CkptdError):
            await _rebuild(cluster, "n1", ["n2", "n0"], 5)
    finally:
        cluster.close()
