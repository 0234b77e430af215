"""Every torch optimizer and scheduler comes back bit for bit, or is refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakedaemon import FakeDaemon
from torch import nn
from torch.optim import lr_scheduler
from trainees import Trainee, assert_same, attach, batch, plain, seed_all, state_of

Start = Callable[..., FakeDaemon]
REFUSED = {"LBFGS"}
OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9, "nesterov": True}],
    "Adam": [{"amsgrad": True}],
    "RMSprop": [{"momentum": 0.5, "centered": True}],
}


def round_trip(make: Callable[[], Trainee], fake: Start, path: Path, steps: int = 3) -> None:
    """Trains, resumes in fresh objects, compares, and trains both on."""
    daemon = fake()
    seed_all(11)
    trainee = make()
    with attach(trainee, path, max_lag=1) as run:
        run.resume()
        for i in range(steps):
            trainee.step(i)
            run.step()
        run.fence()  # the first snapshots end with their audit
        daemon.wait(lambda d: d.captured[-1:] == [steps])
        expected = state_of(trainee)
        run.close(park=True)
    fake(memory=daemon.memory, generation=2)
    seed_all(12)
    revived = make()
    with attach(revived, path) as run:
        assert run.resume().step == steps
        assert_same(expected, state_of(revived))
    random_state = torch.get_rng_state()
    trainee.step(steps)
    torch.set_rng_state(random_state)
    revived.step(steps)
    assert_same(state_of(trainee), state_of(revived))


def test_the_list_of_optimizers_is_torchs() -> None:
    assert len(OPTIMIZERS) >= 15
    assert set(OPTIMIZERS) >= REFUSED


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in REFUSED])
def test_every_optimizer_round_trips(name: str, fake: Start, socket_path: Path) -> None:
    kind = getattr(torch.optim, name)
    for options in OPTIONS.get(name, [{}]):

        def make(options: dict[str, Any] = options) -> Trainee:
            if name == "SparseAdam":
                model: nn.Module = nn.Embedding(9, 4, sparse=True)
            else:
                model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 2, bias=False))
            optimizer = kind(model.parameters(), **{"lr": 0.02, **options})

            def step(i: int) -> None:
                optimizer.zero_grad()
                data = torch.tensor([i % 9, 3]) if name == "SparseAdam" else batch(i)
                model(data).pow(2).sum().backward()
                optimizer.step()

            return Trainee({"model": model, "optimizer": optimizer}, step)

        round_trip(make, fake, socket_path)


def sequential(optimizer: torch.optim.Optimizer) -> Any:
    parts = [lr_scheduler.LinearLR(optimizer, total_iters=2), lr_scheduler.ExponentialLR(optimizer, 0.5)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])


class Decay:
    """A callable with a state, which LambdaLR keeps."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, epoch: int) -> float:
        self.calls += 1
        return 0.9**epoch


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=False),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, Decay()),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 2, 2, 5]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.95),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": sequential,
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
}


def test_the_list_of_schedulers_is_torchs() -> None:
    public = {name for name in lr_scheduler.__all__ if name != "LRScheduler"}
    assert set(SCHEDULERS) >= public


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_round_trips(name: str, fake: Start, socket_path: Path) -> None:
    def make() -> Trainee:
        trainee = plain(torch.optim.SGD)
        scheduler = SCHEDULERS[name](trainee.objects["optimizer"])
        inner = trainee.step

        def step(i: int) -> None:
            loss = inner(i)
            scheduler.step(*([loss.item() + i] if name == "ReduceLROnPlateau" else []))

        return Trainee({**trainee.objects, "scheduler": scheduler}, step)

    round_trip(make, fake, socket_path)


def test_scalers_enabled_and_disabled_and_generators_round_trip(fake: Start, socket_path: Path) -> None:
    def make() -> Trainee:
        trainee = plain(torch.optim.SGD)
        scalers = [torch.amp.GradScaler("cpu", enabled=True), torch.amp.GradScaler("cpu", enabled=False)]
        generator = torch.Generator().manual_seed(int(torch.randint(100, ())))
        inner = trainee.step

        def step(i: int) -> None:
            inner(i)
            torch.rand(3, generator=generator)

        made = Trainee({**trainee.objects, "scaler": scalers}, step)
        made.generator = generator  # type: ignore[attr-defined]
        return made

    daemon = fake()
    trainee = make()
    with attach(trainee, socket_path, max_lag=1, sampling=trainee.generator) as run:  # type: ignore[attr-defined]
        run.resume()
        trainee.step(0)
        run.step()
        run.fence()  # the first snapshots end with their audit
        daemon.wait(lambda d: d.captured == [1])
        run.close(park=True)
    fake(memory=daemon.memory, generation=2)
    revived = make()
    with attach(revived, socket_path, sampling=revived.generator) as run:  # type: ignore[attr-defined]
        run.resume()
    assert_same(trainee.generator.get_state(), revived.generator.get_state())  # type: ignore[attr-defined]
    assert_same(state_of(trainee), state_of(revived))


class OddOptimizer(torch.optim.Optimizer):
    """State as it should not be, but is: numbers, None, nested tensors, the parameter itself, names."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "table": {"a": (1, 2)}})

    def step(self, closure: Any = None) -> None:
        self.state["common"]["total"] = self.state["common"].get("total", 0) + 1
        self.state["common"]["sum"] = torch.ones(2) * self.state["common"]["total"]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                state["history"] = [*state.get("history", [])[-1:], p.grad.clone()]
                state["none"] = None
                state["half"] = p.detach().to(torch.bfloat16)
                state["self"] = p.detach()
                p.data.add_(p.grad, alpha=-group["lr"])


def test_an_odd_optimizer_round_trips(fake: Start, socket_path: Path) -> None:
    round_trip(lambda: plain(lambda params, lr: OddOptimizer(params)), fake, socket_path)


class OddModule(nn.Linear):
    """Extra state and every dtype that has a code."""

    def __init__(self) -> None:
        super().__init__(6, 2)
        self.notes = {"n": 0, "t": torch.zeros(2)}
        for index, dtype in enumerate(
            [
                torch.bool,
                torch.uint8,
                torch.int64,
                torch.float16,
                torch.complex64,
                torch.float8_e4m3fn,
                torch.uint64,
            ]
        ):
            self.register_buffer(f"b{index}", torch.randn(3, 2).abs().mul(9).to(dtype))
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("scalar", torch.randn(()))
        self.register_buffer("conjugate", torch.randn(2, dtype=torch.complex64).conj())

    def get_extra_state(self) -> Any:
        return self.notes

    def set_extra_state(self, state: Any) -> None:
        self.notes = state


def test_extra_state_and_every_dtype_round_trip(fake: Start, socket_path: Path) -> None:
    def make() -> Trainee:
        model = OddModule()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(i: int) -> None:
            optimizer.zero_grad()
            model(batch(i)).sum().backward()
            optimizer.step()
            model.notes = {"n": i, "t": torch.full((2,), float(i))}

        return Trainee({"model": model, "optimizer": optimizer}, step)

    round_trip(make, fake, socket_path)
