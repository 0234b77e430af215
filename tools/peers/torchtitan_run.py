"""Runs torchtitan's own CheckpointManager on `ckptd://`; prints JSON of what was tried and what came of it.

    python -m torch.distributed.run --nproc-per-node 2 tools/peers/torchtitan_run.py

Needs torchtitan and its dependencies, which the project does not install.  It runs on CPUs with gloo: the
manager, its optimizer and scheduler containers and its data loader are torchtitan's; the model and the loop
are small ones of this file, since torchtitan's trainer needs an accelerator.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.tools import filesystem
from torchtitan.tools.utils import device_type

from ckptd.integrations.fsspec_store import CkptdFileSystem

CALLS = ("info", "ls", "makedirs", "mkdir", "_open", "mv", "rm", "rm_file")
DEADLINE_S = 60.0


class Numbers(torch.utils.data.IterableDataset[torch.Tensor]):
    """An endless data set that knows where it is."""

    def __init__(self, rank: int) -> None:
        self.rank, self.at = rank, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            self.at += 1
            yield torch.randn(16, generator=torch.Generator().manual_seed(1000 * self.rank + self.at))

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Training:
    """What torchtitan's trainer gives its manager; it is `train_state`, as the trainer is."""

    def __init__(self, seed: int, folder: str = "ckptd://llama", **options: Any) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(16, 33), torch.nn.Tanh(), torch.nn.Linear(33, 4))
        fully_shard(self.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        optimizer = default_adamw(lr=0.01)
        optimizer.implementation = "for-loop"
        self.optimizers: Any = optimizer.build(model_parts=[self.model])
        schedule = LRSchedulersContainer.Config(warmup_steps=2)
        self.schedulers = schedule.build(optimizers=self.optimizers, training_steps=40)
        rank = dist.get_rank()
        self.data = ParallelAwareDataloader(Numbers(rank), rank, dist.get_world_size(), batch_size=8)
        self.step = 0
        self.manager: Any = CheckpointManager.Config(
            enable=True, folder=folder, interval=5, keep_latest_k=options.pop("keep_latest_k", 0), **options
        ).build(
            dataloader=self.data,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.schedulers,
            states={"train_state": self},
            sd_adapter=None,
            base_folder="./outputs",
        )

    def state_dict(self) -> dict[str, Any]:
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])

    def run(self, until: int, last: bool = False) -> None:
        batches = iter(self.data)
        while self.step < until:
            self.step += 1
            self.manager.maybe_wait_for_staging()
            self.optimizers.zero_grad()
            self.model(next(batches)).square().mean().backward()
            self.optimizers.step()
            self.schedulers.step()
            self.manager.save(self.step, last_step=last and self.step == until)
        self.manager.maybe_wait_for_saving()

    def weights(self) -> list[torch.Tensor]:
        return [parameter.full_tensor().detach().clone() for parameter in self.model.parameters()]  # type: ignore[attr-defined]

    def close(self) -> None:
        self.manager.close()


def saves_and_resumes() -> str:
    """Ten steps, and ten more by a new process's objects, against twenty without a stop."""
    whole = Training(1, enable_first_step_checkpoint=True)
    whole.run(10)
    at_ten = whole.weights()
    resumed = Training(2)
    assert resumed.manager.load(step=-1) and resumed.step == 10
    _same(resumed.weights(), at_ten)
    whole.run(13)
    resumed.run(13)
    _same(resumed.weights(), whole.weights())
    older = Training(3)
    assert older.manager.load(step=5) and older.step == 5
    for each in (whole, resumed, older):
        each.close()
    return f"resumed at 10 of {_steps('ckptd://llama')}; the weights of step 13 are those of an unbroken run"


def purges() -> str:
    run = Training(1, folder="ckptd://purged", keep_latest_k=2)
    run.run(20)
    # The manager looks for old ones as soon as a save is done, and removes them in a thread.
    _until(lambda: _steps("ckptd://purged") == [15, 20])
    run.close()
    return "keep_latest_k=2 left steps 15, 20 of 5, 10, 15, 20"


def saves_while_training_goes_on() -> str:
    run = Training(1, folder="ckptd://async", async_mode="async")
    run.run(10)
    found = Training(2, folder="ckptd://async", async_mode="async")
    assert found.manager.load() and found.step == 10
    _same(found.weights(), run.weights())
    run.close()
    found.close()
    return "async_mode=async: step 10 loaded"


