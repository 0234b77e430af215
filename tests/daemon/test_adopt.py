"""A daemon that comes back: what verifies is its own again, the rest never was."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import JOB, SIZES, Cluster, image, until
from daemonkit import DEADLINE_S, PLAN, Daemon, Trainee, eventually, header, image_of, looped

from ckptd.daemon.adopt import adopt
from ckptd.daemon.job import Job
from ckptd.daemon.node import Node
from ckptd.erasure import Code
from ckptd.errors import StaleGeneration
from ckptd.image.digest import CELL_BYTES
from ckptd.memory import records
from ckptd.memory.bulk import BulkServer, Connection
from ckptd.memory.holding import Holding
from ckptd.v1 import bulk_pb2, common_pb2, daemon_pb2, local_pb2, memory_pb2

NAMES = ["n0", "n1", "n2"]


def _stop(cluster: Cluster, name: str) -> Node:
    """The daemon is gone, its memory stays."""
    node = cluster.nodes[name]
    cluster.kill(name)
    return node


async def _start(cluster: Cluster, old: Node) -> Node:
    """Another daemon of that node, on the same memory and at the same address."""
    name = old.settings.node
    node = Node(old.settings, cluster.pool)
    node.bulk_address = old.bulk_address
    node.adopt()
    server: list[BulkServer] = []

    def listening() -> bool:
        try:
            server.append(BulkServer(old.bulk_address, node.protection.handle, 5.0, 0))
        except OSError:
            return False  # the old listener is just ending
        return True

    await until(listening, f"{name} listens again")
    cluster.nodes[name], cluster.servers[name] = node, server[0]
    return node


async def _protect(cluster: Cluster, step: int, size: int, names: list[str] = NAMES) -> None:
    cluster.direct(names, cluster.roster(names, 1))
    for name in names:
        cluster.plan(name, size)
    cluster.schedule(names, 1, [step])
    for name in names:
        cluster.capture(name, step)
    await until(lambda: cluster.folded(step, names), f"step {step} folded")


def _adopted(directory: Path, node: str) -> Job:
    """What a daemon would adopt of the job, without starting one."""
    return adopt(directory, node, lambda: None)[JOB]


def _encoded(holding: Holding, holdings: dict[str, Holding]) -> list[bytes]:
    """The parity that this node must hold, from everybody's images and the code itself."""
    geometry, cells = holding.geometry, holding.chunk_bytes // CELL_BYTES
    out = []
    for p in range(geometry.parity):
        stripe = geometry.parity_stripe(holding.index, p)
        data = []
        for symbol in range(geometry.data_chunks):
            node, chunk = geometry.data_source(stripe, symbol)
            data.append(b"".join(holdings[holding.group[node]].data_cells(chunk * cells, cells)))
        parity = [bytearray(len(data[0])) for _ in range(geometry.parity)]
        Code(geometry.data_chunks, geometry.parity).encode(data, parity)
        out.append(bytes(parity[p]))
    return out


@looped
async def test_sealed_and_folded_holdings_come_back(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, 3, 1, ranks_per_node=2)
    try:
        await _protect(cluster, 7, SIZES[2])
        before = cluster.job("n1")
        report = before.memory.holdings[1, 7].report()
        parity = before.memory.holdings[1, 7].parity
        assert report.sealed and report.folded and parity is not None
        bytes_of_parity = [bytes(chunk) for chunk in parity.chunks]
        await _start(cluster, _stop(cluster, "n1"))
        job = cluster.job("n1")
        holding = job.memory.holdings[1, 7]
        assert job is not before and holding.report() == report
        for rank in (2, 3):
            assert bytes(holding.places[rank].image) == image(rank, 7, SIZES[2])
        assert holding.parity is not None
        assert [bytes(chunk) for chunk in holding.parity.chunks] == bytes_of_parity
        assert holding.seals == before.memory.holdings[1, 7].seals
        assert job.memory.nbytes() == before.memory.nbytes()
        # The slots that it lies in are taken.
        arena = holding.places[2].arena
        assert holding.places[2].slot not in job.memory.free_slots(arena)
    finally:
        cluster.close()


