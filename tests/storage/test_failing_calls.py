"""Every file call of save, prune, rollback, verify and resume fails, once and for ever.

In each case: what was whole stays whole bit for bit, nothing half is seen, the error is one of ours, no
descriptor is left open, no file is synced again after a failed sync, and the same run without the fault
succeeds and is durable then: a power loss right after it loses nothing.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commit_scripts import JOB, SCRIPTS, Script, check, fresh, prepare
from crash_states import Disk, Tree
from failing_calls import KINDS, Event, Fault, FileCalls, Killed, faults, tree

from ckptd.errors import CkptdError, NoSpace
from ckptd.storage import catalog, snapshot
from ckptd.storage.retention import Done
from ckptd.storage.store import SCRATCH_PREFIX

_SEED = 17
_FAULTS = 18  # of each script and kind in the normal run


@dataclass(frozen=True)
class Base:
    """A prepared store, its content, and the calls of an undisturbed run."""

    root: Path
    content: Tree
    clean: list[Event]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    found = {}
    for script in SCRIPTS:
        root = tmp_path_factory.mktemp("sweep") / "base"
        prepare(script, root)
        work = root.parent / "clean"
        url = fresh(root, work)
        with FileCalls(work) as calls:
            script.run(url)
        check(url, script, done=True, where="undisturbed")
        found[script.name] = Base(root, tree(root), calls.events)
    return found


def run(script: Script, url: str, root: Path, fault: Fault | None) -> tuple[FileCalls, Any]:
    """Runs a script; returns its calls, and what it returned or raised.  Any error but ours goes on."""
    outcome: Any
    with FileCalls(root, fault) as calls:
        try:
            outcome = script.run(url)
        except CkptdError as error:
            outcome = error
    return calls, outcome


def chosen(script: Script, kind: str, base: Base, soak: bool) -> list[Fault]:
    every = list(faults(kind, base.clean))
    if soak or len(every) <= _FAULTS:
        return every
    return random.Random(f"{_SEED} {script.name} {kind}").sample(every, _FAULTS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.name))
def test_a_call_fails(script: Script, kind: str, bases: dict[str, Base], tmp_path: Path) -> None:
    sweep(script, kind, bases[script.name], tmp_path, soak=False)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.name))
def test_every_call_fails(script: Script, kind: str, bases: dict[str, Base], tmp_path: Path) -> None:
    sweep(script, kind, bases[script.name], tmp_path, soak=True)


def sweep(script: Script, kind: str, base: Base, tmp_path: Path, *, soak: bool) -> None:
    tried = chosen(script, kind, base, soak)
    told: Counter[str] = Counter()
    for fault in tried:
        told[disturbed(script, fault, base, tmp_path / "work")] += 1
    outcomes = ", ".join(f"{name} {count}" for name, count in sorted(told.items()))
    print(f"{len(tried)} of {len(list(faults(kind, base.clean)))} {kind} faults of {script.name}: {outcomes}")
    assert tried or not any(Fault(kind, 0).hits(event) for event in base.clean)


def disturbed(script: Script, fault: Fault, base: Base, work: Path) -> str:
    """One run with a fault, and one without after it; returns what came of the first."""
    where = (script.name, fault)
    url = fresh(base.root, work)
    disk = Disk(base.content, str(work))
    calls = FileCalls(work, fault)
    outcome: Any = None
    with suppress(Killed), calls:
        try:
            outcome = script.run(url)
        except CkptdError as error:
            outcome = error
    assert calls.hit, where
    assert not calls.held, (where, "left open", [event.path for event in calls.held.values()])
    assert calls.synced_again() == [], where
    check_outcome(script, fault, calls, outcome, where)
    succeeded = not isinstance(outcome, CkptdError) and fault.kind != "kill"
    promised = succeeded and script.name not in ("prune", "verify", "resume")  # prune may find less to remove
    check(url, script, done=promised, where=where)
    if not fault.forever:
        litter = [path for path in tree(work) if SCRATCH_PREFIX in path and path not in base.content]
        assert litter == [] or calls.hit[0].name == "unlink", (where, litter)
    for event in calls.events:
        disk.apply(event)
    if promised:
        check_durable(disk, script, outcome, where)
    if not (succeeded and not script.retried):
        again, result = run(script, url, work, None)
        if not (isinstance(result, CkptdError) and already_done(script, url)):
            assert not isinstance(result, CkptdError), (where, "again", result)
            for event in again.events:
                disk.apply(event)
            check(url, script, done=True, where=(where, "again"))
            check_durable(disk, script, result, (where, "again"))
    if fault.kind == "kill":
        return "killed"
    if not succeeded:
        return type(outcome).__name__
    return "told damaged" if script.name == "verify" and outcome else "done"


def check_outcome(script: Script, fault: Fault, calls: FileCalls, outcome: Any, where: object) -> None:
    """Errors are told as what they are, and a run that could not read says nothing good of what it read."""
    hit = calls.hit[0]
    if fault.kind == "short":
        assert not isinstance(outcome, CkptdError), (where, outcome)
    if fault.kind in ("ENOSPC", "full") and isinstance(outcome, CkptdError):
        assert isinstance(outcome, NoSpace), (where, outcome)
    if fault.kind == "fsync" and script.name != "verify" and hit.path.count(SCRATCH_PREFIX):
        assert isinstance(outcome, CkptdError), (where, "a file that could not be synced")
    if fault.kind == "EIO" and script.name == "verify" and ".safetensors" in hit.path and hit.name != "close":
        assert outcome != [], (where, "nothing was read, and nothing is said")


def already_done(script: Script, url: str) -> bool:
    """Whether a rollback that told an error is there all the same: then a second one finds it."""
    if script.retried:
        return False
    check(url, script, done=True, where=script.name)
    return True


def check_durable(disk: Disk, script: Script, outcome: Any, where: object) -> None:
    """A power loss now: what the checkpoints consist of is there, and what is told removed is none."""
    seen, durable = disk.seen(), disk.durable()
    for key in script.stays | script.comes:
        directory = f"a/store/{JOB}/{catalog.entry_of(key).directory}"
        files = [path for path in seen if path.startswith(f"{directory}/") and is_content(path)]
        assert len(files) == 6, (where, files)
        for path in files:
            assert durable.get(path) == seen[path], (where, f"{path} is lost by a crash")
    for key in outcome.removed if isinstance(outcome, Done) else []:
        directory = f"a/store/{JOB}/{catalog.entry_of(key).directory}"
        assert f"{directory}/manifest.json" not in durable, (where, "comes back after a crash")
    for path, data in seen.items():
        if "/lines/" in path and is_content(path):
            assert durable.get(path) == data, (where, f"{path} is lost by a crash")


def is_content(path: str) -> bool:
    """Whether a file is part of a checkpoint or a line, and no mark or record."""
    return path.endswith((".json", ".safetensors", ".digests")) and SCRATCH_PREFIX not in path


def test_the_model_of_the_disk_sees_what_the_real_one_holds(bases: dict[str, Base], tmp_path: Path) -> None:
    for script in SCRIPTS:
        base = bases[script.name]
        url = fresh(base.root, tmp_path / "work")
        disk = Disk(base.content, str(tmp_path / "work"))
        calls, outcome = run(script, url, tmp_path / "work", None)
        for event in calls.events:
            disk.apply(event)
        assert disk.seen() == tree(tmp_path / "work"), script.name
        check_durable(disk, script, outcome, script.name)


@pytest.mark.parametrize("kind", ["kill", "fsync"])
def test_who_finds_a_checkpoint_may_rely_on_it(kind: str, bases: dict[str, Base], tmp_path: Path) -> None:
    """The publisher dies, or fails, before the manifest's name is synced; another node then sees it."""
    script = SCRIPTS[0]
    base = bases[script.name]
    url = fresh(base.root, tmp_path / "work")
    disk = Disk(base.content, str(tmp_path / "work"))
    linked = next(number for number, event in enumerate(base.clean) if event.name == "link")
    sync = next(n for n, event in enumerate(base.clean) if n > linked and event.name == "fsync")
    first = FileCalls(tmp_path / "work", Fault(kind, sync, forever=True))
    with suppress(Killed, CkptdError), first:
        script.run(url)
    with FileCalls(tmp_path / "work") as second:
        assert snapshot.is_published(snapshot.directory_of(url, JOB, 40, 1))
    for event in (*first.events, *second.events):
        disk.apply(event)
    assert first.hit
    check_durable(disk, script, None, kind)


