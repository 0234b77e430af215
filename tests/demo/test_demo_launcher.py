"""The reference launcher against a daemon's real gRPC service, with small processes as trainers."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc.aio

from ckptd.demo.channels import channel
from ckptd.demo.children import Child, Children
from ckptd.demo.cluster import address
from ckptd.demo.launcher import Launcher
from ckptd.v1 import daemon_pb2, daemon_pb2_grpc

DEADLINE_S = 20.0
TRAINER = "import time; time.sleep(60)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open(r'{}', 'w'); time.sleep(60)"
)


class Orderer(daemon_pb2_grpc.DaemonServicer):
    """Gives orders on every stream from the newest stop and start on, and keeps the confirmations."""

    def __init__(self) -> None:
        self.orders: list[daemon_pb2.Order] = []
        self.confirmed: list[daemon_pb2.ConfirmRequest] = []
        self.streams = 0
        self.changed = asyncio.Condition()

    async def Orders(self, request: Any, context: Any) -> AsyncIterator[daemon_pb2.Order]:
        assert request.header.timeout_ms > 0
        self.streams += 1
        at = 0
        while True:
            async with self.changed:
                while len(self.orders) <= at:
                    await self.changed.wait()
            for order in self.orders[at:]:
                yield order
            at = len(self.orders)

    async def Confirm(self, request: Any, context: Any) -> daemon_pb2.ConfirmReply:
        async with self.changed:
            self.confirmed.append(request)
            self.changed.notify_all()
        return daemon_pb2.ConfirmReply()

    async def order(self, order: daemon_pb2.Order) -> None:
        async with self.changed:
            self.orders.append(order)
            self.changed.notify_all()

    async def seen(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S), self.changed:
            await self.changed.wait_for(condition)


def start(generation: int, *ranks: int) -> daemon_pb2.Order:
    trainers = [daemon_pb2.TrainerOrder(rank=rank, environment={"RANK": str(rank)}) for rank in ranks]
    return daemon_pb2.Order(generation=generation, start=daemon_pb2.Start(trainers=trainers))


def stop(generation: int, grace_ms: int = 100) -> daemon_pb2.Order:
    return daemon_pb2.Order(generation=generation, stop=daemon_pb2.Stop(grace_ms=grace_ms))


class Setting:
    """A daemon's service, a launcher that obeys it, and what the launcher spawned."""

    def __init__(self, group: Children, code: str) -> None:
        self.daemon = Orderer()
        self.address = address("127.0.0.1")
        self.server = self._server()
        self.spawned: list[tuple[int, int, dict[str, str]]] = []
        self._group, self._code = group, code
        self.channel = channel(self.address)
        self.launcher = Launcher("job", daemon_pb2_grpc.DaemonStub(self.channel), self._spawn)

    async def restart_server(self) -> None:
        await self.server.stop(None)
        self.server = self._server()
        await self.server.start()

    def _server(self) -> grpc.aio.Server:
        server = grpc.aio.server()
        daemon_pb2_grpc.add_DaemonServicer_to_server(self.daemon, server)
        assert server.add_insecure_port(self.address)
        return server

    def _spawn(self, generation: int, rank: int, env: Mapping[str, str]) -> Child:
        self.spawned.append((generation, rank, dict(env)))
        return self._group.spawn(
            f"r{rank}g{generation}", [sys.executable, "-I", "-c", self._code], os.environ
        )


def play(tmp_path: Path, body: Callable[[Setting], Awaitable[None]], code: str = TRAINER) -> None:
    """Runs `body` against a launcher that is obeying, and ends everything."""

    async def main() -> None:
        async with Children(tmp_path, tmp_path) as group:
            setting = Setting(group, code)
            await setting.server.start()
            task = asyncio.create_task(setting.launcher.run())
            try:
                await body(setting)
            finally:
                task.cancel()
                await asyncio.wait([task])
                await setting.channel.close()
                await setting.server.stop(None)

    asyncio.run(main())


def started(setting: Setting, generation: int) -> list[Any]:
    return [
        trainer
        for request in setting.daemon.confirmed
        if request.header.generation == generation
        for trainer in request.trainers
        if not trainer.exited
    ]


def stopped(setting: Setting, generation: int) -> bool:
    return any(r.stopped and r.header.generation == generation for r in setting.daemon.confirmed)


