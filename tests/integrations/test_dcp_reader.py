"""Reader: universal checkpoints into whatever torch.distributed.checkpoint plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from dcpkit import blank, one_process, same, state
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

import ckptd
from ckptd.errors import CorruptCheckpoint
from ckptd.integrations.dcp import Reader, Writer


def load(url: object, into: dict[str, Any], **options: Any) -> dict[str, Any]:
    with one_process():
        dcp.load(into, storage_reader=Reader(str(url)), **options)
    return into


def test_what_ckptd_saved(tmp_path: Path) -> None:
    saved = state(3)
    ckptd.save(str(tmp_path / "c"), saved)
    assert same(load(tmp_path / "c", blank(saved)), saved)


def test_objects_and_tensors_of_stateful_things(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    ckptd.save(str(tmp_path / "c"), {"model": model, "scheduler": scheduler})
    into = {"model": torch.nn.Linear(3, 2).state_dict(), "scheduler": {"last_epoch": 0, "gamma": 0.0}}
    load(tmp_path / "c", into)
    assert torch.equal(into["model"]["weight"], model.weight)
    assert into["scheduler"] == {"last_epoch": 1, "gamma": 0.5}


def test_a_state_is_made_from_the_metadata(tmp_path: Path) -> None:
    saved = state(4)
    with one_process():
        dcp.save(saved, storage_writer=Writer(tmp_path / "c"))
    made: dict[str, Any] = {}
    dcp.state_dict_loader._load_state_dict(
        made, Reader(tmp_path / "c"), no_dist=True, planner=_EmptyStateDictLoadPlanner()
    )
    assert made["optim"]["param_groups"] == saved["optim"]["param_groups"]
    assert same(made["model"]["half"], saved["model"]["half"])
    assert made["scheduler"] == saved["scheduler"]


def test_targets_of_other_forms(tmp_path: Path) -> None:
    with one_process():
        dcp.save({"w": torch.arange(48.0).reshape(6, 8)}, storage_writer=Writer(tmp_path / "c"))
    base = torch.zeros(8, 12)
    into = {"w": base.t()[::2]}  # a view with gaps, transposed
    load(tmp_path / "c", into)
    assert torch.equal(base.t()[::2], torch.arange(48.0).reshape(6, 8))
    assert not base.t()[1::2].any()
    assert load(tmp_path / "c", {"w": torch.zeros(6, 8, dtype=torch.int64)})["w"][5, 7] == 47  # copy_ casts
    parameter = torch.nn.Parameter(torch.zeros(6, 8))
    load(tmp_path / "c", {"w": parameter})
    assert parameter.requires_grad and parameter.is_leaf and parameter[0, 1] == 1


class Doubling(DefaultLoadPlanner):
    """Reads into a tensor of its own, and commits it changed."""

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return torch.empty_like(super().resolve_tensor(read_item))

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        super().resolve_tensor(read_item).copy_(tensor * 2)


def test_planners_that_transform(tmp_path: Path) -> None:
    with one_process():
        dcp.save({"w": torch.ones(3)}, storage_writer=Writer(tmp_path / "c"))
    assert load(tmp_path / "c", {"w": torch.zeros(3)}, planner=Doubling())["w"].tolist() == [2, 2, 2]


def test_damage_reaches_no_tensor(tmp_path: Path) -> None:
    saved = {"w": torch.ones(200_000)}
    with one_process():
        dcp.save(saved, storage_writer=Writer(tmp_path / "c"))
    file = tmp_path / "c" / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[300_000] ^= 1
    file.write_bytes(content)
    into = {"w": torch.zeros(200_000)}
    with pytest.raises(dcp.CheckpointException) as caught:
        load(tmp_path / "c", into)
    assert isinstance(caught.value.failures[0][0], CorruptCheckpoint)
    assert set(into["w"].tolist()) <= {0.0, 1.0}
    assert "bytes" in str(caught.value) and not into["w"][75_000]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with one_process():
        dcp.save({"w": torch.ones(3), "n": 1}, storage_writer=Writer(tmp_path / "c"))
    for into, why in (({"v": torch.zeros(3)}, "Missing key"), ({"w": torch.zeros(4)}, "Size mismatch")):
        with pytest.raises(dcp.CheckpointException, match=why):
            load(tmp_path / "c", into)
        assert not any(tensor.any() for tensor in into.values())
    with pytest.raises(dcp.CheckpointException, match="no checkpoint"):
        load(tmp_path / "nothing", {"w": torch.ones(3)})
