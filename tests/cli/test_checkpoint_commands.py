"""`ckptd ls`, `show`, `verify`, `pin`, `unpin`, `prune`, `rollback`: what they print, change and refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner
from xxhash import xxh3_128_digest

from ckptd.cli.main import app
from ckptd.errors import CkptdError
from ckptd.image.manifest import MANIFEST_NAME
from ckptd.storage import catalog, writing
from ckptd.storage.lines import Key
from ckptd.storage.local_store import LocalStore
from ckptd.storage.parts import LocalTensor

FILE = "rank-00000.safetensors"
COMMANDS = ["ls", "show", "verify", "pin", "unpin", "prune", "rollback"]


def put(root: Path, key: Key, parent: Key | None) -> Path:
    """A checkpoint of two ranks: `w` on both, `own` on the first only."""
    directory = root / "llama" / catalog.Entry(key[1], key[0]).directory
    store = LocalStore(directory)
    parts = []
    for rank in range(2):
        held = {"w": np.arange(50_000, dtype="<i4") + key[1]}
        held |= {} if rank else {"own": np.arange(30_000, dtype="<i4")}
        tensors = [
            LocalTensor.whole(name, "I32", array.shape, name, xxh3_128_digest(array))
            for name, array in held.items()
        ]
        head = writing.Variable("llama", key[0], key[1], rank, 2, writing.empty_objects())
        parts.append(
            writing.write_arrays(store, head, tensors, lambda n, h=held: h[n].shape, held.__getitem__)
        )
    writing.publish(store, writing.Heading("llama", key[1], key[0], world_size=2, parent=parent), parts)
    return directory


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Steps 900, 1000 and 1500 of a job, in CKPTD_STORE, on a machine without daemon."""
    monkeypatch.setenv("CKPTD_STORE", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "no-daemon"))
    monkeypatch.delenv("CKPTD_SOCKET", raising=False)
    parent = None
    for step in (900, 1000, 1500):
        put(tmp_path, (1, step), parent)
        parent = (1, step)
    return tmp_path


def ckptd(*arguments: str, code: int = 0) -> str:
    """What a command prints on stdout."""
    ran = CliRunner().invoke(app, arguments)
    found = ran.exception.exit_code if isinstance(ran.exception, CkptdError) else ran.exit_code
    assert found == code, (found, ran.output, ran.exception)
    return ran.stdout


def as_json(*arguments: str, code: int = 0) -> dict[str, Any]:
    printed = ckptd(*arguments, "--json", code=code)
    body: dict[str, Any] = json.loads(printed)
    assert body["schema"].startswith(f"ckptd.{arguments[0]}/") and printed.count("\n") == 1
    return body


def refused(*arguments: str) -> CkptdError:
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, CkptdError), error
    return error


def steps(keys: list[dict[str, int]]) -> list[str]:
    return [f"{key['step']}.g{key['generation']}" for key in keys]


def there(root: Path) -> list[int]:
    return [entry.step for entry in catalog.entries(str(root), "llama")]


def flip(file: Path, *positions: int) -> None:
    data = bytearray(file.read_bytes())
    for at in positions:
        data[at] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    shown = ckptd(command, "--help")
    assert f"Example: ckptd {command}" in " ".join(shown.split()) and "--json" in shown


def test_ls_draws_lines(root: Path) -> None:
    ckptd("rollback", "llama", "--to", "900", "--reason", "loss spike at 940")
    put(root, (3, 1000), (1, 900))
    put(root, (3, 1100), (3, 1000))
    ckptd("pin", "llama/step-1500", "--reason", "the spike")
    shown = ckptd("ls", "llama")
    drawn = [line[:4].rstrip() for line in shown.splitlines()[1:]]
    assert shown.splitlines()[0] == f"llama: 5 checkpoints, 2 lines, in {root}"
    assert drawn == ["  o", "* |", "* |", "| o", "|/", "*"], shown
    assert "loss spike at 940" in shown and "pinned: the spike" in shown
    body = as_json("ls", "llama")
    assert steps([body["newest"]]) == ["1100.g3"]
    assert {line["head"]["step"]: line["newest"] for line in body["lines"]} == {1100: True, 1500: False}
    left = {c["step"]: c["left_by"] for c in body["checkpoints"] if c["generation"] == 1}
    assert left == {900: None, 1000: 2, 1500: 2}
    jobs = as_json("ls")["jobs"]
    assert [(job["job"], job["checkpoints"], job["lines"]) for job in jobs] == [("llama", 5, 2)]
    assert "llama" in ckptd("ls")


def test_a_line_that_has_only_begun_is_drawn(root: Path) -> None:
    ckptd("rollback", "llama", "--to", "900", "--reason", "spike")
    assert "> generation 2 goes on from step 900.g1 (spike)" in ckptd("ls", "llama")


def test_show(root: Path) -> None:
    body = as_json("show", "llama", "--tensors")
    assert (body["step"], body["generation"], body["parent"]) == (1500, 1, {"step": 1000, "generation": 1})
    assert [one["name"] for one in body["listed"]] == ["w", "own"] and body["files"] == 2
    text = ckptd("show", f"{root}/llama/step-00001500.g00001")
    assert "step 1000.g1" in text and "own" not in text
    assert "own  I32 [30000]" in ckptd("show", "llama/step-1500", "--tensors")


