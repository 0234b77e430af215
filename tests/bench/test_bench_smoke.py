"""The benchmarks run, end cleanly, and say what they promise; no figure is judged here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"
DEADLINE_S = 240.0  # a machine that others keep busy
pytestmark = pytest.mark.timeout(300)
SMALL_STATE = ["--state-gib", "0.0078125", "--torch-threads", "1", "--repeat", "2"]


def left_behind(pid: int) -> list[Path]:
    """What the benchmark of this process id left on tmpfs."""
    return list(Path("/dev/shm").glob(f"ckptd-demo-bench{pid}-*"))


def run(script: str, *arguments: str) -> dict[str, Any]:
    """The JSON on stdout of a benchmark that ends well."""
    command = [sys.executable, str(BENCH / script), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, errors = process.communicate(timeout=DEADLINE_S)
        finally:
            process.terminate()  # does nothing where it is over
    assert process.returncode == 0, errors[-3000:]
    assert left_behind(process.pid) == []
    result: dict[str, Any] = json.loads(out)
    assert result["version"] == 1
    assert result["machine"]["cpus"] == os.cpu_count()
    return result


def positive(summary: dict[str, float]) -> None:
    assert 0 < summary["min"] <= summary["median"] <= summary["p99"] <= summary["max"]


def test_snapshot_tells_what_every_variant_costs() -> None:
    result = run(
        "snapshot.py", *SMALL_STATE, "--snapshots", "3", "--variants", "nothing", "dcp.save", "ckptd"
    )
    state = result["state"]
    assert state["tensors"] >= 1000
    for rank in state["ranks"]:
        assert rank["tensors_of_0_dimensions"] > 100
        assert {"float32", "bfloat16", "int64"} <= set(rank["dtypes"])
    for baseline in ("memcpy_flat", "memcpy_by_tensor", "transfer"):
        for how in ("together", "alone"):
            positive(result["baselines"][baseline][how]["seconds"])
    variants = result["by_torch_threads"]["1"]["variants"]
    assert set(variants) == {"nothing", "dcp.save", "ckptd"}
    for name, figures in variants.items():
        assert "failed" not in figures, (name, figures)
        assert figures["snapshots"] >= 3
        assert figures["blocked_s"]["count"] <= figures["steps"]
        positive(figures["blocked_s"])
        positive(figures["step_s"])
        positive(figures["interval_s"])
    assert variants["ckptd"]["daemons_idle_cpu_per_s"] >= 0
    for rank in variants["ckptd"]["statistics"]:
        assert rank["voided"] == 0
        assert rank["protected_step"] >= 3
        # All of the image but its header and what step() copies by itself is copied behind training.
        assert rank["copied_bytes"] > rank["captured"] * state["ranks"][0]["bytes"] // 2
    ratios = result["ratios"]["1"]
    assert ratios["blocked_to_memcpy"] > 0
    assert ratios["blocked_to_dcp"]["best"] == ratios["blocked_to_best_peer"]["best"] == "dcp.save"
    assert ratios["blocked_to_dcp"]["ratio"] > 0
    assert set(ratios["step_slowdown"]) == {"dcp.save", "ckptd"}
    assert ratios["interval_to_best_peer"]["ratio"] > 0
    assert "file" in ratios["interval_note"]
    assert set(ratios["cpu_to_copy_and_transfer"]) == {"flat", "by_tensor"}
    assert ratios["protected_to_copy_and_transfer"] > 0


def test_snapshot_cleans_up_after_an_interrupt() -> None:
    command = [sys.executable, str(BENCH / "snapshot.py"), *SMALL_STATE, "--variants", "nothing"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell that runs the tests in its background has them ignore it, and what they start, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        end = time.monotonic() + DEADLINE_S
        while not any(child.name == "rank1.log" for at in left_behind(process.pid) for child in at.iterdir()):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert out == b""
    assert left_behind(process.pid) == []
    assert not [pid for pid in _pids() if f"bench{process.pid}-" in _command(pid)]


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_erasure_tells_rates_and_ratios() -> None:
    result = run("erasure.py", "--data-mib", "0.5", "--reedsolo-kib", "1", "--repeat", "2")
    for shape in ("4+2", "6+2"):
        for name in ("encode", "update", "decode 1 of", "decode 2 of"):
            positive(result["gb_per_s"][f"ckptd {name} {shape}"])
        assert result["ratios"]["encode_to_memcpy"][shape] > 0
        assert result["ratios"]["decode_two_to_memcpy"][shape] > 0
    for name in ("memcpy", "xor numpy", "pyeclib encode 4+2", "reedsolo encode 4+2"):
        positive(result["gb_per_s"][name])


@pytest.mark.parametrize("case", ["4,1,1"])
def test_recover_compares_with_plain_transfers(case: str) -> None:
    result = run("recover.py", "--image-mib", "2", "--repeat", "1", "--cases", case)
    (only,) = result["cases"]
    assert [only["nodes"], only["parity"], only["lost"]] == [4, 1, 1]
    positive(only["seconds"]["recover_s"])
    positive(only["seconds"]["plain_s"])
    positive(only["recover_to_plain"])
