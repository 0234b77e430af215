"""Lag, drops, holds, replans, audits: what a completed step meets on its way to the daemon."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakedaemon import FakeDaemon
from torch import nn
from trainees import Trainee, assert_same, attach, batch, plain, seed_all, state_of

from ckptd import errors
from ckptd.client import protection
from ckptd.client.run import Run
from ckptd.client.schedule import Verdict
from ckptd.v1 import common_pb2

Start = Callable[..., FakeDaemon]


def train(trainee: Trainee, run: Run, first: int, last: int) -> None:
    """Iterations [first, last)."""
    for i in range(first, last):
        run.step(loss=trainee.step(i))


def granted(run: Run, step: int) -> None:
    """Waits until a step can be captured."""
    deadline = time.monotonic() + 20
    assert run._link.wait_until(lambda: run._link.view.verdict(step) is Verdict.CAPTURE, deadline)


def settle(run: Run) -> None:
    """Waits until the snapshot under way has ended."""
    assert run._protection.capture.finish(time.monotonic() + 20)


# max_lag


@pytest.mark.parametrize("bound", [1, 2])
def test_with_max_lag_every_step_is_captured_and_the_lag_is_never_larger(
    bound: int, fake: Start, socket_path: Path
) -> None:
    daemon = fake()
    trainee = plain()
    lags = []
    with attach(trainee, socket_path, max_lag=bound) as run:
        # Runs behind the fence: here step i + 1 is about to change the parameters.
        run.resume()
        trainee.objects["optimizer"].register_step_pre_hook(
            lambda *_: lags.append(run._step + 1 - daemon.watermark_or_0())
        )
        train(trainee, run, 0, 12)
        daemon.wait(lambda d: d.captured == list(range(1, 13)))
        assert max(lags) <= bound
        assert run.statistics().dropped == {}
    assert daemon.hellos[0].slots == 3


def test_the_lag_wait_ends_when_the_step_is_protected(
    fake: Start, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = fake(protect=False)
    trainee = plain()
    with attach(trainee, socket_path, max_lag=1, audit=0, slots=3) as run:
        run.resume()
        train(trainee, run, 0, 1)
        wait_until = run._link.wait_until

        def watched(condition: Callable[[], bool], deadline: float) -> bool:
            threading.Timer(0.05, lambda: daemon.set(watermark=1)).start()
            return wait_until(condition, deadline)

        monkeypatch.setattr(run._link, "wait_until", watched)
        trainee.step(1)
        assert run.statistics().lag_wait_s >= 0.05
        assert daemon.watermark == 1


def test_waiting_in_vain_is_reported_once_and_not_repeated(
    fake: Start, socket_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = fake(protect=False)
    trainee = plain()
    # Long enough for the fake daemon's first grants on a busy machine, which are waited for as long.
    with attach(trainee, socket_path, max_lag=1, max_lag_wait_s=1.0, audit=0, slots=4) as run:
        run.resume()
        waits: list[bool] = []
        wait_until = run._link.wait_until

        def watched(condition: Callable[[], bool], deadline: float) -> bool:
            waits.append(wait_until(condition, deadline))
            return waits[-1]

        monkeypatch.setattr(run._link, "wait_until", watched)
        train(trainee, run, 0, 6)
        waited = run.statistics().lag_wait_s
        assert waits.count(False) == 1 and waited >= 1.0, "one deadline, not six"
        assert sum("without waiting" in r.message for r in caplog.records) == 1
        settle(run)
        daemon.set(watermark=max(daemon.captured))
        daemon.wait(lambda d: d.watermark is not None)
        train(trainee, run, 6, 9)
        assert run.statistics().lag_wait_s > waited, "the watermark moved: waiting has a point again"


@pytest.mark.parametrize("how", ["paused", "held"])
def test_nobody_waits_for_protection_that_stands_still(how: str, fake: Start, socket_path: Path) -> None:
    daemon = fake(protect=False)
    trainee = plain()
    with attach(trainee, socket_path, max_lag=1, max_lag_wait_s=30, audit=0) as run:
        run.resume()
        train(trainee, run, 0, 1)
        daemon.wait(lambda d: d.captured == [1])
        daemon.set(**{how: "n2 is away" if how == "paused" else True})
        train(trainee, run, 1, 5)
        assert run.statistics().lag_wait_s < 30, "no deadline was waited for"
        assert run.statistics().protected_step == 0


def test_the_first_audited_step_does_not_stall_a_lag_of_one(fake: Start, socket_path: Path) -> None:
    """With several optimizers, the lag wait comes before some tensors' own fence: they are audited then."""
    daemon = fake()
    one, two = nn.Linear(6, 3), nn.Linear(6, 3)
    first, second = torch.optim.SGD(one.parameters(), lr=0.1), torch.optim.SGD(two.parameters(), lr=0.1)

    def step(i: int) -> None:
        (one(batch(i)) + two(batch(i))).pow(2).sum().backward()
        first.step()
        second.step()

    trainee = Trainee({"model": [one, two], "optimizer": [first, second]}, step)
    with attach(trainee, socket_path, max_lag=1, max_lag_wait_s=30) as run:
        run.resume()
        train(trainee, run, 0, 5)
        daemon.wait(lambda d: d.captured == [1, 2, 3, 4, 5])
        assert run.statistics().lag_wait_s < 30, "no deadline was waited for"


