"""The training loop of the snapshot benchmark, run in each of the job's two ranks.

Every rank trains a stage of its own: a GPT with AdamW, whose parts have other names and
other values than the other rank's.  The ranks meet once per step, as a real job's do.
Writes one JSON object with what this rank measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import children_of, cpu_seconds
from snapshot_baselines import measure as measure_baselines
from snapshot_figures import CALIBRATE, CONTEXT, VARIANTS
from snapshot_peers import SAVERS, WARMUP, WARMUP_DEFAULT, Saver, pids_of_daemons
from torch import Tensor, nn
from torch.nn import functional as F

from ckptd.demo import example

sys.path.insert(0, str(example.directory()))
from model import GPT, Shape

# A step takes so many times the copy of a rank's state, while both ranks copy.
STEP_TO_MEMCPY = 3.5
_TENSORS_PER_BLOCK = 40  # ten parameters, each with two moments and a step
_TENSORS_PER_RANK = 520
_SETTLE_S = 60.0
_IDLE_S = 2.0
_LEAST_CUTS = 4  # however slow a peer is: three intervals


class Stage(nn.Module):
    """One rank's part of the model, of about `state_bytes` with AdamW's moments."""

    tokens_seen: Tensor
    loss_sum: Tensor
    vocabulary_seen: Tensor
    stage: Tensor

    def __init__(self, rank: int, state_bytes: int) -> None:
        super().__init__()
        least_blocks = math.ceil(_TENSORS_PER_RANK / _TENSORS_PER_BLOCK)
        # 12 width^2 weights of a block, four bytes each, three times.
        width = max(32, int(math.sqrt(state_bytes / (3 * 4 * 12 * least_blocks))) // 32 * 32)
        block_bytes = 3 * 4 * (12 * width**2 + 9 * width)
        blocks = max(least_blocks, round((state_bytes - 3 * 4 * 512 * width) / block_bytes))
        self.inner = GPT(Shape(context=CONTEXT, width=width, heads=width // 32, blocks=blocks, dropout=0.0))
        self.inner.positions.to(torch.bfloat16)
        self.register_buffer("tokens_seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("loss_sum", torch.zeros((), dtype=torch.float64))
        self.register_buffer("vocabulary_seen", torch.zeros(256, dtype=torch.bool))
        self.register_buffer("stage", torch.tensor(rank, dtype=torch.int32))

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.inner(tokens)
        return scores


class Training:
    """Model, optimizer and data of one rank."""

    def __init__(self, rank: int, state_bytes: int, batch: int) -> None:
        torch.manual_seed(rank)
        stage = Stage(rank, state_bytes)
        self.model = nn.ModuleDict({f"stage{rank}": stage})
        self.stage = stage
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.batch = batch
        self._random = torch.Generator().manual_seed(rank)

    def backward(self) -> Tensor:
        """Forward and backward of one step; the loss."""
        tokens = torch.randint(0, 256, (self.batch, CONTEXT + 1), generator=self._random)
        scores = self.stage(tokens[:, :-1])
        loss = F.cross_entropy(scores.reshape(-1, 256), tokens[:, 1:].reshape(-1))
        torch.autograd.backward(loss)
        return loss.detach()

    def update(self, loss: Tensor) -> None:
        """Changes the whole state in place."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.stage.tokens_seen += self.batch * CONTEXT
        self.stage.loss_sum += loss
        self.stage.vocabulary_seen[self.stage.tokens_seen % 256] = True

    def tensors(self) -> list[Tensor]:
        """All tensors of the state; the optimizer's exist after the first update."""
        moments = [
            value
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        return [*self.model.state_dict().values(), *moments]


@dataclass(frozen=True)
class Options:
    """What the benchmark tells the ranks."""

    variant: str
    state_bytes: int
    batch: int
    threads: list[int]
    snapshots: int
    seconds: float
    repeat: int
    directory: Path
    result: Path

    @classmethod
    def parse(cls) -> Options:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("--variant", choices=[CALIBRATE, *VARIANTS], required=True)
        parser.add_argument("--state-bytes", type=int, required=True, help="of one rank")
        parser.add_argument("--batch", type=int, default=1, help=f"sequences of {CONTEXT} tokens per step")
        parser.add_argument("--threads", type=int, nargs="+", required=True, help="of torch")
        parser.add_argument("--snapshots", type=int, default=30, help="to measure, at most")
        parser.add_argument("--seconds", type=float, default=60.0, help="to measure, at most")
        parser.add_argument("--repeat", type=int, default=7, help="of every baseline")
        parser.add_argument("--directory", type=Path, required=True, help="of checkpoints")
        parser.add_argument("--result", type=Path, required=True, help="the JSON, .RANK is appended")
        return cls(**vars(parser.parse_args()))


class Loop:
    """Trains and saves; what it measured are its public fields."""

    def __init__(self, training: Training, saver: Saver, options: Options) -> None:
        self.steps_s: list[float] = []
        self.cuts: list[tuple[int, float]] = []
        self.blocked_s: list[float] = []
        self.passed_s: list[float] = []  # blocked in steps that ckptd did not capture
        self.housekeeping_cpu_s = 0.0
        self._training, self._saver, self._options = training, saver, options
        self._step = 0
        self._pending = 0.0  # blocked since the last save
        self._all_idle = True
        self._kept: list[int] = []  # snapshots on tmpfs, oldest first

    def warm_up(self) -> None:
        """Until the first snapshots are finished everywhere; forgets what was measured."""
        variant = self._options.variant
        self._run(WARMUP.get(variant, WARMUP_DEFAULT), _SETTLE_S)
        self.settle()
        self.steps_s, self.cuts, self.blocked_s, self.passed_s = [], [], [], []
        self._saver.blocked_s(0.0)
        self._saver.finished.clear()
        self.housekeeping_cpu_s = 0.0

    def measure(self) -> None:
        """The loop that counts."""
        self._run(self._options.snapshots, self._options.seconds)

    def settle(self) -> None:
        """Waits, without training, until nothing is under way on any rank."""
        end = time.monotonic() + _SETTLE_S
        while not self._saver.idle():
            if time.monotonic() > end:
                raise TimeoutError(f"{self._options.variant} did not finish within {_SETTLE_S:.0f} s")
            time.sleep(0.005)
        dist.barrier()
        self._all_idle = True

    def _run(self, snapshots: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        stop = False
        while not stop:
            began = time.perf_counter()
            loss = self._training.backward()
            self._waits(self._saver.fence)
            self._training.update(loss)
            self._saver.release()
            self._count_fence()
            self._step += 1
            finished = self._finished() if self._saver.every_step else 0
            late = time.monotonic() > end and len(self.cuts) >= min(snapshots, _LEAST_CUTS)
            stop = self._meet(loss, finished >= snapshots or late)
            if self._saver.every_step or self._all_idle:
                self._cut()
                stop |= not self._saver.every_step and len(self.cuts) >= snapshots
            housekeeping = self._tidy()
            self.steps_s.append(time.perf_counter() - began - housekeeping)
        self._waits(self._saver.fence)  # what the next step would have waited for
        self._saver.release()
        self._count_fence()
        if self.blocked_s and self._options.variant != "ckptd":
            self.blocked_s[-1] += self._pending
            self._pending = 0.0

    def _finished(self) -> int:
        """Snapshots that were cut since warming up: the watcher may still tell of one before."""
        first = self.cuts[0][0] if self.cuts else self._step
        return sum(step >= first for step, _ in self._saver.finished)

    def _waits(self, action: Any, *arguments: Any) -> None:
        began = time.perf_counter()
        action(*arguments)
        self._pending += time.perf_counter() - began

    def _count_fence(self) -> None:
        """ckptd counts by itself; what it waited for in the optimizer's step belongs to the last snapshot."""
        if self._options.variant == "ckptd" and self.blocked_s:
            kept = self.blocked_s if self._saver.cut else self.passed_s
            kept[-1] += self._saver.blocked_s(0.0)

    def _cut(self) -> None:
        """A fence belongs to the snapshot before it."""
        if self.blocked_s and self._options.variant != "ckptd":
            self.blocked_s[-1] += self._pending
        self._pending = 0.0
        at = time.monotonic()
        self._waits(self._saver.save, self._step)
        blocked = self._saver.blocked_s(self._pending)
        self._pending = 0.0
        if self._saver.cut:
            self.cuts.append((self._step, at))
            self.blocked_s.append(blocked)
        else:
            self.passed_s.append(blocked)

    def _meet(self, loss: Tensor, enough: bool) -> bool:
        """The step's meeting with the other rank; whether any has measured enough."""
        word = torch.tensor([float(loss), float(self._saver.idle()), float(enough)])
        dist.all_reduce(word)
        self._all_idle = bool(word[1] == dist.get_world_size())
        return bool(word[2] > 0)

    def _tidy(self) -> float:
        """Rank 0 removes all finished snapshots but the newest; the seconds that it took."""
        began, began_cpu = time.perf_counter(), time.process_time()
        if self.cuts and self.cuts[-1][0] not in self._kept:
            self._kept.append(self.cuts[-1][0])
        keep = 1 if self._all_idle and self._saver.idle() else 2
        while dist.get_rank() == 0 and len(self._kept) > keep:
            shutil.rmtree(self._options.directory / f"step{self._kept.pop(0)}", ignore_errors=True)
        self.housekeeping_cpu_s += time.process_time() - began_cpu
        return time.perf_counter() - began


class Cpu:
    """CPU seconds of this rank, of the processes that it started, and on rank 0 of the daemons."""

    def __init__(self) -> None:
        self._before = self._now()

    def since(self) -> dict[str, float]:
        return {name: value - self._before[name] for name, value in self._now().items()}

    def _now(self) -> dict[str, float]:
        daemons = pids_of_daemons() if dist.get_rank() == 0 else []
        return {
            "trainer": time.process_time(),
            "helpers": cpu_seconds(children_of(os.getpid())),
            "daemons": cpu_seconds(daemons),
        }


def measure_variant(training: Training, options: Options) -> dict[str, Any]:
    """The loop with one way of saving."""
    saver = SAVERS[options.variant](training.model, training.optimizer, options.directory)
    loop = Loop(training, saver, options)
    loop.warm_up()
    dist.barrier()
    cpu = Cpu()
    loop.measure()
    loop.settle()
    spent = cpu.since()
    idle = Cpu()
    if pids_of_daemons():
        time.sleep(_IDLE_S)
    result = {
        "steps_s": loop.steps_s,
        "cuts": loop.cuts,
        "blocked_s": loop.blocked_s,
        "passed_s": loop.passed_s,
        "finished": saver.finished,
        "cpu_s": spent | {"housekeeping": loop.housekeeping_cpu_s},
        "daemons_idle_cpu_per_s": idle.since()["daemons"] / _IDLE_S,
        "report": saver.report(),
    }
    dist.barrier()
    saver.close()
    return result


def calibrate(training: Training, options: Options) -> dict[str, Any]:
    """The baselines, and how many sequences make a step long enough with any number of threads."""
    training.update(training.backward())
    tensors = training.tensors()
    baselines = measure_baselines(tensors, options.repeat)
    copy = torch.tensor(sorted(baselines["memcpy_flat"]["together"]["seconds"])[options.repeat // 2])
    dist.all_reduce(copy, dist.ReduceOp.MAX)
    batches = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        few, many = _step_s(training, 1), _step_s(training, 3)
        per_sequence = max((many - few) / 2, 1e-6)
        batches.append(1 + math.ceil(max(0.0, STEP_TO_MEMCPY * float(copy) - few) / per_sequence))
    batch = torch.tensor(max(batches))
    dist.all_reduce(batch, dist.ReduceOp.MAX)
    return {
        "baselines": baselines,
        "batch": int(batch),
        "state": {
            "bytes": sum(tensor.nbytes for tensor in tensors),
            "tensors": len(tensors),
            "tensors_of_0_dimensions": sum(tensor.dim() == 0 for tensor in tensors),
            "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        },
    }


def _step_s(training: Training, batch: int) -> float:
    """The shorter one of two steps, both ranks at once, after one for warming up."""
    training.batch, taken = batch, []
    for _ in range(3):
        dist.barrier()
        began = time.perf_counter()
        training.update(training.backward())
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def main() -> int:
    options = Options.parse()
    torch.set_num_threads(options.threads[0])
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank = dist.get_rank()
    training = Training(rank, options.state_bytes, options.batch)
    act = calibrate if options.variant == CALIBRATE else measure_variant
    result = act(training, options)
    options.result.with_suffix(f".{rank}").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
