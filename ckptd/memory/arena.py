"""Memory that outlives the trainer: one tmpfs file of equal slots.

The daemon creates, sizes and faults in an arena, and hands its descriptor to the
trainer.  What the file is (whose, of which plan, how many slots) stands in its
name, so that a restarted daemon finds it again without a header that could tear.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import stat
from pathlib import Path

from ckptd.errors import CorruptImage, NoSpace
from ckptd.image.digest import CELL_BYTES

_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python has no name for it
_POPULATED_BYTES = 8 << 20  # a millisecond or two
_NAME = re.compile(r"(?P<label>[a-z]+-\d{5})\.(?P<plan>[0-9a-f]{32})\.(?P<slots>\d{1,3})\.arena")


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to whole cells: the room that an image takes in a slot."""
    return -(-nbytes // CELL_BYTES) * CELL_BYTES


class Arena:
    """A mapped tmpfs file of `slots` slots of `slot_bytes` each; slots start as zeros."""

    def __init__(self, path: Path, fd: int, slots: int, slot_bytes: int, plan_hash: bytes) -> None:
        # Whether all pages are taken.  Only then may somebody map the file who does not know
        # which pages are: a full tmpfs would be a SIGBUS.
        self.whole = False
        self.path = path
        self.fd = fd
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.plan_hash = plan_hash
        self._map = mmap.mmap(fd, slots * slot_bytes)
        self._view = memoryview(self._map)

    @classmethod
    def create(
        cls,
        directory: Path,
        label: str,
        plan_hash: bytes,
        slots: int,
        slot_bytes: int,
        *,
        sparse: bool = False,
    ) -> Arena:
        """Creates the file and takes its pages at once, so that no later write can fail.

        Args:
            sparse: takes no pages yet: for `write` now and `allocate` later.

        Raises:
            NoSpace: the tmpfs cannot hold it; the message holds the numbers.
        """
        slot_bytes = padded(slot_bytes)
        assert slots > 0 and slot_bytes > 0
        path = directory / f"{label}.{plan_hash.hex()}.{slots}.arena"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        os.ftruncate(fd, slots * slot_bytes)
        arena = cls(path, fd, slots, slot_bytes, plan_hash)
        if not sparse:
            try:
                arena.allocate()
            except NoSpace:
                arena.discard()
                raise
        return arena

    def allocate(self) -> None:
        """Takes all pages that are not taken yet, and maps them here.

        Raises:
            NoSpace: the tmpfs cannot hold it; the message holds the numbers.
        """
        try:
            os.posix_fallocate(self.fd, 0, self.nbytes)
        except OSError as error:
            raise self._no_space(error) from error
        with contextlib.suppress(OSError):  # before Linux 5.14 the first snapshots take the page faults
            # madvise() keeps the interpreter's lock and the process's map: in one piece, a large arena would
            # silence the daemon for so long that it is declared dead.
            for begin in range(0, self.nbytes, _POPULATED_BYTES):
                length = min(_POPULATED_BYTES, self.nbytes - begin)
                self._map.madvise(_MADV_POPULATE_WRITE, begin, length)
        self.whole = True

    def write(self, slot: int, offset: int, content: memoryview) -> None:
        """Writes into a slot whose pages may not be taken yet; takes them as it goes, and zeroes none.

        Raises:
            NoSpace: the tmpfs is full.
        """
        assert offset + len(content) <= self.slot_bytes
        at = slot * self.slot_bytes + offset
        try:
            while content:
                written = os.pwrite(self.fd, content, at)
                content, at = content[written:], at + written
        except OSError as error:
            raise self._no_space(error) from error

    def _no_space(self, error: OSError) -> NoSpace:
        disk = os.statvfs(self.path.parent)
        return NoSpace(
            f"no room for {self.nbytes:,} bytes on {self.path.parent}",
            f"{error.strerror}; {disk.f_bavail * disk.f_frsize:,} of"
            f" {disk.f_blocks * disk.f_frsize:,} bytes are free",
            "enlarge it (in a container: --shm-size), or point --memory-dir at a larger tmpfs",
        )

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