# Drops


def test_without_max_lag_a_due_step_without_a_slot_is_given_up(fake: Start, socket_path: Path) -> None:
    daemon = fake(due=[2], grants=False)
    trainee = plain()
    with attach(trainee, socket_path) as run:
        run.resume()
        train(trainee, run, 0, 1)
        run._link.wait_until(lambda: run._link.view.known, time.monotonic() + 20)
        train(trainee, run, 1, 3)
        daemon.wait(lambda d: 2 in d.aborted and d.step == 3)
        assert daemon.aborted[2].reason == "no free slot"
        assert not daemon.aborted[2].not_finite
        assert run.statistics().dropped == {"no free slot": 1, protection.BUSY: 2}
        assert run.statistics().dropped_total == 3


def test_a_due_step_that_became_known_too_late_is_given_up(fake: Start, socket_path: Path) -> None:
    daemon = fake(due=[], grants=False)
    trainee = plain()
    with attach(trainee, socket_path) as run:
        run.resume()
        train(trainee, run, 0, 4)
        daemon.wait(lambda d: d.step == 4)
        daemon.set(due=[3])
        run._link.wait_until(lambda: 3 in run._link.view.schedule.due, time.monotonic() + 20)
        train(trainee, run, 4, 5)
        daemon.wait(lambda d: 3 in d.aborted)


def test_steps_that_are_not_due_are_not_captured(fake: Start, socket_path: Path) -> None:
    daemon = fake(due=[3])
    trainee = plain()
    with attach(trainee, socket_path, every=3) as run:
        run.resume()
        for i in range(5):
            trainee.step(i)
            if i == 2:
                granted(run, 3)
            run.step()
        daemon.wait(lambda d: d.captured == [3])
        assert daemon.aborted == {}
    assert daemon.hellos[0].every == 3


# Losses


@pytest.mark.parametrize(
    "loss", [float("nan"), float("inf"), torch.tensor(float("nan")), torch.tensor([-float("inf")])]
)
def test_a_loss_that_is_not_finite_holds_the_job_until_it_is_accepted(
    loss: Any, fake: Start, socket_path: Path
) -> None:
    daemon = fake()
    trainee = plain()
    with attach(trainee, socket_path, max_lag=1) as run:
        run.resume()
        train(trainee, run, 0, 4)
        trainee.step(4)
        run.step(loss=loss)
        train(trainee, run, 5, 8)
        daemon.wait(lambda d: d.step == 8 and d.captured == [1, 2, 3, 4])
        assert daemon.aborted[5].not_finite
        assert daemon.watermark == 4
        assert run.statistics().protected_step == 4
        assert run.statistics().dropped["the loss is not finite"] >= 1
        run.accept()
        daemon.wait(lambda d: d.accepted == 1)
        train(trainee, run, 8, 11)
        daemon.wait(lambda d: d.captured[-1] == 11)


def test_a_loss_is_one_number(fake: Start, socket_path: Path) -> None:
    fake()
    with attach(plain(), socket_path) as run:
        run.resume()
        with pytest.raises(errors.InvalidRequest, match=r"\[2\]"):
            run.step(loss=torch.zeros(2))


# Audits


