"""The restored state equals a deep copy taken at the cut, for every way of training that surprised someone.

Training goes on after the cut before the copy has begun: the copier is held back
until a fence waits for it.  So a fence that is missing, too late or for the wrong
optimizer is caught, whatever the machine's speed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakedaemon import FakeDaemon
from torch import nn
from torch.nn.utils import clip_grad_norm_, parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from trainees import Trainee, assert_same, attach, batch, plain, seed_all, state_of

from ckptd.client.run import Run
from ckptd.client.snapshot import Group

CUT = 4
AFTER = 3
PATIENCE_S = 20.0


def batch_norm() -> Trainee:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    return with_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def with_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, **more: Any) -> Trainee:
    def step(i: int) -> None:
        optimizer.zero_grad()
        model(batch(i)).pow(2).mean().backward()
        optimizer.step()

    return Trainee({"model": model, "optimizer": optimizer, **more}, step)


def ema() -> Trainee:
    trainee = plain()
    average = AveragedModel(trainee.objects["model"], multi_avg_fn=get_ema_multi_avg_fn(0.9))
    inner = trainee.step

    def step(i: int) -> None:
        inner(i)
        average.update_parameters(trainee.objects["model"])

    return Trainee({**trainee.objects, "ema": average}, step)


class ShadowEma:
    """An EMA of the kind that people write themselves."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.updates = 0

    def update(self, model: nn.Module) -> None:
        self.updates += 1
        for name, p in model.named_parameters():
            self.shadow[name].lerp_(p.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow, self.updates = state["shadow"], state["updates"]


def shadow_ema() -> Trainee:
    trainee = plain()
    average = ShadowEma(trainee.objects["model"])
    inner = trainee.step

    def step(i: int) -> None:
        inner(i)
        average.update(trainee.objects["model"])

    return Trainee({**trainee.objects, "ema": average}, step)


def spectral_norm() -> Trainee:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 2))
    return with_optimizer(model, torch.optim.Adam(model.parameters(), lr=0.05))


def clamped() -> Trainee:
    trainee = plain(torch.optim.RMSprop)
    inner = trainee.step

    def step(i: int) -> None:
        inner(i)
        with torch.no_grad():
            for p in trainee.objects["model"].parameters():
                p.clamp_(-0.1, 0.1)

    return Trainee(trainee.objects, step)


def two_optimizers() -> Trainee:
    """As in a GAN: each steps in the middle of the iteration, one of them only every other time."""
    one, two = nn.Linear(6, 6), nn.Linear(6, 6)
    first, second = (
        torch.optim.Adam(one.parameters(), lr=0.1),
        torch.optim.SGD(two.parameters(), lr=0.1, momentum=0.5),
    )

    def step(i: int) -> None:
        if i % 2 == 0:
            first.zero_grad()
            two(one(batch(i))).pow(2).mean().backward()
            first.step()
        second.zero_grad()
        two(one(batch(i))).abs().mean().backward()
        second.step()

    return Trainee({"model": {"one": one, "two": two}, "optimizer": [first, second]}, step)


def in_backward() -> Trainee:
    """One optimizer per parameter, stepped as soon as its gradient is there."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    optimizers = {name: torch.optim.Adam([p], lr=0.05) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():

        def apply(p: torch.Tensor, optimizer: torch.optim.Optimizer = optimizers[name]) -> None:
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(apply)
    return Trainee(
        {"model": model, "optimizer": optimizers}, lambda i: model(batch(i)).pow(2).mean().backward()
    )


def accumulation() -> Trainee:
    trainee = plain()
    model, optimizer = trainee.objects["model"], trainee.objects["optimizer"]

    def step(i: int) -> None:
        for micro in range(3):
            model(batch(3 * i + micro)).pow(2).mean().backward()
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()

    return Trainee(trainee.objects, step)


def skipped_scaler_steps() -> Trainee:
    """The scaler finds an infinity at the cut and right behind it: optimizer.step() is not called there."""
    model = nn.Linear(6, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)

    def step(i: int) -> None:
        optimizer.zero_grad()
        scaler.scale(model(batch(i)).pow(2).mean()).backward()
        if i + 1 in (CUT, CUT + 1):
            model.weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()

    return Trainee({"model": model, "optimizer": optimizer, "scaler": scaler}, step)


def frozen_and_groups() -> Trainee:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    groups = [
        {"params": model[1].parameters(), "lr": 0.1},
        {"params": model[2].parameters(), "weight_decay": 0.3},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    return with_optimizer(model, optimizer)


def scheduled() -> Trainee:
    trainee = plain()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(trainee.objects["optimizer"], max_lr=0.2, total_steps=50)
    inner = trainee.step

    def step(i: int) -> None:
        inner(i)
        scheduler.step()

    return Trainee({**trainee.objects, "scheduler": scheduler}, step)


def tied() -> Trainee:
    """An embedding that is the output layer, too, and a weight that is a view of another layer's."""
    model = nn.ModuleDict(
        {"embed": nn.Embedding(7, 4), "out": nn.Linear(4, 7, bias=False), "mix": nn.Linear(4, 4)}
    )
    model["out"].weight = model["embed"].weight
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)

    def step(i: int) -> None:
        tokens = torch.arange(5) % 7
        optimizer.zero_grad()
        nn.functional.cross_entropy(
            model["out"](model["mix"](model["embed"](tokens))), (tokens + i) % 7
        ).backward()
        optimizer.step()

    return Trainee({"model": model, "optimizer": optimizer}, step)


