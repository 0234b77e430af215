"""How long planning takes and how fast fingerprints are; JSON on stdout, progress on stderr.

Shapes are those of Llama 3 70B (80 layers), each tensor with its Adam state: a weight in bfloat16, an fp32
master and two moments.  Each plan is made in a process of its own, so that the peak memory is the plan's; the
baseline is the same process before it makes any tiles.  Times are CPU seconds; making the tiles is included.

Examples:
  python tools/bench/plan.py                               1,024 -> 768; one rank's part of 16,384 -> 12,288
  python tools/bench/plan.py --source 4096 --target 3072
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
from measure import emit, machine, say, summary

from ckptd.layout import fingerprint, placements, plan
from ckptd.layout.placements import Placement, Replicate, Shard, Strided
from ckptd.layout.tiles import Tiles

TP = 8
ROUNDS = 9


def shapes() -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """(name, shape, dimension that tensor parallelism splits) of Llama 3 70B."""
    hidden, ffn, vocab, groups = 8192, 28672, 128256, 1024
    yield "model.embed_tokens.weight", (vocab, hidden), 0
    for layer in range(80):
        prefix = f"model.layers.{layer}."
        yield prefix + "self_attn.q_proj.weight", (hidden, hidden), 0
        yield prefix + "self_attn.k_proj.weight", (groups, hidden), 0
        yield prefix + "self_attn.v_proj.weight", (groups, hidden), 0
        yield prefix + "self_attn.o_proj.weight", (hidden, hidden), 1
        yield prefix + "mlp.gate_proj.weight", (ffn, hidden), 0
        yield prefix + "mlp.up_proj.weight", (ffn, hidden), 0
        yield prefix + "mlp.down_proj.weight", (hidden, ffn), 1
        yield prefix + "input_layernorm.weight", (hidden,), None
        yield prefix + "post_attention_layernorm.weight", (hidden,), None
    yield "model.norm.weight", (hidden,), None
    yield "lm_head.weight", (vocab, hidden), 0


STATES = {"param": 2, "fp32": 4, "exp_avg": 4, "exp_avg_sq": 4}


@cache
def tiles(shape: tuple[int, ...], split: int | None, ranks: int, kind: str) -> Tiles:
    """All ranks' tiles of one class of tensors; the name of the array is not part of the class."""
    chosen: list[Placement]
    if kind == "fsdp":
        return placements.tiles(shape, (ranks,), [Shard(0)], "")
    mesh = (ranks // TP, TP)
    if split is None:
        chosen = [Shard(0), Replicate()]
    elif split == 0:
        chosen = [Strided(0, TP), Shard(0)]
    else:
        chosen = [Shard(0), Shard(split)]
    return placements.tiles(shape, mesh, chosen, "")


def tensors(
    source: tuple[int, str], target: tuple[int, str], place: int | None
) -> Iterator[tuple[str, Tiles, Tiles]]:
    @cache
    def wanted(shape: tuple[int, ...], split: int | None) -> Tiles:
        every = tiles(shape, split, *target)
        return every if place is None else every.at(every.place == place)

    for name, shape, split in shapes():
        for state in STATES:
            yield f"{state}.{name}", tiles(shape, split, *source), wanted(shape, split)


def planned(source: tuple[int, str], target: tuple[int, str], place: int | None) -> dict[str, Any]:
    """One plan: tilings made, joined, and summed up, with the time of each and the process's peak."""
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    found = plan.plan(tensors(source, target, place))
    joined = time.process_time()
    total = plan.summary(found, lambda name: STATES[name.split(".", 1)[0]])
    ended = time.process_time()
    return {
        "from": f"{source[1]} on {source[0]} ranks",
        "to": f"{target[1]} on {target[0]} ranks",
        "place": place,
        "tensors": len(found),
        "classes": len(found.classes),
        "copies": total.copies,
        "runs": total.runs,
        "bytes": total.bytes,
        "median_run_bytes": total.median_run_bytes,
        "plan_cpu_s": joined - began,
        "summary_cpu_s": ended - joined,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "baseline_rss_bytes": baseline * 1024,
    }


def speed(call: Callable[[], object], size: int) -> dict[str, float | int]:
    """GB/s of CPU time (10^9 bytes), of several rounds."""
    found = []
    for _ in range(ROUNDS):
        began = time.process_time()
        call()
        found.append(size / (time.process_time() - began) / 1e9)
    return summary(found)


def fingerprints() -> dict[str, Any]:
    """Fingerprints of matrices of 128 MiB, and copying the same bytes."""
    raw = np.random.default_rng(0).integers(0, 256, 128 << 20, np.uint8)
    copy = np.empty_like(raw)
    result: dict[str, Any] = {"bytes": raw.nbytes, "memcpy": speed(lambda: np.copyto(copy, raw), raw.nbytes)}
    cases = [
        ("float32", "u4", 8192),
        ("bfloat16", "u2", 8192),
        ("float64", "f8", 8192),
        ("float8", "u1", 8192),
    ]
    cases += [("float32, rows of 1024", "u4", 1024), ("bfloat16, rows of 1024", "u2", 1024)]
    cases += [("float8, rows of 1024", "u1", 1024)]
    for name, dtype, columns in cases:
        values = raw.view(dtype).reshape(-1, columns)
        result[name] = speed(lambda values=values: fingerprint.fingerprint(values), raw.nbytes)
    flat = raw.view("u4")
    result["float32, one dimension"] = speed(lambda: fingerprint.fingerprint(flat), raw.nbytes)
    return result


def apart(case: list[Any]) -> dict[str, Any]:
    """One case in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--case", json.dumps(case)],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=int, default=1024)
    parser.add_argument("--target", type=int, default=768)
    parser.add_argument("--one-source", type=int, default=16384)
    parser.add_argument("--one-target", type=int, default=12288)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.case:
        source, target, place = json.loads(chosen.case)
        print(json.dumps(planned(tuple(source), tuple(target), place)))
        return
    result: dict[str, Any] = {"machine": machine(), "whole": [], "one_rank": []}
    for before, after in (
        ("fsdp", "fsdp"),
        ("fsdp+tp8", "fsdp+tp8"),
        ("fsdp", "fsdp+tp8"),
        ("fsdp+tp8", "fsdp"),
    ):
        say(f"{before} -> {after}")
        result["whole"].append(apart([[chosen.source, before], [chosen.target, after], None]))
        one = [[chosen.one_source, before], [chosen.one_target, after], chosen.one_target // 3]
        result["one_rank"].append(apart(one))
    say("fingerprints")
    result["fingerprint_GB_per_s"] = fingerprints()
    emit(result)


if __name__ == "__main__":
    main()
