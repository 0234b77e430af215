"""The gRPC service of a daemon: launchers, operators, and peers whose coordinator is away."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from cluster import until
from daemonkit import header, looped
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from ckptd.daemon.job import State, Trainer
from ckptd.daemon.node import Node
from ckptd.daemon.server import _control_server, control_socket
from ckptd.daemon.service import DaemonService
from ckptd.daemon.settings import DaemonSettings
from ckptd.erasure import Code
from ckptd.errors import InvalidRequest
from ckptd.v1 import common_pb2, coordinator_pb2, daemon_pb2, daemon_pb2_grpc, local_pb2

JOB = "llama"
SHORT_S = 20.0
PLAN = b"p" * 16


class Served:
    """A node behind its real gRPC server, and a client of it."""

    def __init__(self, node: Node, channel: grpc.aio.Channel, port: int) -> None:
        self.node, self.channel, self.port = node, channel, port
        self.stub = daemon_pb2_grpc.DaemonStub(channel)

    def direct(self, generation: int, nodes: tuple[str, ...] = ("n0", "n1"), **wishes: Any) -> None:
        members = [
            common_pb2.Member(
                node=name, ranks=[2 * i, 2 * i + 1], control_address="127.0.0.1:1", bulk_address="127.0.0.1:1"
            )
            for i, name in enumerate(nodes)
        ]
        roster = common_pb2.Roster(generation=generation, members=members, parity=1)
        spec = coordinator_pb2.JobSpec(job=JOB, nodes=2, ranks_per_node=2, parity=1, every=2, slots=3)
        self.node.follow(coordinator_pb2.JobDirective(job=JOB, spec=spec, roster=roster, **wishes))

    def start(self, generation: int, **wishes: Any) -> None:
        order = coordinator_pb2.StartOrder(
            generation=generation, master_address="127.0.0.1", master_port=4711
        )
        self.direct(generation, start=order, **wishes)

    @property
    def job(self) -> Any:
        return self.node.jobs[JOB]

    async def confirm(self, generation: int, *, stopped: bool = False, **trainer: int) -> None:
        trainers = [daemon_pb2.LaunchedTrainer(**trainer)] if trainer else []  # type: ignore[arg-type]
        request = daemon_pb2.ConfirmRequest(
            header=header(JOB, generation), stopped=stopped, trainers=trainers
        )
        await self.stub.Confirm(request, timeout=SHORT_S)

    def orders(self, after: int) -> Orders:
        return Orders(self.stub.Orders(daemon_pb2.OrdersRequest(header=header(JOB, after)), timeout=30))


class Orders:
    """A launcher's stream."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def next(self) -> tuple[str, int]:
        order = await asyncio.wait_for(self._call.read(), SHORT_S)
        assert order is not grpc.aio.EOF, "the stream ended"
        self.last = order
        return order.WhichOneof("body"), order.generation

    async def nothing(self) -> None:
        """Nothing comes, although the daemon was asked something else afterwards."""
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._read()), 0.1)

    def _read(self) -> asyncio.Task[Any]:
        self._pending = asyncio.ensure_future(self._call.read())
        return self._pending

    async def late(self) -> tuple[str, int]:
        """What came after `nothing`."""
        order = await asyncio.wait_for(self._pending, SHORT_S)
        return order.WhichOneof("body"), order.generation

    async def ended(self) -> bool:
        return await asyncio.wait_for(self._call.read(), SHORT_S) is grpc.aio.EOF

    def close(self) -> None:
        self._call.cancel()


@asynccontextmanager
async def served(tmp_path: Path, coordinator: str = "127.0.0.1:1", **fields: Any) -> AsyncIterator[Served]:
    directory = tmp_path / "m"
    directory.mkdir(exist_ok=True)
    settings = DaemonSettings(
        node="n0", memory_dir=directory, socket=tmp_path / "s", coordinator=coordinator, bulk_nice=0, **fields
    )
    pool = ThreadPoolExecutor(1)
    node = Node(settings, pool)
    server, port = await _control_server(node)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Served(node, channel, port)
    finally:
        await server.stop(0)
        node.close()
        pool.shutdown()


async def refused(call: Any, code: grpc.StatusCode) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() == code, caught.value.details()
    return caught.value.details() or ""


# The service itself


