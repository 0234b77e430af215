"""What attach does to the process around it: threads, imports, forked children, its end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fakedaemon import FakeDaemon
from trainees import attach, in_a_child, plain

from ckptd import errors

Start = Callable[..., FakeDaemon]
HERE = Path(__file__).parent


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("ckptd")}


def test_no_thread_before_the_first_capture_and_none_after_close(fake: Start, socket_path: Path) -> None:
    fake(due=[2])
    trainee = plain()
    run = attach(trainee, socket_path, max_lag=1)
    run.resume()
    trainee.step(0)
    run.step()
    assert threads() == set()
    trainee.step(1)
    run.step()
    assert threads() == {"ckptd-copier"}
    run.close()
    assert threads() == set()


def test_a_trainer_imports_no_grpc_and_may_end_without_close(fake: Start, socket_path: Path) -> None:
    """The interpreter ends in the middle of a snapshot: quietly, and with its last step captured."""
    daemon = fake()
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from trainees import plain, attach\n"
        "t = plain(); run = attach(t, sys.argv[2], max_lag=1); run.resume()\n"
        "for i in range(3): t.step(i); run.step()\n"
        "loaded = [m for m in sys.modules if m.split('.')[0] in ('grpc', 'pydantic', 'typer', 'scipy')]\n"
        "assert not loaded, loaded\n"
        "assert 'torch.distributed.checkpoint' not in sys.modules\n"
    )
    command = [sys.executable, "-c", script, str(HERE), str(socket_path)]
    done = subprocess.run(command, timeout=60, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    daemon.wait(lambda d: d.captured == [1, 2, 3])
    assert daemon.goodbye is None


def test_an_error_that_nobody_catches_is_told_before_the_process_ends(fake: Start, socket_path: Path) -> None:
    daemon = fake()
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from trainees import plain, attach\n"
        "t = plain(); run = attach(t, sys.argv[2], max_lag=1); run.resume()\n"
        "t.step(0); run.step()\n"
        "1 / 0\n"
    )
    command = [sys.executable, "-c", script, str(HERE), str(socket_path)]
    done = subprocess.run(command, timeout=60, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n"), done.stderr
    daemon.wait(lambda d: d.failing == "ZeroDivisionError: division by zero" and d.captured == [1])


def test_a_forked_child_is_disarmed(fake: Start, socket_path: Path) -> None:
    """A DataLoader worker inherits the optimizer and its hooks, but not the run."""
    daemon = fake()
    trainee = plain()
    with attach(trainee, socket_path, max_lag=1) as run:
        run.resume()
        trainee.step(0)
        run.step()
        fds = run._link._connection._sock.fileno()  # type: ignore[union-attr]
        code = in_a_child(lambda: child(trainee, run, fds))
        assert code == 0
        trainee.step(1)
        run.step()
        run.fence()
        daemon.wait(lambda d: d.captured == [1, 2])


def child(trainee: object, run: object, fd: int) -> int:
    try:
        os.fstat(fd)
        return 2  # the socket is still open: the daemon would not see the trainer's end
    except OSError:
        pass
    trainee.step(1)  # type: ignore[attr-defined]
    try:
        run.step()  # type: ignore[attr-defined]
    except errors.InvalidRequest:
        pass
    else:
        return 3
    run.close()  # type: ignore[attr-defined]
    return 0 if not threads() - {"ckptd-copier"} else 4


def test_the_arena_is_not_inherited(fake: Start, socket_path: Path) -> None:
    fake()
    trainee = plain()
    with attach(trainee, socket_path, max_lag=1) as run:
        run.resume()
        trainee.step(0)
        run.step()
        arena = run._protection.room.arena
        assert arena is not None
        address = arena._bytes.data_ptr()

        def mapped() -> bool:
            lines = Path("/proc/self/maps").read_text().splitlines()
            return any(
                int(a, 16) <= address < int(b, 16) for a, b in (line.split()[0].split("-") for line in lines)
            )

        assert mapped()
        assert in_a_child(lambda: int(mapped())) == 0


@pytest.mark.filterwarnings("ignore:This process")
def test_a_loader_with_workers_works_beside_a_run(fake: Start, socket_path: Path) -> None:
    daemon = fake()
    trainee = plain()
    with attach(trainee, socket_path, max_lag=1) as run:
        run.resume()
        for i in range(3):
            loader = torch.utils.data.DataLoader(range(4), num_workers=1, batch_size=2)
            assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3]]
            trainee.step(i)
            run.step()
        run.fence()
        daemon.wait(lambda d: d.captured == [1, 2, 3])