@looped
async def test_membership_fencing_and_owner_come_back(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, 3, 1)
    try:
        await _protect(cluster, 4, 100)
        cluster.direct(NAMES, cluster.roster(NAMES, 3, (1, 4)), stop_through=2)
        job = cluster.job("n0")
        job.owner_uid, job.started_generation, job.confirmed_stopped = 1234, 1, 1
        job.trainers[0].step = 9
        job.save()
        await _start(cluster, _stop(cluster, "n0"))
        again = cluster.job("n0")
        assert again is not job
        assert (again.generation, again.stop_through, again.owner_uid) == (3, 2, 1234)
        assert (again.started_generation, again.confirmed_stopped) == (1, 1)
        assert again.roster == job.roster and again.spec == job.spec
        assert (again.trainers[0].generation, again.trainers[0].step) == (1, 9)
        with pytest.raises(StaleGeneration):
            again.accept(cluster.roster(NAMES, 2))
        with pytest.raises(StaleGeneration):
            again.refuse_stale(2)
    finally:
        cluster.close()


@looped
async def test_a_flipped_byte_unseals_its_rank_and_nothing_else(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, 3, 1, ranks_per_node=2)
    try:
        await _protect(cluster, 7, SIZES[2])
        holding = cluster.job("n1").memory.holdings[1, 7]
        holding.places[3].image[CELL_BYTES + 5] ^= 0x01
        job = _adopted(tmp_path / "n1", "n1")
        found = job.memory.holdings[1, 7]
        report = found.report()
        assert list(report.sealed_ranks) == [2] and not report.sealed
        assert bytes(found.places[2].image) == image(2, 7, SIZES[2])
        assert 3 not in found.places
        # Its parity protects others, and is as good as before.
        assert report.folded and set(found.seals) == {"n0", "n2"}
        # A new generation keeps it for that, even with no image left.
        holding.places[2].image[0] ^= 0x01
        job = _adopted(tmp_path / "n1", "n1")
        assert not job.memory.holdings[1, 7].rank_seals
        job.accept(cluster.roster(NAMES, 2, (1, 7)))
        assert job.memory.holdings[1, 7].folded
    finally:
        cluster.close()


@looped
async def test_flipped_parity_is_not_folded_and_is_folded_again(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, 3, 1)
    try:
        await _protect(cluster, 7, SIZES[2])
        holding = cluster.job("n1").memory.holdings[1, 7]
        assert holding.parity is not None
        good = bytes(holding.parity.chunks[0])
        holding.parity.chunks[0][CELL_BYTES] ^= 0x80
        found = _adopted(tmp_path / "n1", "n1").memory.holdings[1, 7]
        assert found.sealed and not found.folded and found.parity is None
        await _start(cluster, _stop(cluster, "n1"))
        assert not cluster.folded(7, ["n1"])
        await until(lambda: cluster.folded(7, NAMES), "the peers send again, and it is folded again")
        parity = cluster.job("n1").memory.holdings[1, 7].parity
        assert parity is not None and bytes(parity.chunks[0]) == good
    finally:
        cluster.close()


class _Strike:
    """A bulk handler that lets some contributions pass and then stops the world: the moment of the kill."""

    def __init__(self, handle: Callable[[Connection, bulk_pb2.BulkHeader], None], passes: int) -> None:
        self._handle, self._left = handle, passes
        self._lock = threading.Lock()  # one contribution after the other
        self.struck = False

    def __call__(self, connection: Connection, frame: bulk_pb2.BulkHeader) -> None:
        if self.struck:
            connection.close()
        elif frame.WhichOneof("body") != "offer":
            self._handle(connection, frame)
        else:
            self._pass(connection, frame)

    def _pass(self, connection: Connection, frame: bulk_pb2.BulkHeader) -> None:
        with self._lock:
            if self._left:
                self._left -= 1
                self._handle(connection, frame)
                return
            self.struck = True
        connection.close()


