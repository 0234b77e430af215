"""ckptd.save against dcp.save of the same state and against plainly writing the same bytes, all synced.

    python tools/bench/save.py [--mebibytes 1024] [--repeats 5] [--directory /tmp]

Prints one JSON object: seconds of every run, medians, and ratios of medians.  Each variant runs in a process
of its own, in turns; `plain` writes one file in pieces of 16 MiB, and syncs it and its directory.  What a run
wrote is removed before the next one begins.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from load import state

PIECE = 16 << 20


def one(variant: str, directory: Path, mebibytes: int) -> dict[str, Any]:
    """Saves once; returns seconds and the bytes that are on disk then."""
    tensors = state(mebibytes)
    target = directory / variant
    save = _saver(variant, target, tensors)
    os.sync()  # what others left to write is not ours
    begin = time.perf_counter()
    save()
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "bytes": sum(p.stat().st_size for p in target.rglob("*") if p.is_file())}


def _saver(variant: str, target: Path, tensors: dict[str, Any]) -> Any:
    if variant == "ckptd":
        import ckptd
        import ckptd.client.saving

        return lambda: ckptd.save(str(target), tensors)
    if variant == "dcp":
        import torch.distributed.checkpoint as dcp

        return lambda: dcp.save(dict(tensors), checkpoint_id=str(target), no_dist=True)

    def plain() -> None:
        target.mkdir()
        descriptor = os.open(target / "data", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        for tensor in tensors.values():
            view = memoryview(tensor.view(-1).numpy()).cast("B")
            for at in range(0, len(view), PIECE):
                piece = view[at : at + PIECE]
                while len(piece):
                    piece = piece[os.write(descriptor, piece) :]
        os.fsync(descriptor)
        os.close(descriptor)
        folder = os.open(target, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    return plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.one, given.directory, given.mebibytes)))
        return
    root = Path(tempfile.mkdtemp(prefix="ckptd-bench-save-", dir=given.directory))
    try:
        print(json.dumps(measure(root, given.mebibytes, given.repeats), indent=1))
    finally:
        shutil.rmtree(root)


def measure(root: Path, mebibytes: int, repeats: int) -> dict[str, Any]:
    variants = ("plain", "ckptd", "dcp")
    found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    for _ in range(repeats):
        for variant in variants:
            command = [sys.executable, __file__, "--one", variant, "--directory", str(root)]
            done = subprocess.run(
                [*command, "--mebibytes", str(mebibytes)], stdout=subprocess.PIPE, check=True, timeout=600
            )
            found[variant].append(json.loads(done.stdout))
            shutil.rmtree(root / variant)
    median = {v: statistics.median(r["seconds"] for r in found[v]) for v in variants}
    return {
        "mebibytes": mebibytes,
        "cpus": len(os.sched_getaffinity(0)),
        "seconds": {v: [round(r["seconds"], 4) for r in found[v]] for v in variants},
        "median_s": {v: round(median[v], 4) for v in variants},
        "bytes": {v: found[v][0]["bytes"] for v in variants},
        "ckptd_throughput_to_plain": round(median["plain"] / median["ckptd"], 3),
        "ckptd_speedup_over_dcp": round(median["dcp"] / median["ckptd"], 3),
    }


if __name__ == "__main__":
    main()