def test_verify_finds_and_repairs(root: Path) -> None:
    directory = root / "llama" / "step-00001500.g00001"
    assert "nothing is damaged" in ckptd("verify", "llama")
    before = (directory / FILE).read_bytes()
    w_at = before.index(np.arange(1500, 1540, dtype="<i4").tobytes())
    flip(directory / FILE, w_at + 66_000)
    body = as_json("verify", "llama", code=3)
    assert body["repairable"]["blocks"] >= 1 and body["repaired"] is None and body["lost"] == []
    assert "--repair does it" in ckptd("verify", "llama", code=3)
    assert (directory / FILE).read_bytes() != before, "it was not asked to"
    assert "repaired" in ckptd("verify", "llama", "--repair")
    assert (directory / FILE).read_bytes() == before
    assert as_json("verify", "llama")["damaged"] == []


def test_what_cannot_be_repaired_is_named(root: Path) -> None:
    directory = root / "llama" / "step-00001500.g00001"
    data = (directory / FILE).read_bytes()
    own_at = data.index(np.arange(40, dtype="<i4").tobytes()) + 70_000
    flip(directory / FILE, own_at)
    body = as_json("verify", "llama", "--repair", code=3)
    (lost,) = body["lost"]
    begin = own_at // 65536 * 65536
    assert (lost["object"], lost["rank"], lost["begin"]) == (FILE, 0, begin)
    assert "own" in lost["tensors"] and lost["end"] <= begin + 65536
    shown = ckptd("verify", "llama", "--repair", code=3)
    assert f"lost: {FILE} (rank 0) bytes {begin:,} to " in shown and "own" in shown


def test_prune_does_what_its_dry_run_says(root: Path) -> None:
    ckptd("pin", "llama/step-900", "--reason", "paper, table 2")
    planned = as_json("prune", "llama", "--keep", "last=1", "--dry-run")
    assert there(root) == [900, 1000, 1500] and planned["dry_run"] and planned["removed"] == []
    assert steps(planned["remove"]) == ["1000.g1"]
    assert "would be removed (dry run)" in ckptd("prune", "llama", "--keep", "last=1", "--dry-run")
    done = as_json("prune", "llama", "--keep", "last=1")
    assert done["removed"] == done["remove"] == planned["remove"] and done["keep"] == planned["keep"]
    why = {each["step"]: each["why"] for each in done["keep"]}
    assert why[900] == ["pinned: paper, table 2"] and why[1500] == ["newest verified", "last"]
    assert there(root) == [900, 1500]
    assert as_json("unpin", "llama/step-900")["was_pinned"]
    assert "1 checkpoints removed" in ckptd("prune", "llama", "--keep", "last=1")
    assert there(root) == [1500]


def test_rollback_is_planned_then_done(root: Path) -> None:
    command = ["rollback", "llama", "--to", "900", "--reason", "loss spike"]
    planned = as_json(*command, "--dry-run")
    assert not (root / "llama" / "lines").exists()
    assert steps(planned["left"]) == ["1500.g1", "1000.g1"] and planned["daemon_asked"] is False
    done = as_json(*command)
    assert done == {**planned, "dry_run": False} and done["generation"] == 2
    assert there(root) == [900, 1000, 1500]
    assert steps([as_json("ls", "llama")["newest"]]) == ["900.g1"]
    assert "begins at step 1500.g1" in ckptd("rollback", "llama", "--to", "1500.g1", "--reason", "not so bad")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["ls", "nobody"], 5, "ckptd ls shows the jobs"),
        (["show", "llama/step-7"], 5, "ckptd ls llama"),
        (["verify", "nobody"], 5, "no checkpoint"),
        (["pin", "llama/step-7", "--reason", "x"], 5, "step 7"),
        (["prune", "llama", "--keep", "last=none"], 2, "--keep last=3,hourly=24,daily=7"),
        (["prune", "llama", "--keep", "last=0"], 2, "keep at least last=1"),
        (["rollback", "llama", "--to", "950", "--reason", "x"], 5, "900"),
        (["rollback", "llama", "--to", "9.5", "--reason", "x"], 2, "N or N.gG"),
        (["rollback", "llama", "--to", "900", "--reason", ""], 2, "--reason TEXT"),
        (["rollback", "llama", "--to", "900", "--reason", "x", "--address", "127.0.0.1:9"], 6, ""),
        (["verify", "../llama"], 5, "no checkpoint"),
    ],
)
def test_a_wrong_call_says_what_why_and_what_next(
    arguments: list[str], code: int, words: str, root: Path
) -> None:
    error = refused(*arguments)
    assert error.exit_code == code and words in str(error), str(error)
    assert there(root) == [900, 1000, 1500] and not (root / "llama" / "lines").exists()


def test_a_rollback_to_what_is_damaged_is_refused_with_the_way_out(root: Path) -> None:
    (root / "llama" / "step-00000900.g00001" / FILE).unlink()
    error = refused("rollback", "llama", "--to", "900", "--reason", "x")
    assert error.exit_code == 2 and "ckptd verify llama/step-900 --repair" in str(error)


def test_a_damaged_manifest_is_an_error_of_corruption(root: Path) -> None:
    (root / "llama" / "step-00001500.g00001" / MANIFEST_NAME).write_bytes(b"{}")
    assert refused("show", "llama/step-1500").exit_code == 3


def test_a_process_ends_with_the_code_and_stdout_is_only_data(root: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ckptd.cli.main", *arguments], capture_output=True, text=True, timeout=60
        )

    pruned = run("prune", "llama", "--keep", "last=1", "--json")
    assert pruned.returncode == 0 and pruned.stderr == "", "no progress where nobody looks"
    assert steps(json.loads(pruned.stdout)["removed"]) == ["900.g1", "1000.g1"]
    wrong = run("show", "llama/step-900")
    assert (wrong.returncode, wrong.stdout) == (5, "") and wrong.stderr.startswith(
        "ckptd: no checkpoint of step"
    )
