"""Memory that outlives the trainer: one tmpfs file of equal slots.

The daemon creates, sizes and faults in an arena, and hands its descriptor to the
trainer.  What the file is (whose, of which plan, how many slots) stands in its
name, so that a restarted daemon finds it again without a header that could tear.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
from pathlib import Path

from ckptd.errors import CorruptImage, NoSpace
from ckptd.image.digest import CELL_BYTES

_NAME = re.compile(r"(?P<label>[a-z]+-\d{5})\.(?P<plan>[0-9a-f]{32})\.(?P<slots>\d{1,3})\.arena")


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to whole cells: the room that an image takes in a slot."""
    return -(-nbytes // CELL_BYTES) * CELL_BYTES


class Arena:
    """A mapped tmpfs file of `slots` slots of `slot_bytes` each; slots start as zeros."""

    def __init__(self, path: Path, fd: int, slots: int, slot_bytes: int, plan_hash: bytes) -> None:
        self.path = path
        self.fd = fd
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.plan_hash = plan_hash
        # Populated: the first snapshots would otherwise take a page fault for every 4 KiB.
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self._view = memoryview(mmap.mmap(fd, slots * slot_bytes, flags=flags))

    @classmethod
    def create(cls, directory: Path, label: str, plan_hash: bytes, slots: int, slot_bytes: int) -> Arena:
        """Creates the file and takes its pages at once, so that no later write can fail.

        Raises:
            NoSpace: the tmpfs cannot hold it; the message holds the numbers.
        """
        slot_bytes = padded(slot_bytes)
        assert slots > 0 and slot_bytes > 0
        path = directory / f"{label}.{plan_hash.hex()}.{slots}.arena"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            # posix_fallocate: without it a full tmpfs is a SIGBUS in the trainer.
            os.posix_fallocate(fd, 0, slots * slot_bytes)
            return cls(path, fd, slots, slot_bytes, plan_hash)
        except OSError as error:
            os.close(fd)
            path.unlink()
            disk = os.statvfs(directory)
            raise NoSpace(
                f"no room for {slots * slot_bytes:,} bytes on {directory}",
                f"{error.strerror}; {disk.f_bavail * disk.f_frsize:,} of"
                f" {disk.f_blocks * disk.f_frsize:,} bytes are free",
                "enlarge it (in a container: --shm-size), or point --memory-dir at a larger tmpfs",
            ) from error

    @classmethod
    def adopt(cls, path: Path) -> Arena:
        """Maps the file that an earlier daemon left.

        Raises:
            CorruptImage: its name or size is not that of an arena, or it cannot be opened as a file.
        """
        match = _NAME.fullmatch(path.name)
        slots = int(match["slots"]) if match else 0
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise CorruptImage(f"{path} is not an arena", str(error)) from error
        found = os.fstat(fd)
        size = found.st_size if stat.S_ISREG(found.st_mode) else 0
        if match is None or slots == 0 or size == 0 or size % (slots * CELL_BYTES):
            os.close(fd)
            raise CorruptImage(f"{path} is not an arena", f"its name or its size of {size} bytes is wrong")
        return cls(path, fd, slots, size // slots, bytes.fromhex(match["plan"]))

    @property
    def label(self) -> str:
        """Whose memory this is, "rank-00003" or "parity-00000"."""
        return self.path.name.split(".", 1)[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return self.slots * self.slot_bytes

    def slot(self, index: int) -> memoryview:
        """A writable view of one slot, `slot_bytes` long."""
        assert 0 <= index < self.slots, f"slot {index} of {self.slots}"
        return self._view[index * self.slot_bytes : (index + 1) * self.slot_bytes]

    def discard(self) -> None:
        """Removes the file; its pages go when the last mapping does."""
        self.path.unlink(missing_ok=True)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def arena_paths(directory: Path) -> list[Path]:
    """The arenas that lie in `directory`."""
    return sorted(path for path in directory.glob("*.arena") if _NAME.fullmatch(path.name))
