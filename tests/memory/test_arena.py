"""The arena: room is taken at once or not at all, and what it holds outlives its maker."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.errors import CorruptImage, NoSpace
from ckptd.image.digest import CELL_BYTES
from ckptd.memory.arena import Arena, arena_paths, padded

PLAN = bytes(range(16))
LABEL = "rank-00003"
TMPFS_BYTES = 1 << 20


@pytest.fixture
def tmpfs() -> Iterator[Path]:
    """A tmpfs of 1 MiB of our own."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs of a small size needs root")
    with tempfile.TemporaryDirectory(prefix="ckptd-tmpfs-") as name:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", name],
            capture_output=True,
            text=True,
        )
        if mounted.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
        try:
            yield Path(name)
        finally:
            # Lazily: a view that a failed test still holds must not keep the directory busy.
            subprocess.run(["umount", "-l", name], check=True)


def _free(directory: Path) -> int:
    disk = os.statvfs(directory)
    return disk.f_bavail * disk.f_frsize


def test_a_full_tmpfs_is_an_error_with_numbers_that_leaves_nothing(tmpfs: Path) -> None:
    before = _free(tmpfs)
    with pytest.raises(NoSpace) as caught:
        Arena.create(tmpfs, LABEL, PLAN, 2, TMPFS_BYTES)
    assert f"{2 * TMPFS_BYTES:,}" in str(caught.value)  # what was wanted
    assert f"of {TMPFS_BYTES:,}" in str(caught.value)  # what there is
    assert "--shm-size" in caught.value.next
    assert list(tmpfs.iterdir()) == []
    assert _free(tmpfs) == before
    # What fits still goes.
    Arena.create(tmpfs, LABEL, PLAN, 2, 4 * CELL_BYTES).discard()


def test_every_page_is_taken_at_once(tmpfs: Path) -> None:
    """A page that is not there when the trainer writes it would be a SIGBUS."""
    before = _free(tmpfs)
    arena = Arena.create(tmpfs, LABEL, PLAN, 2, 4 * CELL_BYTES)
    assert before - _free(tmpfs) >= arena.nbytes == 8 * CELL_BYTES
    # The rest of the tmpfs is filled, and all of the arena can still be written.
    (tmpfs / "filler").write_bytes(bytes(_free(tmpfs)))
    arena.slot(0)[:] = b"\xff" * arena.slot_bytes
    arena.slot(1)[:] = b"\xff" * arena.slot_bytes


def test_a_discarded_arena_gives_its_pages_back(tmpfs: Path) -> None:
    before = _free(tmpfs)
    arena = Arena.create(tmpfs, LABEL, PLAN, 2, 4 * CELL_BYTES)
    arena.discard()
    arena.discard()  # twice is once
    assert list(tmpfs.iterdir()) == []
    del arena
    assert _free(tmpfs) == before


def test_slots_start_as_zeros_are_padded_and_apart(tmp_path: Path) -> None:
    arena = Arena.create(tmp_path, LABEL, PLAN, 3, CELL_BYTES + 1)
    assert arena.slot_bytes == padded(CELL_BYTES + 1) == 2 * CELL_BYTES
    for slot in range(3):
        assert bytes(arena.slot(slot)) == bytes(arena.slot_bytes)
    for slot in range(3):
        arena.slot(slot)[:] = bytes([slot + 1]) * arena.slot_bytes
    for slot in range(3):
        assert bytes(arena.slot(slot)) == bytes([slot + 1]) * arena.slot_bytes
    for slot in (-1, 3):
        with pytest.raises(AssertionError):
            arena.slot(slot)


def test_padding() -> None:
    assert [padded(n) for n in (0, 1, CELL_BYTES, CELL_BYTES + 1)] == [
        0,
        CELL_BYTES,
        CELL_BYTES,
        2 * CELL_BYTES,
    ]


