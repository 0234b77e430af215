"""How long a lost node's image takes to come back, against plainly moving as many bytes.

Real daemon nodes in a process each, one per node (arenas, bulk plane, event loop); no
trainers and no coordinator: the bench gives the directives.  A decode of one lost image
needs k symbols of every stripe; the plain transfers move k images' bytes between the same
processes, from arenas, over as many sockets, and digest nothing.  They are measured twice:
with everything received into buffers that are used over and over, and with the lost
image's bytes kept in a new arena, whose pages the kernel has to hand out, as a recovery's.

Examples:
  python tools/bench/recover.py                          4+1 one lost; 6+2 and 8+2 one and two lost
  python tools/bench/recover.py --image-mib 32 --repeat 3 --cases 4,1,1
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import numpy as np
from measure import emit, machine, say, summary

from ckptd.daemon.job import Trainer
from ckptd.daemon.node import Node
from ckptd.daemon.settings import DaemonSettings
from ckptd.erasure.stripe import Geometry
from ckptd.memory.arena import Arena
from ckptd.memory.bulk import BLOCK_BYTES, BulkServer
from ckptd.v1 import common_pb2, coordinator_pb2, local_pb2

JOB, PLAN, STEP = "bench", b"p" * 16, 5
_DEADLINE_S = 120.0


@dataclass(frozen=True)
class Case:
    """`lost` of `nodes` nodes with `parity` vanish."""

    nodes: int
    parity: int
    lost: int

    @classmethod
    def parse(cls, text: str) -> Case:
        nodes, parity, lost = (int(part) for part in text.split(","))
        if not 1 <= lost <= parity < nodes:
            raise argparse.ArgumentTypeError(f"{text}: NODES,PARITY,LOST with 1 <= LOST <= PARITY < NODES")
        return cls(nodes, parity, lost)


# In a node's process


def serve_node(name: str, rank: int, directory: str, pipe: Pipe) -> None:
    """One node; does what the pipe says, and answers each command."""
    sys.setswitchinterval(0.0005)  # as the daemon does

    async def live() -> None:
        await _NodeProcess(name, rank, Path(directory), pipe).run()

    asyncio.run(live())


class _NodeProcess:
    def __init__(self, name: str, rank: int, directory: Path, pipe: Pipe) -> None:
        self.name, self.rank, self.pipe = name, rank, pipe
        settings = DaemonSettings(
            node=name,
            memory_dir=directory,
            coordinator="127.0.0.1:1",
            bulk_timeout_s=30.0,
            scrub_bytes_per_s=0,
        )
        self.pool = ThreadPoolExecutor(4)
        self.node = Node(settings, self.pool)
        self.server = BulkServer(
            "127.0.0.1:0", self.node.protection.handle, settings.bulk_timeout_s, settings.bulk_nice
        )
        self.node.bulk_address = self.server.address

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self.pipe.send(self.server.address)
        while (command := await loop.run_in_executor(None, self.pipe.recv)) is not None:
            verb, *arguments = command
            self.pipe.send(await getattr(self, verb)(*arguments))
        self.server.close()
        self.node.close()

    async def direct(self, roster: bytes, order: bytes | None) -> None:
        directive = coordinator_pb2.JobDirective(
            job=JOB,
            spec=coordinator_pb2.JobSpec(job=JOB, every=1, slots=2),
            roster=common_pb2.Roster.FromString(roster),
        )
        if order is not None:
            directive.transfer.CopyFrom(coordinator_pb2.TransferOrder.FromString(order))
        self.node.follow(directive)

    async def protect(self, image_bytes: int) -> float:
        """Captures the step with random bytes; answers when it is folded here."""
        job = self.node.jobs[JOB]
        trainer = Trainer(self.rank, job.generation, 0, attached=True)
        job.trainers[self.rank] = trainer
        plan = local_pb2.Plan(plan_hash=PLAN, image_bytes=image_bytes)
        await job.prepare(trainer, plan, 1 << 40, {})
        job.place_plan(trainer, plan, 1 << 40, {})
        job.apply(common_pb2.Schedule(generation=job.generation, due=[STEP]))
        place = job.grants[self.rank][STEP]
        random = np.random.default_rng(self.rank).integers(0, 256, image_bytes, dtype=np.uint8)
        np.copyto(np.frombuffer(place.image, np.uint8), random)
        captured = local_pb2.Captured(step=STEP, slot=place.slot, plan_hash=PLAN)
        self.node.protection.captured(job, job.captured(trainer, captured), self.rank)
        began = time.perf_counter()
        await _until(lambda: job.memory.holdings[1, STEP].folded)
        return time.perf_counter() - began

    async def recovered(self) -> tuple[float, int]:
        """Answers when this node's transfer is verified: (its seconds, bytes it received)."""
        transfer = self.node.jobs[JOB].transfer
        state = coordinator_pb2.Transfer
        await _until(lambda: transfer.state in (state.VERIFIED, state.FAILED))
        if transfer.state == state.FAILED:
            raise RuntimeError(transfer.reason)
        return transfer.seconds, transfer.bytes

    async def cpu(self) -> float:
        """User and system time of this process, all threads, in seconds."""
        return time.process_time()

    async def place(self, streams: int, nbytes: int) -> float:
        """How long `streams` threads take to write `nbytes` each into a new arena."""
        arena = self._new_arena(streams * nbytes)
        block = memoryview(bytearray(BLOCK_BYTES))

        def write(stream: int) -> None:
            for at in range(0, nbytes, BLOCK_BYTES):
                arena.write(0, stream * nbytes + at, block[: min(BLOCK_BYTES, nbytes - at)])

        began = time.perf_counter()
        with ThreadPoolExecutor(streams) as pool:
            list(pool.map(write, range(streams)))
        return time.perf_counter() - began

    async def receive_plain(self, streams: int, nbytes: int, keep: bool) -> str:
        """Listens for `streams` plain transfers of `nbytes` each.

        Args:
            keep: they are written into a new arena side by side, as a lost image is; else
                each lands in a buffer that is used over and over, as what a decode reads does.
        """
        listener = socket.create_server(("127.0.0.1", 0), backlog=streams)
        arena = self._new_arena(streams * nbytes) if keep else None
        for stream in range(streams):
            threading.Thread(target=self._take, args=(listener, nbytes, arena, stream)).start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    def _new_arena(self, nbytes: int) -> Arena:
        """Without pages yet, and without a name already: it goes when nobody uses it any more."""
        arena = Arena.create(self.node.settings.memory_dir, "rank-99999", PLAN, 1, nbytes, sparse=True)
        arena.path.unlink()
        return arena

    def _take(self, listener: socket.socket, nbytes: int, arena: Arena | None, stream: int) -> None:
        sock, _ = listener.accept()
        scratch = memoryview(bytearray(BLOCK_BYTES))
        with sock:
            for at in range(0, nbytes, BLOCK_BYTES):
                part = scratch[: min(BLOCK_BYTES, nbytes - at)]
                if sock.recv_into(part, len(part), socket.MSG_WAITALL) != len(part):
                    raise RuntimeError("a plain transfer ended early")
                if arena is not None:
                    arena.write(0, stream * nbytes + at, part)
            sock.sendall(b"k")

    async def send_plain(self, targets: list[str], nbytes: int) -> tuple[float, float]:
        """Sends `nbytes` of this node's image to every target at once, one connection each.

        Returns:
            When the first byte was sent and the last one received, by a clock that all share.
        """
        began = time.perf_counter()
        image = self.node.jobs[JOB].memory.holdings[1, STEP].places[self.rank].cells

        def send(address: str) -> None:
            host, port = address.rsplit(":", 1)
            with socket.create_connection((host, int(port)), timeout=_DEADLINE_S) as sock:
                sock.setblocking(True)
                for at in range(0, nbytes, BLOCK_BYTES):
                    sock.sendall(image[at : min(at + BLOCK_BYTES, nbytes)])
                if sock.recv(1) != b"k":
                    raise RuntimeError("a plain transfer was not received")

        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(max(1, len(targets))) as pool:
            await asyncio.gather(*(loop.run_in_executor(pool, send, target) for target in targets))
        return began, time.perf_counter()