@looped
async def test_health_and_reflection_answer_on_both_addresses(tmp_path: Path) -> None:
    async with served(tmp_path) as one:
        local = f"unix:{control_socket(tmp_path / 's')}"
        assert control_socket(tmp_path / "s").stat().st_mode & 0o777 == 0o600
        for address in (f"127.0.0.1:{one.port}", local):
            async with grpc.aio.insecure_channel(address) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                for name in ("", "ckptd.v1.Daemon"):
                    reply = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=SHORT_S)
                    assert reply.status == health_pb2.HealthCheckResponse.SERVING
                stub = reflection_pb2_grpc.ServerReflectionStub(channel)
                request = reflection_pb2.ServerReflectionRequest(list_services="")
                call = stub.ServerReflectionInfo(iter([request]), timeout=SHORT_S)
                reply = await call.read()
                names = {service.name for service in reply.list_services_response.service}
                assert "ckptd.v1.Daemon" in names and "grpc.health.v1.Health" in names
                symbol = reflection_pb2.ServerReflectionRequest(file_containing_symbol="ckptd.v1.Daemon")
                call = stub.ServerReflectionInfo(iter([symbol]), timeout=SHORT_S)
                assert (await call.read()).file_descriptor_response.file_descriptor_proto


@looped
async def test_a_call_without_a_deadline_is_refused(tmp_path: Path) -> None:
    async with served(tmp_path) as one:
        one.direct(1)
        calls = [
            one.stub.Status(daemon_pb2.DaemonStatusRequest(header=header(""))),
            one.stub.Confirm(daemon_pb2.ConfirmRequest(header=header(JOB, 1), stopped=True)),
            one.stub.Forget(daemon_pb2.ForgetRequest(header=header(JOB))),
            one.stub.Facts(daemon_pb2.FactsRequest(header=header(JOB, 1), node="n1")),
            one.stub.Submit(coordinator_pb2.SubmitRequest(header=header(JOB))),
        ]
        for call in calls:
            details = await asyncio.wait_for(refused(call, grpc.StatusCode.INVALID_ARGUMENT), SHORT_S)
            assert "deadline" in details
        assert JOB in one.node.jobs  # nothing was done


@looped
async def test_status_tells_what_this_daemon_is_and_holds(tmp_path: Path) -> None:
    async with served(tmp_path, memory_limit_bytes=123 << 20) as one:
        one.direct(1)
        trainer = one.job.trainers[0] = Trainer(0, 1, 0, attached=True)
        one.job.place_plan(trainer, local_pb2.Plan(plan_hash=PLAN, image_bytes=70_000), 1 << 40, {})
        reply = await one.stub.Status(daemon_pb2.DaemonStatusRequest(header=header("")), timeout=SHORT_S)
        assert (reply.protocol, reply.node, reply.memory_limit_bytes) == (1, "n0", 123 << 20)
        assert (reply.memory_dir, reply.kernel) == (str(tmp_path / "m"), Code(1, 1).kernel.name)
        assert not reply.coordinator_connected and not reply.embedded and "parity" in reply.survives
        [memory] = reply.memory
        assert (memory.job, memory.arena_bytes, memory.parity_bytes) == (JOB, 3 * 2 * 65536, 0)
        [report] = reply.jobs
        assert (report.job, report.generation, list(report.roster.members[1].ranks)) == (JOB, 1, [2, 3])


@looped
async def test_submit_without_a_coordinator_says_what_to_do(tmp_path: Path) -> None:
    async with served(tmp_path, coordinator="") as one:
        request = coordinator_pb2.SubmitRequest(header=header(JOB))
        details = await refused(one.stub.Submit(request, timeout=SHORT_S), grpc.StatusCode.INVALID_ARGUMENT)
        assert "has no coordinator" in details and "ckptd coordinator" in details
    async with served(tmp_path) as one:  # a coordinator that is away is passed on as it is
        await refused(one.stub.Submit(request, timeout=SHORT_S), grpc.StatusCode.UNAVAILABLE)


@looped
async def test_jobs_that_are_not_here_are_not_found(tmp_path: Path) -> None:
    async with served(tmp_path) as one:
        report = coordinator_pb2.JobReport(job="nobody", generation=1)
        for call in (
            one.stub.Forget(daemon_pb2.ForgetRequest(header=header("nobody")), timeout=SHORT_S),
            one.stub.Confirm(
                daemon_pb2.ConfirmRequest(header=header("nobody", 1), stopped=True), timeout=SHORT_S
            ),
            one.stub.Facts(
                daemon_pb2.FactsRequest(header=header("nobody", 1), report=report), timeout=SHORT_S
            ),
        ):
            assert "no job nobody" in await refused(call, grpc.StatusCode.NOT_FOUND)
        assert not (tmp_path / "m" / "jobs").exists()


