"""One of two ranks of an FSDP2 job; started by test_fsdp2.py, says what it found as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from trainees import Trainee, attach, batch, seed_all

from ckptd import errors
from ckptd.client.attached import Attached
from ckptd.client.state import Survey

CUT, STEPS = 3, 6


def make(seed: int, sharded: bool = True) -> Trainee:
    """Uneven shards (7 rows over 2 ranks), an empty one (1 row), dropout, a buffer, tied weights."""
    seed_all(seed)
    blocks = [nn.Sequential(nn.Linear(7, 7), nn.Dropout(0.2), nn.Linear(7, 7)) for _ in range(2)]
    model = nn.Sequential(nn.Linear(6, 7), *blocks, nn.BatchNorm1d(7), nn.Linear(7, 1))
    model[2][0].weight = model[2][2].weight
    if sharded:
        for block in blocks:
            fully_shard(block)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    def step(i: int) -> None:
        optimizer.zero_grad()
        model(batch(2 * i + dist.get_rank())).pow(2).mean().backward()
        optimizer.step()
        scheduler.step()
        with torch.no_grad():  # an evaluation in between leaves the root's parameters gathered
            model.eval()(batch(900 + i))
            model.train()

    return Trainee({"model": model, "optimizer": optimizer, "scheduler": scheduler}, step)


def local_state(trainee: Trainee) -> dict[str, Any]:
    """Everything that this rank holds, as plain values."""
    model, optimizer = trainee.objects["model"], trainee.objects["optimizer"]
    state = {f"model.{name}": t for name, t in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            state[f"optimizer.{name}.{key}"] = value
    found: dict[str, Any] = {"random": torch.get_rng_state().sum().item()}
    for name, tensor in state.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        layout = str((tensor.placements, tuple(tensor.shape))) if isinstance(tensor, DTensor) else "whole"
        found[name] = (layout, str(local.dtype), list(local.shape), local.reshape(-1).tolist())
    found["lr"] = trainee.objects["scheduler"].get_last_lr()
    return found


def main(socket: str) -> dict[str, Any]:
    rank = dist.get_rank()
    place = {"rank": rank, "world_size": 2, "local_world_size": 2}
    trainee = make(1)
    seed_all(100 + rank)
    run = attach(trainee, socket, audit=0, **place)
    run.resume()
    for i in range(STEPS):
        trainee.step(i)
        if i == CUT - 1:
            run._link.wait_until(lambda: CUT in run._link.view.grants, time.monotonic() + 20)
            cut = local_state(trainee)
        run.step()
    end = local_state(trainee)
    run.fence()
    run.close(park=True)
    dist.barrier()

    revived = make(2)
    with attach(revived, socket, **place) as run:
        report = run.resume()
        after_resume = local_state(revived)
        for i in range(report.step, STEPS):
            revived.step(i)
            run.step()
        after_end = local_state(revived)
        run.close(park=True)

    other = make(3, sharded=False)
    with attach(other, socket, **place) as run:
        try:
            run.resume()
            refused = ""
        except errors.StateMismatch as error:
            refused = str(error)
        run.close(park=True)
    whole = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    names = [
        Survey(Attached.sort({"model": m})).module_names for m in (whole, DistributedDataParallel(whole))
    ]
    return {
        "ddp names": names[0] == names[1],
        "step": report.step,
        "captured": run.statistics().captured,
        "same at the cut": after_resume == cut,
        "same at the end": after_end == end,
        "cut differs from end": cut != end,
        "names": sorted(name for name in cut if name.startswith("optimizer")),
        "refused": refused,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{sys.argv[2]}",
        rank=int(os.environ["RANK"]),
        world_size=2,
        timeout=timedelta(seconds=80),
    )
    try:
        print(json.dumps(main(sys.argv[1])), flush=True)
    finally:
        dist.destroy_process_group()