async def _until(condition: Any) -> None:
    end = time.monotonic() + _DEADLINE_S
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the node did not get there in time")
        await asyncio.sleep(0.005)


# In the bench's process


class Cluster:
    """Node processes, old members first, then replacements."""

    def __init__(self, case: Case, root: Path) -> None:
        self.case = case
        self.names = [f"n{i}" for i in range(case.nodes + case.lost)]
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Pipe] = []
        self.processes = []
        for index, name in enumerate(self.names):
            here, there = context.Pipe()
            (root / name).mkdir()
            # A replacement takes the rank of the node that it replaces.
            rank = index if index < case.nodes else index - case.nodes
            process = context.Process(
                target=serve_node, args=(name, rank, str(root / name), there), daemon=True
            )
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)
        self.addresses = [self.answer(i) for i in range(len(self.names))]

    def ask(self, index: int, *command: Any) -> Any:
        self.pipes[index].send(command)
        return self.answer(index)

    def ask_all(self, indices: list[int], *command: Any) -> list[Any]:
        for index in indices:
            self.pipes[index].send(command)
        return [self.answer(index) for index in indices]

    def answer(self, index: int) -> Any:
        if not self.pipes[index].poll(_DEADLINE_S):
            raise TimeoutError(f"node {self.names[index]} does not answer")
        return self.pipes[index].recv()

    def cpu_s(self, indices: list[int]) -> float:
        """User and system time of these nodes so far."""
        return sum(self.ask_all(indices, "cpu"))

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def roster(self, members: list[int], generation: int, start: tuple[int, int]) -> bytes:
        return common_pb2.Roster(
            generation=generation,
            parity=self.case.parity,
            start=common_pb2.Snapshot(generation=start[0], step=start[1]),
            members=[
                common_pb2.Member(
                    node=self.names[i],
                    ranks=[rank],
                    control_address="127.0.0.1:1",
                    bulk_address=self.addresses[i],
                )
                for rank, i in enumerate(members)
            ],
        ).SerializeToString()


