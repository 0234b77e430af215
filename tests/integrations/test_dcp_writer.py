"""Writer: what torch.distributed.checkpoint saves in universal form."""

from __future__ import annotations

import io
import pickletools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from dcpkit import blank, one_process, same, state
from safetensors.torch import load_file
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

import ckptd
from ckptd.errors import InvalidRequest, UnsafeObject
from ckptd.integrations.dcp import Reader, Writer
from ckptd.storage.reading import open_checkpoint
from ckptd.storage.store import AlreadyThere


def save(url: object, what: dict[str, Any], **options: Any) -> Writer:
    writer = Writer(str(url))
    with one_process():
        dcp.save(what, storage_writer=writer, **options)
    return writer


def error_of(call: Any, *args: Any, **options: Any) -> BaseException:
    """The error of one rank, which DCP wraps."""
    with pytest.raises((dcp.CheckpointException, ckptd.CkptdError)) as caught:
        call(*args, **options)
    wrapped = caught.value
    return wrapped.failures[0][0] if isinstance(wrapped, dcp.CheckpointException) else wrapped


def test_the_state_comes_back_through_every_door(tmp_path: Path) -> None:
    saved = state(7)
    save(tmp_path / "c", saved)
    loads: list[Any] = [
        lambda into: dcp.load(into, storage_reader=Reader(tmp_path / "c")),
        lambda into: ckptd.load(str(tmp_path / "c"), into=into),
    ]
    for load in loads:
        found = blank(saved)
        with one_process():
            load(found)
        assert same(found, saved)
    with ckptd.open(str(tmp_path / "c")) as checkpoint:
        assert same(checkpoint["model.large"][3:200, 7], saved["model"]["large"][3:200, 7])
        assert checkpoint.verify() == []


def test_files_are_safetensors_and_json_and_no_pickle(tmp_path: Path) -> None:
    saved = state(8)
    save(tmp_path / "c", saved)
    files = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert [f for f in files if not f.endswith(".digests")] == [
        "manifest.json", "rank-00000.safetensors", "rank-00001.safetensors",
    ]  # fmt: skip
    stock = load_file(tmp_path / "c" / "rank-00000.safetensors")
    assert same(stock["model.transposed"], saved["model"]["transposed"].contiguous())
    for name in files:
        content = (tmp_path / "c" / name).read_bytes()
        with pytest.raises(ValueError):  # not even the beginning of one
            for _ in pickletools.genops(content):
                pass


def test_the_url_says_job_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTD_STORE", str(tmp_path))
    writer = save("ckptd://llama/step-7", {"w": torch.ones(2)})
    assert writer.manifest is not None
    assert (writer.manifest.job, writer.manifest.step, writer.manifest.generation) == ("llama", 7, 0)
    again = save("ckptd://llama/step-7", {"w": torch.zeros(2)})  # going back to step 7 starts a new line
    assert again.manifest is not None and again.manifest.generation == 1
    assert isinstance(error_of(save, "ckptd://llama/step-7.g1", {"w": torch.ones(2)}), AlreadyThere)
    assert isinstance(error_of(save, "ckptd://llama", {"w": torch.ones(2)}), InvalidRequest)
    with ckptd.open("ckptd://llama/step-7") as newest:
        assert newest["w"][0] == 0
    with one_process():  # the other way to say where
        dcp.save({"w": torch.ones(2)}, storage_writer=Writer(), checkpoint_id="ckptd://llama/step-8")
    latest = open_checkpoint("ckptd://llama/latest").manifest
    assert (latest.step, latest.generation, latest.parent) == (8, 1, (1, 7))


def test_what_has_no_safe_form_is_named(tmp_path: Path) -> None:
    error = error_of(save, tmp_path / "a", {"model": {"w": torch.ones(2)}, "hook": {"call": [print]}})
    assert isinstance(error, UnsafeObject) and "hook.call" in str(error)
    error = error_of(save, tmp_path / "b", {"sparse": torch.eye(3).to_sparse()})
    assert isinstance(error, UnsafeObject) and "sparse" in str(error)
    error = error_of(save, tmp_path / "c", {"pair": (torch.ones(2), 1)})
    assert isinstance(error, UnsafeObject) and "pair" in str(error)
    assert not list(tmp_path.rglob("manifest.json"))


