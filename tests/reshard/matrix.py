"""Saves the model in every layout, and loads each checkpoint into every layout, at several world sizes.

    python matrix.py DIRECTORY DEADLINE_S all|some WORLD...     # one JSON line of figures on stdout
    python matrix.py /tmp/x 60 all 2 4 6:fsdp-tp-3x2            # of some worlds only some layouts

Run as a script it imports torch once and forks the ranks of all worlds: one process group per world, which
runs all of its cases.  all, or some: of the pairs of layouts, as `reshard_pairs` chooses them.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimizer imports it: here once instead of in every rank
import torch.distributed as dist
from reshard_model import LR, Layout, Model, cut, join, layouts, optimizer_of, train
from reshard_pairs import pairs_of
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import ckptd
import ckptd.client.loading
import ckptd.client.saving

CUT, MORE = 3, 3  # steps before and after the checkpoint
SEED = 1
# Of losses, relative, where sums are taken in another order, some of them in bf16: six times what was found.
TOLERANCE = 4e-4
_PR_SET_PDEATHSIG = 1
_BIG = (2050, 20480)  # int32: 160 MiB, rows of 80 KiB
_MESSAGE_BYTES = 1 << 18


# What a rank does.


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All tensors of a training state by the names that a checkpoint gives them; a tied one has two."""
    named = [(f"model.{name.removeprefix('module.')}", p) for name, p in _tied(model)]
    found: dict[str, torch.Tensor] = {name: p.detach() for name, p in named}
    found |= {f"model.{name.removeprefix('module.')}": b for name, b in model.named_buffers()}
    seen: set[int] = set()
    for name, parameter in named:
        state = optimizer.state.get(parameter, {}) if id(parameter) not in seen else {}
        found |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
        seen.add(id(parameter))
    return found


