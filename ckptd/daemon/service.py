"""The daemon's gRPC service: launchers, operators, and peers without a coordinator."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeAlias, TypeVar

import grpc

from ckptd import erasure
from ckptd.daemon.job import Job
from ckptd.daemon.node import Node
from ckptd.errors import CkptdError, InvalidRequest, NotFound, StaleGeneration
from ckptd.protocol import PROTOCOL
from ckptd.rpc import CHANNEL_OPTIONS
from ckptd.v1 import coordinator_pb2, coordinator_pb2_grpc, daemon_pb2, daemon_pb2_grpc

T = TypeVar("T")
_STATUS = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    StaleGeneration: grpc.StatusCode.FAILED_PRECONDITION,
}
Context: TypeAlias = grpc.aio.ServicerContext  # untyped, as all of grpc


class DaemonService(daemon_pb2_grpc.DaemonServicer):
    """See proto/ckptd/v1/daemon.proto; every unary call must have a deadline."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def Orders(
        self, request: daemon_pb2.OrdersRequest, context: Context
    ) -> AsyncIterator[daemon_pb2.Order]:
        # The launcher's newest order may have been the start of the very generation that is
        # to be stopped by now, so its stop is said again; obeying twice does no harm.
        start_sent = request.header.generation
        stop_sent = max(0, start_sent - 1)
        while True:
            pulse = self._node.pulse  # an order is not sent at once, and the next one may come meanwhile
            job = self._node.jobs.get(request.header.job)
            if job is not None:
                if job.stop_through > stop_sent:
                    stop_sent = job.stop_through
                    grace = int(self._node.settings.stop_grace_s * 1000)
                    yield daemon_pb2.Order(generation=stop_sent, stop=daemon_pb2.Stop(grace_ms=grace))
                start = job.start
                if start is not None and start.generation > max(start_sent, job.stop_through) and job.member:
                    start_sent = start.generation
                    self._node.release_port(start)
                    yield daemon_pb2.Order(generation=start_sent, start=_start(job, start, self._node))
                if job.finished:
                    yield daemon_pb2.Order(generation=job.generation, finish=daemon_pb2.Finish())
                    return
            await pulse.wait()

    async def Confirm(self, request: daemon_pb2.ConfirmRequest, context: Context) -> daemon_pb2.ConfirmReply:
        async def confirm() -> daemon_pb2.ConfirmReply:
            job, generation = self._node.job(request.header.job), request.header.generation
            for trainer in request.trainers:
                if trainer.exited:
                    self._node.exited(job, generation, trainer.rank, trainer.pid, trainer.status)
                else:
                    self._node.launched(job, generation, trainer.rank, trainer.pid)
            # What may still be started cannot have been confirmed as gone.
            stopped = min(generation, job.stop_through) if request.stopped else 0
            if stopped > job.confirmed_stopped:
                job.confirmed_stopped = stopped
                job.save()
            self._node.changed()
            return daemon_pb2.ConfirmReply()

        return await _answer(context, confirm)

    async def Submit(
        self, request: coordinator_pb2.SubmitRequest, context: Context
    ) -> coordinator_pb2.SubmitReply:
        async def submit() -> coordinator_pb2.SubmitReply:
            address = self._node.settings.coordinator
            if not address:
                raise InvalidRequest(
                    f"node {self._node.settings.node} has no coordinator",
                    "only a coordinator forms jobs over several nodes",
                    "start `ckptd coordinator`, and this daemon with --coordinator HOST:PORT",
                )
            async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
                stub = coordinator_pb2_grpc.CoordinatorStub(channel)
                return await stub.Submit(request, timeout=context.time_remaining())  # type: ignore[no-any-return]

        return await _answer(context, submit)

    async def Status(
        self, request: daemon_pb2.DaemonStatusRequest, context: Context
    ) -> daemon_pb2.DaemonStatusReply:
        async def status() -> daemon_pb2.DaemonStatusReply:
            node = self._node
            return daemon_pb2.DaemonStatusReply(
                protocol=PROTOCOL,
                node=node.settings.node,
                pid=os.getpid(),
                embedded=node.settings.embedded,
                coordinator_connected=node.coordinator_connected,
                jobs=[job.report() for job in node.jobs.values()],
                memory=[_memory(job) for job in node.jobs.values()],
                memory_limit_bytes=node.limit_bytes(),
                memory_dir=str(node.settings.memory_dir),
                survives=node.survives,
                kernel=erasure.Code(1, 1).kernel.name,
                cells_refused=node.protection.corrupt_cells,
                cells_damaged=node.scrub.corrupt_cells,
                cells_healed=node.scrub.healed_cells,
                scrubbed_bytes=node.scrub.scrubbed_bytes,
                incarnation=node.incarnation,
            )

        return await _answer(context, status)

    async def Forget(self, request: daemon_pb2.ForgetRequest, context: Context) -> daemon_pb2.ForgetReply:
        async def forget() -> daemon_pb2.ForgetReply:
            return daemon_pb2.ForgetReply(freed_bytes=self._node.forget(request.header.job))

        return await _answer(context, forget)

    async def Facts(self, request: daemon_pb2.FactsRequest, context: Context) -> daemon_pb2.FactsReply:
        async def facts() -> daemon_pb2.FactsReply:
            return daemon_pb2.FactsReply(schedule=self._node.fold_facts(request.node, request.report))

        return await _answer(context, facts)


def _start(job: Job, order: coordinator_pb2.StartOrder, node: Node) -> daemon_pb2.Start:
    assert job.member is not None
    ranks = list(job.member.ranks)
    world = sum(len(member.ranks) for member in job.roster.members)
    common = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(len(ranks)),
        "MASTER_ADDR": order.master_address,
        "MASTER_PORT": str(order.master_port),
        "CKPTD_GENERATION": str(order.generation),
        "CKPTD_SOCKET": str(node.settings.socket),
        "CKPTD_NODE": node.settings.node,
    }
    return daemon_pb2.Start(
        trainers=[
            daemon_pb2.TrainerOrder(
                rank=rank, environment={**common, "RANK": str(rank), "LOCAL_RANK": str(local)}
            )
            for local, rank in enumerate(ranks)
        ]
    )


def _memory(job: Job) -> daemon_pb2.JobMemory:
    arenas, parity = job.memory.nbytes()
    return daemon_pb2.JobMemory(
        job=job.name,
        owner_uid=max(job.owner_uid, 0),
        arena_bytes=arenas,
        parity_bytes=parity,
        images_held=sum(len(h.rank_seals) for h in job.memory.holdings.values()),
    )


async def _answer(context: Context, work: Callable[[], Awaitable[T]]) -> T:
    """Runs one unary call under its deadline, with our errors as gRPC's."""
    left = context.time_remaining()
    if left is None:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a call needs a deadline")
    try:
        async with asyncio.timeout(left):
            return await work()
    except CkptdError as error:
        code = next(
            (code for kind, code in _STATUS.items() if isinstance(error, kind)), grpc.StatusCode.INTERNAL
        )
        await context.abort(code, str(error))
    except grpc.aio.AioRpcError as error:
        await context.abort(error.code(), error.details() or "")
    raise AssertionError("abort raises")