@contextmanager
def cluster_of(case: Case) -> Iterator[Cluster]:
    root = Path(tempfile.mkdtemp(prefix="ckptd-bench-", dir="/dev/shm"))
    cluster = None
    try:
        cluster = Cluster(case, root)
        yield cluster
    finally:
        if cluster is not None:
            cluster.close()
        shutil.rmtree(root, ignore_errors=True)


def measure_once(case: Case, image_bytes: int) -> dict[str, float]:
    """Protects, measures plain transfers, kills, recovers; seconds by name."""
    with cluster_of(case) as cluster:
        old = list(range(case.nodes))
        cluster.ask_all(old, "direct", cluster.roster(old, 1, (0, 0)), None)
        protected = max(cluster.ask_all(old, "protect", image_bytes))
        lost, spares = old[: case.lost], list(range(case.nodes, case.nodes + case.lost))
        survivors = old[case.lost :]
        _plain(cluster, survivors, spares, image_bytes, keep=False)  # a first one is slower
        plain, plain_cpu = _plain(cluster, survivors, spares, image_bytes, keep=False)
        placed, placed_cpu = _plain(cluster, survivors, spares, image_bytes, keep=True)
        share = image_bytes // len(survivors)
        placing = max(cluster.ask_all(spares, "place", len(survivors), share))
        for index in lost:
            cluster.processes[index].kill()
            cluster.processes[index].join()
        living = [*survivors, *spares]
        began_cpu = cluster.cpu_s(living)
        began = time.perf_counter()
        roster = cluster.roster([*spares, *survivors], 2, (1, STEP))
        group = [cluster.names[i] for i in old]
        sources = [
            coordinator_pb2.Source(position=cluster.names[i], bulk_address=cluster.addresses[i])
            for i in survivors
        ]
        for index in survivors:
            cluster.ask(index, "direct", roster, None)
        for at, index in enumerate(spares):
            order = coordinator_pb2.TransferOrder(
                generation=2,
                positions=[cluster.names[lost[at]]],
                group=group,
                parity=case.parity,
                sources=sources,
            )
            cluster.ask(index, "direct", roster, order.SerializeToString())
        outcomes = cluster.ask_all(spares, "recovered")
        with_orders = time.perf_counter() - began
        return {
            "protect_s": protected,
            "plain_s": plain,
            "plain_cpu_s": plain_cpu,
            "plain_placed_s": placed,
            "plain_placed_cpu_s": placed_cpu,
            "placing_s": placing,
            "recover_s": max(seconds for seconds, _ in outcomes),
            "recover_with_orders_s": with_orders,
            "recover_cpu_s": cluster.cpu_s(living) - began_cpu,
        }


