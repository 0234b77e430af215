"""The coordinator's gRPC server: a thin shell around `shell.Shell`."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable
from typing import NoReturn

import grpc
import grpc.aio
from google.protobuf.message import Message

from ckptd.coordinator import wire
from ckptd.coordinator.journal import Journal
from ckptd.coordinator.settings import CoordinatorSettings
from ckptd.coordinator.shell import Shell, Stream
from ckptd.errors import CkptdError, InvalidRequest, NotFound, ProtocolMismatch
from ckptd.image.names import check_name
from ckptd.rpc import make_server
from ckptd.storage.snapshot import generations
from ckptd.v1 import common_pb2, coordinator_pb2, coordinator_pb2_grpc

log = logging.getLogger("ckptd.coordinator")

_SERVICE = coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"].full_name
_CODES = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    ProtocolMismatch: grpc.StatusCode.FAILED_PRECONDITION,
}
_STOP_S = 0.5


async def serve(settings: CoordinatorSettings, ready: Callable[[int], None] | None = None) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        ready: called with the port once requests are taken.

    Raises:
        Unreachable: the address or the journal cannot be used.
        ProtocolMismatch: the journal is of another version.
        CorruptImage: the journal cannot be read.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    journal = Journal(settings.journal)
    try:
        shell = Shell(settings, journal)
        server, port = await _listen(settings, shell)
        log.info("listening on port %d, journal %s", port, settings.journal)
        if ready is not None:
            ready(port)
        try:
            await _until(stop, shell)
        finally:
            shell.stop_streams()
            await server.stop(_STOP_S)
    finally:
        journal.close()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def _until(stop: asyncio.Event, shell: Shell) -> None:
    """Runs the shell until `stop`; what the shell fails with, this fails with."""
    running = asyncio.create_task(shell.run())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([running, stopping], return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
    finally:
        running.cancel()
        stopping.cancel()
        await asyncio.gather(running, stopping, return_exceptions=True)


async def _listen(settings: CoordinatorSettings, shell: Shell) -> tuple[grpc.aio.Server, int]:
    def register(server: grpc.aio.Server) -> None:
        coordinator_pb2_grpc.add_CoordinatorServicer_to_server(Service(shell, settings.store_url()), server)

    server, port = await make_server(_SERVICE, register, settings.listen)
    await server.start()
    return server, port


class Service(coordinator_pb2_grpc.CoordinatorServicer):
    """The RPCs; each is a few lines between the wire and the shell."""

    def __init__(self, shell: Shell, store: str) -> None:
        self._shell = shell
        self._store = store

    async def Session(
        self,
        request_iterator: AsyncIterator[coordinator_pb2.NodeReport],
        context: grpc.aio.ServicerContext[coordinator_pb2.NodeReport, coordinator_pb2.Directive],
    ) -> AsyncIterator[coordinator_pb2.Directive]:
        try:
            first = await anext(request_iterator)
        except StopAsyncIteration:
            return
        try:
            _check_header(first.header)
            report = wire.report_from(first)
        except CkptdError as error:
            await _refuse(context, error)
        stream = self._shell.open_stream(report.node)
        self._shell.report(stream, report)
        reader = asyncio.create_task(self._read(report.node, stream, request_iterator))
        try:
            async for directive in stream.directives():
                yield wire.directive_message(directive)
            if reader.done() and (refused := reader.result()) is not None:
                await _refuse(context, refused)
        finally:
            reader.cancel()
            self._shell.close_stream(report.node, stream)

    async def _read(
        self, node: str, stream: Stream, reports: AsyncIterator[coordinator_pb2.NodeReport]
    ) -> CkptdError | None:
        """Takes reports until the stream ends; returns what was wrong with the last one."""
        try:
            async for message in reports:
                _check_header(message.header)
                report = wire.report_from(message)
                if report.node != node:
                    raise InvalidRequest(f"a stream of node {node} carried a report of {report.node}")
                self._shell.report(stream, report)
        except CkptdError as error:
            return error
        finally:
            stream.close()
        return None

    async def Submit(
        self, request: coordinator_pb2.SubmitRequest, context: grpc.aio.ServicerContext
    ) -> coordinator_pb2.SubmitReply:
        try:
            _check_call(request.header, context)
            check_name("job", request.spec.job)
            if request.header.job != request.spec.job:
                raise InvalidRequest(
                    "header and specification name different jobs",
                    f"found {request.header.job!a} and {request.spec.job!a}",
                )
            stored = await asyncio.to_thread(generations, self._store, request.spec.job)
            self._check_rolled_back(request.spec.job, stored.start)
            created = self._shell.submit(wire.spec_from(request.spec), stored.newest)
            return coordinator_pb2.SubmitReply(created=created)
        except CkptdError as error:
            await _refuse(context, error)

    def _check_rolled_back(self, job: str, start: int) -> None:
        """Memory goes before storage, so none may be left from before a rollback.

        Raises:
            InvalidRequest: some node holds a state of an older generation.
        """
        known = {name: node.facts(job) for name, node in self._shell.state.nodes.items()}
        nodes = sorted(
            n for n, facts in known.items() if facts and facts.holdings and facts.generation < start
        )
        if nodes:
            raise InvalidRequest(
                f"job {job} was rolled back, and nodes still hold what it left",
                f"generation {start} begins with the rollback; older states are on {', '.join(nodes)}",
                f"ckptd forget {job} on each of them, then submit it again",
            )

    async def Status(
        self, request: coordinator_pb2.StatusRequest, context: grpc.aio.ServicerContext
    ) -> coordinator_pb2.StatusReply:
        try:
            _check_call(request.header, context)
            job = request.header.job
            if job and job not in self._shell.state.jobs:
                known = ", ".join(sorted(self._shell.state.jobs)) or "none"
                raise NotFound(f"no job {job!a}", f"known here: {known}")
            return wire.status_message(self._shell.state, job)
        except CkptdError as error:
            await _refuse(context, error)

    async def Watch(
        self, request: coordinator_pb2.WatchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[coordinator_pb2.TimelineEvent]:
        try:
            _check_call(request.header, context)
        except CkptdError as error:
            await _refuse(context, error)
        job = request.header.job
        async for number, event in self._shell.timeline.follow(request.after):
            if not job or event.job in ("", job):
                yield wire.event_message(event, number)


def _check_header(header: common_pb2.Header) -> None:
    if not header.timeout_ms:
        raise InvalidRequest("the request's header has no timeout_ms", "expected more than 0", "set it")


def _check_call(header: common_pb2.Header, context: grpc.aio.ServicerContext) -> None:
    if context.time_remaining() is None:
        raise InvalidRequest(
            "the call has no deadline",
            "a caller that waits for ever holds a place here for ever",
            "pass a timeout to the call",
        )
    _check_header(header)


async def _refuse(context: grpc.aio.ServicerContext[Message, Message], error: CkptdError) -> NoReturn:
    await context.abort(_CODES.get(type(error), grpc.StatusCode.INTERNAL), str(error))
    raise AssertionError("abort returns never")
