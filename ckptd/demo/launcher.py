"""The reference launcher: obeys one node's daemon, and confirms what is so.

`Daemon.Orders` is level-triggered: a stream starts with the newest stop and the
newest start, so every order is obeyed any number of times with one result, and the
stream may break at any moment.  Facts (who runs, who ended, that nobody runs) are
confirmed until the daemon has taken them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import grpc
import grpc.aio

from ckptd.demo.children import Child
from ckptd.v1 import common_pb2, daemon_pb2, daemon_pb2_grpc

RETRY_S = 0.05
STREAM_S = 60.0
CONFIRM_S = 2.0

# (generation, rank, environment of the order) -> the trainer's process
Spawn = Callable[[int, int, Mapping[str, str]], Child]


@dataclass(frozen=True)
class Trainer:
    """A process that this launcher started."""

    generation: int
    rank: int
    child: Child


class Launcher:
    """Starts and stops the trainers of one node, as its daemon orders."""

    def __init__(self, job: str, daemon: daemon_pb2_grpc.DaemonStub, spawn: Spawn) -> None:
        self.trainers: list[Trainer] = []
        self._job = job
        self._daemon = daemon
        self._spawn = spawn
        self._watches: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Obeys until the job is finished; for ever where the daemon never answers again."""
        try:
            while not await self._follow():
                await asyncio.sleep(RETRY_S)
        finally:
            for watch in self._watches:
                watch.cancel()

    def living(self) -> list[Trainer]:
        """Trainers whose process still exists."""
        return [trainer for trainer in self.trainers if trainer.child.alive]

    async def _follow(self) -> bool:
        """Obeys one stream of orders to its end; True when the job is finished."""
        request = daemon_pb2.OrdersRequest(header=self._header(0, STREAM_S))
        try:
            async for order in self._daemon.Orders(request, timeout=STREAM_S):
                body = order.WhichOneof("body")
                if body == "stop":
                    await self._stop(order.generation, order.stop.grace_ms / 1e3)
                elif body == "start":
                    await self._start(order.generation, order.start)
                elif body == "finish":
                    return True
        except grpc.aio.AioRpcError:
            pass  # the daemon is away or the stream's time is over: ask again
        return False

    async def _stop(self, generation: int, grace_s: float) -> None:
        """Ends every trainer of `generation` or older, and confirms that none is left."""
        old = [trainer for trainer in self.living() if trainer.generation <= generation]
        await asyncio.gather(*(trainer.child.end(grace_s) for trainer in old))
        await self._confirm(daemon_pb2.ConfirmRequest(header=self._header(generation), stopped=True))

    async def _start(self, generation: int, start: daemon_pb2.Start) -> None:
        """Starts the ranks that this generation does not have yet, and names all its processes."""
        have = {trainer.rank for trainer in self.trainers if trainer.generation == generation}
        for order in start.trainers:
            if order.rank not in have:
                child = self._spawn(generation, order.rank, order.environment)
                trainer = Trainer(generation, order.rank, child)
                self.trainers.append(trainer)
                self._keep(asyncio.create_task(self._report_exit(trainer)))
        started = [
            daemon_pb2.LaunchedTrainer(rank=trainer.rank, pid=trainer.child.pid)
            for trainer in self.living()
            if trainer.generation == generation
        ]
        await self._confirm(daemon_pb2.ConfirmRequest(header=self._header(generation), trainers=started))

    async def _report_exit(self, trainer: Trainer) -> None:
        status = await trainer.child.wait()
        ended = daemon_pb2.LaunchedTrainer(
            rank=trainer.rank, pid=trainer.child.pid, exited=True, status=status
        )
        header = self._header(trainer.generation)
        while not await self._confirm(daemon_pb2.ConfirmRequest(header=header, trainers=[ended])):
            await asyncio.sleep(RETRY_S)

    async def _confirm(self, request: daemon_pb2.ConfirmRequest) -> bool:
        """True once the daemon has the fact, or has a newer one that makes it void."""
        try:
            await self._daemon.Confirm(request, timeout=CONFIRM_S)
        except grpc.aio.AioRpcError as error:
            # A refusal is an answer; an order that still stands comes again with the next stream.
            return error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        return True

    def _header(self, generation: int, timeout_s: float = CONFIRM_S) -> common_pb2.Header:
        return common_pb2.Header(job=self._job, generation=generation, timeout_ms=int(timeout_s * 1e3))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._watches.add(task)
        task.add_done_callback(self._watches.discard)
