"""The real server: RPCs over a real channel, the journal across kill -9, and what it refuses."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from ckptd.coordinator import wire
from ckptd.coordinator.events import Answer
from ckptd.coordinator.journal import Journal
from ckptd.coordinator.probe import probe
from ckptd.coordinator.server import serve
from ckptd.coordinator.settings import CoordinatorSettings
from ckptd.errors import InvalidRequest, Unreachable
from ckptd.storage import catalog
from ckptd.storage.lines import Start
from ckptd.v1 import common_pb2, coordinator_pb2, coordinator_pb2_grpc

Stub = coordinator_pb2_grpc.CoordinatorStub
DEADLINE_S = 30.0
# A daemon by hand, held up on a busy machine, is not a silent one: what these tests end is streams.
SILENCE_S = 30.0
HEADER = common_pb2.Header(job="llama", timeout_ms=2000)
SPEC = coordinator_pb2.JobSpec(job="llama", nodes=1, ranks_per_node=1, parity=1, every=1, slots=3)


def submission(**changes: int) -> coordinator_pb2.SubmitRequest:
    request = coordinator_pb2.SubmitRequest(header=HEADER, spec=SPEC)
    for name, value in changes.items():
        setattr(request.spec, name, value)
    return request


@asynccontextmanager
async def running(tmp_path: Path, **options: Any) -> AsyncIterator[tuple[grpc.aio.Channel, int]]:
    """A coordinator in this process, and a channel to it."""
    settings = CoordinatorSettings(
        listen="127.0.0.1:0",
        journal=tmp_path / "journal.sqlite",
        settle_s=0.1,
        silence_s=SILENCE_S,
        **{"store": str(tmp_path / "store"), **options},
    )
    ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    server = asyncio.create_task(serve(settings, ready.set_result))
    await asyncio.wait([server, ready], return_when=asyncio.FIRST_COMPLETED)
    if server.done():
        server.result()
    port = ready.result()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel, port
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(server, DEADLINE_S)


class Daemon:
    """A daemon's side of a session, by hand: it accepts rosters, and confirms that nothing runs."""

    def __init__(self, channel: grpc.aio.Channel, node: str, address: str = "127.0.0.1:1") -> None:
        self.node, self.address, self.sequence = node, address, 0
        self.jobs: list[coordinator_pb2.JobReport] = []
        self.call = Stub(channel).Session(timeout=2 * DEADLINE_S)

    async def report(self, **fields: object) -> None:
        self.sequence += 1
        message = coordinator_pb2.NodeReport(
            header=common_pb2.Header(timeout_ms=1000), protocol=wire.PROTOCOL, node=self.node, incarnation=1,
            sequence=self.sequence, control_address=self.address, bulk_address="127.0.0.1:2",
            rendezvous_host="127.0.0.1", rendezvous_port=7777,
        )  # fmt: skip
        message.jobs.extend(self.jobs)
        for name, value in fields.items():
            setattr(message, name, value)
        await self.call.write(message)

    async def directive(
        self, wanted: Callable[[coordinator_pb2.Directive], bool]
    ) -> coordinator_pb2.Directive:
        """The first directive that is as wanted; reports go on meanwhile, as a daemon's do."""

        async def beat() -> None:
            while True:
                await asyncio.sleep(0.1)
                await self.report()

        beating = asyncio.create_task(beat())
        try:
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    found = await self.call.read()
                    assert found is not grpc.aio.EOF
                    self.jobs = [
                        coordinator_pb2.JobReport(
                            job=job.job,
                            spec=job.spec,
                            roster=job.roster,
                            generation=job.roster.generation,
                            stopped_through=job.stop_through,
                        )
                        for job in found.jobs
                    ]
                    if wanted(found):
                        return found
        finally:
            beating.cancel()


async def refused(call: Awaitable[object], code: grpc.StatusCode) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() == code, caught.value.details()
    return caught.value.details() or ""


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await condition():
            await asyncio.sleep(0.02)


def test_submitting_is_idempotent_and_another_specification_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (channel, _):
            stub = Stub(channel)
            assert (await stub.Submit(submission(), timeout=DEADLINE_S)).created
            assert not (await stub.Submit(submission(), timeout=DEADLINE_S)).created
            details = await refused(
                stub.Submit(submission(nodes=2), timeout=DEADLINE_S), grpc.StatusCode.INVALID_ARGUMENT
            )
            assert "another specification" in details and "Next:" in details
            for name in ("", "a/b", ".."):
                request = submission()
                request.spec.job = request.header.job = name
                await refused(stub.Submit(request, timeout=DEADLINE_S), grpc.StatusCode.INVALID_ARGUMENT)
            status = await stub.Status(coordinator_pb2.StatusRequest(header=HEADER), timeout=DEADLINE_S)
            assert [job.spec for job in status.jobs] == [SPEC]
            assert status.jobs[0].phase == "forming"

    asyncio.run(story())


