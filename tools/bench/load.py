"""ckptd.load against dcp.load of the same state and against plainly reading the same bytes.

    python tools/bench/load.py [--mebibytes 1024] [--repeats 5] [--directory /tmp] [--cold]

The page cache is warm; with --cold, what is read is dropped from it before each run.

Prints one JSON object: seconds of every run, medians, the ratios of medians, and how far the peak of resident
memory rose above what was there before (the targets exist and are touched by then).  Each variant runs in a
process of its own, in turns, so that none profits from another's pages.
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

# Tensors like those of a transformer with Adam: a few large ones, many small ones.
HIDDEN = 1024


def state(mebibytes: int) -> dict[str, Any]:
    """Returns named tensors of about so many MiB, filled."""
    import torch

    torch.manual_seed(0)
    found: dict[str, Any] = {}
    layer = 0
    while sum(t.nbytes for t in found.values()) < mebibytes << 20:
        for name, shape in (
            ("attn.qkv", (3 * HIDDEN, HIDDEN)),
            ("attn.out", (HIDDEN, HIDDEN)),
            ("mlp.up", (4 * HIDDEN, HIDDEN)),
            ("mlp.down", (HIDDEN, 4 * HIDDEN)),
            ("norm", (HIDDEN,)),
            ("bias", (4 * HIDDEN,)),
        ):
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                found[f"layers.{layer}.{name}.{kind}"] = torch.randn(shape)
        layer += 1
    return found


def save(directory: Path, mebibytes: int) -> None:
    """Writes the state in every form that is read."""
    import torch.distributed.checkpoint as dcp

    import ckptd

    tensors = state(mebibytes)
    ckptd.save(str(directory / "ckptd"), tensors)
    dcp.save(dict(tensors), checkpoint_id=str(directory / "dcp"), no_dist=True)
    with (directory / "plain").open("wb") as file:
        for tensor in tensors.values():
            file.write(memoryview(tensor.view(-1).numpy()).cast("B"))


def _drop(directory: Path) -> None:
    """Drops all files below from the page cache; they are synced first, as dirty pages stay."""
    for path in filter(Path.is_file, directory.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def one(variant: str, directory: Path, mebibytes: int, check: bool, cold: bool) -> dict[str, Any]:
    """Loads once into touched targets; returns seconds and how far resident memory rose meanwhile."""
    import torch

    wanted = state(mebibytes) if check else None
    targets = {name: torch.empty_like(t).fill_(1.0) for name, t in (wanted or state(mebibytes)).items()}
    load = _loader(variant, directory, targets)
    if cold:
        _drop(directory)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _resident("VmRSS")
    begin = time.perf_counter()
    extra = load()
    seconds = time.perf_counter() - begin
    rose = _resident("VmHWM") - before
    if wanted is not None:
        assert all(torch.equal(targets[name], t) for name, t in wanted.items()), variant
    return {"seconds": seconds, "peak_extra_mib": rose / 2**20, **extra}


def _loader(variant: str, directory: Path, targets: dict[str, Any]) -> Any:
    if variant == "ckptd":
        import ckptd
        import ckptd.client.loading

        def load() -> dict[str, Any]:
            report = ckptd.load(str(directory / "ckptd"), targets)
            return {"read_bytes": report.read_bytes, "needed_bytes": report.needed_bytes}

        return load
    if variant == "dcp":
        import torch.distributed.checkpoint as dcp

        return lambda: dcp.load(targets, checkpoint_id=str(directory / "dcp"), no_dist=True) or {}

    def plain() -> dict[str, Any]:
        with (directory / "plain").open("rb", buffering=0) as file:
            for tensor in targets.values():
                view = memoryview(tensor.view(-1).numpy()).cast("B")
                at = 0
                while at < len(view):
                    at += file.readinto(view[at:])  # type: ignore[operator]
        return {}

    return plain


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    raise AssertionError(key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--cold", action="store_true", help="read from the disk, not from the page cache")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one == "save":
        save(given.directory, given.mebibytes)
        return
    if given.one:
        print(json.dumps(one(given.one, given.directory, given.mebibytes, given.check, given.cold)))
        return
    root = Path(tempfile.mkdtemp(prefix="ckptd-bench-load-", dir=given.directory))
    try:
        print(json.dumps(measure(root, given.mebibytes, given.repeats, given.cold), indent=1))
    finally:
        shutil.rmtree(root)


def measure(root: Path, mebibytes: int, repeats: int, cold: bool) -> dict[str, Any]:
    def run(variant: str, *more: str) -> dict[str, Any]:
        command = [sys.executable, __file__, "--one", variant, "--directory", str(root)]
        done = subprocess.run(
            [*command, "--mebibytes", str(mebibytes), *more], stdout=subprocess.PIPE, check=True, timeout=600
        )
        return json.loads(done.stdout or b"{}")  # type: ignore[no-any-return]

    run("save")
    variants = ("plain", "ckptd", "dcp")
    for variant in variants:  # the first one warms the page cache, and looks at what it got
        run(variant, "--check")
    found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    for _ in range(repeats):
        for variant in variants:
            found[variant].append(run(variant, *(["--cold"] if cold else [])))
    median = {v: statistics.median(r["seconds"] for r in found[v]) for v in variants}
    return {
        "mebibytes": mebibytes,
        "page_cache": "cold" if cold else "warm",
        "cpus": len(os.sched_getaffinity(0)),
        "seconds": {v: [round(r["seconds"], 4) for r in found[v]] for v in variants},
        "median_s": {v: round(median[v], 4) for v in variants},
        "ckptd_to_plain": round(median["ckptd"] / median["plain"], 3),
        "ckptd_to_dcp": round(median["ckptd"] / median["dcp"], 3),
        "peak_extra_mib": {v: round(max(r["peak_extra_mib"] for r in found[v]), 1) for v in variants},
        "amplification": round(found["ckptd"][0]["read_bytes"] / found["ckptd"][0]["needed_bytes"], 4),
    }


if __name__ == "__main__":
    main()
