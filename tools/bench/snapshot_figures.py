"""From what both ranks measured to the figures and ratios of the snapshot benchmark.  Pure."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from measure import summary

from ckptd.client.protection import BUSY

JOB = "bench"
CALIBRATE = "calibrate"  # the job that measures the baselines and the length of a step
CONTEXT = 64  # tokens of a sequence
DCP = ("dcp.save", "dcp.async-thread", "dcp.async-process", "dcp.async-process-shm")
PEERS = ("torch.save", *DCP, "torch_checkpointing")
VARIANTS = ("nothing", *PEERS, "ckptd")
INTERVAL_NOTE = (
    "a peer's snapshot is finished when its files are (on tmpfs); ckptd's when it is protected in the"
    " memory of two nodes.  Peers begin a save at the first step at which the last one is finished on"
    " all ranks; ckptd begins one at every step, so no interval is shorter than a step"
)

Ranks = list[dict[str, Any]]


def baselines(ranks: Ranks) -> dict[str, Any]:
    """Seconds are the slower rank's, CPU seconds the sum of both ranks'; alone, rank 0's state only."""
    merged: dict[str, Any] = {}
    for name in ranks[0]["baselines"]:
        merged[name] = {
            how: {
                "seconds": summary(_zipped(max, ranks, name, how, "seconds")),
                "cpu_s": summary(_zipped(sum, ranks, name, how, "cpu_s")),
            }
            for how in ("together", "alone")
        }
    return merged


def _zipped(combine: Any, ranks: Ranks, name: str, how: str, field: str) -> list[float]:
    lists = [rank["baselines"][name][how][field] for rank in ranks]
    return [combine(values) for values in zip(*lists, strict=True)]


def variant(ranks: Ranks, nothing_cpu_per_step_s: float | None) -> dict[str, Any]:
    """The figures of one variant.

    A snapshot's blocked time is that of the rank that waited longer; it is finished when the
    last rank knows so, and begins when the first one cuts.
    """
    first = ranks[0]
    steps = len(first["steps_s"])
    by_rank = [dict(zip((s for s, _ in rank["cuts"]), rank["blocked_s"], strict=True)) for rank in ranks]
    times_by_rank = [dict(rank["cuts"]) for rank in ranks]
    everywhere = [step for step, _ in first["cuts"] if all(step in times for times in times_by_rank)]
    blocked = [max(rank[step] for rank in by_rank) for step in everywhere]
    cuts = {step: min(times[step] for times in times_by_rank) for step in everywhere}
    finished = {
        step: max(_known_at(rank, step) for rank in ranks) for step, _ in first["finished"] if step in cuts
    }
    times = sorted(finished.values())
    figures = {
        "snapshots": len(finished),
        "steps": steps,
        "blocked_s": summary(blocked),
        "step_s": summary(first["steps_s"]),
        "mean_step_s": sum(first["steps_s"]) / steps,
        "interval_s": summary([later - sooner for sooner, later in pairwise(times)]),
        "cut_to_finished_s": summary([at - cuts[step] for step, at in finished.items()]),
        "cpu": _cpu(ranks, steps, _completed(first, len(finished)), nothing_cpu_per_step_s),
    }
    if any(first["report"].values()):
        figures["daemons_idle_cpu_per_s"] = first["daemons_idle_cpu_per_s"]
        figures["blocked_in_steps_without_a_cut_s"] = summary([s for rank in ranks for s in rank["passed_s"]])
        figures["statistics"] = [rank["report"] for rank in ranks]
    return figures


def _completed(rank: dict[str, Any], seen: int) -> int:
    """How many snapshots of the loop were finished in the end.

    ckptd's watermark may pass several steps at once: all that were cut and not dropped then became protected.
    """
    if "protected_step" not in rank["report"]:
        return seen
    report = rank["report"]
    given_up = sum(count for why, count in report["dropped"].items() if why != BUSY)
    return sum(step <= report["protected_step"] for step, _ in rank["cuts"]) - given_up


def _known_at(rank: dict[str, Any], step: int) -> float:
    """When this rank knew that `step`, or a newer one, is finished."""
    return min((at for known, at in rank["finished"] if known >= step), default=float("inf"))


