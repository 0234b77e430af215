"""From memory to storage and back: real embedded daemon, real files, memory wiped in between."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from trainees import Trainee, assert_same, in_a_child, plain, seed_all, state_of

import ckptd
from ckptd import errors
from ckptd.client import embedded
from ckptd.client.run import Run
from ckptd.storage import catalog, marks
from ckptd.storage.store import open_store

DEADLINE_S = 30.0


@pytest.fixture
def store(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CKPTD_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


def lose_memory() -> None:
    """The daemon dies, and all that it held with it."""
    while embedded._started:
        process = embedded._started.pop()
        process.kill()
        process.wait()
    shutil.rmtree(embedded.Environment.read().memory_dir)


def train(trainee: Trainee, run: Run, first: int, last: int) -> None:
    for i in range(first, last):
        trainee.step(i)
        run.step()


def scheduled(seed: int) -> Trainee:
    """With dropout and a scheduler: random states and plain values matter too."""
    seed_all(seed)
    trainee = plain()
    trainee.objects["scheduler"] = torch.optim.lr_scheduler.StepLR(trainee.objects["optimizer"], 2, 0.5)
    step = trainee.step

    def and_schedule(i: int) -> Any:
        loss = step(i)
        trainee.objects["scheduler"].step()
        return loss

    trainee.step = and_schedule
    return trainee


def control(steps: int) -> dict[str, Any]:
    trainee = scheduled(5)
    for i in range(steps):
        trainee.step(i)
    return state_of(trainee)


def test_a_durable_step_comes_back_when_all_memory_is_lost(store: Path) -> None:
    trainee = scheduled(5)
    with ckptd.attach("life", max_lag=1, **trainee.objects) as run:
        assert run.resume().rung == "none"
        train(trainee, run, 0, 3)
        url = run.save("paper, table 2", wait="durable")
    assert url == str(store / "life" / "step-00000003.g00001")
    assert marks.pin_of(open_store(url)).reason == "paper, table 2"
    lose_memory()

    revived = scheduled(99)
    with ckptd.attach("life", max_lag=1, **revived.objects) as run:
        report = run.resume()
        assert (report.step, report.rung, report.generation, report.layout_change) == (3, "storage", 1, None)
        assert_same(control(3), state_of(revived))
        assert run.generation > report.generation, "a generation is never used again"
        train(revived, run, 3, 5)
        run.save(wait="durable")
        assert_same(control(5), state_of(revived))
    with ckptd.open(str(store / "life" / "step-00000005.g00002")) as checkpoint:
        assert checkpoint.manifest.parent == (1, 3)
        assert checkpoint.verify() == []


def test_memory_goes_before_storage(store: Path) -> None:
    trainee = scheduled(5)
    run = ckptd.attach("life", max_lag=1, **trainee.objects)
    run.resume()
    train(trainee, run, 0, 2)
    run.save(wait="durable")
    train(trainee, run, 2, 4)
    run.save()
    run.close(park=True)
    revived = scheduled(99)
    with ckptd.attach("life", max_lag=1, **revived.objects) as run:
        report = run.resume()
        assert (report.step, report.rung) == (4, "own-memory")


def test_the_background_flush_makes_steps_durable_without_being_asked(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTD_FLUSH_EVERY", "2")  # read by the daemon that is started
    trainee = scheduled(5)
    with ckptd.attach("life", max_lag=1, **trainee.objects) as run:
        run.resume()
        steps = 0
        deadline = time.monotonic() + DEADLINE_S
        while len(catalog.entries(str(store), "life")) < 3:
            assert time.monotonic() < deadline
            train(trainee, run, steps, steps + 1)
            steps += 1
        assert run.statistics().dropped == {}, "a flush costs no snapshot"
    wait_for(lambda: not list(store.rglob("*.part")))
    lose_memory()
    found = catalog.entries(str(store), "life")  # nobody writes any more
    assert all(entry.generation == 1 for entry in found)
    revived = scheduled(99)
    with ckptd.attach("life", max_lag=1, **revived.objects) as run:
        assert run.resume().step == found[-1].step
        assert_same(control(found[-1].step), state_of(revived))


def test_a_daemon_that_is_told_to_end_makes_the_newest_protected_step_durable_first(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTD_FLUSH_EVERY", "1000")  # no step of this test by itself
    trainee = scheduled(5)
    with ckptd.attach("life", max_lag=1, **trainee.objects) as run:
        run.resume()
        train(trainee, run, 0, 3)
        run.save()
        assert not run.should_stop
        (daemon,) = embedded._started
        daemon.terminate()
        wait_for(lambda: run.should_stop or daemon.poll() is not None)
        assert daemon.wait(DEADLINE_S) == 0
        assert [entry.step for entry in catalog.entries(str(store), "life")] == [3]
    lose_memory()
    revived = scheduled(99)
    with ckptd.attach("life", max_lag=1, **revived.objects) as run:
        assert run.resume().step == 3
        assert_same(control(3), state_of(revived))


def test_a_damaged_checkpoint_is_passed_over_and_named(store: Path) -> None:
    trainee = scheduled(5)
    with ckptd.attach("life", max_lag=1, **trainee.objects) as run:
        run.resume()
        train(trainee, run, 0, 2)
        run.save(wait="durable")
        train(trainee, run, 2, 3)
        run.save(wait="durable")
    (store / "life" / "step-00000003.g00001" / "rank-00000.safetensors").write_bytes(b"torn")
    lose_memory()
    revived = scheduled(99)
    with ckptd.attach("life", max_lag=1, **revived.objects) as run:
        report = run.resume()
        assert report.step == 2
        assert [(skipped.generation, skipped.step) for skipped in report.skipped] == [(1, 3)]
        assert "rank-00000.safetensors" in report.skipped[0].why
        assert_same(control(2), state_of(revived))


def test_a_store_that_cannot_be_written_is_a_clear_error_and_training_goes_on(store: Path) -> None:
    store.write_text("a file is in the way")
    trainee = scheduled(5)
    with ckptd.attach("life", max_lag=1, **trainee.objects) as run:
        with pytest.raises(errors.CkptdError, match="store"):
            run.resume()
        store.unlink()
        run.resume()
        train(trainee, run, 0, 1)
        store.write_text("a file is in the way")
        with pytest.raises(errors.CkptdError, match="store"):
            run.save(wait="durable")
        store.unlink()
        train(trainee, run, 1, 3)
        assert run.save(wait="durable")
        assert_same(control(3), state_of(trainee))


def test_forgetting_to_resume_leaves_no_stored_state_behind(store: Path) -> None:
    trainee = scheduled(5)
    with ckptd.attach("life", max_lag=1, **trainee.objects) as run:
        run.resume()
        train(trainee, run, 0, 1)
        run.save(wait="durable")
    lose_memory()
    with (
        ckptd.attach("life", max_lag=1, **trainee.objects) as run,
        pytest.raises(errors.InvalidRequest, match="has a state to resume from"),
    ):
        run.step()


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_job_comes_back_with_another_number_of_ranks(ranks: int, store: Path) -> None:
    def rank_of(rank: int, world: int, work: Callable[[Run, Trainee], None]) -> Callable[[], None]:
        def body() -> None:
            trainee = scheduled(5)
            options = {"rank": rank, "world_size": world, "local_world_size": world, "max_lag": 1}
            with ckptd.attach("life", **options, **trainee.objects) as run:
                work(run, trainee)

        return body

    def first_life(run: Run, trainee: Trainee) -> None:
        run.resume()
        train(trainee, run, 0, 2)
        assert run.save(wait="durable")

    def second_life(run: Run, trainee: Trainee) -> None:
        report = run.resume()
        assert (report.step, report.layout_change) == (2, f"2 ranks, now {ranks}")
        expected = control(2)
        for name in ("model.0", "optimizer.0", "scheduler.0"):
            assert_same(expected[name], state_of(trainee)[name])
        train(trainee, run, 2, 3)
        assert run.save(wait="durable")

    ckptd.attach("first", **plain().objects).close()  # the daemon is this process's to end
    together([rank_of(rank, 2, first_life) for rank in range(2)])
    lose_memory()
    ckptd.attach("again", **plain().objects).close()
    together([rank_of(rank, ranks, second_life) for rank in range(ranks)])
    assert [e.step for e in catalog.entries(str(store), "life")] == [2, 3]


def together(bodies: list[Callable[[], None]]) -> None:
    """Runs each in a child of its own, at the same time."""
    with ThreadPoolExecutor(len(bodies)) as threads:
        assert list(threads.map(in_a_child, bodies)) == [0] * len(bodies)


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Noted(torch.nn.Linear):
    """A module that keeps more than its tensors."""

    notes: Any = None

    def get_extra_state(self) -> Any:
        return self.notes

    def set_extra_state(self, state: Any) -> None:
        self.notes = state


def test_the_extra_state_of_a_module_comes_back_from_the_store(store: Path) -> None:
    def make() -> Trainee:
        model = Noted(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(i: int) -> None:
            optimizer.zero_grad()
            model(torch.full((3, 4), float(i))).sum().backward()
            optimizer.step()
            model.notes = {"n": i, "t": torch.full((2,), float(i))}

        return Trainee({"model": model, "optimizer": optimizer}, step)

    trainee = make()
    with ckptd.attach("life", max_lag=1, **trainee.objects) as run:
        run.resume()
        train(trainee, run, 0, 3)
        run.save(wait="durable")
    lose_memory()
    other = make()
    with ckptd.attach("life", max_lag=1, **other.objects) as run:
        report = run.resume()
    assert (report.step, report.rung) == (3, "storage")
    assert other.objects["model"].notes["n"] == 2
    assert torch.equal(other.objects["model"].notes["t"], torch.full((2,), 2.0))
    assert torch.equal(other.objects["model"].weight, trainee.objects["model"].weight)