@pytest.mark.parametrize("passes", [0, 1])
@looped
async def test_a_node_that_dies_in_the_middle_of_a_fold_is_folded_after_its_return(
    tmp_path: Path, passes: int
) -> None:
    """Half-folded parity is thrown away; the peers send everything again, and every cell counts once."""
    cluster = Cluster(tmp_path, 3, 1)
    try:
        victim = cluster.nodes["n1"]
        strike = _Strike(victim.protection.handle, passes)
        cluster.servers["n1"]._handler = strike
        cluster.direct(NAMES, cluster.roster(NAMES, 1))
        for name, size in zip(NAMES, (SIZES[3], SIZES[3], SIZES[2]), strict=True):
            cluster.plan(name, size)
        cluster.schedule(NAMES, 1, [5])
        for name in NAMES:
            cluster.capture(name, 5)
        await until(lambda: strike.struck, "the kill")
        holding = cluster.job("n1").memory.holdings[1, 5]
        assert not holding.folded
        begun = holding.parity
        _stop(cluster, "n1")
        found = _adopted(tmp_path / "n1", "n1").memory.holdings[1, 5]
        assert found.sealed and not found.folded and found.parity is None
        assert passes == 0 or begun is not None  # there was something to throw away
        await _start(cluster, victim)
        await until(lambda: cluster.folded(5, NAMES), "folded everywhere")
        holdings = {name: cluster.job(name).memory.holdings[1, 5] for name in NAMES}
        for found in holdings.values():
            assert found.parity is not None
            assert [bytes(chunk) for chunk in found.parity.chunks] == _encoded(found, holdings)
        # Nobody counts as away any more.
        await until(lambda: not any(cluster.job(n).unreachable for n in NAMES), "all are reachable")
    finally:
        cluster.close()


@looped
async def test_a_node_that_lost_its_memory_is_folded_after_its_return(tmp_path: Path) -> None:
    """Its peers' contributions come before it knows their seals: refused, and sent again in order."""
    cluster = Cluster(tmp_path, 3, 1)
    try:
        victim = cluster.nodes["n1"]
        strike = _Strike(victim.protection.handle, 0)
        cluster.servers["n1"]._handler = strike
        cluster.direct(NAMES, cluster.roster(NAMES, 1))
        for name in NAMES:
            cluster.plan(name, SIZES[2])
        cluster.schedule(NAMES, 1, [5])
        for name in NAMES:
            cluster.capture(name, 5)
        await until(lambda: strike.struck, "the kill")
        _stop(cluster, "n1")
        # Everything but the images is gone: the records of the group, too.
        for path in records.holding_paths(records.job_directory(tmp_path / "n1", JOB)):
            path.unlink()
        await _start(cluster, victim)
        assert not cluster.job("n1").memory.holdings
        # The rank captures the step once more: the same bytes.
        cluster.plan("n1", SIZES[2])
        cluster.schedule(["n1"], 1, [5])
        cluster.capture("n1", 5)
        await until(lambda: cluster.folded(5, NAMES), "folded everywhere")
    finally:
        cluster.close()


