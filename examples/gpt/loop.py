"""What training is, with or without ckptd: build the job, take one step, digest the result.

train.py and control.py share every line of this file, so that they differ by
ckptd's lines only.  Nothing here imports ckptd.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from data import Sampler, corpus
from model import GPT, Shape
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

BATCH = 4
WARMUP_STEPS = 5
GROUP_TIMEOUT = timedelta(seconds=60)


class Log:
    """JSON lines of what happened when; `t` is CLOCK_MONOTONIC in seconds."""

    def __init__(self, path: str, rank: int) -> None:
        # Line buffered: a line is out before the next statement runs, whoever is killed then.
        self._file: TextIO = Path(path).open("a", buffering=1)  # noqa: SIM115 - for the process's life
        self._rank = rank

    def write(self, event: str, t: float | None = None, **fields: Any) -> None:
        """One line; `t` is now unless it is given."""
        at = time.monotonic() if t is None else t
        self._file.write(json.dumps({"event": event, "rank": self._rank, "t": at, **fields}) + "\n")


@dataclass(frozen=True)
class Options:
    """What both scripts are told; rank and addresses come from the launcher's environment."""

    steps: int
    seed: int
    log: str


def options(text: str | None) -> Options:
    """The command line of train.py and control.py; `text` is the program's description."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", default="/dev/stdout", help="where the JSON lines go")
    return Options(**vars(parser.parse_args()))


@contextmanager
def process_group() -> Iterator[None]:
    """The job's process group: gloo, from the launcher's MASTER_ADDR, RANK and so on."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", timeout=GROUP_TIMEOUT)
    try:
        yield
        dist.barrier()  # nobody leaves while somebody still reads from it
    finally:
        dist.destroy_process_group()


class Training:
    """Model, optimizer, schedule and data of one rank, and the step that moves them on."""

    def __init__(self, options: Options, log: Log) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        shape = Shape()
        torch.manual_seed(options.seed)  # the same weights on every rank, then sharded
        self.model: nn.Module = GPT(shape)
        mesh = init_device_mesh("cpu", (world_size,))
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: warmup_cosine(step, options.steps)
        )
        self.sampler = Sampler(
            corpus(),
            context=shape.context,
            batch=BATCH,
            rank=rank,
            world_size=world_size,
            seed=options.seed,
        )
        torch.manual_seed(options.seed * world_size + rank + 1)  # dropout differs from rank to rank
        self._log = log
        self._completed = 0

    def begin(self, step: int, **how: Any) -> None:
        """Says in the log that `step` steps are done already, and `how` their result came here."""
        self._completed = step
        self._log.write("begin", step=step, **how)

    def step(self) -> Tensor:
        """One optimizer step; returns this rank's loss, a scalar."""
        inputs, targets = next(self.sampler)
        scores = self.model(inputs)
        loss = F.cross_entropy(scores.view(-1, scores.shape[-1]), targets.reshape(-1))
        loss.backward()
        self.optimizer.step()
        self._completed += 1
        self._log.write("step", step=self._completed, loss=loss.item().hex(), value=loss.item())
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def digests(self) -> dict[str, str]:
        """SHA-256 of everything that training has changed, by part; equal means equal bits."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        optimizer = {
            f"{names[id(parameter)]}.{key}": value
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
        }
        return {
            "weights": _digest(dict(self.model.state_dict())),
            "optimizer": _digest(optimizer),
            "schedule": _digest(self.scheduler.state_dict() | {"lr_lambdas": None}),
            "data": _digest(self.sampler.state_dict()),
            "rng": _digest({"torch": torch.get_rng_state()}),
        }


def warmup_cosine(step: int, steps: int) -> float:
    """The learning rate's factor after `step` steps: up in WARMUP_STEPS, then half a cosine to 0.1."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = min(1.0, (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS))
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * progress))


def _digest(values: dict[str, Any]) -> str:
    """SHA-256 over names, dtypes, shapes and exact bytes of this rank's shards, sorted by name."""
    total = hashlib.sha256()
    for name in sorted(values):
        value = values[name]
        if isinstance(value, DTensor):
            value = value.to_local()
        if isinstance(value, Tensor):
            total.update(f"{name}:{value.dtype}:{tuple(value.shape)}:".encode())
            total.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        else:
            total.update(f"{name}={value!r};".encode())
    return total.hexdigest()