def _plain(
    cluster: Cluster, survivors: list[int], spares: list[int], image_bytes: int, *, keep: bool
) -> tuple[float, float]:
    """As many bytes as the decode of all lost images needs: k per image.

    Every survivor sends its share of the result to every replacement, and of what it
    gives to the other survivors k-1 shares, all at once.  Returns (seconds, seconds of CPU).
    """
    case = cluster.case
    k = Geometry(case.nodes, case.parity).data_chunks
    share = image_bytes // len(survivors)
    others = k - 1  # survivors that each survivor fetches from, for every lost image
    listeners = {
        index: cluster.ask(index, "receive_plain", others * case.lost, share, False) for index in survivors
    } | {index: cluster.ask(index, "receive_plain", len(survivors), share, keep) for index in spares}
    targets = {index: [listeners[spare] for spare in spares] for index in survivors}
    for at, index in enumerate(survivors):
        for step in range(1, others + 1):
            to = survivors[(at + step) % len(survivors)] if len(survivors) > 1 else index
            targets[index] += [listeners[to]] * case.lost
    began_cpu = cluster.cpu_s([*survivors, *spares])
    for index in survivors:
        cluster.pipes[index].send(("send_plain", targets[index], share))
    times = [cluster.answer(index) for index in survivors]
    seconds = max(end for _, end in times) - min(begin for begin, _ in times)
    return seconds, cluster.cpu_s([*survivors, *spares]) - began_cpu


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image-mib", type=int, default=128, help="bytes of one node's image, MiB")
    parser.add_argument("--repeat", type=int, default=5, help="runs of every case")
    parser.add_argument(
        "--cases",
        type=Case.parse,
        nargs="+",
        metavar="NODES,PARITY,LOST",
        default=[Case(4, 1, 1), Case(6, 2, 1), Case(6, 2, 2), Case(8, 2, 1), Case(8, 2, 2)],
    )
    options = parser.parse_args()
    results = []
    for case in options.cases:
        runs = []
        for run in range(options.repeat):
            runs.append(measure_once(case, options.image_mib << 20))
            say(f"{case.lost} of {case.nodes} lost, m={case.parity}, run {run}: " + _words(runs[-1]))
        results.append(
            {
                "nodes": case.nodes,
                "parity": case.parity,
                "lost": case.lost,
                "seconds": {name: summary([run[name] for run in runs]) for name in runs[0]},
                "recover_to_plain": _ratio(runs, "recover_s", "plain_s"),
                "recover_to_plain_placed": _ratio(runs, "recover_s", "plain_placed_s"),
                "recover_cpu_to_plain_cpu": _ratio(runs, "recover_cpu_s", "plain_cpu_s"),
            }
        )
    emit(
        {
            "benchmark": "recover",
            "machine": machine(),
            "image_bytes": options.image_mib << 20,
            "note": "plain transfers move k images' bytes per lost image and digest nothing; plain_placed"
            " also writes what replaces the lost image into a new arena, and placing is that alone; a"
            " recovery decodes, and verifies at both ends, too",
            "cases": results,
        }
    )
    return 0


def _ratio(runs: list[dict[str, float]], above: str, below: str) -> dict[str, float | int]:
    return summary([run[above] / run[below] for run in runs])


def _words(run: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in run.items())


if __name__ == "__main__":
    raise SystemExit(main())
