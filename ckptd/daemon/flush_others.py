"""What a flush waits for from other nodes, and how it learns that they will not bring it.

Nodes put a checkpoint together through the store alone: one leads, and waits for what all others bring; the
others wait for what it makes of that.  Who waits for long asks those that it waits for, daemon to daemon, so
that a node that failed, or does not even reach the store any more, holds nobody up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import grpc

from ckptd.daemon.job import Job
from ckptd.rpc import CHANNEL_OPTIONS
from ckptd.v1 import common_pb2, daemon_pb2, daemon_pb2_grpc

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
_ASK_TIMEOUT_S = 1.0


def pauses() -> Iterator[float]:
    """Yields how long to wait before each next look at the store, in seconds: longer and longer, for ever."""
    pause = _FIRST_PAUSE_S
    while True:
        yield pause
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def leads(job: Job) -> bool:
    """Whether this node is the one that puts together what all nodes bring."""
    return bool(job.roster.members[0].node == job.node)


class Others:
    """The nodes that a flush of one step of the job's present generation waits for."""

    def __init__(self, job: Job, step: int) -> None:
        self._job = job
        self._step = step
        self._generation = job.generation
        members = [member for member in job.roster.members if member.node != job.node]
        if not leads(job):
            members = [job.roster.members[0]]
        self._members = {member.node: (member.control_address, tuple(member.ranks)) for member in members}
        # The life in which each of them was found first.
        self._lives: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._members)

    async def gone(self) -> dict[str, tuple[int, ...]]:
        """Returns those that are not going to bring anything more, and their ranks.

        Who cannot be reached may come back; should it not, a new generation ends the flush.
        """
        answers = await asyncio.gather(*(self._ask(node) for node in self._members))
        return {
            node: ranks
            for (node, (_, ranks)), answer in zip(self._members.items(), answers, strict=True)
            if answer is not None and self._over(node, answer)
        }

    def _over(self, node: str, answer: daemon_pb2.DaemonStatusReply) -> bool:
        report = next((report for report in answer.jobs if report.job == self._job.name), None)
        if report is None:
            return True  # its memory is lost
        if (report.generation, report.flush_over) >= (self._generation, self._step):
            return True
        # What trainers had asked an earlier daemon for, nobody knows; what the schedule names is begun anew.
        life = self._lives.setdefault(node, answer.incarnation)
        return life != answer.incarnation and self._job.schedule.flush != self._step

    async def _ask(self, node: str) -> daemon_pb2.DaemonStatusReply | None:
        address, _ = self._members[node]
        header = common_pb2.Header(
            job=self._job.name, generation=self._generation, timeout_ms=int(_ASK_TIMEOUT_S * 1000)
        )
        try:
            async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
                request = daemon_pb2.DaemonStatusRequest(header=header)
                return await daemon_pb2_grpc.DaemonStub(channel).Status(request, timeout=_ASK_TIMEOUT_S)  # type: ignore[no-any-return]
        except grpc.aio.AioRpcError:
            return None