def test_a_job_that_was_rolled_back_does_not_go_on_from_older_memory(tmp_path: Path) -> None:
    async def story() -> None:
        store = str(tmp_path / "store")
        begun = catalog.job_store(store, "llama").inside(catalog.STARTS)
        start = Start(5, (1, 3), "loss spike", 0)
        begun.put_if_absent(catalog.start_name(5), start.write("llama"))
        async with running(tmp_path, store=store) as (channel, _):
            daemon, stub = Daemon(channel, "n0"), Stub(channel)
            held = coordinator_pb2.Holding(generation=2, step=4, sealed=True)
            daemon.jobs = [coordinator_pb2.JobReport(job="llama", generation=2, holdings=[held])]
            await daemon.report()

            everything = coordinator_pb2.StatusRequest(header=common_pb2.Header(timeout_ms=1000))

            async def is_known() -> bool:
                return len((await stub.Status(everything, timeout=DEADLINE_S)).nodes) > 0

            await until(is_known)
            details = await refused(
                stub.Submit(submission(), timeout=DEADLINE_S), grpc.StatusCode.INVALID_ARGUMENT
            )
            assert "rolled back" in details and "n0" in details and "ckptd forget llama" in details
            daemon.jobs = []
            await daemon.report()

            async def is_forgotten() -> bool:
                try:
                    return (await stub.Submit(submission(), timeout=DEADLINE_S)).created
                except grpc.aio.AioRpcError:
                    return False

            await until(is_forgotten)
            daemon.call.cancel()

    asyncio.run(story())


def test_calls_without_a_deadline_or_timeout_are_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (channel, _):
            stub = Stub(channel)
            invalid = grpc.StatusCode.INVALID_ARGUMENT
            assert "no deadline" in await refused(stub.Submit(submission()), invalid)
            request = coordinator_pb2.StatusRequest(header=HEADER)
            assert "no deadline" in await refused(stub.Status(request), invalid)
            assert "no deadline" in await refused(
                stub.Watch(coordinator_pb2.WatchRequest(header=HEADER)).read(), invalid
            )
            request.header.timeout_ms = 0
            assert "timeout_ms" in await refused(stub.Status(request, timeout=DEADLINE_S), invalid)
            other = coordinator_pb2.StatusRequest(header=common_pb2.Header(job="other", timeout_ms=1))
            await refused(stub.Status(other, timeout=DEADLINE_S), grpc.StatusCode.NOT_FOUND)

    asyncio.run(story())


