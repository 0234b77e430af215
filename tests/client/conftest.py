"""Fixtures of the client's tests: a socket path, fake daemons that are stopped, no stray environment."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakedaemon import FakeDaemon

from ckptd.client import embedded


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CKPTD_GENERATION", "CKPTD_SOCKET"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def socket_path() -> Iterator[Path]:
    # Not tmp_path: a socket's path may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ckptd-test-") as directory:
        yield Path(directory) / "s"


@pytest.fixture
def fake(socket_path: Path) -> Iterator[Callable[..., FakeDaemon]]:
    """Starts fake daemons on `socket_path`; at the end, none may have seen a broken rule."""
    started: list[FakeDaemon] = []

    def start(**options: Any) -> FakeDaemon:
        if started:
            started[-1].stop()
        started.append(FakeDaemon(socket_path, **options))
        return started[-1]

    yield start
    if started:
        started[-1].stop()
    complaints = [complaint for daemon in started for complaint in daemon.complaints]
    assert not complaints, complaints


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A node without any daemon; one that is started is ended."""
    with (
        tempfile.TemporaryDirectory(prefix="ckptd-home-") as directory,
        tempfile.TemporaryDirectory(prefix="ckptd-test-", dir="/dev/shm") as memory,
    ):
        monkeypatch.setenv("XDG_RUNTIME_DIR", directory)
        monkeypatch.setenv("CKPTD_MEMORY_DIR", f"{memory}/m")
        monkeypatch.setenv("CKPTD_STORE", f"{directory}/store")  # a user's own may know jobs of these names
        monkeypatch.setattr(embedded, "SYSTEM_SOCKET", Path(directory) / "no-system-daemon")
        monkeypatch.setattr(embedded.find_daemon, "__defaults__", (Path(directory) / "no-system-daemon",))
        yield Path(directory)
        while embedded._started:
            process = embedded._started.pop()
            process.kill()
            process.wait()
