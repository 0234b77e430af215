"""torchtitan's and Lightning's use of `ckptd://`, without them.

The calls are those that tools/peers/torchtitan_run.py and tools/peers/lightning_run.py recorded of the real
programs (torchtitan 0.3.0, Lightning 2.6.6).
"""

from __future__ import annotations

import io
import posixpath
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from dcpkit import one_process, same
from fsspec.core import url_to_fs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ckptd
from ckptd.errors import InvalidRequest, NoSpace, NotFound
from ckptd.integrations import drafts
from ckptd.integrations.fsspec_store import CkptdFileSystem
from ckptd.integrations.lightning import FabricSharded, Sharded
from ckptd.storage import catalog, place
from ckptd.storage.local_store import LocalStore


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CKPTD_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "store"


def left(store: Path) -> list[str]:
    return [path.name for path in store.rglob("*") if path.is_file()]


# torchtitan: a new file system for every call, a URL or what fsspec makes of it


def steps_found(folder: str) -> list[str]:
    files, path = url_to_fs(folder)
    assert files.exists(path) and files.isdir(path)
    found = [posixpath.basename(entry.rstrip("/")) for entry in files.ls(path, detail=False)]
    for name in found:
        files, path = url_to_fs(f"{folder}/{name}/.metadata")
        assert files.isfile(path)
        files, path = url_to_fs(f"{folder}/{name}/model.safetensors.index.json")
        assert not files.isfile(path)
    return found


def test_torchtitan_finds_loads_and_purges(store: Path) -> None:
    files, path = url_to_fs("ckptd://llama")
    assert not files.exists(path) and not files.isdir(path)
    for step in (5, 10, 15):
        with one_process():
            dcp.save({"w": torch.full((4,), float(step))}, checkpoint_id=f"ckptd://llama/step-{step}")
    assert steps_found("ckptd://llama") == ["step-5", "step-10", "step-15"]
    found = {"w": torch.zeros(4)}
    files, path = url_to_fs("ckptd://llama/step-15")
    assert files.isdir(path)
    with one_process():
        dcp.load(found, checkpoint_id="ckptd://llama/step-15")
    assert found["w"][0] == 15
    files, path = url_to_fs("ckptd://llama/step-5")
    files.rm(path, recursive=True)
    with pytest.raises(FileNotFoundError):  # which torchtitan takes for done
        url_to_fs("ckptd://llama/step-5")[0].rm(path, recursive=True)
    assert steps_found("ckptd://llama") == ["step-10", "step-15"]
    files, path = url_to_fs("ckptd://llama/step-5")
    assert not files.isdir(path)


# Lightning's one file, written in a transaction


def write(url: str, *contents: bytes) -> None:
    directory = posixpath.dirname(url)
    url_to_fs(url)[0].makedirs(directory, exist_ok=True)
    files, path = url_to_fs(url)
    job, before = path.split("/")[0], published(path)
    with files.transaction:
        for number, content in enumerate(contents):
            with files.open(path + str(number) * (number > 0), "wb") as file:
                file.write(content)
        assert published(job) == before, "a checkpoint is there before its transaction ends"


def published(path: str) -> list[catalog.Entry]:
    return list(catalog.entries(place.store_url(), path.split("/")[0]))


def test_a_transaction_is_a_whole_checkpoint(store: Path) -> None:
    write("ckptd://llama/step-4/model.ckpt", b"a" * 100_000)
    files, path = url_to_fs("ckptd://llama/step-4/model.ckpt")
    assert files.exists("ckptd://llama/step-4/model.ckpt")
    assert files.cat_file("ckptd://llama/latest/model.ckpt") == b"a" * 100_000
    with ckptd.open("ckptd://llama/step-4") as checkpoint:
        assert [each.name for each in checkpoint.manifest.objects] == ["model.ckpt"]
        assert checkpoint.verify() == []
    write("ckptd://llama/step-8/model.ckpt", b"b", b"c")
    names = ["llama/step-8/model.ckpt", "llama/step-8/model.ckpt1"]
    assert files.ls("llama/step-8", detail=False) == names
    # A callback that keeps the newest removes a checkpoint by the one file that it wrote.
    with pytest.raises(PermissionError):
        files.rm(path)
    files.rm(path, recursive=True)
    assert CkptdFileSystem().ls("llama", detail=False) == ["llama/step-8"]
    with pytest.raises(PermissionError):
        CkptdFileSystem().rm("llama/step-8/model.ckpt", recursive=True)  # it has two


def test_a_transaction_holds_its_own_files_alone() -> None:
    with CkptdFileSystem().open("llama/step-4/left-by-an-earlier-try", "wb") as file:
        file.write(b"x")
    write("ckptd://llama/step-4/model.ckpt", b"a")
    write("ckptd://llama/step-4/model.ckpt", b"b")  # again: the next generation
    files = CkptdFileSystem()
    assert files.ls("llama/step-4.g0", detail=False) == ["llama/step-4.g0/model.ckpt"]
    assert files.cat_file("llama/step-4/model.ckpt") == b"b"


