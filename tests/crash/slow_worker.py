"""A rank of the job in test_slow_peers.py: its peers take far longer to be protected than a step takes."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import ckptd


def main() -> None:
    torch.set_num_threads(1)
    out, steps = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    torch.manual_seed(int(sys.argv[3]) + rank)
    model = nn.Linear(256, 512)  # with its moments 1.5 MiB
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    seen = []
    with ckptd.attach("lost", model=model, optimizer=optimizer) as run:
        run.resume()
        for _ in range(steps):
            torch.autograd.backward(model(torch.randn(4, 256)).pow(2).mean())
            optimizer.step()
            optimizer.zero_grad()
            run.step()
            dist.barrier()
            seen.append(run.statistics().protected_step)
        found = run.statistics()
        told = {
            "captured": found.captured,
            "dropped": dict(found.dropped),
            "protected": sorted(set(seen)),
            "lag_wait_s": found.lag_wait_s,
        }
        scratch = out / f"{rank}.part"
        scratch.write_text(json.dumps(told))
        scratch.rename(out / f"{rank}.json")
        dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