def _tied(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_all(directory: Path, rank: int, chosen: list[Layout]) -> dict[str, list[float]]:
    """Saves each layout after CUT steps, and beside it what this rank has; returns the losses after it."""
    losses = {}
    for layout in chosen:
        model = layout.build(SEED)
        check_cuts(layout, model, rank)
        optimizer = optimizer_of(model, layout.way)
        train(model, optimizer, range(CUT))
        manifest = ckptd.save(str(directory / layout.name), {"model": model, "optimizer": optimizer})
        state = state_of(model, optimizer)
        stored = {t.name for t in manifest.tensors}
        assert stored == set(state), f"{layout.name}: {sorted(stored ^ set(state))}"
        assert not [t.name for t in manifest.tensors if t.differs], layout.name
        mine = {name: local(tensor).clone().contiguous() for name, tensor in state.items()}
        save_file(mine, directory / f"{layout.name}.{rank}.part")
        losses[layout.name] = train(model, optimizer, range(CUT, CUT + MORE))
    return losses


def check_cuts(layout: Layout, model: torch.nn.Module, rank: int) -> None:
    """Passes if torch itself put onto this rank what the tests expect of this layout."""
    torch.manual_seed(SEED)
    whole = dict(_tied(Model()))
    for name, tensor in _tied(model):
        plain = name.removeprefix("module.")
        expected = cut(whole[plain].detach(), layout.cuts(f"model.{plain}", tensor.dim(), rank))
        assert same_bits(local(tensor.detach()), expected), f"{layout.name}, rank {rank}: {name}"


def load_all(
    directory: Path, rank: int, chosen: list[Layout], pairs: list[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Loads into a fresh state of the second of each pair what the first one saved, and trains on."""
    by_name = {layout.name: layout for layout in chosen}
    found = []
    for source, target in pairs:
        model, optimizer, tensors = _load(directory, by_name[target], rank, source)
        losses = train(model, optimizer, range(CUT, CUT + MORE))
        found.append({"source": source, "target": target, "tensors": tensors, "losses": losses})
    return found


def _load(
    directory: Path, layout: Layout, rank: int, source: str
) -> tuple[torch.nn.Module, torch.optim.Optimizer, int]:
    """Loads one checkpoint into one layout, and compares all tensors bit by bit with those of the source."""
    pair = f"{source} into {layout.name}, rank {rank}"
    model = layout.build(seed=99)
    optimizer = optimizer_of(model, layout.way, lr=1.0)
    steps: list[object] = []
    optimizer.register_step_pre_hook(lambda *_: steps.append(1))
    report = ckptd.load(str(directory / source), into={"model": model, "optimizer": optimizer})
    assert not steps, f"{pair}: the optimizer was stepped"
    assert (report.missing, report.unexpected, report.differs, report.cast) == ((), (), (), ()), pair
    for group in optimizer.param_groups:
        assert group["lr"] == LR, pair
        assert (group["foreach"], group["fused"]) == (layout.way == "foreach", layout.way == "fused"), pair
    state = state_of(model, optimizer)
    whole = load_file(directory / f"{source}.whole")
    assert set(state) == set(whole), f"{pair}: {sorted(set(state) ^ set(whole))}"
    for name, tensor in state.items():
        assert tensor.shape == whole[name].shape and tensor.dtype == whole[name].dtype, f"{pair}: {name}"
        mine = local(tensor)
        expected = cut(whole[name], layout.cuts(name, tensor.dim(), rank))
        assert mine.shape == expected.shape, f"{pair}: {name} {tuple(mine.shape)} {tuple(expected.shape)}"
        assert same_bits(mine, expected), f"{pair}: {name} differs\n{mine}\n{expected}"
        if source == layout.name and isinstance(tensor, DTensor) and not _strided(tensor):
            assert same_bits(tensor.full_tensor(), whole[name]), f"{pair}: {name} as torch gathers it"
    return model, optimizer, len(state)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all bytes of two tensors of one shape are equal."""
    one, other = (t.contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(one, other)


def _strided(tensor: DTensor) -> bool:
    # torch gathers some uneven strided shards in another order than fully_shard stores them in.
    return any(hasattr(placement, "split_factor") for placement in tensor.placements)


def big_tensor(world: int, rank: int, dim: int, filled: bool) -> DTensor:
    """Rows of consecutive numbers, split over all ranks."""
    mesh = init_device_mesh("cpu", (world,))
    whole = torch.arange(_BIG[0] * _BIG[1], dtype=torch.int32).view(_BIG)
    mine = cut(whole, [(dim, world, rank)]).clone()
    if not filled:
        mine.fill_(-1)
    return DTensor.from_local(mine, mesh, [Shard(dim)], shape=torch.Size(_BIG), stride=(_BIG[1], 1))


def save_big(directory: Path, rank: int, chosen: list[Layout]) -> None:
    """Saves long rows, over all ranks."""
    world = chosen[0].ranks
    ckptd.save(str(directory / "big"), {"big": big_tensor(world, rank, 0, filled=True)})


def load_big(directory: Path, rank: int, chosen: list[Layout], dim: int) -> dict[str, int]:
    """Loads long runs; returns bytes needed and read, and by how much the process grew at its peak."""
    world = chosen[0].ranks
    target = big_tensor(world, rank, dim, filled=False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before = _status("VmRSS")
    report = ckptd.load(str(directory / "big"), into={"big": target})
    grown = _status("VmHWM") - before
    assert same_bits(local(target), local(big_tensor(world, rank, dim, filled=True))), f"big, rank {rank}"
    return {"needed": report.needed_bytes, "read": report.read_bytes, "grown": grown}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def be_rank(directory: Path, rank: int, chosen: list[Layout], orders: socket.socket) -> None:
    """Joins its process group, and does what it is told until there is nothing more."""
    torch.set_num_threads(1)
    world = chosen[0].ranks
    meeting = f"file://{directory}/meeting.{world}"
    dist.init_process_group("gloo", meeting, timedelta(seconds=600), world_size=world, rank=rank)
    does: dict[str, Callable[..., Any]] = {
        "save": save_all, "load": load_all, "save_big": save_big, "load_big": load_big,
    }  # fmt: skip
    while order := orders.recv(_MESSAGE_BYTES):
        what, *args = json.loads(order)
        orders.send(json.dumps({"done": does[what](directory, rank, chosen, *args)}).encode())
    dist.destroy_process_group()


# What the parent of all ranks does.


class Ranks:
    """The ranks of all worlds; none outlives `close`, nor this process."""

    def __init__(self, directory: Path, worlds: dict[int, list[Layout]], deadline: float) -> None:
        self._deadline = deadline
        self._pids: list[int] = []
        self._orders: dict[int, list[socket.socket]] = {}
        for world, chosen in worlds.items():
            self._orders[world] = [self._fork(directory, rank, chosen) for rank in range(world)]

    def ask(self, world: int, *order: Any) -> list[Any]:
        """All ranks of a world do the same; returns their answers in the order of ranks.

        Raises:
            RuntimeError: one of them failed, died, or took too long.
        """
        orders = self._orders[world]
        for sock in orders:
            sock.send(json.dumps(order).encode())
        answers: dict[int, Any] = {}
        while len(answers) < world:
            left = [sock for rank, sock in enumerate(orders) if rank not in answers]
            ready = select.select(left, [], [], max(0.0, self._deadline - time.monotonic()))[0]
            if not ready:
                raise RuntimeError(f"{len(left)} of {world} ranks were still at {order[0]} at the deadline")
            for sock in ready:
                data = sock.recv(_MESSAGE_BYTES)
                answer = json.loads(data) if data else {"failed": "it died"}
                rank = orders.index(sock)
                if "failed" in answer:
                    raise RuntimeError(f"rank {rank} of {world} at {order[0]}: {answer['failed']}")
                answers[rank] = answer["done"]
        return [answers[rank] for rank in range(world)]

    def close(self, kill: bool) -> None:
        """Lets the ranks end, or kills them, and collects them."""
        for sock in (sock for orders in self._orders.values() for sock in orders):
            sock.close()
        statuses = []
        for pid in self._pids:
            handle = os.pidfd_open(pid)
            left = 0.0 if kill else max(0.0, self._deadline - time.monotonic())
            if not select.select([handle], [], [], left)[0]:
                os.kill(pid, signal.SIGKILL)
            os.close(handle)
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        if not kill and any(statuses):
            raise RuntimeError(f"ranks ended with {statuses}")

    def _fork(self, directory: Path, rank: int, chosen: list[Layout]) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid:
            theirs.close()
            self._pids.append(pid)
            return ours
        code = 1
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            ours.close()
            for others in (sock for orders in self._orders.values() for sock in orders):
                others.close()
            be_rank(directory, rank, chosen, theirs)
            code = 0
        except BaseException:  # noqa: BLE001  the top of this process
            theirs.send(json.dumps({"failed": traceback.format_exc()[-8000:]}).encode())
        finally:
            sys.stdout.flush()
            os._exit(code)


def gather(directory: Path, layout: Layout) -> dict[str, torch.Tensor]:
    """The whole tensors of a saved state, from what each rank had; replicas are equal bit by bit."""
    ranks = [load_file(directory / f"{layout.name}.{rank}.part") for rank in range(layout.ranks)]
    wholes = {}
    for name, first in ranks[0].items():
        parts: dict[tuple[tuple[int, int, int], ...], torch.Tensor] = {}
        for rank, held in enumerate(ranks):
            key = tuple(layout.cuts(name, first.dim(), rank))
            same = same_bits(parts.setdefault(key, held[name]), held[name])
            assert same, f"{layout.name}: replicas of {name}"
        wholes[name] = join(parts).contiguous()
    save_file(wholes, directory / f"{layout.name}.whole")
    return wholes


def run(directory: Path, chosen: list[Layout], every: bool, ranks: Ranks) -> dict[str, Any]:
    """All of it; returns figures."""
    started = time.monotonic()
    worlds = sorted({layout.ranks for layout in chosen})
    losses: dict[str, list[float]] = {}
    for world in worlds:
        of_ranks = ranks.ask(world, "save")
        assert all(found == of_ranks[0] for found in of_ranks), "ranks have different losses"
        losses |= of_ranks[0]
    for layout in chosen:
        gather(directory, layout)
    saved = time.monotonic()
    by_name = {layout.name: layout for layout in chosen}
    pairs = pairs_of(chosen, every)
    figures: dict[str, Any] = {"layouts": len(chosen), "worlds": worlds, "pairs": len(pairs)}
    figures |= {"kinds": len({(source.kind, target.kind) for source, target in pairs})}
    figures |= {"across": len({(source.ranks, target.ranks) for source, target in pairs})}
    figures |= {"loads": 0, "tensors": 0, "exact": 0, "deviation": 0.0}
    for world in worlds:
        wanted = [(source.name, target.name) for source, target in pairs if target.ranks == world]
        answers = ranks.ask(world, "load", wanted)
        figures["loads"] += sum(len(answer) for answer in answers)
        figures["tensors"] += sum(pair["tensors"] for answer in answers for pair in answer)
        for same in zip(*answers, strict=True):
            source, target = by_name[same[0]["source"]], by_name[same[0]["target"]]
            assert all(pair["losses"] == same[0]["losses"] for pair in same), "ranks have different losses"
            exact = source == target or (source.exact and target.exact)
            deviation = compare_losses(same[0], losses[source.name], exact)
            figures["exact"] += exact
            figures["deviation"] = max(figures["deviation"], deviation)
    return figures | {"save_s": saved - started, "load_s": time.monotonic() - saved}


def compare_losses(pair: dict[str, Any], expected: list[float], exact: bool) -> float:
    """Returns by how much they differ, relative, if training went on as it did without resharding."""
    what = f"{pair['source']} into {pair['target']}: losses {pair['losses']}, expected {expected}"
    assert len(pair["losses"]) == len(expected) == MORE
    deviation = max(abs(a - b) / abs(b) for a, b in zip(pair["losses"], expected, strict=True))
    assert deviation <= (0.0 if exact else TOLERANCE), what
    return deviation


def of_world(text: str) -> tuple[int, list[Layout]]:
    """A number of ranks, and all of its layouts or those that are named: `4`, `6:fsdp-6,hsdp-2x3`."""
    world, _, names = text.partition(":")
    every = layouts(int(world))
    return int(world), [layout for layout in every if not names or layout.name in names.split(",")]


def run_big(ranks: Ranks, writers: int, readers: int) -> dict[str, Any]:
    """Long runs: rows over `writers` ranks into rows and into columns over `readers`."""
    ranks.ask(writers, "save_big")
    return {"rows": ranks.ask(readers, "load_big", 0), "columns": ranks.ask(readers, "load_big", 1)}


def main(directory: Path, deadline_s: float, every: bool, worlds: dict[int, list[Layout]]) -> None:
    ranks = Ranks(directory, worlds, time.monotonic() + deadline_s)
    finished = False
    try:
        figures = run(directory, [layout for chosen in worlds.values() for layout in chosen], every, ranks)
        figures["big"] = run_big(ranks, max(worlds), 2 if 2 in worlds else min(worlds))
        finished = True
    finally:
        ranks.close(kill=not finished)
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "all", dict(map(of_world, sys.argv[4:])))
