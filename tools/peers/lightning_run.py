"""Runs Lightning's own Trainer and Fabric on `ckptd://`; prints JSON of what was tried and what came of it.

    python tools/peers/lightning_run.py

Needs Lightning, which the project does not install.  All runs are on CPUs: in one process, and in two with
gloo, which this file starts itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.fabric import strategies as fabric_strategies
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import ckptd
from ckptd.integrations.fsspec_store import CkptdFileSystem
from ckptd.integrations.lightning import FabricSharded, Sharded

CALLS = ("info", "ls", "makedirs", "mkdir", "_open", "mv", "rm", "rm_file")


class Strategy(Sharded, ModelParallelStrategy):  # type: ignore[misc]
    """As the docs say."""


class FabricStrategy(FabricSharded, fabric_strategies.ModelParallelStrategy):  # type: ignore[misc]
    """As the docs say."""


class Model(LightningModule):  # type: ignore[misc]
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = torch.nn.Sequential(torch.nn.Linear(16, 33), torch.nn.Tanh(), torch.nn.Linear(33, 4))

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            fully_shard(self.layers, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        loss = self.layers(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    def weights(self) -> list[torch.Tensor]:
        found = [each.detach() for each in self.parameters()]
        return [each.full_tensor() if hasattr(each, "full_tensor") else each.clone() for each in found]


def data() -> DataLoader[Any]:
    numbers = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(numbers), batch_size=8)


def fit(seed: int, epochs: int, *, path: str | None = None, **options: Any) -> tuple[Trainer, Model]:
    callbacks = options.pop("callbacks", None)
    trainer = Trainer(
        accelerator="cpu",
        devices=_world(),
        max_epochs=epochs,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=callbacks is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        strategy=options.pop("strategy", lambda: "auto")(),
        **options,
    )
    model = Model(seed)
    trainer.fit(model, data(), ckpt_path=path)
    return trainer, model


def resumes(save_to: str, **options: Any) -> None:
    """One epoch, saved and taken up by other objects for a second one, against two without a stop."""
    first, _ = fit(1, 1, **options)
    first.save_checkpoint(save_to)
    second, resumed = fit(2, 2, path=save_to, **options)
    assert second.global_step == 16, second.global_step
    _, whole = fit(1, 2, **options)
    _same(resumed.weights(), whole.weights())


def keeps_the_best(pattern: str, extension: str, path: str, left: list[str], **options: Any) -> None:
    """A checkpoint every four steps, of which the two newest stay; then the newest is taken up."""
    job = path.split("/")[2]
    keep = ModelCheckpoint(
        dirpath=f"ckptd://{job}",
        filename=pattern,
        auto_insert_metric_name=False,
        enable_version_counter=False,
        every_n_train_steps=4,
        monitor="step",
        mode="max",
        save_top_k=2,
    )
    keep.FILE_EXTENSION = extension
    _, model = fit(1, 2, callbacks=[keep], **options)
    found = sorted(CkptdFileSystem().ls(f"ckptd://{job}", detail=False))
    assert found == left, found
    trainer, resumed = fit(2, 2, path=path, **options)
    assert trainer.global_step == 16
    _same(resumed.weights(), model.weights())


def a_file_of_one_process() -> str:
    resumes("ckptd://one/step-8/model.ckpt")
    with ckptd.open("ckptd://one/step-8") as checkpoint:
        assert checkpoint.verify() == []
    return "ckptd://one/step-8/model.ckpt is saved and resumed from; digests are right"


def a_file_without_its_name() -> str:
    resumes("ckptd://bare/step-8")
    return "saved"


def callback_of_one_process() -> str:
    left = ["kept/step-12", "kept/step-16"]
    keeps_the_best("step-{step}/model", ".ckpt", "ckptd://kept/latest/model.ckpt", left)
    return f"ModelCheckpoint left {left}; latest/model.ckpt is resumed from"


def callback_as_it_is() -> str:
    fit(1, 1, callbacks=[ModelCheckpoint(dirpath="ckptd://plain")])
    return "saved"


def callback_with_save_last() -> str:
    keep = ModelCheckpoint(
        dirpath="ckptd://last",
        filename="step-{step}/model",
        auto_insert_metric_name=False,
        save_last=True,
    )
    fit(1, 1, callbacks=[keep])
    return "saved"


def fabric_of_one_process() -> str:
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = torch.nn.Linear(16, 4)
    fabric.save("ckptd://fabric1/step-3/model.ckpt", {"model": model, "step": 3})
    other = torch.nn.Linear(16, 4)
    state = {"model": other, "step": 0}
    fabric.load("ckptd://fabric1/step-3/model.ckpt", state)
    assert state["step"] == 3
    _same(list(other.parameters()), list(model.parameters()))
    return "fabric.save, fabric.load of one file"


def ddp() -> str:
    resumes("ckptd://ddp/step-8/model.ckpt", strategy=lambda: "ddp")
    return "saved and resumed from"


def sharded() -> str:
    resumes("ckptd://sharded/step-7", strategy=lambda: Strategy(2, 1))
    with ckptd.open("ckptd://sharded/step-7") as checkpoint:
        files = sorted(each.name for each in checkpoint.manifest.objects)
        assert checkpoint.verify() == []
    return f"save_checkpoint and ckpt_path; files: {', '.join(files)}"


def sharded_callback() -> str:
    left = ["topk/step-12", "topk/step-16"]
    keeps_the_best("step-{step}", "", "ckptd://topk/latest", left, strategy=lambda: Strategy(2, 1))
    return f"ModelCheckpoint left {left}; ckptd://topk/latest is resumed from"


def sharded_copied_out() -> str:
    """The files, copied to a folder, are a checkpoint of Lightning's own strategy."""
    folder = _shared(tempfile.mkdtemp(prefix="copied-", dir=Path.cwd()) if _rank() == 0 else "")
    trainer, model = fit(1, 1, strategy=lambda: Strategy(2, 1))
    trainer.save_checkpoint("ckptd://copied/step-8")
    if _rank() == 0:
        CkptdFileSystem().get("ckptd://copied/step-8/", folder, recursive=True)
    dist.barrier()
    _, found = fit(2, 1, path=folder, strategy=lambda: ModelParallelStrategy(2, 1))
    _same(found.weights(), model.weights())
    return "fs.get of the directory is resumed from by ModelParallelStrategy itself"