def _cpu(ranks: Ranks, steps: int, snapshots: int, nothing_per_step_s: float | None) -> dict[str, Any]:
    """CPU seconds of the whole loop, and per snapshot without what training itself takes."""
    raw = {name: sum(rank["cpu_s"][name] for rank in ranks) for name in ("trainer", "helpers", "daemons")}
    # Deleting old files is no part of saving.
    raw["trainer"] -= sum(rank["cpu_s"]["housekeeping"] for rank in ranks)
    total = sum(raw.values())
    result: dict[str, Any] = {"raw_s": raw, "per_step_s": total / steps}
    if nothing_per_step_s is not None and snapshots:
        result["per_snapshot_s"] = (total - steps * nothing_per_step_s) / snapshots
        result["per_snapshot_by_place_s"] = {
            "trainer": (raw["trainer"] - steps * nothing_per_step_s) / snapshots,
            "helpers": raw["helpers"] / snapshots,
            "daemons": raw["daemons"] / snapshots,
        }
    return result


def ratios(base: Mapping[str, Any], variants: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Medians of ckptd divided by what they are compared with; None where that was not measured."""
    good = {name: figures for name, figures in variants.items() if "failed" not in figures}
    if "ckptd" not in good:
        return {}
    ours = good["ckptd"]
    peers = {name: good[name] for name in PEERS if name in good}
    dcp = {name: good[name] for name in DCP if name in good}
    copy, tensors, transfer = (
        base[name]["together"] for name in ("memcpy_flat", "memcpy_by_tensor", "transfer")
    )
    blocked, cpu = ours["blocked_s"]["median"], ours["cpu"].get("per_snapshot_s")
    result = {
        "blocked_to_memcpy": blocked / copy["seconds"]["median"],
        "step_to_memcpy": _of(good, "nothing", "step_s", copy["seconds"]["median"]),
        "blocked_to_dcp": None,
        "blocked_to_best_peer": None,
        "step_slowdown": _slowdown(good, "step_s"),
        "interval_to_best_peer": None,
        "interval_note": INTERVAL_NOTE,
        "cpu_to_copy_and_transfer": {
            name: cpu / (each["cpu_s"]["median"] + transfer["cpu_s"]["median"]) if cpu is not None else None
            for name, each in (("flat", copy), ("by_tensor", tensors))
        },
        "protected_to_copy_and_transfer": _divided(
            ours["cut_to_finished_s"].get("median"),
            copy["seconds"]["median"] + transfer["seconds"]["median"],
        ),
    }
    if dcp:
        best, least = _least(dcp, "blocked_s")
        result["blocked_to_dcp"] = {"best": best, "ratio": blocked / least}
    if peers:
        best, least = _least(peers, "blocked_s")
        result["blocked_to_best_peer"] = {
            "best": best,
            "ratio": blocked / least,
            "difference_ms": (blocked - least) * 1e3,
        }
        best, least = _least(peers, "interval_s")
        result["interval_to_best_peer"] = {
            "best": best,
            "ratio": _divided(ours["interval_s"].get("median"), least),
        }
        best, least = _least(peers, "cut_to_finished_s")
        result["protected_to_best_peers_save"] = {
            "best": best,
            "ratio": _divided(ours["cut_to_finished_s"].get("median"), least),
        }
    return result


def _slowdown(variants: Mapping[str, Mapping[str, Any]], field: str) -> dict[str, float] | None:
    """Median step with each variant, divided by the median step with nothing."""
    if "nothing" not in variants:
        return None
    plain = variants["nothing"][field]["median"]
    return {name: figures[field]["median"] / plain for name, figures in variants.items() if name != "nothing"}


def _of(variants: Mapping[str, Mapping[str, Any]], name: str, field: str, divisor: float) -> float | None:
    return variants[name][field]["median"] / divisor if name in variants else None


def _least(variants: Mapping[str, Mapping[str, Any]], field: str) -> tuple[str, float]:
    """The variant with the least median of `field`, and that median."""
    medians = {name: figures[field].get("median", float("inf")) for name, figures in variants.items()}
    best = min(medians, key=lambda name: medians[name])
    return best, medians[best]


def _divided(value: float | None, divisor: float) -> float | None:
    return None if value is None else value / divisor
