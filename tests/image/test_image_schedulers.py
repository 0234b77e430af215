"""Every torch.optim.lr_scheduler keeps its state through encode and decode."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer, lr_scheduler, swa_utils

from ckptd.image import TensorRef, decode, encode


class Warmup:
    """A callable object: a LambdaLR keeps its __dict__."""

    def __init__(self) -> None:
        self.steps = 3

    def __call__(self, epoch: int) -> float:
        return 1 / (epoch + self.steps)


S = lr_scheduler
MAKERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: S.LambdaLR(o, [lambda epoch: 0.9**epoch, Warmup()]),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: S.StepLR(o, 2),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [2, 4, 4]),
    "ConstantLR": lambda o: S.ConstantLR(o),
    "LinearLR": lambda o: S.LinearLR(o),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: S.SequentialLR(o, [S.ConstantLR(o), S.ExponentialLR(o, 0.9)], [2]),
    "PolynomialLR": lambda o: S.PolynomialLR(o),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 5),
    "ChainedScheduler": lambda o: S.ChainedScheduler([S.ConstantLR(o), S.ExponentialLR(o, 0.9)]),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: S.CyclicLR(o, 0.1, 0.2),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 0.1, total_steps=20),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 3),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05),
}


def optimizer(lr: float | torch.Tensor) -> Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(2)]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)


def advance(scheduler: Any, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        scheduler.optimizers[0].step() if hasattr(scheduler, "optimizers") else scheduler.optimizer.step()
        scheduler.step(1.0) if isinstance(scheduler, S.ReduceLROnPlateau) else scheduler.step()
        rates += [float(rate) for rate in scheduler.get_last_lr()]
    return rates


def test_every_scheduler_of_torch_is_tried() -> None:
    known = {
        name
        for name, kind in inspect.getmembers(S, inspect.isclass)
        if issubclass(kind, S.LRScheduler) and kind is not S.LRScheduler and not name.startswith("_")
    }
    assert known <= set(MAKERS)


@pytest.mark.parametrize("name", MAKERS)
def test_a_restored_scheduler_goes_on_as_the_first_one(name: str) -> None:
    first_optimizer = optimizer(0.1)
    first = MAKERS[name](first_optimizer)
    advance(first, 3)
    state = decode(encode(first.state_dict()))
    assert state == first.state_dict()
    second_optimizer = optimizer(0.1)
    second = MAKERS[name](second_optimizer)
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    second.load_state_dict(state)
    assert second.state_dict() == first.state_dict()
    assert advance(second, 4) == advance(first, 4)


@pytest.mark.parametrize("name", MAKERS)
def test_a_tensor_as_learning_rate_travels_by_reference(name: str) -> None:
    """With lr=tensor(...) a scheduler's state holds tensors, deep inside."""
    scheduler = MAKERS[name](optimizer(torch.tensor(0.1)))
    tensors: dict[str, torch.Tensor] = {}

    def referred(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            tensors[f"t{len(tensors)}"] = x
            return TensorRef(f"t{len(tensors) - 1}")
        if isinstance(x, list):
            return [referred(element) for element in x]
        return {key: referred(element) for key, element in x.items()} if type(x) is dict else x

    state = referred(scheduler.state_dict())
    assert tensors
    assert decode(encode(state)) == state
