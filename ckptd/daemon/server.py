"""`serve`: one daemon from settings to SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import sys
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from ckptd.address import host_of
from ckptd.daemon.node import Node
from ckptd.daemon.service import DaemonService
from ckptd.daemon.session import Session
from ckptd.daemon.settings import DaemonSettings
from ckptd.daemon.trainers import TrainerServer, clear_socket
from ckptd.errors import InvalidRequest, NoSpace, Unreachable
from ckptd.memory.bulk import BulkServer
from ckptd.memory.yielding import yield_session_to_training
from ckptd.rpc import make_server
from ckptd.v1 import daemon_pb2, daemon_pb2_grpc

log = logging.getLogger("ckptd.daemon")

_SERVICE = daemon_pb2.DESCRIPTOR.services_by_name["Daemon"].full_name
_EXPIRE_S = 1.0
_SWITCH_S = 0.0005
_SMALLEST_TMPFS_BYTES = 16 << 20


async def serve(settings: DaemonSettings) -> None:
    """Runs a daemon until SIGTERM or SIGINT.

    Raises:
        NoSpace: the memory directory is too small to be of use.
        InvalidRequest: another daemon serves this memory or this socket.
        Unreachable: an address cannot be listened on.
    """
    _check_memory_dir(settings.memory_dir)
    _make_socket_dir(settings)
    # Digesting holds the GIL for a cell at a time; at the default of 5 ms every beat would wait for it.
    sys.setswitchinterval(_SWITCH_S)
    with _only_one(settings.memory_dir), ThreadPoolExecutor(2, thread_name_prefix="digest") as pool:
        node = Node(settings, pool)
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        try:
            await _run(node, stop)
        finally:
            node.close()


async def _run(node: Node, stop: asyncio.Event) -> None:
    settings = node.settings
    yield_session_to_training(settings.bulk_nice)
    clear_socket(settings.socket)
    bulk = _bulk_server(node)
    try:
        node.bulk_address = bulk.address
        server, port = await _control_server(node)
        try:
            node.control_address = f"{host_of(settings.listen)}:{port}"
            await _work(node, stop)
        finally:
            await server.stop(0.2)
    finally:
        bulk.close()


async def _work(node: Node, stop: asyncio.Event) -> None:
    settings = node.settings
    node.adopt()
    trainers = TrainerServer(node, settings.socket, 0o600 if settings.embedded else 0o666)
    session = Session(node)
    work: list[Coroutine[Any, Any, None]] = [trainers.serve(), _expire(node, stop)]
    work += [_schedule(node)] if node.standalone else [session.run(), session.stand_in()]
    work += [node.scrub.run()] if settings.scrub_bytes_per_s else []
    work += [node.flush.run()] if settings.flush_every else []
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    log.info(
        "node %s: control %s, bulk %s, socket %s, %s bytes of memory at %s",
        settings.node,
        node.control_address,
        node.bulk_address,
        settings.socket,
        f"{node.limit_bytes():,}",
        settings.memory_dir,
    )
    ended = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait([*tasks, ended], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # a part that failed ends the daemon, loudly
        await node.flush.last(settings.last_flush_s)
    finally:
        trainers.close()
        for task in [*tasks, ended]:
            task.cancel()
        await asyncio.gather(*tasks, ended, return_exceptions=True)


def _bulk_server(node: Node) -> BulkServer:
    settings = node.settings
    try:
        return BulkServer(settings.bulk, node.protection.handle, settings.bulk_timeout_s, settings.bulk_nice)
    except OSError as error:
        raise Unreachable(f"cannot listen on {settings.bulk}", str(error), "choose another --bulk") from error


async def _control_server(node: Node) -> tuple[grpc.aio.Server, int]:
    def register(server: grpc.aio.Server) -> None:
        daemon_pb2_grpc.add_DaemonServicer_to_server(DaemonService(node), server)

    server, port = await make_server(_SERVICE, register, node.settings.listen)
    # Operators of this machine come by path; the file's mode says who may.
    local = control_socket(node.settings.socket)
    local.unlink(missing_ok=True)
    server.add_insecure_port(f"unix:{local}")
    await server.start()
    local.chmod(0o600)
    return server, port


def control_socket(trainer_socket: Path) -> Path:
    """Where the gRPC service of the daemon behind `trainer_socket` can be reached on its own machine."""
    return trainer_socket.with_name(trainer_socket.name + ".control")


async def _schedule(node: Node) -> None:
    """A node that serves alone names its own steps."""
    while True:
        await node.next_change(node.settings.heartbeat_s)
        for job in list(node.jobs.values()):
            if job.member is not None and not job.finished:
                node.reschedule(job)


async def _expire(node: Node, stop: asyncio.Event) -> None:
    """Frees parked jobs, and ends an embedded daemon that nobody needs."""
    idle_since = time.monotonic()
    while True:
        await asyncio.sleep(_EXPIRE_S)
        now = time.monotonic()
        node.expire(now)
        if node.jobs:
            idle_since = now
        elif node.settings.embedded and now - idle_since > node.settings.idle_s:
            log.info("no job for %.0f s: the embedded daemon ends", node.settings.idle_s)
            stop.set()


def _check_memory_dir(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    stat = os.statvfs(path)
    if stat.f_blocks * stat.f_frsize < _SMALLEST_TMPFS_BYTES:
        raise NoSpace(
            f"{path} has {stat.f_blocks * stat.f_frsize:,} bytes in all",
            f"at least {_SMALLEST_TMPFS_BYTES:,} are needed",
            "enlarge it (in a container: --shm-size), or point --memory-dir at a larger tmpfs",
        )


def _make_socket_dir(settings: DaemonSettings) -> None:
    path = settings.socket.parent
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700 if settings.embedded else 0o755)
    except OSError as error:
        raise InvalidRequest(
            f"{path} cannot be made for the socket", str(error), "create it, or choose another --socket"
        ) from error


@contextlib.contextmanager
def _only_one(memory_dir: Path) -> Iterator[None]:
    """Holds the lock that says whose this memory is; the kernel drops it when we die."""
    fd = os.open(memory_dir / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidRequest(
                f"another daemon serves {memory_dir}",
                "its lock is held",
                "stop it, or choose another --memory-dir",
            ) from error
        yield
    finally:
        os.close(fd)
