"""Finding a daemon, and starting the embedded one: the real one, in a memory of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fakedaemon import FakeDaemon
from trainees import assert_same, in_a_child, plain, seed_all, state_of

import ckptd
from ckptd import errors
from ckptd.client import embedded
from ckptd.client.settings import Environment


def test_attach_starts_a_daemon_that_outlives_a_killed_trainer(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainee = plain()
    run = ckptd.attach("life", max_lag=1, **trainee.objects)
    said = capfd.readouterr().err
    assert "embedded daemon" in said and "rank deaths on this node" in said
    assert run.survives in said
    assert [p.poll() for p in embedded._started] == [None]
    process = embedded._started[0]
    assert os.getsid(process.pid) == process.pid, "a session of its own"
    run.close()

    # Another process trains and is killed in the middle of a step.
    def train_and_die() -> None:
        seed_all(5)
        trainee = plain()
        run = ckptd.attach("life2", max_lag=1, **trainee.objects)
        assert run.resume().step == 0
        for i in range(4):
            trainee.step(i)
            run.step()
        run.save()
        trainee.step(4)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(train_and_die) == -signal.SIGKILL
    assert len(embedded._started) == 1 and process.poll() is None

    seed_all(5)
    control = plain()
    for i in range(4):
        control.step(i)
    expected = state_of(control)
    seed_all(99)
    revived = plain()
    with ckptd.attach("life2", max_lag=1, **revived.objects) as run:
        report = run.resume()
        assert (report.step, report.rung, report.verified) == (4, "own-memory", True)
        assert_same(expected, state_of(revived))
        assert run.generation > report.generation
        revived.step(4)
        run.step()
        run.save()
        assert run.statistics().protected_step == 5


def test_a_second_trainer_of_the_same_rank_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTD_RANK_HANDOVER_S", "0.2")  # read by the daemon that is started

    def come_second() -> None:
        with pytest.raises(errors.RankTaken, match="rank 0 of job twice"):
            ckptd.attach("twice", **plain().objects)

    with ckptd.attach("twice", **plain().objects):
        assert in_a_child(come_second) == 0


def test_training_outlives_the_real_daemons_restart(home: Path) -> None:
    trainee = plain()
    with ckptd.attach("restart", max_lag=2, **trainee.objects) as run:
        run.resume()
        for i in range(4):
            trainee.step(i)
            run.step()
        run.save()
        first = embedded._started.pop()
        first.kill()
        first.wait()
        trainee.step(4)
        run.step()
        assert run.statistics().detached
        environment = Environment.read()
        embedded.find_daemon(None, environment, 30)
        deadline = time.monotonic() + 30
        step = 5
        while run.statistics().protected_step < 6:
            trainee.step(step)
            run.step()
            step += 1
            assert time.monotonic() < deadline, run.statistics()
        assert run.statistics().reconnects == 1


def test_the_order_of_sockets(home: Path, socket_path: Path) -> None:
    asked = Environment.read({"CKPTD_SOCKET": "/from/environment"})
    assert embedded.find_daemon("/from/argument", asked, 1) == Path("/from/argument")
    assert embedded.find_daemon(None, asked, 1) == Path("/from/environment")
    daemon = FakeDaemon(socket_path)
    assert embedded.find_daemon(None, Environment.read({}), 1, system=socket_path) == socket_path
    daemon.stop()
    assert not embedded.answers(socket_path)


@pytest.mark.parametrize("what", ["mode", "link", "file"])
def test_an_unsafe_runtime_directory_is_refused(what: str, tmp_path: Path) -> None:
    directory = tmp_path / "ckptd"
    if what == "mode":
        directory.mkdir(mode=0o755)
    elif what == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        directory.symlink_to(tmp_path / "elsewhere")
    else:
        directory.touch()
    with pytest.raises(errors.InvalidRequest, match="mode 700"):
        embedded.private_directory(directory)


def test_a_daemon_that_does_not_start_says_why(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/ls")
    with pytest.raises(
        errors.Unreachable, match=r"did not start: it ended with code [1-9].*(invalid|unrecognized) option"
    ):
        embedded.find_daemon(None, Environment.read(), 30)


def test_only_one_of_many_starts_it(home: Path) -> None:
    """Three trainers that come at once find one daemon."""
    script = (
        "import ckptd.client.embedded as e; from pathlib import Path\n"
        "from ckptd.client.settings import Environment\n"
        "print(e.find_daemon(None, Environment.read(), 30, Path('/nowhere')), len(e._started),\n"
        "      *[p.pid for p in e._started])\n"
    )
    many = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    said = [process.communicate(timeout=60)[0].split() for process in many]
    try:
        assert [process.returncode for process in many] == [0] * 3
        assert {words[0] for words in said} == {str(home / "ckptd" / "ckptd.sock")}
        assert sum(int(words[1]) for words in said) == 1
    finally:
        for pid in {int(pid) for words in said for pid in words[2:]}:
            os.kill(pid, signal.SIGTERM)