def not_contiguous() -> Trainee:
    model = nn.Linear(6, 4)
    model.weight = nn.Parameter(torch.randn(6, 4).t())
    model.register_buffer("expanded", torch.randn(1, 3).expand(5, 3))
    return with_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def adamw(**options: Any) -> Callable[[], Trainee]:
    return lambda: plain(torch.optim.AdamW, **options)


CASES: dict[str, Callable[[], Trainee]] = {
    "batch_norm": batch_norm,
    "ema": ema,
    "shadow_ema": shadow_ema,
    "spectral_norm": spectral_norm,
    "clamped": clamped,
    "two_optimizers": two_optimizers,
    "in_backward": in_backward,
    "accumulation": accumulation,
    "skipped_scaler_steps": skipped_scaler_steps,
    "frozen_and_groups": frozen_and_groups,
    "scheduled": scheduled,
    "tied": tied,
    "not_contiguous": not_contiguous,
    "adamw_for_loop": adamw(foreach=False),
    "adamw_foreach": adamw(foreach=True),
    "adamw_fused": adamw(fused=True),
    "adamw_tensor_lr": adamw(lr=torch.tensor(0.05), foreach=False),
}


class Gate:
    """Holds the copier back until a fence waits for it, or training is over where none does."""

    def __init__(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.held_back = 0
        wait = Group.wait

        def opening(group: Group) -> bool:
            self.opened.set()
            return wait(group)

        monkeypatch.setattr(Group, "wait", opening)
        self._behind = run._protection.capture.behind
        run._protection.capture.behind = self.hold

    def hold(self) -> None:
        self._behind()
        self.opened.wait(PATIENCE_S)
        self.held_back += 1


def train_past_the_cut(
    trainee: Trainee, daemon: FakeDaemon, path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[dict[str, Any], Run]:
    """Trains CUT steps, keeps a copy of the state, and trains on; returns the copy."""
    run = attach(trainee, path, **{"audit": 0, **options})
    gate = Gate(run, monkeypatch)
    assert run.resume().step == 0
    for i in range(CUT):
        trainee.step(i)
        if i == CUT - 1:
            run._link.wait_until(lambda: CUT in run._link.view.grants, run_deadline())
            expected = state_of(trainee)
        run.step()
    for i in range(CUT, CUT + AFTER):
        trainee.step(i)
        run.step()
    gate.opened.set()
    daemon.wait(lambda d: d.captured == [CUT])
    assert gate.held_back
    return expected, run


def run_deadline() -> float:
    import time

    return time.monotonic() + 20


@pytest.mark.parametrize("case", CASES)
def test_restored_equals_a_copy_taken_at_the_cut(
    case: str, fake: Callable[..., FakeDaemon], socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = fake(due=[CUT])
    seed_all(1)
    control = CASES[case]()
    seed_all(2)
    for i in range(CUT + AFTER):
        control.step(i)
    seed_all(1)
    trainee = CASES[case]()
    seed_all(2)
    expected, run = train_past_the_cut(trainee, daemon, socket_path, monkeypatch)
    # Capturing changed nothing.
    assert_same(state_of(control), state_of(trainee))
    run.close(park=True)

    fake(memory=daemon.memory, due=[], generation=2)
    seed_all(77)
    revived = CASES[case]()
    with attach(revived, socket_path) as run:
        report = run.resume()
        assert (report.step, report.rung, report.verified) == (CUT, "own-memory", True)
        assert_same(expected, state_of(revived))
        # And it goes on as if nothing had happened.
        for i in range(report.step, CUT + AFTER):
            revived.step(i)
            run.step()
    assert_same(state_of(control), state_of(revived))


@pytest.mark.parametrize("case", ["batch_norm", "two_optimizers", "in_backward", "skipped_scaler_steps"])
def test_eager_capture_needs_no_fence(
    case: str, fake: Callable[..., FakeDaemon], socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = fake(due=[CUT])
    seed_all(3)
    trainee = CASES[case]()
    run = attach(trainee, socket_path, capture="eager")
    assert not run._hooks
    run.resume()
    for i in range(CUT + AFTER):
        trainee.step(i)
        if i == CUT - 1:
            run._link.wait_until(lambda: CUT in run._link.view.grants, run_deadline())
            expected = state_of(trainee)
        run.step()
    daemon.wait(lambda d: d.captured == [CUT])
    run.close(park=True)
    fake(memory=daemon.memory, due=[], generation=2)
    revived = CASES[case]()
    with attach(revived, socket_path) as run:
        assert run.resume().step == CUT
        assert_same(expected, state_of(revived))


def test_a_missing_fence_is_caught_by_the_matrix(
    fake: Callable[..., FakeDaemon], socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The matrix means something: without the optimizer's fence, the copy is of another state."""
    daemon = fake(due=[CUT])
    seed_all(1)
    trainee = plain()
    monkeypatch.setattr("ckptd.client.capture.Capture.fence", lambda self, index: None)
    expected, run = train_past_the_cut(trainee, daemon, socket_path, monkeypatch)
    run.close(park=True)
    fake(memory=daemon.memory, due=[], generation=2)
    revived = plain()
    with attach(revived, socket_path) as run:
        run.resume()
        with pytest.raises(AssertionError):
            assert_same(expected, state_of(revived))