GARBAGE: dict[str, Callable[[Path], object]] = {
    "a file among the jobs": lambda jobs: (jobs / "file").write_bytes(b"x"),
    "a link to nowhere": lambda jobs: (jobs / "link").symlink_to("/nowhere"),
    "a job without a record": lambda jobs: (jobs / "empty").mkdir(),
    "a job record that is garbage": lambda jobs: _file(jobs / "torn" / "job.record", b"\xff" * 9),
    "a job record that is a directory": lambda jobs: (jobs / "odd" / "job.record").mkdir(parents=True),
    "a job record of another job": lambda jobs: _file(
        jobs / "thief" / "job.record", memory_pb2.JobRecord(job=JOB).SerializeToString()
    ),
    "a job record with a path": lambda jobs: _file(
        jobs / "path" / "job.record", memory_pb2.JobRecord(job="../../etc").SerializeToString()
    ),
    "a roster that cannot be": lambda jobs: _file(
        jobs / "roster" / "job.record",
        memory_pb2.JobRecord(
            job="roster", roster=common_pb2.Roster(parity=200, members=[common_pb2.Member(node="n0")] * 2)
        ).SerializeToString(),
    ),
    "an arena of a wrong size": lambda jobs: _file(jobs / JOB / f"rank-00009.{'0' * 32}.2.arena", b"x"),
    "an arena that is a directory": lambda jobs: (jobs / JOB / f"rank-00008.{'0' * 32}.2.arena").mkdir(),
    "an arena that is a link": lambda jobs: (jobs / JOB / f"rank-00007.{'0' * 32}.2.arena").symlink_to(
        "/dev/zero"
    ),
    "a pipe as an arena": lambda jobs: os.mkfifo(jobs / JOB / f"rank-00006.{'0' * 32}.2.arena"),
    "a holding that is garbage": lambda jobs: records.holding_path(jobs / JOB, 1, 99).write_bytes(
        b"\xff" * 99
    ),
    "a holding that is empty": lambda jobs: records.holding_path(jobs / JOB, 1, 98).touch(),
    "a holding that is a directory": lambda jobs: records.holding_path(jobs / JOB, 1, 97).mkdir(),
    "a holding that is a link": lambda jobs: records.holding_path(jobs / JOB, 1, 96).symlink_to("/nowhere"),
    "a holding of arenas that are not there": lambda jobs: _stray(jobs / JOB, 95),
    "a holding that was half written": lambda jobs: (jobs / JOB / "x.holding.tmp").write_bytes(b"x"),
    "a file of somebody's": lambda jobs: (jobs / JOB / "notes.txt").write_bytes(b"x"),
}


