"""What saving at every step costs training: nothing, torch.save, DCP, torch_checkpointing, ckptd.

Two ranks train (gloo), each a GPT of its own with AdamW, and save to tmpfs; ckptd protects them
on two nodes with one parity: a real coordinator, two real daemons.  Every variant runs the same
loop; a step is made long enough for 3.5 copies of the state.  JSON on stdout, progress on stderr.

Examples:
  python tools/bench/snapshot.py                         1 GiB, one and two torch threads, all variants
  python tools/bench/snapshot.py --state-gib 0.25 --torch-threads 1 --variants nothing dcp.save ckptd
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import snapshot_figures as figures
from measure import emit, machine, say
from snapshot_ckptd import RANKS, JobFailed, Places, places, run_plain, run_protected
from snapshot_figures import CALIBRATE, CONTEXT, VARIANTS

_START_S = 180.0  # for imports, processes, warming up and the end


@dataclass(frozen=True)
class Options:
    """The command line."""

    state_gib: float
    snapshots: int
    torch_threads: list[int]
    variants: list[str]
    peer_seconds: float
    seconds: float
    slots: int
    repeat: int

    @property
    def rank_bytes(self) -> int:
        return int(self.state_gib * (1 << 30)) // RANKS


class Bench:
    """All jobs of one run, one after the other."""

    def __init__(self, options: Options, where: Places) -> None:
        self._options, self._where = options, where
        self._batch = 1

    async def run(self) -> dict[str, Any]:
        """The whole result."""
        threads = self._options.torch_threads
        ranks = await self._job(CALIBRATE, threads, 0, 0.0)
        self._batch, base = ranks[0]["batch"], figures.baselines(ranks)
        say(f"state: {ranks[0]['state']} per rank; steps of {self._batch} x {CONTEXT} tokens")
        for name, each in base.items():
            say(f"  {name}: {each['together']['seconds']['median'] * 1e3:.1f} ms both ranks at once")
        by_threads = {}
        for count in threads:
            variants = await self._variants(count)
            ratios = figures.ratios(base, variants)
            by_threads[str(count)] = {"variants": variants, "ratios": ratios}
            say(f"ratios, {count} threads: {json.dumps(ratios)}")
        return {
            "benchmark": "snapshot",
            "machine": machine(),
            "state": {
                "bytes": sum(rank["state"]["bytes"] for rank in ranks),
                "tensors": sum(rank["state"]["tensors"] for rank in ranks),
                "ranks": [rank["state"] for rank in ranks],
            },
            "tokens_per_step_and_rank": self._batch * CONTEXT,
            "slots": self._options.slots,
            "baselines": base,
            "by_torch_threads": by_threads,
            "ratios": {count: each["ratios"] for count, each in by_threads.items()},
        }

    async def _variants(self, threads: int) -> dict[str, Any]:
        results: dict[str, Any] = {}
        nothing: float | None = None
        for name in sorted(self._options.variants, key=VARIANTS.index):
            slow = name in figures.PEERS
            seconds = self._options.peer_seconds if slow else self._options.seconds
            snapshots = self._options.snapshots if name == "ckptd" else max(self._options.snapshots // 2, 3)
            try:
                ranks = await self._job(name, [threads], snapshots, seconds)
            except JobFailed as error:
                say(f"{name}, {threads} threads: failed\n{error}")
                results[name] = {"failed": str(error)}
                continue
            results[name] = figures.variant(ranks, nothing)
            if name == "nothing":
                nothing = results[name]["cpu"]["per_step_s"]
            say(f"{name}, {threads} threads: {_words(results[name])}")
        return results

    async def _job(self, variant: str, threads: list[int], snapshots: int, seconds: float) -> Any:
        """What each rank measured, by rank."""
        options, began = self._options, time.monotonic()
        result, directory = self._where.fresh("result") / "rank.json", self._where.fresh("files")
        numbers = {
            "state-bytes": options.rank_bytes,
            "batch": self._batch,
            "snapshots": snapshots,
            "seconds": seconds,
            "repeat": options.repeat,
            "directory": directory,
            "result": result,
        }
        arguments = ["--variant", variant, "--threads", *map(str, threads)]
        arguments += [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
        limit_s = seconds + _START_S
        if variant == "ckptd":
            await run_protected(self._where, arguments, limit_s, options.rank_bytes, options.slots)
        else:
            await run_plain(self._where, arguments, limit_s)
        await asyncio.to_thread(_remove, directory)
        say(f"  ({variant}: {time.monotonic() - began:.0f} s)")
        return [json.loads(result.with_suffix(f".{rank}").read_text()) for rank in range(RANKS)]


def _remove(directory: Path) -> None:
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def _words(result: dict[str, Any]) -> str:
    def median_ms(name: str) -> str:
        value = result[name].get("median")
        return "-" if value is None else f"{value * 1e3:.1f} ms"

    return (
        f"{result['snapshots']} snapshots in {result['steps']} steps; blocked {median_ms('blocked_s')}, "
        f"step {median_ms('step_s')}, interval {median_ms('interval_s')}, "
        f"cut to finished {median_ms('cut_to_finished_s')}"
    )


async def _main(options: Options) -> dict[str, Any]:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: everything is ended and removed first
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    async with places() as where:
        return await Bench(options, where).run()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--state-gib", type=float, default=1.0, help="of both ranks together, GiB")
    parser.add_argument("--snapshots", type=int, default=30, help="ckptd's; peers take half, if time allows")
    parser.add_argument("--torch-threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--peer-seconds", type=float, default=10.0, help="of the loop of every peer")
    parser.add_argument("--seconds", type=float, default=60.0, help="of every other loop, at most")
    parser.add_argument("--slots", type=int, default=3, help="images that ckptd keeps per rank")
    parser.add_argument("--repeat", type=int, default=7, help="of every baseline")
    options = Options(**vars(parser.parse_args()))
    try:
        emit(asyncio.run(_main(options)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        say("interrupted: nothing is left behind")
        return 130
    except JobFailed as error:
        say(f"failed: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
