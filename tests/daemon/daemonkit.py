"""A real daemon process, and trainers that speak raw frames to it."""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import grpc

from ckptd.daemon.server import control_socket
from ckptd.v1 import common_pb2, daemon_pb2, daemon_pb2_grpc, local_pb2

DEADLINE_S = 20.0
PLAN = b"p" * 16
Failure = common_pb2.ErrorCode


def looped(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs an asynchronous test in a loop of its own."""

    async def outlived(*args: Any, **kwargs: Any) -> None:
        try:
            await test(*args, **kwargs)
        finally:
            await _end_of_bulk_threads()

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(outlived(*args, **kwargs))

    return run


async def _end_of_bulk_threads() -> None:
    """Threads of this process's nodes ask the loop until they end; in a closed one, coroutines are left."""
    end = time.monotonic() + DEADLINE_S
    while left := [thread.name for thread in threading.enumerate() if thread.name.startswith("bulk-")]:
        assert time.monotonic() < end, left
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()  # what a thread waits for may never come any more
        await asyncio.sleep(0.002)


def eventually(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Waits for a true value and returns it."""
    end = time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        time.sleep(0.005)
    return value


class Daemon:
    """`ckptd daemon` as a process; its directories outlive it, so that it can be started again."""

    def __init__(self, *flags: str, memory_dir: Path | None = None, **environment: str) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="ckptd-t-"))  # short: a socket's path has 107 bytes at most
        self.memory_dir = memory_dir or Path(tempfile.mkdtemp(prefix="ckptd-t-", dir="/dev/shm"))
        self.socket = self.root / "s"
        self.log = self.root / "log"
        self._flags = flags
        # A store of its own: the user's may know jobs of these names, and their generations.
        mine = {"CKPTD_RANK_HANDOVER_S": "0.2", "CKPTD_STORE": str(self.root / "store")}
        self._environment = {**mine, **environment}
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "ckptd.cli.main", "daemon", "--node", "x", *self._flags]
        command += ["--socket", str(self.socket), "--memory-dir", str(self.memory_dir)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log, env={**os.environ, **self._environment})

        def up() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            try:
                Frames(self.socket).close()
            except OSError:
                return False
            return True

        eventually(up, "the daemon is up", 40)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)

    def close(self) -> None:
        """Ends it in order; it must not have failed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                code = self.process.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            assert code == 0, self.log.read_text()
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.rmtree(self.memory_dir, ignore_errors=True)

    @contextmanager
    def stub(self) -> Iterator[Any]:
        with grpc.insecure_channel(f"unix:{control_socket(self.socket)}") as channel:
            yield daemon_pb2_grpc.DaemonStub(channel)

    def status(self) -> daemon_pb2.DaemonStatusReply:
        with self.stub() as stub:
            return stub.Status(daemon_pb2.DaemonStatusRequest(header=header("")), timeout=DEADLINE_S)

    def job(self, name: str) -> Any:
        """The JobReport of a job, or None."""
        return next((job for job in self.status().jobs if job.job == name), None)


def header(job: str, generation: int = 0) -> common_pb2.Header:
    return common_pb2.Header(job=job, generation=generation, timeout_ms=int(DEADLINE_S * 1000))


def hello(job: str, rank: int = 0, world: int = 1, **fields: Any) -> local_pb2.TrainerMessage:
    fields = {"protocol": 1, "local_world_size": world, "every": 1, "slots": 3, **fields}
    generation = fields.pop("generation", 0)
    body = local_pb2.Hello(rank=rank, world_size=world, **fields)
    return local_pb2.TrainerMessage(header=header(job, generation), hello=body)


def frame(message: Any) -> bytes:
    text = message.SerializeToString()
    return struct.pack("<I", len(text)) + text


class Frames:
    """One connection to the UNIX socket: raw bytes out, DaemonMessages in."""

    opened: ClassVar[list[Frames]] = []

    @classmethod
    def close_all(cls) -> None:
        """Closes what a failed test left open."""
        while cls.opened:
            cls.opened[-1].close()

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(DEADLINE_S)
        try:
            self.sock.connect(str(path))
        except OSError:
            self.sock.close()
            raise
        self.fds: list[int] = []
        self._data = b""
        self.opened.append(self)

    def send(self, message: Any) -> None:
        self.sock.sendall(frame(message))

    def receive(self) -> local_pb2.DaemonMessage | None:
        """The next message; None when the daemon ended the connection."""
        while len(self._data) < 4 or len(self._data) < 4 + struct.unpack("<I", self._data[:4])[0]:
            try:
                part, fds, _, _ = socket.recv_fds(self.sock, 1 << 16, 8)
            except ConnectionError:
                return None
            self.fds += fds
            if not part:
                return None
            self._data += part
        (length,) = struct.unpack("<I", self._data[:4])
        message = local_pb2.DaemonMessage.FromString(self._data[4 : 4 + length])
        self._data = self._data[4 + length :]
        return message

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []
        self.sock.close()
        if self in self.opened:
            self.opened.remove(self)


class Trainee(Frames):
    """A trainer of this process: attaches, plans, captures."""

    def __init__(self, daemon: Daemon, job: str, rank: int = 0, world: int = 1, **fields: Any) -> None:
        super().__init__(daemon.socket)
        self.job, self.rank = job, rank
        self.grants = local_pb2.Grants()
        self.arena = -1
        self.slot_bytes = 0
        self.send(hello(job, rank, world, **fields))
        self.welcome = self.expect("welcome").welcome
        self.generation = self.welcome.generation

    def tell(self, **body: Any) -> None:
        self.send(local_pb2.TrainerMessage(header=header(self.job, self.generation), **body))

    def expect(self, body: str) -> local_pb2.DaemonMessage:
        """The next message of this kind; grants that come before are noted, anything else is an error."""
        while True:
            message = self.receive()
            assert message is not None, f"the daemon ended the connection before {body}"
            found = message.WhichOneof("body")
            if found == "grants":
                self.grants = message.grants
            if found == body:
                return message
            assert found == "grants", f"{message} instead of {body}"

    def failure(self) -> common_pb2.Error:
        return self.expect("failure").failure.error

    def until(self, condition: Callable[[local_pb2.Grants], Any], what: str) -> local_pb2.Grants:
        end = time.monotonic() + DEADLINE_S
        while not condition(self.grants):
            assert time.monotonic() < end, f"{what}; last: {self.grants}"
            self.expect("grants")
        return self.grants

    def plan(self, image_bytes: int, plan_hash: bytes = PLAN) -> None:
        self.tell(plan=local_pb2.Plan(plan_hash=plan_hash, image_bytes=image_bytes))
        ready = self.expect("arena_ready").arena_ready
        assert ready.plan_hash == plan_hash
        self.grants.ClearField("grants")  # those that came before name slots of another arena
        self.arena, self.slot_bytes, self.slots = self.fds[-1], ready.slot_bytes, ready.slots
        self.image_bytes, self.plan_hash = image_bytes, plan_hash

    def capture(self, step: int, content: bytes | None = None) -> int:
        """Writes the image of `step` once it is granted; returns its slot."""
        grants = self.until(lambda g: step in {grant.step for grant in g.grants}, f"a grant for step {step}")
        slot = next(grant.slot for grant in grants.grants if grant.step == step)
        content = image_of(self.rank, step, self.image_bytes) if content is None else content
        os.pwrite(self.arena, content, slot * self.slot_bytes)
        self.tell(captured=local_pb2.Captured(step=step, slot=slot, plan_hash=self.plan_hash))
        self.tell(progress=local_pb2.Progress(step=step))
        return slot

    def protected(self, step: int) -> local_pb2.Grants:
        return self.until(
            lambda g: g.schedule.has_watermark and g.schedule.watermark >= step, f"step {step} protected"
        )

    def locate(self) -> local_pb2.Located:
        self.tell(locate=local_pb2.Locate())
        return self.expect("located").located

    def leave(self, park: bool = False) -> None:
        self.tell(goodbye=local_pb2.Goodbye(park=park))


def image_of(rank: int, step: int, nbytes: int) -> bytes:
    return bytes([(rank * 31 + step * 7 + 1) % 256]) * nbytes


_STRANGER = """
import os, socket, sys, time
uid, path, data = int(sys.argv[1]), sys.argv[2], bytes.fromhex(sys.argv[3])
if uid >= 0:
    os.setgroups([]); os.setgid(uid); os.setuid(uid)
s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
s.connect(path)
s.sendall(data)
os.write(1, s.recv(65536).hex().encode() + b"\\n")
time.sleep(60)
"""


class Stranger:
    """Another process (and, with `uid`, another user) that sends prepared frames, then stays alive."""

    def __init__(self, daemon: Daemon, data: bytes, uid: int = -1) -> None:
        command = [sys.executable, "-S", "-E", "-c", _STRANGER, str(uid), str(daemon.socket), data.hex()]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd="/")
        assert self.process.stdout is not None
        answer = bytes.fromhex(self.process.stdout.readline().decode())
        (length,) = struct.unpack("<I", answer[:4])
        self.answer = local_pb2.DaemonMessage.FromString(answer[4 : 4 + length])

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        self.process.kill()

    def close(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