def test_a_session_brings_a_node_into_a_job_and_its_end_makes_it_suspect(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (channel, _):
            stub = Stub(channel)
            await stub.Submit(submission(), timeout=DEADLINE_S)
            daemon = Daemon(channel, "n0")
            await daemon.report()
            found = await daemon.directive(lambda d: any(job.HasField("start") for job in d.jobs))
            (job,) = found.jobs
            assert job.spec == SPEC and job.stop_through == 0
            assert job.roster.generation == 1 and [m.node for m in job.roster.members] == ["n0"]
            assert (job.start.master_address, job.start.master_port) == ("127.0.0.1", 7777)
            watch = stub.Watch(coordinator_pb2.WatchRequest(header=HEADER), timeout=DEADLINE_S)
            names, last = [], 0
            daemon.call.cancel()
            async for event in watch:
                assert event.sequence > last
                last = event.sequence
                names.append(event.name)
                if event.name == "node-suspect":
                    break
            watch.cancel()
            assert names == ["node-joined", "job-formed", "planned", "committed", "started", "node-suspect"]
            rest = stub.Watch(coordinator_pb2.WatchRequest(header=HEADER, after=last), timeout=DEADLINE_S)
            assert (await anext(aiter(rest))).sequence > last, "watching goes on from any event"
            rest.cancel()

    asyncio.run(story())


def test_a_second_stream_of_a_node_replaces_the_first(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (channel, _):
            await Stub(channel).Submit(submission(nodes=2), timeout=DEADLINE_S)
            first, second = Daemon(channel, "n0"), Daemon(channel, "n0")
            await first.report()
            await first.directive(lambda d: bool(d.jobs))
            second.sequence = first.sequence
            await second.report()
            found = await second.directive(lambda d: bool(d.jobs))
            assert found.jobs[0].spec.job == "llama", "it is told everything anew"
            async with asyncio.timeout(DEADLINE_S):
                while await first.call.read() is not grpc.aio.EOF:
                    pass
            second.call.cancel()

    asyncio.run(story())


def test_a_daemon_of_another_version_or_without_a_name_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (channel, _):
            for fields, code in (
                ({"protocol": 99}, grpc.StatusCode.FAILED_PRECONDITION),
                ({"node": "../n"}, grpc.StatusCode.INVALID_ARGUMENT),
            ):
                daemon = Daemon(channel, "n0")
                await daemon.report(**fields)
                await refused(daemon.call.read(), code)
            daemon = Daemon(channel, "n0")
            await daemon.report()
            assert not (await daemon.call.read()).jobs, "nothing is wished of it yet"
            await daemon.report(node="n1")
            await refused(daemon.call.read(), grpc.StatusCode.INVALID_ARGUMENT)

    asyncio.run(story())


def test_health_and_reflection_are_served(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (channel, port):
            for service in ("", "ckptd.v1.Coordinator"):
                reply = await health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE_S
                )
                assert reply.status == health_pb2.HealthCheckResponse.SERVING
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(timeout=DEADLINE_S)
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            listed = (await call.read()).list_services_response
            assert "ckptd.v1.Coordinator" in {service.name for service in listed.service}
            call.cancel()
            assert await probe(f"127.0.0.1:{port}", DEADLINE_S) == Answer.ANSWERED

    asyncio.run(story())


def test_a_probe_tells_nobody_there_from_somebody_silent() -> None:
    async def story() -> None:
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            port = silent.getsockname()[1]
            assert await probe(f"127.0.0.1:{port}", 0.2) == Answer.REFUSED
            # The kernel completes the connection for a process that never accepts it.
            silent.listen()
            assert await probe(f"127.0.0.1:{port}", 0.2) == Answer.SILENT
        assert await probe("nonsense", 0.2) == Answer.REFUSED

    asyncio.run(story())


def test_settings_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="reachable from other machines"):
        CoordinatorSettings(listen="0.0.0.0:7070")
    for address in ("127.evil.org:1", "10.0.0.1:7070", "[::]:7070"):
        with pytest.raises(InvalidRequest, match="--insecure"):
            CoordinatorSettings(listen=address)
    assert CoordinatorSettings(listen="0.0.0.0:7070", insecure=True).insecure
    assert CoordinatorSettings(listen="[::1]:7070").listen == "[::1]:7070"
    with pytest.raises(InvalidRequest, match="heartbeats"):
        CoordinatorSettings(silence_s=0.3)
    with pytest.raises(InvalidRequest, match="probe"):
        CoordinatorSettings(probe_timeout_s=0.6)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTD_COORDINATOR_SILENCE_S", "2.5")
    assert CoordinatorSettings().timing().silence_s == 2.5


PROGRAM = """
import asyncio, sys
from pathlib import Path
from ckptd.coordinator.server import serve
from ckptd.coordinator.settings import CoordinatorSettings
settings = CoordinatorSettings(
    listen="127.0.0.1:0",
    journal=Path(sys.argv[1]),
    settle_s=0.1,
    silence_s=float(sys.argv[2]),
    store=sys.argv[1] + ".store",
)
asyncio.run(serve(settings, lambda port: print(port, flush=True)))
"""


@contextmanager
def process(journal: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-c", PROGRAM, str(journal), str(SILENCE_S)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        assert line, "the coordinator did not come up"
        yield child, int(line)
    finally:
        child.kill()
        child.wait(DEADLINE_S)
        assert child.stdout is not None
        child.stdout.close()


def test_the_journal_survives_kill_9(tmp_path: Path) -> None:
    journal = tmp_path / "journal.sqlite"

    async def before(port: int) -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await Stub(channel).Submit(submission(), timeout=DEADLINE_S)
            daemon = Daemon(channel, "n0")
            await daemon.report()
            await daemon.directive(lambda d: any(job.roster.generation == 1 for job in d.jobs))
            daemon.call.cancel()

    async def after(port: int) -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = Stub(channel)
            assert not (await stub.Submit(submission(), timeout=DEADLINE_S)).created
            (job,) = (
                await stub.Status(coordinator_pb2.StatusRequest(header=HEADER), timeout=DEADLINE_S)
            ).jobs
            assert job.phase == "adopting" and job.roster.generation == 1
            # The node knows nothing of generation 1: it is not begun a second time.
            daemon = Daemon(channel, "n0")
            await daemon.report()
            found = await daemon.directive(
                lambda d: any(job.roster.generation and job.HasField("start") for job in d.jobs)
            )
            assert found.jobs[0].roster.generation == 2
            daemon.call.cancel()

    with process(journal) as (child, port):
        asyncio.run(before(port))
        child.send_signal(signal.SIGKILL)
        child.wait(DEADLINE_S)
    with process(journal) as (child, port):
        asyncio.run(after(port))
        child.send_signal(signal.SIGTERM)
        assert child.wait(DEADLINE_S) == 0, "a clean end"


def test_a_coordinator_that_cannot_write_its_journal_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Journal, entry: object) -> None:
        raise Unreachable("cannot write to the journal", "no space left on device")

    async def story() -> None:
        ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        settings = CoordinatorSettings(listen="127.0.0.1:0", journal=tmp_path / "journal.sqlite")
        server = asyncio.create_task(serve(settings, ready.set_result))
        port = await ready
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            monkeypatch.setattr(Journal, "append", refuse)
            call = Stub(channel).Submit(submission(), timeout=DEADLINE_S)
            assert "no space" in await refused(call, grpc.StatusCode.INTERNAL)
        with pytest.raises(Unreachable, match="no space"):
            await asyncio.wait_for(server, DEADLINE_S)

    asyncio.run(story())


def test_an_address_in_use_is_an_error_with_a_next_step(tmp_path: Path) -> None:
    async def story() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(Unreachable, match="choose another --listen"):
                await serve(CoordinatorSettings(listen=address, journal=tmp_path / "journal.sqlite"))

    asyncio.run(story())