def test_a_transaction_that_fails_leaves_nothing(store: Path) -> None:
    files = CkptdFileSystem()
    with pytest.raises(ZeroDivisionError), files.transaction:
        with files.open("llama/step-4/model.ckpt", "wb") as file:
            file.write(b"whole")
        files.open("llama/step-4/other.ckpt", "wb").write(b"half")
        raise ZeroDivisionError
    assert left(store) == []
    with files.open("llama/step-4/a", "wb") as file:  # the instance is usable, and not in a transaction
        file.write(b"x")
    assert not CkptdFileSystem().exists("llama/step-4")
    for step in (5, 6):
        with files.transaction:
            files.open(f"llama/step-{step}/a", "wb").write(b"x")  # its end closes the file
        assert CkptdFileSystem().cat_file(f"llama/step-{step}/a") == b"x"
    with pytest.raises(FileNotFoundError, match="nothing is published"), files.transaction:
        files.open("llama/step-7/a", "wb").discard()
    assert CkptdFileSystem().ls("llama", detail=False) == ["llama/step-5", "llama/step-6"]


def test_a_store_that_fails_at_the_end_of_a_transaction(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise NoSpace("the disk is full")

    monkeypatch.setattr(LocalStore, "put_if_absent", full)
    with pytest.raises(NoSpace):
        write("ckptd://llama/step-4/model.ckpt", b"a")
    assert not CkptdFileSystem().exists("llama/step-4")


def test_a_transaction_that_was_never_ended_leaves_nothing_to_the_next() -> None:
    system = CkptdFileSystem()
    system.start_transaction()
    with system.open("ckptd://job/step-1/a", "wb") as file:
        file.write(b"b was to come")
    system.start_transaction()
    with system.open("ckptd://job/step-2/c", "wb") as file:
        file.write(b"c")
    system.end_transaction()
    assert published("job") == [catalog.Entry(2, 0)]


def test_a_checkpoint_that_was_published_meanwhile_is_not_published_twice() -> None:
    system = CkptdFileSystem()
    with system.transaction:
        with system.open("ckptd://job/step-3/.metadata.tmp", "wb") as file:
            file.write(b"m")
        system.mv("ckptd://job/step-3/.metadata.tmp", "ckptd://job/step-3/.metadata")
    assert published("job") == [catalog.Entry(3, 0)]


def test_an_unclear_end_is_never_written_over(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system, publish = CkptdFileSystem(), drafts.publish

    def unclear(*arguments: Any) -> None:
        publish(*arguments)
        raise NotFound("the answer was lost")

    def save(data: bytes) -> None:
        with system.transaction, system.open("ckptd://job/step-1.g0/f", "wb") as file:
            file.write(data)

    monkeypatch.setattr(drafts, "publish", unclear)
    with pytest.raises(FileNotFoundError):
        save(b"one")
    monkeypatch.undo()
    monkeypatch.setenv("CKPTD_STORE", str(store))
    with pytest.raises(FileExistsError):
        save(b"two")
    assert CkptdFileSystem().cat("ckptd://job/step-1/f") == b"one"


def test_removing_one_file_removes_no_other_generation() -> None:
    system = CkptdFileSystem()
    for generation, names in ((1, "xy"), (2, "x")):
        with system.transaction:
            for name in names:
                with system.open(f"ckptd://job/step-5.g{generation}/{name}", "wb") as file:
                    file.write(b"1")
    system.rm("ckptd://job/step-5/x", recursive=True)
    assert CkptdFileSystem().cat("ckptd://job/step-5/y") == b"1"
    assert published("job") == [catalog.Entry(5, 1)]
    with pytest.raises(PermissionError):
        CkptdFileSystem().rm("ckptd://job/step-5/y", recursive=True)


def test_what_lightning_names_by_default_is_refused(store: Path) -> None:
    for url in ("ckptd://llama/epoch=0-step=8.ckpt", "ckptd://llama/step-8", "ckptd://llama/step-8.ckpt"):
        with pytest.raises(InvalidRequest, match="expected ckptd://JOB/step-N"):
            write(url, b"a")
    assert left(store) == []


# Lightning's shards


class TorchCheckpointIO:
    """Lightning's own, as far as it is used."""

    def load_checkpoint(
        self, path: str, map_location: Any = None, weights_only: Any = None
    ) -> dict[str, Any]:
        files, _ = url_to_fs(path)
        if not files.exists(path):
            raise FileNotFoundError(path)
        with files.open(path, "rb") as file:
            found: dict[str, Any] = torch.load(io.BytesIO(file.read()), weights_only=weights_only)
        return found


class ModelParallelStrategy:
    """What the classes of ckptd find in Lightning's: the same names, and what is passed on to it."""

    def __init__(self, model: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        self.model, self.optimizers = model, list(optimizers)
        self.lightning_module = types.SimpleNamespace(strict_loading=True)
        self._save_distributed_checkpoint = True
        self.passed: list[Any] = []

    def broadcast(self, value: Any) -> Any:
        return value

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.passed.append(("save", args))

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.passed.append(("load", args))
        return {}


class Trainers(Sharded, ModelParallelStrategy):  # type: ignore[misc]
    checkpoint_io = TorchCheckpointIO()


class Fabrics(FabricSharded, ModelParallelStrategy):  # type: ignore[misc]
    pass


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        dist.destroy_process_group()


def trained(seed: int, steps: int = 2, lr: float = 0.1) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    train(model, optimizer, steps)
    return model, optimizer


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> dict[str, Any]:
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((2, 5), float(step + 1))).square().mean().backward()
        optimizer.step()
    return {name: each.full_tensor() for name, each in model.state_dict().items()}


def of_lightning(model: torch.nn.Module, optimizer: torch.optim.Optimizer, **rest: Any) -> dict[str, Any]:
    states = dcp.state_dict.get_state_dict(model, optimizer)
    return {"state_dict": states[0], "optimizer_states": [states[1]], **rest}


@pytest.mark.usefixtures("group")
def test_a_trainers_shards(store: Path) -> None:
    model, optimizer = trained(1)
    strategy = Trainers(model, optimizer)
    strategy.save_checkpoint(of_lightning(model, optimizer, epoch=3), "ckptd://llama/step-7")
    with ckptd.open("ckptd://llama/step-7") as checkpoint:
        names = [each.name for each in checkpoint.manifest.objects]
        assert names == [".metadata", "__0_0.distcp", "meta.pt"]
        assert checkpoint.verify() == []
    other, fresh = trained(2, steps=0, lr=0.5)
    assert Trainers(other, fresh).load_checkpoint("ckptd://llama/latest", weights_only=True) == {"epoch": 3}
    assert same(train(other, fresh, 3), train(model, optimizer, 3))
    assert not Path("ckptd:").exists() and strategy.passed == []


@pytest.mark.usefixtures("group")
def test_fabrics_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("lightning_twin.plugins")
    package.TorchCheckpointIO = TorchCheckpointIO  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightning_twin", types.ModuleType("lightning_twin"))
    monkeypatch.setitem(sys.modules, "lightning_twin.plugins", package)
    where = "lightning_twin.strategies.model_parallel"
    monkeypatch.setattr(ModelParallelStrategy.load_checkpoint, "__module__", where)
    model, optimizer = trained(1)
    saved = {"model": model, "optimizer": optimizer, "step": 3, "more": [1]}
    Fabrics(model).save_checkpoint("ckptd://llama/step-3", saved)
    other, fresh = trained(2, steps=0, lr=0.5)
    state = {"model": other, "optimizer": fresh, "step": 0}
    assert Fabrics(other).load_checkpoint("ckptd://llama/step-3", state) == {"more": [1]}
    assert state["step"] == 3
    assert same(train(other, fresh, 3), train(model, optimizer, 3))
    with pytest.raises(InvalidRequest, match="has no absent"):
        Fabrics(other).load_checkpoint("ckptd://llama/step-3", state | {"absent": 0})
    with pytest.raises(InvalidRequest, match="give state"):
        Fabrics(other).load_checkpoint("ckptd://llama/step-3")
    with pytest.raises(InvalidRequest, match="filter"):
        Fabrics(model).save_checkpoint("ckptd://llama/step-4", saved, filter={})
    with pytest.raises(InvalidRequest, match="one model"):
        Fabrics(model).save_checkpoint("ckptd://llama/step-4", {"a": model, "b": other})


@pytest.mark.usefixtures("group")
def test_shards_without_the_rest_are_no_checkpoint() -> None:
    class Unsaveable:
        def __reduce__(self) -> Any:
            raise RuntimeError("no")

    model, optimizer = trained(1)
    state = of_lightning(model, optimizer, bad=Unsaveable())
    with pytest.raises(dcp.CheckpointException):
        Trainers(model, optimizer).save_checkpoint(state, "ckptd://llama/step-7")
    assert not CkptdFileSystem().exists("ckptd://llama/step-7")


def test_other_paths_go_to_lightning() -> None:
    strategy = Trainers(torch.nn.Linear(1, 1))
    strategy.save_checkpoint({"state_dict": {}}, "/somewhere/step-7")
    strategy.load_checkpoint("/somewhere/step-7")
    other = Fabrics(torch.nn.Linear(1, 1))
    other.save_checkpoint("/somewhere/step-7", {})
    other.load_checkpoint("/somewhere/step-7", {})
    assert [each[0] for each in strategy.passed + other.passed] == ["save", "load", "save", "load"]


def test_one_file_of_all_shards_is_refused() -> None:
    strategy = Trainers(torch.nn.Linear(1, 1))
    with pytest.raises(InvalidRequest, match="storage_options"):
        strategy.save_checkpoint({"state_dict": {}}, "ckptd://llama/step-7", storage_options={})
    strategy._save_distributed_checkpoint = False
    with pytest.raises(InvalidRequest, match="save_distributed_checkpoint=False"):
        strategy.save_checkpoint({"state_dict": {}}, "ckptd://llama/step-7")