# Orders


@looped
async def test_orders_come_as_they_are_given(tmp_path: Path) -> None:
    async with served(tmp_path) as one:
        launcher = one.orders(0)  # before the job is known here
        await launcher.nothing()
        one.start(1)
        assert await launcher.late() == ("start", 1)
        one.direct(1, stop_through=1)
        assert await launcher.next() == ("stop", 1)
        assert launcher.last.stop.grace_ms == 500
        one.start(2, stop_through=1)
        assert await launcher.next() == ("start", 2)
        one.start(2, stop_through=1)  # the same wish again is no new order
        await launcher.nothing()
        one.direct(2, finished=True)
        assert await launcher.late() == ("finish", 2)
        assert await launcher.ended()


@looped
async def test_an_order_that_comes_while_another_is_being_sent_is_not_lost(tmp_path: Path) -> None:
    async with served(tmp_path) as one:
        one.start(1)
        request = daemon_pb2.OrdersRequest(header=header(job=JOB))
        orders = DaemonService(one.node).Orders(request, None)  # type: ignore[arg-type]  # asks nothing of it
        try:
            # The generator stands at its yield, as it does while gRPC sends the order.
            assert (await anext(orders)).WhichOneof("body") == "start"
            # The last change that would wake it all the same.
            await until(lambda: one.job.unreachable == {"n1"}, "nobody answers for n1")
            one.job.stop_through = 1
            one.node.changed()
            async with asyncio.timeout(SHORT_S):
                assert (await anext(orders)).WhichOneof("body") == "stop"
        finally:
            await orders.aclose()


@looped
async def test_a_start_order_tells_each_rank_its_environment(tmp_path: Path) -> None:
    async with served(tmp_path) as one:
        one.start(4)
        launcher = one.orders(0)
        assert await launcher.next() == ("start", 4)
        trainers = launcher.last.start.trainers
        assert [trainer.rank for trainer in trainers] == [0, 1]
        assert dict(trainers[1].environment) == {
            "RANK": "1",
            "LOCAL_RANK": "1",
            "WORLD_SIZE": "4",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "4711",
            "CKPTD_GENERATION": "4",
            "CKPTD_SOCKET": str(tmp_path / "s"),
            "CKPTD_NODE": "n0",
        }
        launcher.close()


@looped
async def test_a_launcher_that_comes_back_resumes_by_generation(tmp_path: Path) -> None:
    async with served(tmp_path) as one:
        one.start(3, stop_through=2)
        # Who knows nothing gets the newest stop and the newest start, in this order.
        fresh = one.orders(0)
        assert [await fresh.next(), await fresh.next()] == [("stop", 2), ("start", 3)]
        # Who has obeyed start 3 gets nothing again.
        known = one.orders(3)
        await known.nothing()
        one.direct(3, stop_through=3)
        assert await known.late() == ("stop", 3) == await fresh.next()
        # Who was away when generation 3 was stopped still hears of it: else nobody would confirm.
        away = one.orders(3)
        assert await away.next() == ("stop", 3)
        # A generation that was stopped is not started any more.
        late = one.orders(0)
        assert await late.next() == ("stop", 3)
        await late.nothing()
        one.start(4)
        for launcher in (known, fresh, away):
            assert await launcher.next() == ("start", 4)
        assert await late.late() == ("start", 4)
        for launcher in (known, fresh, away, late):
            launcher.close()


@looped
async def test_a_spare_is_told_to_stop_and_never_to_start(tmp_path: Path) -> None:
    async with served(tmp_path) as one:
        order = coordinator_pb2.StartOrder(generation=2, master_address="127.0.0.1", master_port=1)
        one.direct(2, nodes=("n1", "n2"), start=order, stop_through=1)
        launcher = one.orders(0)
        assert await launcher.next() == ("stop", 1)
        await launcher.nothing()
        assert one.job.member is None and one.job.stopped_through == 1
        launcher.close()


# Confirm


@looped
async def test_a_launched_trainer_is_watched_before_it_attaches(tmp_path: Path) -> None:
    async with served(tmp_path) as one:
        one.start(1)
        child = subprocess.Popen(["sleep", "60"])
        try:
            await one.confirm(1, rank=0, pid=child.pid)
            trainer = one.job.trainers[0]
            assert (trainer.pid, trainer.state, trainer.attached) == (child.pid, State.ALIVE, False)
            assert one.job.running_generation == 0, "it has not attached"
            child.kill()
            await until(
                lambda: trainer.state == State.DIED, "its death is seen, without a word of the launcher"
            )
        finally:
            child.kill()
            child.wait(10)
        await one.confirm(1, rank=0, pid=child.pid, exited=True, status=-9)
        assert one.job.trainers[0].exit == "signal 9"