class Bare(SavePlanner):
    """A planner of its own kind: it has what the interface asks for, and gives objects as pickles."""

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self.inner = DefaultSavePlanner()
        self.inner.set_up_planner(state_dict, storage_meta, is_coordinator)

    def create_local_plan(self) -> SavePlan:
        return self.inner.create_local_plan()

    def create_global_plan(self, all_plans: list[SavePlan]) -> Any:
        return self.inner.create_global_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return self.inner.finish_plan(new_plan)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        return self.inner.resolve_data(write_item)


def test_a_planner_without_look_up(tmp_path: Path) -> None:
    error = error_of(save, tmp_path / "a", {"w": torch.ones(2), "epoch": 3}, planner=Bare())
    assert isinstance(error, InvalidRequest)
    assert "the item epoch" in str(error) and "lookup_object" in str(error)
    save(tmp_path / "b", {"w": torch.ones(2)}, planner=Bare())  # tensors need none
    assert open_checkpoint(str(tmp_path / "b")).names == ["w"]


class Halves(DefaultSavePlanner):
    """Splits a tensor into two chunks of its own, and may give another dtype than it planned."""

    planned = torch.float16

    def create_local_plan(self) -> SavePlan:
        size = torch.Size((5, 4))

        def item(begin: int, rows: int) -> WriteItem:
            chunk = ChunkStorageMetadata(torch.Size((begin, 0)), torch.Size((rows, 4)))
            data = TensorWriteData(chunk, TensorProperties(dtype=self.planned), size)
            return WriteItem(MetadataIndex("w", chunk.offsets), WriteItemType.SHARD, tensor_data=data)

        self.plan = SavePlan([item(0, 2), item(2, 3), item(5, 0)], planner_data={"w": ("w",)})
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        assert write_item.tensor_data is not None
        begin, rows = write_item.tensor_data.chunk.offsets[0], write_item.tensor_data.chunk.sizes[0]
        whole: torch.Tensor = self.state_dict["w"]
        return whole[begin : begin + rows].to(torch.float16)


class Liar(Halves):
    planned = torch.float32


def test_planners_may_cut_and_cast_as_they_say(tmp_path: Path) -> None:
    w = torch.arange(20.0).reshape(5, 4)
    save(tmp_path / "a", {"w": w}, planner=Halves())
    with ckptd.open(str(tmp_path / "a")) as checkpoint:
        assert same(checkpoint["w"][...], w.half())
    error = error_of(save, tmp_path / "b", {"w": w}, planner=Liar())
    assert isinstance(error, InvalidRequest) and "changed w" in str(error)


def test_a_rank_alone_cannot_commit(tmp_path: Path) -> None:
    error = error_of(save, tmp_path / "a", {"w": torch.ones(2)}, use_collectives=False)
    assert isinstance(error, InvalidRequest) and "use_collectives" in str(error)


def test_plans_that_are_kept_from_save_to_save(tmp_path: Path) -> None:
    for step in range(3):
        saved = {"w": torch.full((3,), float(step)), "step": step}
        save(tmp_path / str(step), saved, planner=DefaultSavePlanner(enable_plan_caching=True))
        found = blank(saved)
        ckptd.load(str(tmp_path / str(step)), into=found)
        assert same(found, saved)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_on_a_device(tmp_path: Path) -> None:
    saved = {"w": torch.randn(70, 50, device="cuda").t()[::2], "step": 3}
    save(tmp_path / "c", saved)
    found = {"w": torch.zeros(25, 70, device="cuda"), "step": 0}
    with one_process():
        dcp.load(found, storage_reader=Reader(tmp_path / "c"))
    assert torch.equal(found["w"], saved["w"]) and found["step"] == 3
