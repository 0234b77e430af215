"""The daemon's line to the coordinator, and what happens while there is none."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc

from ckptd.daemon.job import Job
from ckptd.daemon.node import Node
from ckptd.errors import CkptdError
from ckptd.rpc import CHANNEL_OPTIONS
from ckptd.v1 import common_pb2, coordinator_pb2, coordinator_pb2_grpc, daemon_pb2, daemon_pb2_grpc

log = logging.getLogger("ckptd.session")

_RETRY_S = 0.1
_FACTS_TIMEOUT_S = 0.3


class Session:
    """Reports facts and follows directives, for as long as the daemon lives."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._sequence = 0

    async def run(self) -> None:
        """Keeps a stream to the coordinator; reconnects for ever."""
        while True:
            try:
                async with grpc.aio.insecure_channel(
                    self._node.settings.coordinator, options=CHANNEL_OPTIONS
                ) as channel:
                    call = coordinator_pb2_grpc.CoordinatorStub(channel).Session(self._reports())
                    async for directive in call:
                        self._connected(True)
                        self._follow(directive)
            except grpc.aio.AioRpcError as error:
                log.debug("coordinator: %s", error.details())
            self._connected(False)
            await asyncio.sleep(_RETRY_S)

    async def stand_in(self) -> None:
        """While the coordinator is away, sends facts to the lowest reachable member of each job."""
        while True:
            await self._node.next_change(self._node.settings.heartbeat_s)
            if self._node.coordinator_connected:
                continue
            for job in list(self._node.jobs.values()):
                if job.member is not None and not job.finished and job.living():
                    await self._ask_lowest(job)

    def _connected(self, up: bool) -> None:
        if up != self._node.coordinator_connected:
            self._node.coordinator_connected = up
            where = self._node.settings.coordinator
            log.info(
                "coordinator %s is %s", where, "connected" if up else "away; protection goes on without it"
            )

    def _follow(self, directive: coordinator_pb2.Directive) -> None:
        for wish in directive.jobs:
            try:
                self._node.follow(wish)
            except CkptdError as error:
                log.error("job %s: %s", wish.job, error)

    async def _reports(self) -> AsyncIterator[coordinator_pb2.NodeReport]:
        while True:
            self._sequence += 1
            yield self._node.report(self._sequence)
            await self._node.next_change(self._node.settings.heartbeat_s)

    async def _ask_lowest(self, job: Job) -> None:
        for member in list(job.roster.members):
            if member.node == self._node.settings.node:
                self._node.reschedule(job)
                return
            request = daemon_pb2.FactsRequest(
                header=common_pb2.Header(
                    job=job.name, generation=job.generation, timeout_ms=int(_FACTS_TIMEOUT_S * 1000)
                ),
                node=self._node.settings.node,
                report=job.report(),
            )
            try:
                async with grpc.aio.insecure_channel(
                    member.control_address, options=CHANNEL_OPTIONS
                ) as channel:
                    reply = await daemon_pb2_grpc.DaemonStub(channel).Facts(request, timeout=_FACTS_TIMEOUT_S)
            except grpc.aio.AioRpcError:
                continue
            job.apply(reply.schedule)
            return