@looped
async def test_an_exit_that_only_the_launcher_saw_counts(tmp_path: Path) -> None:
    async with served(tmp_path) as one:
        one.start(1)
        one.job.trainers[1] = Trainer(1, 1, 1, attached=True)
        await one.confirm(1, rank=1, pid=1, exited=True, status=3)
        assert (one.job.trainers[1].state, one.job.trainers[1].exit) == (State.DIED, "exit 3")
        # One that said goodbye has not died.
        one.job.trainers[0] = Trainer(0, 1, 1, attached=True, state=State.FINISHED)
        await one.confirm(1, rank=0, pid=1, exited=True, status=0)
        assert one.job.trainers[0].state == State.FINISHED


@looped
async def test_news_of_an_older_generation_change_nothing(tmp_path: Path) -> None:
    async with served(tmp_path) as one:
        one.start(2, stop_through=1)
        one.job.trainers[0] = Trainer(0, 2, 1, attached=True)
        await one.confirm(1, rank=0, pid=1, exited=True, status=-9)
        assert one.job.trainers[0].state == State.ALIVE
        await one.confirm(1, rank=1, pid=1)
        assert 1 not in one.job.trainers


@looped
async def test_stopped_is_what_the_launcher_confirmed_and_no_more(tmp_path: Path) -> None:
    async with served(tmp_path) as one:
        one.start(1)
        one.direct(1, stop_through=1)
        assert one.job.stopped_through == 0, "a trainer may just be starting"
        await one.confirm(1, stopped=True)
        assert one.job.stopped_through == 1
        # A word about the future is none: generation 2 is yet to be started, and stopped.
        await one.confirm(10**12, stopped=True)
        one.start(2, stop_through=1)
        one.direct(2, stop_through=2)
        assert one.job.stopped_through == 0
        await one.confirm(1, stopped=True)  # said again, late
        assert one.job.stopped_through == 0
        await one.confirm(2, stopped=True)
        assert one.job.stopped_through == 2


# Facts: the lowest reachable daemon stands in for the coordinator


def _attach(one: Served, generation: int, step: int = 0) -> None:
    for rank in (0, 1):
        trainer = one.job.trainers[rank] = Trainer(rank, generation, 0, attached=True, step=step)
        one.job.place_plan(trainer, local_pb2.Plan(plan_hash=PLAN, image_bytes=100), 1 << 40, {})


def _report(
    one: Served, generation: int, step: int = 0, folded: tuple[int, ...] = ()
) -> coordinator_pb2.JobReport:
    trainers = [
        coordinator_pb2.Trainer(rank=rank, generation=generation, state=State.ALIVE, step=step, ready=True)
        for rank in (2, 3)
    ]
    holdings = [
        coordinator_pb2.Holding(generation=generation, step=s, group=["n0", "n1"], sealed=True, folded=True)
        for s in folded
    ]
    return coordinator_pb2.JobReport(
        job=JOB, generation=generation, roster=one.job.roster, trainers=trainers, holdings=holdings
    )


async def _facts(one: Served, report: coordinator_pb2.JobReport) -> common_pb2.Schedule:
    request = daemon_pb2.FactsRequest(header=header(JOB, report.generation), node="n1", report=report)
    reply = await one.stub.Facts(request, timeout=SHORT_S)
    return reply.schedule


@looped
async def test_facts_are_answered_with_a_schedule_that_is_also_followed_here(tmp_path: Path) -> None:
    async with served(tmp_path) as one:
        one.direct(1)
        _attach(one, 1)
        schedule = await _facts(one, _report(one, 1))
        assert list(schedule.due) == [2, 4] and not schedule.has_watermark  # every=2, slots=3
        assert set(one.job.grants[0]) == {2, 4}
        # Folded there and not here: not protected.
        schedule = await _facts(one, _report(one, 1, step=2, folded=(2,)))
        assert not schedule.has_watermark
        holding = one.job.new_holding(2)
        holding.folded = True
        schedule = await _facts(one, _report(one, 1, step=2, folded=(2,)))
        assert schedule.has_watermark and schedule.watermark == 2 and min(schedule.due) > 2
        assert one.job.schedule.watermark == 2