def test_the_descriptor_and_the_view_are_one_memory(tmp_path: Path) -> None:
    arena = Arena.create(tmp_path, LABEL, PLAN, 2, CELL_BYTES)
    os.pwrite(arena.fd, b"trainer", arena.slot_bytes)
    assert bytes(arena.slot(1)[:7]) == b"trainer"
    assert not os.get_inheritable(arena.fd)
    assert arena.path.stat().st_mode & 0o777 == 0o600


def test_an_arena_is_adopted_as_it_was(tmp_path: Path) -> None:
    seed = 5
    print(f"seed {seed}")
    content = random.Random(seed).randbytes(3 * CELL_BYTES)
    first = Arena.create(tmp_path, LABEL, PLAN, 3, CELL_BYTES)
    for slot in range(3):
        first.slot(slot)[:] = content[slot * CELL_BYTES : (slot + 1) * CELL_BYTES]
    [path] = arena_paths(tmp_path)
    second = Arena.adopt(path)
    assert (second.label, second.plan_hash, second.slots, second.slot_bytes) == (LABEL, PLAN, 3, CELL_BYTES)
    assert b"".join(bytes(second.slot(slot)) for slot in range(3)) == content


_CREATOR = """
import os, signal, sys
from pathlib import Path
from ckptd.memory.arena import Arena
arena = Arena.create(Path(sys.argv[1]), "rank-00003", bytes(range(16)), 2, 65536)
arena.slot(1)[:] = bytes([7]) * 65536
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_arena_survives_the_sigkill_of_its_maker(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _CREATOR, str(tmp_path)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    arena = Arena.adopt(arena_paths(tmp_path)[0])
    assert bytes(arena.slot(0)) == bytes(65536)
    assert bytes(arena.slot(1)) == bytes([7]) * 65536


HEX = PLAN.hex()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        (f"{LABEL}.{HEX}.2.arena", 0),
        (f"{LABEL}.{HEX}.2.arena", 2 * CELL_BYTES - 1),
        (f"{LABEL}.{HEX}.2.arena", 3 * CELL_BYTES),  # not two equal slots of whole cells
        (f"{LABEL}.{HEX}.0.arena", 2 * CELL_BYTES),
        (f"{LABEL}.{HEX[:-1]}.2.arena", 2 * CELL_BYTES),
        (f"{LABEL}.{HEX[:-1]}g.2.arena", 2 * CELL_BYTES),
        (f"{LABEL}.{HEX}.arena", 2 * CELL_BYTES),
        (f"{LABEL}.{HEX}.2.arena.tmp", 2 * CELL_BYTES),
        (f"RANK-00003.{HEX}.2.arena", 2 * CELL_BYTES),
        (f"rank-3.{HEX}.2.arena", 2 * CELL_BYTES),
        ("garbage", 2 * CELL_BYTES),
    ],
)
def test_what_is_no_arena_is_refused(tmp_path: Path, name: str, size: int) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(size)
    with pytest.raises(CorruptImage) as caught:
        Arena.adopt(path)
    assert str(path) in str(caught.value)
    assert path.exists()  # whether it goes is the caller's decision


@pytest.mark.parametrize("kind", ["directory", "link", "dangling", "pipe", "missing"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"{LABEL}.{HEX}.2.arena"
    target = tmp_path / "target"
    if kind == "directory":
        path.mkdir()
    elif kind == "link":
        target.write_bytes(bytes(2 * CELL_BYTES))
        path.symlink_to(target)
    elif kind == "dangling":
        path.symlink_to(target)
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(CorruptImage):
        Arena.adopt(path)


def test_only_arenas_are_found(tmp_path: Path) -> None:
    Arena.create(tmp_path, "rank-00001", PLAN, 2, 1)
    Arena.create(tmp_path, "parity-00000", bytes(16), 1, 1)
    for name in ("x.arena", "rank-00001.arena", "job.record", f"rank-1.{HEX}.2.arena"):
        (tmp_path / name).touch()
    assert [path.name.split(".")[0] for path in arena_paths(tmp_path)] == ["parity-00000", "rank-00001"]