def test_a_tensor_that_moves_behind_the_cut_voids_the_snapshot_and_becomes_volatile(
    fake: Start, socket_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = fake()
    trainee = plain()
    model = trainee.objects["model"]
    model.register_parameter("sneaky", nn.Parameter(torch.zeros(3), requires_grad=False))

    def step(i: int) -> torch.Tensor:
        model.sneaky.detach().numpy()[:] += 1  # no version counter sees this
        return trainee.step(i)

    with attach(Trainee(trainee.objects, step), socket_path, max_lag=1) as run:
        run.resume()
        for i in range(6):
            loss = step(i)
            expected = state_of(trainee)
            run.step(loss=loss)
        daemon.wait(lambda d: d.captured == [2, 3, 4, 5, 6])
        statistics = run.statistics()
        assert daemon.aborted.keys() == {1}
        assert "model.sneaky" in daemon.aborted[1].reason
        assert (statistics.voided, statistics.volatile) == (1, ("model.sneaky",))
        assert statistics.audits == 3
        assert any("model.sneaky changed" in record.message for record in caplog.records)
        assert "model.sneaky" in run.describe()
        run.close(park=True)
    fake(memory=daemon.memory, generation=2)
    revived = plain()
    revived.objects["model"].register_parameter("sneaky", nn.Parameter(torch.ones(3), requires_grad=False))
    with attach(revived, socket_path) as run:
        assert run.resume().step == 6
        assert_same(expected, state_of(revived))


def test_the_first_three_and_every_nth_snapshot_are_audited(fake: Start, socket_path: Path) -> None:
    fake()
    trainee = plain()
    with attach(trainee, socket_path, max_lag=1, audit=5) as run:
        run.resume()
        audits = []
        for i in range(11):
            train(trainee, run, i, i + 1)
            audits.append(run.statistics().audits)
        assert audits == [1, 2, 3, 3, 4, 4, 4, 4, 4, 5, 5]
        assert run.statistics().voided == 0


def test_a_step_without_an_optimizer_step_ends_the_audit_before_it(fake: Start, socket_path: Path) -> None:
    """As when a GradScaler skips: no optimizer's fence came, so run.step() is the fence."""
    daemon = fake()
    trainee = plain()
    with attach(trainee, socket_path, max_lag=2) as run:
        run.resume()
        train(trainee, run, 0, 1)
        for _ in range(2):
            run.step()
        daemon.wait(lambda d: d.captured == [1, 2])


def test_manual_updates_are_caught_unless_they_are_fenced(fake: Start, socket_path: Path) -> None:
    """Parameters that nobody's optimizer steps: run.fence() is their fence."""

    def updating(model: nn.Module, run: list[Run]) -> Trainee:
        def step(i: int) -> None:
            model(batch(i)).pow(2).mean().backward()
            for each in run:
                each.fence()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None

        return Trainee({"model": model}, step)

    for fenced, voided in ((False, 1), (True, 0)):
        fake()
        fences: list[Run] = []
        trainee = updating(nn.Linear(6, 2), fences)
        with attach(trainee, socket_path, max_lag=1, audit=1) as run:
            run.resume()
            if fenced:
                fences.append(run)
            for i in range(5):
                trainee.step(i)
                run.step()
            assert run.statistics().voided == voided
            assert run.statistics().volatile == (() if fenced else ("model.bias", "model.weight"))


# Plans


def test_state_that_appears_later_makes_a_new_plan_and_is_kept(fake: Start, socket_path: Path) -> None:
    daemon = fake()
    trainee = plain()
    with attach(trainee, socket_path, max_lag=1) as run:
        run.resume()
        run.step()  # before the first optimizer step: no state yet
        plans = daemon.plans
        for i in range(4):
            trainee.step(i)
            expected = state_of(trainee)
            run.step()
        daemon.wait(lambda d: d.captured == [1, 2, 3, 4, 5])  # with max_lag, a new plan costs no step
        assert (plans, daemon.plans) == (1, 2)
        assert run.statistics().replans == 1
        run.close(park=True)
    fake(memory=daemon.memory, generation=2)
    revived = plain()
    with attach(revived, socket_path) as run:
        assert run.resume().step == 5
        assert_same(expected, state_of(revived))


def test_other_tensors_of_the_same_geometry_are_captured_without_a_new_plan(
    fake: Start, socket_path: Path
) -> None:
    daemon = fake()
    seed_all(5)
    trainee = plain()
    model, optimizer = trainee.objects["model"], trainee.objects["optimizer"]

    def swap(i: int) -> None:
        if i == 2:  # a parameter's storage
            model[0].weight.data = model[0].weight.data.clone() + 1
        if i == 3:  # the state's tensors
            optimizer.load_state_dict(optimizer.state_dict())
            for state in optimizer.state.values():
                state["exp_avg"] = state["exp_avg"] * 2
        if i == 4:  # a parameter
            new = nn.Parameter(torch.randn_like(model[3].bias))
            optimizer.state[new] = optimizer.state.pop(model[3].bias)
            optimizer.param_groups[0]["params"][3] = model[3].bias = new

    with attach(trainee, socket_path, max_lag=1) as run:
        run.resume()
        for i in range(6):
            trainee.step(i)
            swap(i)
            expected = state_of(trainee)
            run.step()
            settle(run)
            daemon.wait(lambda d, step=i + 1: step in d.images)
            assert_captured(daemon.images[i + 1], expected)
        assert daemon.plans == 1


def assert_captured(image: bytes, expected: dict[str, Any]) -> None:
    """Stock safetensors reads the image, and finds the model's and the optimizer's bytes."""
    import safetensors.torch

    stored = safetensors.torch.load(image)
    for name, tensor in expected["model.0"].items():
        assert torch.equal(stored[f"model.{name}"], tensor), name
    names = list(expected["model.0"])
    for index, state in expected["optimizer.0"]["state"].items():
        for key, tensor in state.items():
            assert torch.equal(stored[f"optimizer.model.{names[index]}.{key}"], tensor), (index, key)


class Growing:
    """An object whose state grows for ever."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.marks: dict[str, torch.Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "marks": self.marks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.marks = state["seen"], state["marks"]


@pytest.mark.parametrize("what", ["values", "tensors"])
def test_objects_that_outgrow_their_plan_get_a_new_one(what: str, fake: Start, socket_path: Path) -> None:
    daemon = fake()
    trainee = plain()
    growing = Growing()
    trainee.objects["growing"] = growing
    with attach(trainee, socket_path, max_lag=1) as run:
        run.resume()
        for i in range(5):
            trainee.step(i)
            if what == "values":
                growing.seen.extend(range(10**9, 10**9 + 5000))
            elif i % 2:
                growing.marks[f"at {i}"] = torch.full((i,), float(i))
            expected = state_of(trainee)
            run.step()
        daemon.wait(lambda d: d.captured == [1, 2, 3, 4, 5])
        assert run.statistics().replans >= 2
        run.close(park=True)
    fake(memory=daemon.memory, generation=2)
    revived = plain()
    revived.objects["growing"] = Growing()
    with attach(revived, socket_path) as run:
        run.resume()
        assert_same(expected, state_of(revived))


def test_a_state_that_grows_beyond_the_memory_does_not_end_training(
    fake: Start, socket_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = fake(space_bytes=1 << 20)
    trainee = plain()
    growing = Growing()
    trainee.objects["growing"] = growing
    with attach(trainee, socket_path, max_lag=1, max_lag_wait_s=0.2) as run:
        run.resume()
        train(trainee, run, 0, 2)
        growing.marks["big"] = torch.zeros(1 << 19)
        train(trainee, run, 2, 5)
        assert any("protection is off" in record.message for record in caplog.records)
        assert daemon.plans == 2, "a plan that was refused is not announced again"
        del growing.marks["big"]
        growing.marks["small"] = torch.zeros(1)
        trainee.objects["model"][0].weight.data = trainee.objects["model"][0].weight.data.clone()
        train(trainee, run, 5, 6)
        for step in (7, 8):
            granted(run, step)  # training does not wait: it did so in vain
            train(trainee, run, step - 1, step)
        daemon.wait(lambda d: d.captured[-1] == 8)


# save, close


def test_save_waits_for_protection(fake: Start, socket_path: Path) -> None:
    daemon = fake(protect=False)
    trainee = plain()
    with attach(trainee, socket_path, max_lag=3) as run:
        run.resume()
        train(trainee, run, 0, 1)
        run.save(wait="sealed")
        daemon.wait(lambda d: d.captured == [1])
        with pytest.raises(errors.DeadlineExceeded):
            run.save(timeout_s=0.05)
        helper = threading.Timer(0.05, lambda: daemon.set(watermark=1))
        helper.start()
        run.save("final", timeout_s=20)
        helper.join()
        assert run.statistics().protected_step == 1


def test_saving_a_step_that_was_not_captured_is_an_error(fake: Start, socket_path: Path) -> None:
    fake(due=[5])
    trainee = plain()
    with attach(trainee, socket_path) as run:
        run.resume()
        train(trainee, run, 0, 2)
        with pytest.raises(errors.InvalidRequest, match="step 2 was not captured"):
            run.save(timeout_s=1)


def test_close_finishes_the_last_snapshot_and_says_goodbye(fake: Start, socket_path: Path) -> None:
    daemon = fake()
    trainee = plain()
    run = attach(trainee, socket_path, max_lag=1)
    run.resume()
    train(trainee, run, 0, 2)
    run.close()
    run.close()
    daemon.wait(lambda d: d.goodbye is not None and d.captured == [1, 2])
    assert daemon.goodbye is not None and not daemon.goodbye.park
    trainee.step(2)  # no hook is left
    assert not trainee.objects["optimizer"]._optimizer_step_pre_hooks
    with pytest.raises(errors.InvalidRequest):
        run.step()


def test_an_error_in_the_with_block_is_told_and_keeps_the_memory(fake: Start, socket_path: Path) -> None:
    daemon = fake()
    trainee = plain()
    with pytest.raises(ZeroDivisionError), attach(trainee, socket_path, max_lag=1) as run:
        run.resume()
        train(trainee, run, 0, 1)
        raise ZeroDivisionError("by nothing\nat all")
    daemon.wait(lambda d: bool(d.failing) and not d._links)
    assert daemon.failing == "ZeroDivisionError: by nothing"
    assert daemon.captured == [1], "the last snapshot is finished first"
    assert daemon.goodbye is None
    trainee.step(1)  # the hooks do nothing any more


# The daemon's absence


def test_training_outlives_the_daemon_and_protection_returns_with_it(
    fake: Start, socket_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = fake()
    trainee = plain()
    with attach(trainee, socket_path, max_lag=2, max_lag_wait_s=30) as run:
        run.resume()
        train(trainee, run, 0, 4)
        settle(run)
        daemon.stop()
        train(trainee, run, 4, 8)
        assert run.statistics().detached
        assert sum("protection is off" in record.message for record in caplog.records) == 1
        mapping = run._protection.room.arena
        daemon = fake(memory=daemon.memory)
        back(trainee, run, 8)
        daemon.wait(lambda d: run.statistics().step in d.captured)
        assert daemon.hellos[0].reconnect
        assert run._protection.room.arena is mapping, "the same inode: the mapping is kept"
        assert run.statistics().reconnects == 1


def test_a_daemon_that_lost_its_memory_gives_a_new_arena(fake: Start, socket_path: Path) -> None:
    daemon = fake()
    trainee = plain()
    with attach(trainee, socket_path, max_lag=2) as run:
        run.resume()
        train(trainee, run, 0, 3)
        mapping = run._protection.room.arena
        daemon.stop()
        train(trainee, run, 3, 4)
        daemon = fake()
        back(trainee, run, 4)
        daemon.wait(lambda d: run.statistics().step in d.images)
        assert run._protection.room.arena is not mapping
        assert_captured(daemon.images[run.statistics().step], state_of(trainee))


def back(trainee: Trainee, run: Run, first: int) -> None:
    """Trains until a step is captured again."""
    settle(run)  # a snapshot from before may still be under way
    before = run.statistics().captured
    deadline = time.monotonic() + 20
    for i in range(first, first + 100_000):
        train(trainee, run, i, i + 1)
        settle(run)
        if run.statistics().captured > before:
            return
        assert time.monotonic() < deadline
        run._link._next_revival = 0


def test_a_stale_generation_ends_the_trainer(fake: Start, socket_path: Path) -> None:
    daemon = fake()
    trainee = plain()
    with attach(trainee, socket_path, max_lag=2) as run:
        run.resume()
        train(trainee, run, 0, 2)
        daemon.fail(common_pb2.ERROR_CODE_STALE_GENERATION, "generation 2 exists")
        trainee.step(2)
        with pytest.raises(errors.StaleGeneration, match="generation 2 exists"):
            run.step()
        with pytest.raises(errors.StaleGeneration):
            run.step()


def test_a_trainer_that_comes_back_too_late_is_told(fake: Start, socket_path: Path) -> None:
    daemon = fake()
    trainee = plain()
    with attach(trainee, socket_path) as run:
        run.resume()
        train(trainee, run, 0, 2)
        fake(memory=daemon.memory, generation=2)
        deadline = time.monotonic() + 20
        with pytest.raises(errors.StaleGeneration, match="too old"):
            for i in range(2, 100_000):
                train(trainee, run, i, i + 1)
                run._link._next_revival = 0
                assert time.monotonic() < deadline


def test_other_failures_are_told_and_training_goes_on(
    fake: Start, socket_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ckptd")
    daemon = fake()
    trainee = plain()
    with attach(trainee, socket_path, max_lag=2) as run:
        run.resume()
        train(trainee, run, 0, 2)
        daemon.fail(common_pb2.ERROR_CODE_INVALID, "no grant for step 2")
        train(trainee, run, 2, 4)
        daemon.wait(lambda d: d.captured == [1, 2, 3, 4])
        assert any("no grant for step 2" in record.message for record in caplog.records)
