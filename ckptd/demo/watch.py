"""Keeps the board up to date from the coordinator: its timeline as it happens, its status by and by."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio

from ckptd.demo.board import Board
from ckptd.demo.figures import Event
from ckptd.erasure import groups
from ckptd.v1 import common_pb2, coordinator_pb2, coordinator_pb2_grpc

RETRY_S = 0.05
WATCH_S = 30.0
STATUS_EVERY_S = 0.2
STATUS_S = 2.0


class Watcher:
    """Two endless tasks over one channel; they outlive the coordinator's restarts."""

    def __init__(self, job: str, connection: grpc.aio.Channel, board: Board) -> None:
        self._job = job
        self._stub = coordinator_pb2_grpc.CoordinatorStub(connection)
        self._board = board
        self._after = 0

    async def timeline(self) -> None:
        """Puts the coordinator's events on the board, each once."""
        while True:
            request = coordinator_pb2.WatchRequest(header=self._header(WATCH_S), after=self._after)
            try:
                async for told in self._stub.Watch(request, timeout=WATCH_S):
                    self._after = told.sequence
                    self._take(told)
            except grpc.aio.AioRpcError:
                pass  # the time of this call is over, or the coordinator is away
            await asyncio.sleep(RETRY_S)

    async def status(self) -> None:
        """Puts the job's phase, watermark and roster and the nodes' states on the board."""
        while True:
            request = coordinator_pb2.StatusRequest(header=self._header(STATUS_S))
            try:
                self._show(await self._stub.Status(request, timeout=STATUS_S))
            except grpc.aio.AioRpcError:
                self._board.phase = "coordinator away"
            await asyncio.sleep(STATUS_EVERY_S)

    def _take(self, told: coordinator_pb2.TimelineEvent) -> None:
        if told.name == "protected":
            self._board.watermark = told.step
        else:
            text = sentence(told)
            self._board.events.append(Event(told.name, told.monotonic_s, text))
            self._board.now = text.partition("\n")[0]
        self._board.changed()

    def _show(self, reply: coordinator_pb2.StatusReply) -> None:
        for seen in reply.nodes:
            if seen.node in self._board.nodes:
                self._board.nodes[seen.node].state = seen.state
        for job in reply.jobs:
            if job.spec.job == self._job:
                self._show_job(job)
        self._board.changed()

    def _show_job(self, job: coordinator_pb2.JobStatus) -> None:
        board, roster = self._board, job.roster
        board.phase = job.phase
        board.generation = roster.generation
        board.watermark = job.schedule.watermark if job.schedule.has_watermark else None
        cut = groups.cut([(member.node, member.domain) for member in roster.members], roster.parity)
        group_of = {node: index for index, group in enumerate(cut) for node in group}
        ranks_of = {member.node: tuple(member.ranks) for member in roster.members}
        for name, node in board.nodes.items():
            node.ranks = ranks_of.get(name, ())
            node.group = group_of.get(name)

    def _header(self, timeout_s: float) -> common_pb2.Header:
        return common_pb2.Header(job=self._job, timeout_ms=int(timeout_s * 1e3))


def sentence(told: coordinator_pb2.TimelineEvent) -> str:
    """What a coordinator's event says to people; the plan's has several lines."""
    nodes = ", ".join(told.nodes)
    match told.name:
        case "job-formed":
            return f"the job is formed of {nodes}"
        case "incident":
            return f"incident: {told.text}"
        case "stopped":
            return "no trainer of the old generation runs any more"
        case "planned":
            return f"plan: {told.text}"
        case "committed":
            return f"generation {told.generation} is committed"
        case "transferred":
            return f"the state of step {told.step} is in place everywhere and verified"
        case "started":
            return f"trainers of generation {told.generation} are started; {told.text}"
        case "running":
            return f"all ranks of generation {told.generation} are attached, from step {told.step}"
        case "finished":
            return "the coordinator has seen the job's end"
        case "node-joined":
            return " ".join(filter(None, [f"{nodes} joined", told.text and f"({told.text})"]))
        case "node-suspect":
            return f"{nodes} is suspected: {told.text}"
        case "node-dead":
            return f"{nodes} is dead: {told.text}"
        case _:
            return " ".join(filter(None, [told.name.replace("-", " "), nodes, told.text]))
