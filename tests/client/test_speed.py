"""`run.step()` takes under 5 ms of the training thread for 3,000 tensors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from fakedaemon import FakeDaemon
from torch import nn
from trainees import Trainee, attach

PARAMETERS = 750  # with AdamW: 3,000 tensors
LIMIT_S = 0.005


def test_a_step_of_three_thousand_tensors(
    fake: Callable[..., FakeDaemon], socket_path: Path, soak: bool
) -> None:
    fake()
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(PARAMETERS // 2)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with attach(Trainee({"model": model, "optimizer": optimizer}, print), socket_path, max_lag=2) as run:
        run.resume()
        cpu, wall = [], []
        for step in range(1, 16):
            optimizer.step()
            # The grant is waited for here: what is measured is the step, not the fake daemon.
            if step > 1:
                run._link.wait_until(lambda step=step: step in run._link.view.grants, time.monotonic() + 20)
            began_cpu, began = time.thread_time(), time.perf_counter()
            run.step()
            cpu.append(time.thread_time() - began_cpu)
            wall.append(time.perf_counter() - began)
        # The first ones make the plan and are audited.
        cpu, wall = sorted(cpu[4:]), sorted(wall[4:])
        for clock, times in (("CPU", cpu), ("wall", wall)):
            least, median = 1e3 * times[0], 1e3 * statistics.median(times)
            print(
                f"run.step(), {PARAMETERS} parameters: {clock} least {least:.2f} ms, median {median:.2f} ms"
            )
        assert run.statistics().captured >= 13
        # The least, since what else runs on this machine slows this thread down, too; asserted
        # with --soak only, since a slow machine must not fail a test.
        assert cpu[0] < LIMIT_S or not soak
        run.fence()
