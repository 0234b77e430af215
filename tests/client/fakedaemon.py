"""A small daemon for the client's tests: real socket, real frames, real shared memory, one node.

It keeps the rules a trainer relies on (a slot is granted for one step and reused only
when the watermark has passed it; pushes replace each other) and asserts those that it
relies on (a step is captured where it was granted, and ends once).  `test_fakedaemon.py`
holds it and the real daemon to the same conversation.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ckptd.image.digest import cell_digests, digest_of_digests
from ckptd.v1 import common_pb2, local_pb2

LENGTH = struct.Struct("<I")
WAIT_S = 20.0


@dataclass
class Memory:
    """One rank's arena; survives the fake daemon, as tmpfs survives the real one."""

    fd: int
    plan_hash: bytes
    image_bytes: int
    slot_bytes: int
    slots: int
    holds: dict[int, int] = field(default_factory=dict)  # step -> slot, captured

    def image(self, slot: int) -> bytes:
        with mmap.mmap(self.fd, self.slots * self.slot_bytes) as whole:
            return whole[slot * self.slot_bytes : slot * self.slot_bytes + self.image_bytes]


class FakeDaemon:
    """Serves the ranks of one job.

    Args:
        due: the steps that are due, or None: always the next ones.
        protect: whether a captured step is protected at once; otherwise `set_watermark` says so.
        memory: what an earlier fake daemon held, by rank.
    """

    def __init__(
        self,
        path: Path,
        *,
        due: list[int] | None = None,
        protect: bool = True,
        memory: dict[int, Memory] | None = None,
        generation: int = 1,
        protocol: int = 1,
        space_bytes: int = 1 << 40,
        survives: str = "nothing",
        grants: bool = True,
    ) -> None:
        self.path = path
        self.due = due
        self.protect = protect
        self.memory = {} if memory is None else memory
        self.generation = generation
        self.protocol = protocol
        self.space_bytes = space_bytes
        self.survives = survives
        self.grants_given = grants
        self.step = 0
        held_steps = [step for each in self.memory.values() for step in each.holds]
        self.watermark: int | None = max(held_steps, default=None)
        self.held = False
        self.paused = ""
        self.aborted: dict[int, local_pb2.Aborted] = {}
        self.captured: list[int] = []
        self.images: dict[int, bytes] = {}  # as they were when Captured arrived
        self.accepted = 0
        self.plans = 0
        self.goodbye: local_pb2.Goodbye | None = None
        self.failing = ""
        self.hellos: list[local_pb2.Hello] = []
        self.reserved: list[int] = []
        self.complaints: list[str] = []
        self.locate_step: int | None = None
        self.flip_bit: int | None = None  # of the image, right after it was verified for a locate
        self._grants: dict[int, int] = {}
        self._due: set[int] = set()
        self._named = 0
        self._links: list[socket.socket] = []
        self._changed = threading.Condition()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path.unlink(missing_ok=True)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def stop(self) -> None:
        """Dies; the memory stays."""
        with self._changed:
            # shutdown wakes the threads; close alone would not.
            for sock in [self._listener, *self._links]:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(WAIT_S)
            assert not thread.is_alive()
        self._listener.close()
        self.path.unlink(missing_ok=True)

    def wait(self, condition: Callable[[FakeDaemon], bool]) -> None:
        """Waits until something holds."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self), WAIT_S), (
                self.captured,
                self.aborted,
                self.step,
            )

    def watermark_or_0(self) -> int:
        """The watermark, where a fresh start counts as protected."""
        with self._changed:
            return self.watermark or 0

    def set(self, **values: object) -> None:
        """Changes attributes and tells the trainers."""
        with self._changed:
            for name, value in values.items():
                setattr(self, name, value)
            self._push()

    def fail(self, code: common_pb2.ErrorCode, what: str = "because") -> None:
        """Pushes a failure to every trainer."""
        with self._changed:
            for link in self._links:
                self._failure(link, code, what)

    def _accept(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(link,), daemon=True)
            with self._changed:
                self._threads.append(thread)
                self._links.append(link)
            thread.start()

    def _serve(self, link: socket.socket) -> None:
        rank = [0]
        try:
            while (message := _receive(link)) is not None:
                with self._changed:
                    getattr(self, f"_on_{message.WhichOneof('body')}")(link, message, rank)
                    self._changed.notify_all()
        except OSError:
            pass
        with self._changed:
            self._links.remove(link)
            link.close()
            self._changed.notify_all()

    def _on_hello(self, link: socket.socket, message: local_pb2.TrainerMessage, rank: list[int]) -> None:
        self.hellos.append(message.hello)
        rank[0] = message.hello.rank
        if message.hello.protocol != self.protocol:
            return self._failure(link, common_pb2.ERROR_CODE_PROTOCOL, "another version")
        if message.hello.reconnect and message.header.generation < self.generation:
            return self._failure(link, common_pb2.ERROR_CODE_STALE_GENERATION, "too old")
        welcome = local_pb2.Welcome(
            protocol=self.protocol, generation=self.generation, node="fake", survives=self.survives
        )
        _send(link, local_pb2.DaemonMessage(welcome=welcome))
        return self._push()

    def _on_reserve(self, link: socket.socket, message: local_pb2.TrainerMessage, rank: list[int]) -> None:
        asked = message.reserve.image_bytes
        self.reserved.append(asked)
        if asked * 2 > self.space_bytes:
            return self._failure(link, common_pb2.ERROR_CODE_NO_SPACE, f"{asked * 2} of {self.space_bytes}")
        reserved = local_pb2.Reserved(needed_bytes=asked * 2, available_bytes=self.space_bytes)
        return _send(link, local_pb2.DaemonMessage(reserved=reserved))

    def _on_plan(self, link: socket.socket, message: local_pb2.TrainerMessage, rank: list[int]) -> None:
        plan = message.plan
        self.plans += 1
        if plan.image_bytes * 2 > self.space_bytes:
            return self._failure(link, common_pb2.ERROR_CODE_NO_SPACE, "too much")
        memory = self.memory.get(rank[0])
        if memory is None or memory.plan_hash != plan.plan_hash:
            slots, slot_bytes = max(2, self.hellos[-1].slots), -(-plan.image_bytes // 65536) * 65536
            fd = os.memfd_create("fake-arena")
            os.ftruncate(fd, slots * slot_bytes)
            memory = self.memory[rank[0]] = Memory(fd, plan.plan_hash, plan.image_bytes, slot_bytes, slots)
        self._grants.clear()
        ready = local_pb2.ArenaReady(
            plan_hash=plan.plan_hash, slots=memory.slots, slot_bytes=memory.slot_bytes
        )
        _send(link, local_pb2.DaemonMessage(arena_ready=ready), memory.fd)
        return self._push()

    def _on_captured(self, link: socket.socket, message: local_pb2.TrainerMessage, rank: list[int]) -> None:
        step, slot = message.captured.step, message.captured.slot
        memory = self.memory[rank[0]]
        if self.hellos[-1].reconnect and step not in self._grants:
            # Told again, since a daemon may die between an image's arrival and its record.  Like the
            # real one: what is known is known, and what is not is given up.
            if step not in self.captured and step not in self.aborted:
                self.aborted[step] = local_pb2.Aborted(step=step, reason="its image is nowhere")
            return self._push()
        self._expect(self._grants.pop(step, None) == slot, f"step {step} was not granted slot {slot}")
        self._expect(step not in self.captured and step not in self.aborted, f"step {step} ended twice")
        self._expect(message.captured.plan_hash == memory.plan_hash, "captured with another plan")
        memory.holds = {s: at for s, at in memory.holds.items() if at != slot} | {step: slot}
        self.captured.append(step)
        self.images[step] = memory.image(slot)
        if self.protect:
            self.watermark = max(step, self.watermark or 0)
        return self._push()

    def _on_aborted(self, link: socket.socket, message: local_pb2.TrainerMessage, rank: list[int]) -> None:
        step = message.aborted.step
        self._expect(step not in self.aborted, f"step {step} was aborted twice")
        self.aborted[step] = message.aborted
        self._grants.pop(step, None)
        for memory in self.memory.values():
            memory.holds.pop(step, None)
        self.held |= message.aborted.not_finite
        self._push()

    def _on_progress(self, link: socket.socket, message: local_pb2.TrainerMessage, rank: list[int]) -> None:
        self._expect(message.progress.step > self.step, "progress goes forward")
        self.step = message.progress.step
        self._push()

    def _on_accept(self, link: socket.socket, message: local_pb2.TrainerMessage, rank: list[int]) -> None:
        self.accepted += 1
        self.held = False
        self._push()

    def _on_locate(self, link: socket.socket, message: local_pb2.TrainerMessage, rank: list[int]) -> None:
        memory = self.memory.get(rank[0])
        steps = memory.holds if memory else {}
        step = self.locate_step if self.locate_step is not None else max(steps, default=0)
        located = local_pb2.Located(step=step, rung="own-memory" if step else "none", verified=True)
        if not step:
            return _send(link, local_pb2.DaemonMessage(located=located))
        assert memory is not None
        located.generation, located.slot = self.generation, memory.holds[step]
        located.slot_bytes, located.image_bytes = memory.slot_bytes, memory.image_bytes
        image = memory.image(located.slot)
        located.digest = digest_of_digests(cell_digests(image))
        if self.flip_bit is not None:
            byte = self.flip_bit // 8
            flipped = bytes([image[byte] ^ 1 << self.flip_bit % 8])
            os.pwrite(memory.fd, flipped, located.slot * located.slot_bytes + byte)
        # A new generation starts from this step, sealed and protected again; the rest is void.
        memory.holds = {step: memory.holds[step]}
        self.step = self.watermark = step
        return _send(link, local_pb2.DaemonMessage(located=located), memory.fd)

    def _on_failing(self, link: socket.socket, message: local_pb2.TrainerMessage, rank: list[int]) -> None:
        self.failing = message.failing.reason

    def _on_goodbye(self, link: socket.socket, message: local_pb2.TrainerMessage, rank: list[int]) -> None:
        self.goodbye = message.goodbye

    def _push(self) -> None:
        memory = next(iter(self.memory.values()), None)
        due = self._due_steps(memory)
        if memory is not None and self.grants_given:
            # The rule: a slot of step s is reused only when the watermark is greater than s.
            kept = {slot for step, slot in memory.holds.items() if step >= (self.watermark or 0)}
            self._grants = {step: slot for step, slot in self._grants.items() if step in due}
            free = [slot for slot in range(memory.slots) if slot not in kept | set(self._grants.values())]
            for step in due:
                if free and step not in self._grants and step > self.step and step not in memory.holds:
                    self._grants[step] = free.pop(0)
        schedule = common_pb2.Schedule(
            watermark=self.watermark or 0,
            has_watermark=self.watermark is not None,
            due=due,
            held=self.held,
            paused=self.paused,
            aborted=sorted(self.aborted),
            generation=self.generation,
        )
        grants = [local_pb2.Grant(step=step, slot=slot) for step, slot in sorted(self._grants.items())]
        for link in self._links:
            with suppress(OSError):
                body = local_pb2.Grants(schedule=schedule, grants=grants)
                _send(link, local_pb2.DaemonMessage(grants=body))

    def _due_steps(self, memory: Memory | None) -> list[int]:
        """As in ckptd.memory.schedule: due until protected, named in the future, slots - 1 at most."""
        if self.held:
            self._due.clear()
        elif self.due is not None:
            return self.due
        else:
            self._due = {s for s in self._due if s > (self.watermark or 0) and s not in self.aborted}
            while memory is not None and len(self._due) < memory.slots - 1:
                self._named = max(self._named, self.step, self.watermark or 0) + 1
                self._due.add(self._named)
        return sorted(self._due)

    def _failure(self, link: socket.socket, code: common_pb2.ErrorCode, what: str) -> None:
        error = common_pb2.Error(code=code, what=what, why="the fake says so", next="nothing")
        _send(link, local_pb2.DaemonMessage(failure=local_pb2.Failure(error=error)))

    def _expect(self, holds: bool, complaint: str) -> None:
        if not holds:
            self.complaints.append(complaint)


def _receive(link: socket.socket) -> local_pb2.TrainerMessage | None:
    head = link.recv(LENGTH.size, socket.MSG_WAITALL)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    return local_pb2.TrainerMessage.FromString(link.recv(length, socket.MSG_WAITALL) if length else b"")


def _send(link: socket.socket, message: local_pb2.DaemonMessage, fd: int | None = None) -> None:
    text = message.SerializeToString()
    data = LENGTH.pack(len(text)) + text
    if fd is None:
        link.sendall(data)
    else:
        sent = socket.send_fds(link, [data], [fd])
        link.sendall(data[sent:])