@looped
async def test_facts_of_a_stale_generation_are_refused_and_change_nothing(tmp_path: Path) -> None:
    async with served(tmp_path) as one:
        one.direct(2, stop_through=1)
        _attach(one, 2)
        before = one.job.schedule.SerializeToString()
        request = daemon_pb2.FactsRequest(header=header(JOB, 1), node="n1", report=_report(one, 1, 9, (8,)))
        details = await refused(one.stub.Facts(request, timeout=SHORT_S), grpc.StatusCode.FAILED_PRECONDITION)
        assert "generation 2" in details and "generation 1" in details
        one.direct(2, stop_through=2)
        request = daemon_pb2.FactsRequest(header=header(JOB, 2), node="n1", report=_report(one, 2, 9, (8,)))
        await refused(one.stub.Facts(request, timeout=SHORT_S), grpc.StatusCode.FAILED_PRECONDITION)
        assert one.job.schedule.SerializeToString() == before


@looped
async def test_facts_of_strangers_and_of_the_future_do_not_count(tmp_path: Path) -> None:
    async with served(tmp_path) as one:
        one.direct(1)
        _attach(one, 1)
        for node, generation in [("n7", 1), ("n1", 5)]:
            request = daemon_pb2.FactsRequest(
                header=header(JOB, generation), node=node, report=_report(one, generation, 0)
            )
            reply = await one.stub.Facts(request, timeout=SHORT_S)
            assert not reply.schedule.due and reply.schedule.generation == 1
            assert "n1" in reply.schedule.paused  # has not taken up this generation


# The end of jobs


@looped
async def test_forget_is_refused_while_a_rank_lives_and_frees_afterwards(tmp_path: Path) -> None:
    async with served(tmp_path) as one:
        one.direct(1)
        _attach(one, 1)
        directory = tmp_path / "m" / "jobs" / JOB
        request = daemon_pb2.ForgetRequest(header=header(JOB))
        details = await refused(one.stub.Forget(request, timeout=SHORT_S), grpc.StatusCode.INVALID_ARGUMENT)
        assert "is running on node n0" in details and directory.exists()
        for trainer in one.job.trainers.values():
            trainer.state = State.DIED
        reply = await one.stub.Forget(request, timeout=SHORT_S)
        assert reply.freed_bytes == 2 * 3 * 65536
        assert not directory.exists() and not one.node.jobs


@looped
async def test_a_finished_job_can_expire_be_forgotten_and_run_again(tmp_path: Path) -> None:
    """Its directory is gone already; the daemon must not stumble over that."""
    async with served(tmp_path, park_s=10.0) as one:
        for again in ("expires", "is forgotten"):
            one.start(1)
            _attach(one, 1)
            for trainer in one.job.trainers.values():
                trainer.state = State.FINISHED
            one.direct(1, finished=True)
            assert not (tmp_path / "m" / "jobs" / JOB).exists()
            # The same job once more: it needs its memory again.
            one.direct(2, stop_through=1)
            _attach(one, 2)
            assert len(list((tmp_path / "m" / "jobs" / JOB).glob("*.arena"))) == 2 and not one.job.finished
            for trainer in one.job.trainers.values():
                trainer.state = State.FINISHED
            one.direct(2, finished=True)
            if again == "expires":
                one.node.expire(100.0)
                one.node.expire(109.0)
                assert JOB in one.node.jobs
                one.node.expire(111.0)
            else:
                await one.stub.Forget(daemon_pb2.ForgetRequest(header=header(JOB)), timeout=SHORT_S)
            assert not one.node.jobs


@looped
async def test_a_job_without_trainers_is_freed_after_its_time_and_not_before(tmp_path: Path) -> None:
    async with served(tmp_path, park_s=10.0) as one:
        one.direct(1)
        _attach(one, 1)
        one.node.expire(0.0)
        one.node.expire(1000.0)
        assert JOB in one.node.jobs, "its trainers live"
        for trainer in one.job.trainers.values():
            trainer.state = State.DIED
        one.node.expire(1001.0)
        one.node.expire(1010.0)
        assert JOB in one.node.jobs
        one.node.expire(1012.0)
        assert not one.node.jobs and not (tmp_path / "m" / "jobs" / JOB).exists()


def test_a_bad_directive_names_no_path(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(tmp_path) as one:
            for name in ("../x", "a/b", "", "."):
                with pytest.raises(InvalidRequest, match="job name"):
                    one.node.follow(coordinator_pb2.JobDirective(job=name))
            assert list((tmp_path / "m").iterdir()) == []

    asyncio.run(run())