def _file(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


def _stray(directory: Path, step: int) -> None:
    seal = bulk_pb2.SealRecord(job=JOB, generation=1, step=step, node="n0", cell_bytes=CELL_BYTES)
    seal.ranks.add(rank=0, image_bytes=1, plan_hash=b"z" * 16, cell_digests=bytes(16))
    record = memory_pb2.HoldingRecord(
        job=JOB,
        generation=1,
        step=step,
        group=["n0", "n1"],
        position="n0",
        parity=1,
        seals=[seal],
        folded=True,
    )
    record.images.add(rank=0, plan_hash=b"z" * 16, slot=7, image_bytes=1)
    record.chunk_bytes = CELL_BYTES
    record.parity_digests.append(bytes(16))
    records.write_record(records.holding_path(directory, 1, step), record)


@looped
async def test_garbage_does_not_stop_the_daemon(tmp_path: Path) -> None:
    """All kinds of it at once, and each alone must have been harmless for that."""
    cluster = Cluster(tmp_path, 1, 0)
    try:
        await _protect(cluster, 3, SIZES[2], ["n0"])
        jobs = tmp_path / "n0" / "jobs"
        for make in GARBAGE.values():
            make(jobs)
        await _start(cluster, _stop(cluster, "n0"))
        node = cluster.nodes["n0"]
        assert set(node.jobs) == {JOB}
        holdings = node.jobs[JOB].memory.holdings
        assert {key for key, holding in holdings.items() if holding.sealed or holding.folded} == {(1, 3)}
        assert bytes(holdings[1, 3].places[0].image) == image(0, 3, SIZES[2])
        assert [path.name for path in jobs.iterdir()] == [JOB]
        assert set(node.jobs[JOB].memory.arenas) == {("rank-00000", b"p" * 16)}
        # It goes on, and forgets everything in the end, somebody's file included.
        node.report(1)
        node.jobs[JOB].trainers.clear()
        node.forget(JOB)
        assert list(jobs.iterdir()) == []
    finally:
        cluster.close()


@looped
async def test_a_damaged_record_never_makes_damaged_bytes_good(tmp_path: Path) -> None:
    """Prefixes and flips of the record: the daemon starts, and whatever it calls sealed or folded is."""
    seed, tries = 23, 120
    print(f"seed {seed}, {tries} damages")
    rng = random.Random(seed)
    cluster = Cluster(tmp_path, 3, 1, ranks_per_node=2)
    try:
        await _protect(cluster, 7, 2 * CELL_BYTES)
        original = cluster.job("n1").memory.holdings[1, 7]
        assert original.parity is not None
        parity = [bytes(chunk) for chunk in original.parity.chunks]
        images = {rank: bytes(original.places[rank].image) for rank in original.ranks}
        path = records.holding_path(records.job_directory(tmp_path / "n1", JOB), 1, 7)
        text = path.read_bytes()
        kept = 0
        for number in range(tries):
            damaged = bytearray(text)
            if number % 2:
                del damaged[rng.randrange(len(text)) :]
            else:
                damaged[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
            path.write_bytes(bytes(damaged))
            found = _adopted(tmp_path / "n1", "n1").memory.holdings.get((1, 7))
            if found is None:
                assert not path.exists()  # thrown away
                continue
            kept += 1
            for rank in found.rank_seals:
                assert bytes(found.places[rank].image) == images[rank]
            if found.folded:
                assert found.parity is not None
                assert [bytes(chunk) for chunk in found.parity.chunks] == parity
        print(f"{kept} kept in part or whole")
        path.write_bytes(text)
        assert _adopted(tmp_path / "n1", "n1").memory.holdings[1, 7].report() == original.report()
    finally:
        cluster.close()


# A real daemon, killed and started again


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    daemon = Daemon()
    yield daemon
    daemon.close()


def test_a_killed_daemon_gives_everything_back(daemon: Daemon) -> None:
    """SIGKILL in mid-job: the trainer reconnects into its generation, another job returns from parking."""
    size = 2 * CELL_BYTES + 17
    running, parked = Trainee(daemon, "running"), Trainee(daemon, "parked", rank=0)
    for trainee in (running, parked):
        trainee.plan(size)
        for step in (1, 2):
            trainee.capture(step)
            trainee.protected(step)
    parked.leave(park=True)
    parked.close()
    # One more image is complete and not yet told when the daemon dies.
    grants = running.until(lambda g: any(grant.step == 3 for grant in g.grants), "a grant for step 3")
    slot = next(grant.slot for grant in grants.grants if grant.step == 3)
    os.pwrite(running.arena, image_of(0, 3, size), slot * running.slot_bytes)
    inode = os.fstat(running.arena).st_ino
    eventually(lambda: daemon.job("parked").finished, "parked")
    daemon.kill()
    while running.receive() is not None:
        pass  # what it said before
    daemon.start()
    assert [(h.step, h.sealed, h.folded) for h in daemon.job("running").holdings] == [(2, True, True)]

    again = Trainee(daemon, "running", reconnect=True, generation=1)
    assert again.generation == 1
    again.plan(size)
    assert os.fstat(again.arena).st_ino == inode, "the same memory: what is mapped stays mapped"
    again.tell(progress=local_pb2.Progress(step=3))
    # What was granted before the kill in a slot that it is not granted any more is given up, not waited for.
    granted = again.until(lambda g: 3 in {grant.step for grant in g.grants}, "step 3 is granted again")
    assert {grant.step: grant.slot for grant in granted.grants}[3] != slot
    again.tell(captured=local_pb2.Captured(step=3, slot=slot, plan_hash=PLAN))
    assert "no grant for step 3" in again.failure().what
    again.until(lambda g: 3 in g.schedule.aborted, "step 3 is given up")
    assert again.grants.schedule.watermark == 2
    step = again.until(lambda g: any(grant.step > 3 for grant in g.grants), "steps are named").grants[-1].step
    again.capture(step)
    again.protected(step)

    back = Trainee(daemon, "parked")
    located = back.locate()
    assert (back.generation, located.step, located.verified) == (2, 2, True)
    content = os.pread(back.fds[-1], located.image_bytes, located.slot * located.slot_bytes)
    assert content == image_of(0, 2, size)
    for trainee in (running, again, back):
        trainee.close()
    with daemon.stub() as stub:
        assert stub.Status(daemon_pb2.DaemonStatusRequest(header=header("")), timeout=DEADLINE_S).node == "x"