def test_a_start_order_starts_its_ranks_with_their_environment(tmp_path: Path) -> None:
    async def body(setting: Setting) -> None:
        await setting.daemon.order(start(1, 2, 3))
        await setting.daemon.seen(lambda: len(started(setting, 1)) == 2)
        assert setting.spawned == [(1, 2, {"RANK": "2"}), (1, 3, {"RANK": "3"})]
        assert {t.rank: t.pid for t in started(setting, 1)} == {
            t.rank: t.child.pid for t in setting.launcher.living()
        }

    play(tmp_path, body)


def test_a_repeated_order_starts_nothing_twice(tmp_path: Path) -> None:
    """The daemon restarts, and its new stream repeats the newest start."""

    async def body(setting: Setting) -> None:
        await setting.daemon.order(start(1, 0))
        await setting.daemon.seen(lambda: len(started(setting, 1)) == 1)
        await setting.restart_server()
        await setting.daemon.seen(lambda: len(started(setting, 1)) >= 2)
        assert setting.daemon.streams >= 2
        assert setting.spawned == [(1, 0, {"RANK": "0"})]
        assert len({trainer.pid for trainer in started(setting, 1)}) == 1

    play(tmp_path, body)


def test_a_stop_is_confirmed_only_when_every_trainer_is_gone(tmp_path: Path) -> None:
    mark = tmp_path / "ignores-sigterm"

    async def body(setting: Setting) -> None:
        await setting.daemon.order(start(1, 0))
        await setting.daemon.seen(lambda: len(started(setting, 1)) == 1)
        (trainer,) = setting.launcher.living()
        async with asyncio.timeout(DEADLINE_S):
            while not mark.exists():
                await asyncio.sleep(0.01)
        alive_at_confirm: list[bool] = []
        confirm = setting.daemon.Confirm

        async def watched(request: Any, context: Any) -> Any:
            if request.stopped:
                alive_at_confirm.append(Path(f"/proc/{trainer.child.pid}").exists())
            return await confirm(request, context)

        setting.daemon.Confirm = watched  # type: ignore[method-assign]
        await setting.restart_server()  # the server looks its methods up when it is made
        await setting.daemon.order(stop(1))
        await setting.daemon.seen(lambda: stopped(setting, 1))
        assert alive_at_confirm[0] is False
        assert trainer.child.exited.result() == -9

    play(tmp_path, body, STUBBORN.format(mark))


def test_a_stop_spares_newer_generations_and_nobody_is_confirmed_too(tmp_path: Path) -> None:
    async def body(setting: Setting) -> None:
        await setting.daemon.order(stop(3))
        await setting.daemon.seen(lambda: stopped(setting, 3))
        await setting.daemon.order(start(4, 1))
        await setting.daemon.seen(lambda: len(started(setting, 4)) == 1)
        await setting.daemon.order(stop(3))
        await setting.daemon.seen(lambda: sum(r.stopped for r in setting.daemon.confirmed) == 2)
        assert [trainer.generation for trainer in setting.launcher.living()] == [4]

    play(tmp_path, body)


def test_an_exit_is_reported_even_if_the_daemon_was_away(tmp_path: Path) -> None:
    async def body(setting: Setting) -> None:
        await setting.daemon.order(start(1, 0))
        await setting.daemon.seen(lambda: len(started(setting, 1)) == 1)
        (trainer,) = setting.launcher.living()
        await setting.server.stop(None)
        assert await trainer.child.end(grace_s=DEADLINE_S) == -15
        setting.server = setting._server()
        await setting.server.start()

        def reported() -> bool:
            exits = [t for r in setting.daemon.confirmed for t in r.trainers if t.exited]
            # More than once, where an answer did not come in time.
            return {(t.rank, t.pid, t.status) for t in exits} == {(0, trainer.child.pid, -15)}

        await setting.daemon.seen(reported)

    play(tmp_path, body)


def test_a_finish_order_ends_the_launcher(tmp_path: Path) -> None:
    async def main() -> None:
        async with Children(tmp_path, tmp_path) as group:
            setting = Setting(group, TRAINER)
            await setting.server.start()
            await setting.daemon.order(daemon_pb2.Order(generation=1, finish=daemon_pb2.Finish()))
            async with asyncio.timeout(DEADLINE_S):
                await setting.launcher.run()
            await setting.channel.close()
            await setting.server.stop(None)

    asyncio.run(main())