def saves_from_a_process() -> str:
    """What async_with_pinned_mem calls, but with memory that is not pinned."""
    run = Training(1, folder="ckptd://process")
    run.run(5)
    dcp.async_save(
        run.manager._flattened_model_states_sd(),
        checkpoint_id="ckptd://process/step-6",
        process_group=dist.new_group(backend="gloo"),
        async_checkpointer_type=AsyncCheckpointerType.PROCESS,
    ).result(DEADLINE_S)
    assert _steps("ckptd://process") == [5, 6]
    found = Training(2, folder="ckptd://process")
    assert found.manager.load(step=6)
    _same(found.weights(), run.weights())
    run.close()
    found.close()
    return "async_save in a process of its own; the manager loads it"


def saves_from_pinned_memory() -> str:
    run = Training(1, folder="ckptd://pinned", async_mode="async_with_pinned_mem")
    try:
        run.run(5)
    finally:
        run.close()
    return f"async_mode=async_with_pinned_mem: {_steps('ckptd://pinned')}"


def writes_the_last_step() -> str:
    run = Training(1, folder="ckptd://last")
    run.run(7, last=True)
    start = Training(2, folder="ckptd://tuned", initial_load_path="ckptd://last/step-7")
    assert start.manager.load() and start.step == 0  # the model only
    _same(start.weights(), run.weights())
    run.close()
    start.close()
    return "the last step holds the model only; initial_load_path=ckptd://last/step-7 loads it"


def starts_fresh() -> str:
    run = Training(1, folder="ckptd://nothing")
    assert run.manager.load() is False
    try:
        run.manager.load(step=3)
    except FileNotFoundError as error:
        return f"load() of an empty job is False; load(step=3) raises {type(error).__name__}"
    finally:
        run.close()
    raise AssertionError("load(step=3) of an empty job did not raise")


def exports_to_hugging_face() -> str:
    CheckpointManager.Config(enable=True, folder="ckptd://export", last_save_in_hf=True)
    return "accepted"


def takes_a_folder_inside_a_job() -> str:
    run = Training(1, folder="ckptd://deep/runs/a")
    try:
        run.run(5)
    finally:
        run.close()
    return f"{_steps('ckptd://deep/runs/a')}"


CASES: tuple[Callable[[], str], ...] = (
    saves_and_resumes,
    purges,
    saves_while_training_goes_on,
    writes_the_last_step,
    starts_fresh,
    exports_to_hugging_face,
    takes_a_folder_inside_a_job,
    saves_from_a_process,
    saves_from_pinned_memory,
)


def _same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _steps(folder: str) -> list[int]:
    names = filesystem.listdir(folder) if filesystem.isdir(folder) else []
    return sorted(int(name.removeprefix("step-")) for name in names)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)
    dist.barrier()


def _record(calls: list[list[str]]) -> None:
    """Makes a list of the calls that reach our file system, in order."""

    def recorded(name: str, method: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append([name, *(str(each) for each in args), *(f"{k}={v}" for k, v in kwargs.items())])
            return method(self, *args, **kwargs)

        return call

    for name in CALLS:
        setattr(CkptdFileSystem, name, recorded(name, getattr(CkptdFileSystem, name)))


def _tried(case: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"case": case.__name__, "works": True, "outcome": case()}
    except (Exception, dcp.CheckpointException) as error:  # noqa: BLE001  # the outcome is the result
        traceback.print_exc()
        why = str(error).strip().splitlines() or [""]
        return {"case": case.__name__, "works": False, "outcome": f"{type(error).__name__}: {why[-1]}"}


def main() -> None:
    dist.init_process_group("gloo")
    where: list[Any] = [tempfile.mkdtemp(prefix="ckptd-torchtitan-") if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(where)
    os.environ["CKPTD_STORE"] = where[0]
    calls: list[list[str]] = []
    _record(calls)
    only = os.environ.get("ONLY", "").split()
    results = []
    for case in CASES:
        if not only or case.__name__ in only:
            results.append(_tried(case) | {"calls": list(calls)})
            calls.clear()
            dist.barrier()
    if dist.get_rank() == 0:
        versions = {name: version(name) for name in ("torchtitan", "torch", "fsspec", "ckptd")}
        left = sorted(
            path.name for path in Path.cwd().iterdir() if path.name.startswith(("ckptd:", "outputs"))
        )
        print(
            json.dumps(
                {
                    "versions": versions,
                    "processes": dist.get_world_size(),
                    "device": "cpu",
                    "device_type_of_torchtitan": device_type,
                    "left_in_working_directory": left,
                    "results": results,
                },
                indent=1,
            )
        )
        shutil.rmtree(where[0])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
