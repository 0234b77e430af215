"""Small training jobs, and what it takes to compare their states bit for bit."""

from __future__ import annotations

import copy
import os
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

import ckptd
from ckptd.client.run import Run


@dataclass
class Trainee:
    """Objects to attach, and one step of training them.

    `step(i)` does everything of iteration i but `run.step()`; it may call `between()`
    where other code would run between an optimizer's step and the cut.
    """

    objects: dict[str, Any]
    step: Callable[[int], Any]
    options: dict[str, Any] = field(default_factory=dict)


def seed_all(seed: int) -> None:
    """Seeds every random state that belongs to a rank."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def state_of(trainee: Trainee) -> dict[str, Any]:
    """Returns a deep copy of everything that is to come back."""
    state: dict[str, Any] = {
        "random": (torch.get_rng_state().clone(), np.random.get_state()[1].copy(), random.getstate())
    }
    for name, value in trainee.objects.items():
        items = (
            value.items()
            if isinstance(value, dict)
            else enumerate(value)
            if isinstance(value, list)
            else [(0, value)]
        )
        for key, item in items:
            state[f"{name}.{key}"] = copy.deepcopy(item.state_dict())
    return state


def assert_same(left: Any, right: Any, path: str = "") -> None:
    """Asserts that two states are equal to the bit and in type."""
    if isinstance(left, torch.Tensor):
        assert isinstance(right, torch.Tensor), path
        assert (left.dtype, left.shape, left.device) == (right.dtype, right.shape, right.device), path
        a, b = left.detach().contiguous().reshape(-1), right.detach().contiguous().reshape(-1)
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"{path}: {left} {right}"
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), (path, left.keys(), right.keys())
        for key in left:
            assert_same(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, (list, tuple)):
        assert type(left) is type(right) and len(left) == len(right), path
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{path}[{index}]")
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype and left.tobytes() == right.tobytes(), path
    else:
        assert type(left) is type(right) and (left == right or left != left), (path, left, right)


def attach(trainee: Trainee, path: Any, **options: Any) -> Run:
    """Attaches a trainee as rank 0 of 1, without any of the environment's ideas."""
    given = {
        "rank": 0,
        "world_size": 1,
        "local_world_size": 1,
        "timeout_s": 20.0,
        **trainee.options,
        **options,
    }
    return ckptd.attach("job", socket=path, **trainee.objects, **given)


def plain(optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW, **options: Any) -> Trainee:
    """Two layers with dropout: the plainest job whose random state matters."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
    opt = optimizer(model.parameters(), **{"lr": 0.05, **options})

    def step(i: int) -> torch.Tensor:
        opt.zero_grad()
        loss = model(batch(i)).pow(2).mean()
        loss.backward()
        opt.step()
        return loss

    return Trainee({"model": model, "optimizer": opt}, step)


def batch(i: int, size: int = 5, features: int = 6) -> torch.Tensor:
    """Iteration i's input; does not touch the global random state."""
    return torch.randn(size, features, generator=torch.Generator().manual_seed(1000 + i))


def in_a_child(work: Callable[[], int | None]) -> int:
    """Runs `work` in a forked child; returns its exit code, 99 if it raised, or the negative signal."""
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = work() or 0
        except BaseException:  # noqa: BLE001 - the child's top frame
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
