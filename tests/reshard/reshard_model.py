"""A small model with uneven sizes in every layout that is tested, and what each rank then has of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.nn.parallel import DistributedDataParallel

VOCABULARY, HIDDEN, INNER, WIDE, LENGTH, BATCH = 10, 6, 7, 11, 5, 4
LR = 0.01

# The dim that tensor parallelism splits, by the last two parts of a name; no others are split by it.
COLUMNS, ROWS = {"weight": 0, "bias": 0}, {"weight": 1}
SPLIT_BY_TP = {"query": COLUMNS, "value": COLUMNS, "up": COLUMNS, "out": ROWS, "down": ROWS}
SPLIT_BY_TP |= {"widen": COLUMNS, "narrow": ROWS, "embed": {"weight": 0}, "head": COLUMNS}
BUFFERS = ("tokens", "scale")


class Block(nn.Module):
    """What a transformer's block has, with the average of the tokens before in place of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.query, self.value = nn.Linear(HIDDEN, VOCABULARY), nn.Linear(HIDDEN, VOCABULARY)
        self.out = nn.Linear(VOCABULARY, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        past = torch.tril(torch.ones(LENGTH, LENGTH)) / torch.arange(1.0, LENGTH + 1).unsqueeze(1)
        seen = self.first(x)
        x = x + self.out(torch.sigmoid(self.query(seen)) * self.value(past @ seen))
        return x + self.down(F.silu(self.up(self.second(x))))


class Adapter(nn.Module):
    """A part whose parameters are bf16, in a model of f32."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Linear(HIDDEN, WIDE, dtype=torch.bfloat16)
        self.narrow = nn.Linear(WIDE, HIDDEN, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * self.narrow(torch.sigmoid(self.widen(x.bfloat16()))).float()


class Model(nn.Module):
    """Sizes 11, 10, 7, 6, 5 and 1, so that over eight ranks some have nothing; bf16 among f32; the embedding
    is also the head's weight; a parameter is frozen; two buffers."""

    tokens: torch.Tensor
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.position = nn.Parameter(torch.randn(LENGTH, HIDDEN), requires_grad=False)
        self.block = Block()
        self.adapter = Adapter()
        self.temperature = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(HIDDEN, VOCABULARY)
        self.head.weight = self.embed.weight
        self.register_buffer("tokens", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.rand(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.tokens += tokens.numel()
        x = self.adapter(self.block(self.embed(tokens) + self.position))
        return self.head(x) * self.temperature * self.scale.sum()


@dataclass(frozen=True)
class Layout:
    """How many ranks replicate, shard (FSDP2) and split (tensor parallel), outermost first."""

    kind: str  # ddp, fsdp, hsdp, tp, fsdp-tp, hsdp-tp
    sizes: tuple[int, ...]
    other_way: str = ""  # of AdamW, than that of all layouts without or with tensor parallelism

    @property
    def name(self) -> str:
        return f"{self.kind}-{'x'.join(map(str, self.sizes))}{self.other_way and '-' + self.other_way}"

    @property
    def way(self) -> str:
        """How AdamW goes through the tensors: "fused", "foreach" or one after another ("single").

        Tensor parallelism leaves plain tensors or tensors on two meshes: these go only one after another.
        """
        return self.other_way or ("single" if "tp" in self.kind else "fused")

    @property
    def ranks(self) -> int:
        return prod(self.sizes)

    @property
    def exact(self) -> bool:
        """Whether its sums have the same bits as one process's.

        All ranks have equal terms: of two or four, one after another, the sum is exact (3g may be rounded,
        and 3g + g is 4g again); of three, or of eight in a row, it is not.
        """
        return self.way == "fused" and all(size in (1, 2, 4) for size in self.sizes)

    def cuts(self, name: str, dims: int, rank: int) -> list[tuple[int, int, int]]:
        """What one rank has of a tensor: (dim, chunks, which one) to be applied one after the other."""
        parts = name.removeprefix("optimizer.").removeprefix("model.").split(".")
        if dims == 0 or parts[-1] in BUFFERS:
            return []
        at = dict(zip(self._axes, _coordinates(rank, self.sizes), strict=True))
        size = dict(zip(self._axes, self.sizes, strict=True))
        found = []
        split = [SPLIT_BY_TP[p][w] for p, w in pairwise(parts) if w in SPLIT_BY_TP.get(p, {})]
        if "tp" in at and split:
            found.append((split[0], size["tp"], at["tp"]))
        if "shard" in at:
            found.append((0, size["shard"], at["shard"]))
        return found

    @property
    def _axes(self) -> tuple[str, ...]:
        axes = {"ddp": ("replicate",), "fsdp": ("shard",), "hsdp": ("replicate", "shard"), "tp": ("tp",)}
        axes |= {"fsdp-tp": ("shard", "tp"), "hsdp-tp": ("replicate", "shard", "tp")}
        return axes[self.kind]

    def build(self, seed: int) -> nn.Module:
        """The model in this layout, from its own random numbers; all ranks call this."""
        torch.manual_seed(seed)
        model = Model()
        if self.kind == "ddp":
            return DistributedDataParallel(model) if self.ranks > 1 else model
        mesh = mesh_of(self.sizes, self._axes)
        if "tp" in self._axes:
            _split(model, mesh["tp"])
        if "shard" in self._axes:
            names = tuple(axis for axis in self._axes if axis != "tp")
            data = mesh[names] if len(names) > 1 else mesh[names[0]]
            for part in (model.block, model.adapter, model):
                fully_shard(part, mesh=data)  # one dtype in each
        return model


def layouts(world: int) -> list[Layout]:
    """The layouts that a number of ranks has."""
    found = [Layout("ddp", (world,)), Layout("fsdp", (world,))]
    pairs = [(n, world // n) for n in range(2, world) if world % n == 0]
    pairs = pairs or list(dict.fromkeys([(1, world), (world, 1)]))
    found += [Layout(kind, pair) for kind in ("hsdp", "fsdp-tp") for pair in pairs]
    if world in (2, 3):
        found.append(Layout("tp", (world,)))
    if world == 4:
        found += [Layout("fsdp", (world,), way) for way in ("foreach", "single")]
    if world == 8:
        found.append(Layout("hsdp-tp", (2, 2, 2)))
    return found


def optimizer_of(model: nn.Module, way: str, lr: float = LR) -> torch.optim.AdamW:
    """AdamW over two groups; `way` as in `Layout`."""
    named = list(model.named_parameters())
    decayed = [p for name, p in named if name.endswith("weight")]
    others = [p for name, p in named if not name.endswith("weight")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.8, 0.95), foreach=way == "foreach", fused=way == "fused")


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """The losses of some steps; every rank has the whole batch."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def cut(whole: torch.Tensor, cuts: Sequence[tuple[int, int, int]]) -> torch.Tensor:
    """A part of a tensor, by torch.chunk itself."""
    for dim, number, which in cuts:
        chunks = torch.chunk(whole, number, dim)
        whole = chunks[which] if which < len(chunks) else whole.narrow(dim, 0, 0)
    return whole


def join(parts: Mapping[tuple[tuple[int, int, int], ...], torch.Tensor]) -> torch.Tensor:
    """The tensor whose parts, by their cuts, are given."""
    if () in parts:
        return parts[()]
    (dim, number), *more = {key[0][:2] for key in parts}
    assert not more
    chunks = [{k[1:]: part for k, part in parts.items() if k[0][2] == which} for which in range(number)]
    return torch.cat([join(chunk) for chunk in chunks], dim)


@lru_cache
def mesh_of(sizes: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)  # its process groups are made once


def _coordinates(rank: int, sizes: Sequence[int]) -> tuple[int, ...]:
    found: list[int] = []
    for size in reversed(sizes):
        rank, at = divmod(rank, size)
        found.insert(0, at)
    return tuple(found)


def _split(model: Model, mesh: DeviceMesh) -> None:
    """Tensor parallelism; uneven activations stay DTensors, since only these know their sizes."""
    column, row = ColwiseParallel(use_local_output=False), RowwiseParallel()
    plan: dict[str, ParallelStyle] = {"embed": RowwiseParallel(input_layouts=Replicate())}
    plan["head"] = ColwiseParallel(output_layouts=Replicate())
    plan |= {f"block.{name}": column for name in ("query", "value", "up")}
    plan |= {f"block.{name}": row for name in ("out", "down")}
    plan |= {"adapter.widen": column, "adapter.narrow": row}
    parallelize_module(model, mesh, plan)
    model.head.weight = model.embed.weight  # each was made a DTensor of its own
