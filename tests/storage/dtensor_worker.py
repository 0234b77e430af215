"""One rank of test_load_dtensors.py: saves DTensors in one layout, loads them in others, and compares.

python dtensor_worker.py DIRECTORY RANK WORLD
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import ckptd
from ckptd.errors import CkptdError

SHAPES = {"even": (16, 12), "uneven": (7, 5), "short": (2, 3), "vector": (11,)}


def wholes() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


class Own:
    """An object whose state differs from rank to rank, one tensor in its values and one in its shape."""

    def __init__(self, rank: int) -> None:
        self.held = {"value": torch.full((2,), float(rank)), "shape": torch.full((1 + rank,), float(rank))}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.held

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.held = state


class Noted(torch.nn.Linear):
    """A module with such an extra state."""

    def __init__(self, rank: int) -> None:
        super().__init__(2, 2)
        self.own = Own(rank)

    def get_extra_state(self) -> dict[str, torch.Tensor]:
        return self.own.held

    def set_extra_state(self, state: dict[str, torch.Tensor]) -> None:
        self.own.held = state


def check_own_states(url: str, rank: int) -> None:
    """What an object or a module keeps beside its tensors comes back as this rank had it."""
    ckptd.save(url, {"own": Own(rank), "model": Noted(rank)})
    own, model = Own(99), Noted(99)
    ckptd.load(url, {"own": own, "model": model})
    for held in (own.held, model.own.held):
        for name, expected in Own(rank).held.items():
            assert torch.equal(held[name], expected), (rank, name, held)


def main(directory: Path, rank: int, world: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world)
    flat = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    square = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    layouts = {
        "fsdp": (flat, [Shard(0)]),
        "hsdp": (square, [Replicate(), Shard(0)]),
        "tp": (square, [Replicate(), Shard(1)]),
        "both": (square, [Shard(0), Shard(1)]),
        "fsdp-tp": (square, [_StridedShard(0, split_factor=world // 2), Shard(0)]),
        "ddp": (flat, [Replicate()]),
    }

    def laid_out(layout: str, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        mesh, placements = layouts[layout]
        made: dict[str, torch.Tensor] = {"same": torch.full((3,), 5.0), "mine": torch.full((2,), float(rank))}
        for name, whole in values.items():
            fitting = [p if p.is_replicate() or p.dim < whole.dim() else Replicate() for p in placements]
            # distribute_tensor refuses strided shards; redistributing through a full one does not.
            if any(isinstance(p, _StridedShard) for p in fitting):
                spec = distribute_tensor(whole, mesh, [Replicate()] * mesh.ndim)._spec
                local, _ = fitting[1]._split_tensor(whole, mesh.size(1), with_padding=False)
                first = local[mesh.get_coordinate()[1]]
                chunks = list(first.chunk(mesh.size(0)))
                chunks += [first[:0]] * (mesh.size(0) - len(chunks))
                made[name] = DTensor.from_local(
                    chunks[mesh.get_coordinate()[0]].contiguous(), mesh, fitting, run_check=False,
                    shape=spec.shape, stride=spec.stride,
                )  # fmt: skip
            else:
                made[name] = distribute_tensor(whole, mesh, fitting)
        return made

    check_own_states(str(directory / "own"), rank)
    whole = wholes()
    zeros = {name: torch.zeros_like(value) for name, value in whole.items()}
    for stored in layouts:
        url = str(directory / stored)
        manifest = ckptd.save(url, {**laid_out(stored, whole), "epoch": rank})
        assert manifest.world_size == world and manifest.by_name["mine"].differs
        assert not manifest.by_name["even"].differs
        held = sum(
            int(boxes.sizes.prod(axis=1).sum()) for boxes in [manifest.tiles("even")] if boxes is not None
        )
        assert held == whole["even"].numel(), "a replica was written twice"
        for wanted in layouts:
            into = {**laid_out(wanted, zeros), "epoch": -1}
            into["mine"].fill_(-1)
            report = ckptd.load(url, into)
            assert (report.missing, report.unexpected) == ((), ()) and report.differs == ("mine",)
            assert into["epoch"] == rank and (into["mine"] == rank).all()
            expected = laid_out(wanted, whole)
            for name in whole:
                assert torch.equal(into[name].to_local(), expected[name].to_local()), (stored, wanted, name)
    # One rank's object fails: all hear of it.
    failing = Own(rank)
    if rank == 1:
        failing.state_dict = lambda: 1 / 0  # type: ignore[assignment,method-assign,return-value]
    try:
        ckptd.save(str(directory / "failing"), {"own": failing})
    except CkptdError as error:
        assert "own gives no state" in str(error)
    else:
        raise AssertionError("a state that is not there was saved")
    # One rank cannot save: all hear of it, and there is no checkpoint.
    broken = {"x": torch.nn.Parameter(torch.empty(3, device="meta" if rank == 1 else "cpu"))}
    try:
        ckptd.save(str(directory / "broken"), broken)
    except CkptdError as error:
        assert "x" in str(error)
    else:
        raise AssertionError("a tensor without bytes was saved")
    assert not (directory / "broken" / "manifest.json").exists()
    dist.barrier()
    dist.destroy_process_group()
    print("layouts", len(layouts) ** 2)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
