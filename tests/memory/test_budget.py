"""The memory sum: what is promised before training is what is taken in it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.daemon.job_memory import JobMemory
from ckptd.errors import NoSpace
from ckptd.image.digest import CELL_BYTES
from ckptd.memory.arena import padded
from ckptd.memory.budget import TRANSFER_BYTES, check, needed_bytes
from ckptd.memory.holding import Holding


def test_the_designs_sum() -> None:
    """Images x slots x (1 + m/(n-m)), and the transfer buffers."""
    image = 12 * CELL_BYTES
    for nodes, parity, factor in [
        (4, 1, 4 / 3),
        (4, 2, 2),
        (2, 1, 2),
        (8, 2, 8 / 6),
        (1, 1, 1),
        (2, 2, 1),
        (4, 0, 1),
    ]:
        needed = needed_bytes(image, 2, 3, nodes, parity) - TRANSFER_BYTES
        assert needed == pytest.approx(image * 2 * 3 * factor), (nodes, parity)


@settings(deadline=None, max_examples=25)
@given(
    image_bytes=st.integers(1, 9 * CELL_BYTES),
    ranks=st.integers(1, 3),
    slots=st.integers(2, 3),
    nodes=st.integers(1, 6),
    parity=st.integers(0, 5),
)
def test_the_arenas_of_a_job_are_never_more_than_its_sum(
    image_bytes: int, ranks: int, slots: int, nodes: int, parity: int
) -> None:
    needed = needed_bytes(image_bytes, ranks, slots, nodes, parity)
    with tempfile.TemporaryDirectory() as name:
        memory = JobMemory("job", "n0", Path(name))
        for rank in range(ranks):
            memory.make_rank_arena(rank, bytes(16), slots, image_bytes)
        group = tuple(f"n{i}" for i in range(nodes))
        for step in range(1, slots + 1):
            holding = Holding(1, step, group, "n0", parity, tuple(range(ranks)))
            if holding.protected_group:
                chunk_bytes = holding.geometry.chunk_bytes(padded(image_bytes) * ranks)
                holding.parity = memory.place_parity(holding, chunk_bytes, slots, (0, 0))
                assert holding.parity is not None
            memory.holdings[holding.key] = holding
        assert sum(memory.nbytes()) <= needed - TRANSFER_BYTES
        memory.discard()


def test_what_fits_exactly_fits() -> None:
    assert check("mine", 100, 150, {"other": 50, "mine": 70, "empty": 0}) == 100


def test_what_does_not_fit_is_told_who_holds_what() -> None:
    with pytest.raises(NoSpace) as caught:
        check("mine", 1_000_001, 3_000_000, {"llama": 1_500_000, "gpt": 500_000, "mine": 123_456, "empty": 0})
    text = str(caught.value)
    assert "job mine needs 1,000,001 bytes" in text
    assert "1,000,000 of 3,000,000 bytes are free" in text
    assert "gpt holds 500,000, llama holds 1,500,000" in text
    assert "mine holds" not in text and "empty" not in text
    assert "ckptd forget" in caught.value.next
    with pytest.raises(NoSpace, match="nobody else holds any"):
        check("mine", 2, 1, {})


def test_a_daemon_on_a_tiny_tmpfs_ends_with_code_8_and_says_why() -> None:
    """The container's classic: /dev/shm of 64 KiB to 64 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs of a small size needs root")
    with tempfile.TemporaryDirectory(prefix="ckptd-tiny-") as name:
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", name]
        mounted = subprocess.run(command, capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
        try:
            daemon = [sys.executable, "-m", "ckptd.cli.main", "daemon", "--node", "tiny"]
            daemon += ["--socket", f"{name}/s", "--memory-dir", f"{name}/memory"]
            done = subprocess.run(daemon, capture_output=True, text=True, timeout=60)
        finally:
            subprocess.run(["umount", "-l", name], check=True)
    assert done.returncode == 8, done.stderr
    assert f"{1 << 20:,} bytes in all" in done.stderr and "--shm-size" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