def sharded_elsewhere() -> str:
    folder = _shared(tempfile.mkdtemp(prefix="local-", dir=Path.cwd()) if _rank() == 0 else "")
    resumes(f"{folder}/step-8", strategy=lambda: Strategy(2, 1))
    return "other paths go to Lightning as before"


def sharded_in_one_file() -> str:
    trainer, _ = fit(1, 1, strategy=lambda: Strategy(2, 1, save_distributed_checkpoint=False))
    trainer.save_checkpoint("ckptd://single/step-8")
    return "saved"


def sharded_without_ours() -> str:
    resumes("ckptd://lost/step-7", strategy=lambda: ModelParallelStrategy(2, 1))
    there = CkptdFileSystem().exists("ckptd://lost/step-7")
    folders = sorted(path.name for path in Path.cwd().iterdir() if path.name.startswith("ckptd"))
    assert there, f"no error, and nothing in the store; in the working directory: {folders}"
    return "saved"


def fabric_sharded() -> str:
    def start(seed: int) -> tuple[Any, dict[str, Any]]:
        fabric = lightning.Fabric(
            accelerator="cpu",
            devices=2,
            strategy=FabricStrategy(
                lambda module, mesh: fully_shard(module, mesh=mesh["data_parallel"]), 2, 1
            ),
        )
        fabric.launch()
        torch.manual_seed(seed)
        model = fabric.setup(torch.nn.Linear(16, 5))
        optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=0.01))
        return fabric, {"model": model, "optimizer": optimizer, "step": seed}

    def train(fabric: Any, state: dict[str, Any]) -> list[torch.Tensor]:
        for seed in range(3):
            batch = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
            state["optimizer"].zero_grad()
            fabric.backward(state["model"](batch).square().mean())
            state["optimizer"].step()
        return [each.full_tensor().detach().clone() for each in state["model"].parameters()]

    fabric, saved = start(1)
    train(fabric, saved)
    fabric.save("ckptd://fabric2/step-3", saved)
    other, loaded = start(2)
    assert other.load("ckptd://fabric2/step-3", loaded) == {} and loaded["step"] == 1
    _same(train(other, loaded), train(fabric, saved))
    return "fabric.save, fabric.load; training goes on as without a stop"


def fsdp() -> str:
    fit(1, 1, strategy=lambda: "fsdp")
    return "ran"


ONE: tuple[Callable[[], str], ...] = (
    a_file_of_one_process,
    a_file_without_its_name,
    callback_of_one_process,
    callback_as_it_is,
    callback_with_save_last,
    fabric_of_one_process,
)
TWO: tuple[Callable[[], str], ...] = (
    ddp,
    sharded,
    sharded_callback,
    sharded_copied_out,
    sharded_elsewhere,
    sharded_in_one_file,
    sharded_without_ours,
    fabric_sharded,
    fsdp,
)


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _shared(folder: str) -> str:
    if not dist.is_initialized():
        dist.init_process_group("gloo")  # Lightning takes the one that is there
    told = [folder]
    dist.broadcast_object_list(told)
    return told[0]


def _same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


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


def run(cases: tuple[Callable[[], str], ...]) -> list[dict[str, Any]]:
    calls: list[list[str]] = []
    _record(calls)
    only = os.environ.get("ONLY", "").split()
    results = []
    for case in cases:
        if not only or case.__name__ in only:
            results.append(_tried(case) | {"processes": _world(), "calls": list(calls)})
            calls.clear()
    return results


def main() -> None:
    warnings.simplefilter("ignore")
    if "RANK" in os.environ:
        found = run(TWO)
        if _rank() == 0:
            Path(os.environ["RESULTS"]).write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory(prefix="ckptd-lightning-") as folder:
        os.environ["CKPTD_STORE"] = f"{folder}/store"
        os.environ["RESULTS"] = f"{folder}/results.json"
        os.chdir(folder)
        results = run(ONE)
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(HERE)]
        subprocess.run(launch, check=True, stdout=sys.stderr)
        results += json.loads(Path(os.environ["RESULTS"]).read_text())
        versions = {name: version(name) for name in ("lightning", "torch", "fsspec", "ckptd")}
        print(json.dumps({"versions": versions, "device": "cpu", "results": results}, indent=1))


HERE = Path(__file__).resolve()

if __name__ == "__main__":
    main()