# What each replaced function is to the system: the names that strace gives the calls.
_SYSTEM = {
    "open": ("openat",), "close": ("close",), "fstat": ("newfstatat",), "stat": ("newfstatat",),
    "lstat": ("newfstatat",), "preadv": ("preadv",), "write": ("write",), "unlink": ("unlink",),
    "rmdir": ("rmdir",), "mkdir": ("mkdir",), "link": ("link",), "replace": ("rename",), "fsync": (),
    "listdir": ("openat", "newfstatat", "getdents64", "getdents64", "close"),
    "scandir": ("openat", "newfstatat", "getdents64", "getdents64", "close"),
}  # fmt: skip

_ALSO = {
    "stat": "newfstatat", "fstat": "newfstatat", "lstat": "newfstatat", "preadv2": "preadv",
    "linkat": "link", "renameat": "rename", "unlinkat": "unlink", "mkdirat": "mkdir",
}  # fmt: skip


def test_nothing_reaches_the_system_by_another_way(tmp_path: Path) -> None:
    """Python's audit events and, where there is one, strace see no call that the sweep does not."""
    trace = tmp_path / "trace"
    command = [sys.executable, str(Path(__file__)), str(tmp_path / "store")]
    strace = shutil.which("strace")
    if strace is not None:
        command = [strace, "-f", "-y", "-qq", "-s", "0", "-e", "trace=file,desc", "-o", str(trace), *command]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 0, ended.stderr
    counts = json.loads(ended.stdout)
    assert counts["bypassed"] == []
    print(f"{sum(counts['calls'].values())} calls in {len(counts['calls'])} functions, none beside them")
    if strace is None:
        pytest.skip("no strace here: the audit events alone were compared")
    expected: Counter[str] = Counter()
    for name, count in counts["calls"].items():
        # A directory that is not there is not read.
        calls = _SYSTEM[name.rstrip("!")]
        for call in calls[:1] if name.endswith("!") else calls:
            expected[call] += count
    found = Counter(traced(trace.read_text(), str(tmp_path / "store" / "work")))
    # The same has several names, and libraries choose.
    for other, name in _ALSO.items():
        if other in found:
            found[name] += found.pop(other)
    print(f"{sum(found.values())} system calls in strace, the same")
    # An empty directory needs one getdents64, others two.
    directories = expected.pop("getdents64"), found.pop("getdents64")
    assert 0.5 * directories[0] <= directories[1] <= directories[0]
    assert found == expected


