"""Forks the ranks of an FSDP2 job; rank 0 says what it found as JSON.  Started by test_dcp_ranks.py.

    dcp_worker.py DIRECTORY WORLD_SIZE

World size 2 trains and saves in every form; world size 4 loads all of that, trains on, saves again, and its
first two ranks load that as a job of two.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from xxhash import xxh3_128_hexdigest

import ckptd
from ckptd.integrations.dcp import Reader, Writer

STEPS = 3


class Job:
    """A model with uneven and empty shards, Adam's moments, and a scheduler, on the ranks of a group."""

    def __init__(self, ranks: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.group = dist.group.WORLD if ranks == dist.get_world_size() else dist.new_group(range(ranks))
        self.inside = dist.get_rank() < ranks
        if not self.inside:
            return
        mesh = DeviceMesh.from_group(self.group, "cpu")
        block = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 9))
        self.model = nn.Sequential(nn.Linear(6, 7), block, nn.Linear(9, 1))
        fully_shard(self.model[1], mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(torch.randn(4, 6)).pow(2).mean().backward()
            self.optimizer.step()
            self.scheduler.step()

    def state(self) -> dict[str, Any]:
        """What a trainer gives to DCP; the optimizer has state, so that nothing is stepped for it."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        scheduler = self.scheduler.state_dict()
        return {"model": model, "optim": optimizer, "scheduler": scheduler, "step": self.scheduler.last_epoch}

    def give(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
        )
        self.scheduler.load_state_dict(state["scheduler"])

    def prints(self) -> dict[str, str]:
        """Digests of the whole tensors, and everything else as text, by name."""
        found: dict[str, str] = {}

        def walk(name: str, value: Any) -> None:
            if isinstance(value, dict):
                for key, item in sorted(value.items()):
                    walk(f"{name}.{key}", item)
            elif isinstance(value, torch.Tensor):
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                found[name] = (
                    f"{whole.dtype} {list(whole.shape)} {xxh3_128_hexdigest(whole.numpy().tobytes())}"
                )
            else:
                found[name] = repr(value)

        walk("", self.state())
        return found


def save_all(job: Job, where: Path, step: int) -> None:
    """Saves in universal form, in DCP's form, and by ckptd itself."""
    dcp.save(job.state(), storage_writer=Writer(f"ckptd://universal/step-{step}"), process_group=job.group)
    dcp.save(job.state(), checkpoint_id=f"ckptd://dcp/step-{step}", process_group=job.group)
    ckptd.save(str(where / f"own-{step}"), job.state(), group=job.group)


def load_all(ranks: int, where: Path, step: int) -> list[dict[str, str]]:
    """Loads each of them into a job of another seed; returns what the job then holds."""

    def universal(state: dict[str, Any], group: Any) -> None:
        dcp.load(state, storage_reader=Reader(f"ckptd://universal/step-{step}"), process_group=group)

    def verbatim(state: dict[str, Any], group: Any) -> None:
        dcp.load(state, checkpoint_id=f"ckptd://dcp/step-{step}", process_group=group)

    def own(state: dict[str, Any], group: Any) -> None:
        dcp.load(state, storage_reader=Reader(where / f"own-{step}"), process_group=group)

    def by_ckptd(state: dict[str, Any], group: Any) -> None:
        ckptd.load(f"ckptd://universal/step-{step}", into=state)

    found = []
    for seed, load in enumerate((universal, verbatim, own, by_ckptd)):
        job = Job(ranks, 50 + seed)
        if job.inside:
            job.train(1)
            state = job.state()
            load(state, job.group)
            job.give(state)
            found.append(job.prints())
    return found


def main(where: Path) -> dict[str, Any]:
    job = Job(2, 1) if dist.get_world_size() == 2 else Job(4, 2)
    job.train(STEPS)
    if dist.get_world_size() == 2:
        save_all(job, where, 3)
        return {"saved": job.prints(), "at 2": load_all(2, where, 3)}
    loaded = load_all(4, where, 3)
    save_all(job, where, 4)
    return {"saved": job.prints(), "at 4": loaded, "at 2": load_all(2, where, 4)}


def run(rank: int, where: Path, world_size: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{where}/meeting-{world_size}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    found = main(where)
    if rank == 0:
        (where / f"found-{world_size}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    directory, size = Path(sys.argv[1]), int(sys.argv[2])
    children = []
    for number in range(size):
        child = os.fork()  # torch is imported once; no thread runs yet
        if child == 0:
            status = 1
            try:
                run(number, directory, size)
                status = 0
            except BaseException:  # noqa: BLE001  # the process's top frame
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))
