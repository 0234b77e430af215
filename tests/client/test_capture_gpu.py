"""Capture on CUDA: stream waits instead of host waits, and no synchronization in run.step()."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fakedaemon import FakeDaemon
from torch import nn
from trainees import Trainee, assert_same, attach, seed_all, state_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make(**options: object) -> Trainee:
    model = nn.Sequential(
        nn.Linear(512, 2048), nn.BatchNorm1d(2048), nn.Dropout(0.2), nn.Linear(2048, 8)
    ).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **options)  # type: ignore[arg-type]

    def step(i: int) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.full((64, 512), float(i), device="cuda")).pow(2).mean()
        loss.backward()
        optimizer.step()
        return loss

    return Trainee({"model": model, "optimizer": optimizer}, step)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"capturable": True}])
@pytest.mark.parametrize("audit", [0, 1])
@pytest.mark.parametrize("capture", ["lazy", "eager"])
def test_the_restored_state_is_the_one_at_the_cut(
    options: dict[str, object], audit: int, capture: str, fake: Callable[..., FakeDaemon], socket_path: Path
) -> None:
    daemon = fake()
    seed_all(1)
    trainee = make(**options)
    with attach(trainee, socket_path, max_lag=1, audit=audit, capture=capture) as run:
        run.resume()
        for i in range(4):
            loss = trainee.step(i)
            expected = state_of(trainee), torch.cuda.get_rng_state()
            run.step(loss=loss)
        run.save(timeout_s=20)
        assert run.statistics().voided == 0
        run.close(park=True)
    fake(memory=daemon.memory, generation=2)
    seed_all(2)
    revived = make(**options)
    with attach(revived, socket_path) as run:
        assert run.resume().step == 4
    assert_same(expected, (state_of(revived), torch.cuda.get_rng_state()))


def test_a_step_never_synchronizes_the_device(fake: Callable[..., FakeDaemon], socket_path: Path) -> None:
    daemon = fake()
    trainee = make(fused=True)
    with attach(trainee, socket_path, max_lag=2, audit=0) as run:
        run.resume()
        for i in range(3):
            run.step(loss=trainee.step(i))
        for i in range(3, 8):
            loss = trainee.step(i)
            torch.cuda.set_sync_debug_mode("error")
            try:
                run.step(loss=loss)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        run.save(timeout_s=20)
        daemon.wait(lambda d: d.captured[-1] == 8)


def test_a_loss_on_the_device_is_judged_a_step_later(
    fake: Callable[..., FakeDaemon], socket_path: Path
) -> None:
    daemon = fake()
    trainee = make()
    with attach(trainee, socket_path, max_lag=1, audit=0) as run:
        run.resume()
        for i in range(3):
            run.step(loss=trainee.step(i))
        trainee.step(3)
        run.step(loss=torch.tensor(float("nan"), device="cuda"))
        torch.cuda.synchronize()
        run.step(loss=trainee.step(4))
        daemon.wait(lambda d: 4 in d.aborted)
        assert daemon.aborted[4].not_finite
        assert 4 not in daemon.captured
