"""A rank of the job in test_all_is_lost: trains the same model on every rank, and says what it resumed."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from xxhash import xxh3_128_hexdigest

import ckptd


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model as every rank builds it, from whatever seed."""
    model = nn.Sequential(nn.Linear(33, 47), nn.Tanh(), nn.Linear(47, 5))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Global step `step`, the same on every rank."""
    inputs = torch.randn(8, 33, generator=torch.Generator().manual_seed(step))
    torch.autograd.backward(model(inputs).pow(2).mean())
    optimizer.step()
    optimizer.zero_grad()


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Of every byte of parameters and moments."""
    tensors = [p.detach() for p in model.parameters()]
    tensors += [state[key] for state in optimizer.state.values() for key in sorted(state)]
    return xxh3_128_hexdigest(b"".join(tensor.numpy().tobytes() for tensor in tensors))


def main() -> None:
    torch.set_num_threads(1)
    out, steps = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    torch.manual_seed(int(sys.argv[3]))
    model, optimizer = build()
    with ckptd.attach("lost", model=model, optimizer=optimizer, max_lag=1) as run:
        report = run.resume()
        told = {
            "step": report.step,
            "rung": report.rung,
            "layout_change": report.layout_change,
            "generation": run.generation,
            "digest": digest(model, optimizer),
        }
        scratch = out / f"{rank}.part"
        scratch.write_text(json.dumps(told))
        scratch.rename(out / f"{rank}.json")
        for step in range(report.step, steps):
            train_step(model, optimizer, step)
            run.step()
            dist.barrier()
        run.save(wait="protected")
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
