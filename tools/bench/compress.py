"""What compression of checkpoints gains and costs, on weights and moments of real training.

    python tools/bench/compress.py [--steps 300] [--width 256] [--directory /tmp]

Trains the GPT of examples with AdamW for so many steps, in fp32 and in bf16, and prints one JSON object:
for each kind of tensor the ratio (compressed / plain bytes) and MB/s of one thread, with byte planes and
without, at some levels of zstd; then `ckptd.save` and `ckptd.load` of the whole state, plain and compressed,
in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import ckptd
from ckptd.storage import compression
from ckptd.storage.compression import GROUP_BYTES

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "gpt"))

from data import Sampler, corpus
from model import GPT, Shape

LEVELS = (1, 3)
REPEATS = 5
WARMUP_STEPS = 20


def trained(steps: int, width: int, dtype: torch.dtype) -> tuple[GPT, torch.optim.Optimizer, list[float]]:
    """The example's model after training; losses say whether it learnt."""
    torch.manual_seed(0)
    shape = Shape(width=width, blocks=4)
    model = GPT(shape).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    sampler = Sampler(corpus(), context=shape.context, batch=8, rank=0, world_size=1, seed=0)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / WARMUP_STEPS)
        inputs, targets = next(sampler)
        scores = model(inputs)
        loss = F.cross_entropy(scores.view(-1, scores.shape[-1]).float(), targets.reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return model, optimizer, losses


def kinds(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    """The bytes of all weights, and of each moment, one tensor after another."""
    found = {"weights": [p.detach() for p in model.parameters()]}
    for key in ("exp_avg", "exp_avg_sq"):
        found[key] = [optimizer.state[p][key] for p in model.parameters()]
    return {
        kind: b"".join(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
        for kind, tensors in found.items()
    }


def measured(data: bytes, width: int, level: int) -> dict[str, float]:
    """Ratio and speed of one thread, groups of 1 MiB."""
    compression.LEVEL = level  # type: ignore[misc]
    vars(compression._local).clear()
    groups = [data[at : at + GROUP_BYTES] for at in range(0, len(data), GROUP_BYTES)]
    packed = [compression.pack_group(group, width) for group in groups]
    into = [bytearray(len(group)) for group in groups]

    def pack() -> None:
        for group in groups:
            compression.pack_group(group, width)

    def unpack() -> None:
        for (frame, kept), target in zip(packed, into, strict=True):
            compression.unpack_group(frame, kept, memoryview(target), "bench")

    seconds = {"pack": median_s(pack), "unpack": median_s(unpack)}
    assert [bytes(target) for target in into] == groups
    return {
        "ratio": round(sum(len(frame) for frame, _ in packed) / len(data), 4),
        **{f"{what}_mb_per_s": round(len(data) / 1e6 / s, 1) for what, s in seconds.items()},
    }


def median_s(work: Callable[[], Any]) -> float:
    work()
    taken = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def stored(model: GPT, optimizer: torch.optim.Optimizer, root: Path) -> dict[str, Any]:
    """`ckptd.save` and `ckptd.load` of all of it, plain and compressed, in turns."""
    state = {"model": model, "optimizer": optimizer}
    taken: dict[str, list[float]] = {}
    nbytes = {}
    for repeat in range(REPEATS + 1):
        for name, compress in (("plain", False), ("compressed", True)):
            url = root / name
            begin = time.perf_counter()
            manifest = ckptd.save(str(url), state, compress=compress)
            middle = time.perf_counter()
            ckptd.load(str(url), state)
            end = time.perf_counter()
            nbytes[name] = sum(o.file_bytes for o in manifest.objects)
            shutil.rmtree(url)
            if repeat:  # the first turn warms up
                taken.setdefault(f"save_{name}_s", []).append(middle - begin)
                taken.setdefault(f"load_{name}_s", []).append(end - middle)
    medians = {name: round(statistics.median(seconds), 4) for name, seconds in taken.items()}
    return {"bytes": nbytes, "ratio": round(nbytes["compressed"] / nbytes["plain"], 4), **medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args()
    report: dict[str, Any] = {"steps": given.steps, "width": given.width, "group_bytes": GROUP_BYTES}
    report["cpus"] = len(os.sched_getaffinity(0))
    default = compression.LEVEL
    for name, dtype, width in (("fp32", torch.float32, 4), ("bf16", torch.bfloat16, 2)):
        model, optimizer, losses = trained(given.steps, given.width, dtype)
        found: dict[str, Any] = {"loss": [round(losses[0], 3), round(float(np.mean(losses[-10:])), 3)]}
        for kind, data in kinds(model, optimizer).items():
            found[kind] = {"bytes": len(data)}
            for level in LEVELS:
                found[kind][f"planes level {level}"] = measured(data, width, level)
                found[kind][f"no planes level {level}"] = measured(data, 1, level)
        compression.LEVEL = default  # type: ignore[misc]
        vars(compression._local).clear()
        root = Path(tempfile.mkdtemp(prefix="ckptd-bench-compress-", dir=given.directory))
        try:
            found["whole"] = stored(model, optimizer, root)
        finally:
            shutil.rmtree(root)
        report[name] = found
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