def traced(text: str, root: str) -> Iterator[str]:
    """The names of the system calls below a directory, in what strace wrote."""
    for line in text.splitlines():
        call = re.match(r"\d+ +(\w+)\((.*)", line)
        moved = call is not None and call[1] == "rename" and f'"{root}"' in call[2]  # by `audited` itself
        if call is not None and not moved and re.search(re.escape(root) + r'[/">]', call[2]):
            yield call[1]


def audited(root: Path) -> dict[str, Any]:
    """Runs every script undisturbed; returns its calls by name, and the audit events beside them."""
    inside: list[FileCalls] = []
    bypassed: list[str] = []

    def heard(event: str, args: tuple[Any, ...]) -> None:
        # What pathlib says of itself is no call; `scandir` comes after it.
        if inside and not inside[0].inside and event not in ("object.__getattr__", "pathlib.Path.glob"):
            paths = [os.fsdecode(a) for a in args if isinstance(a, (str, bytes, os.PathLike))]
            work = str(root / "work")
            if any(path == work or path.startswith(work + "/") for path in paths) or event.startswith("mmap"):
                bypassed.append(f"{event} {paths}")

    sys.addaudithook(heard)
    counts: Counter[str] = Counter()
    for number, script in enumerate(SCRIPTS):
        base = root / f"base-{number}"
        prepare(script, base)
        url = fresh(base, root / "copy")
        (root / "copy").rename(root / "work")
        with FileCalls(root / "work") as calls:
            inside.append(calls)
            script.run(url.replace(str(root / "copy"), str(root / "work")))
            inside.clear()
        counts.update(event.name + "!" * bool(event.error) for event in calls.events)
        (root / "work").rename(root / f"done-{number}")
    return {"calls": dict(counts), "bypassed": bypassed}


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir()
    print(json.dumps(audited(Path(sys.argv[1]))))
