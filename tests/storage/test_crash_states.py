"""A crash at any point of save, prune and rollback leaves a store that opens as old or as new.

The calls of a run are recorded; at each point between two of them, every state that the weakest disk may
then hold (`crash_states`) is written to a directory and opened: no checkpoint is half there, none is missing,
and a job resumes from the old or the new one; after the run told success, from the new one.  Then the run is
done again, as the restarted process does it, and must succeed.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest
from commit_scripts import SCRIPTS, Script, check, fresh, prepare
from crash_states import SECTOR_BYTES, Disk, Tree
from failing_calls import Event, FileCalls, tree
from xxhash import xxh3_128_digest

from ckptd.errors import CkptdError
from ckptd.storage.local_store import LocalStore
from ckptd.storage.store import SCRATCH_PREFIX

_SEED = 29
_MOST = 4096  # states of one point
_CHANGING = tuple(script for script in SCRIPTS if script.name not in ("verify", "resume"))
_AGAIN = 25  # states of each script in the normal run from which it is done again


@dataclass
class Counts:
    """How much was tried."""

    points: int = 0
    states: int = 0
    opened: int = 0  # differ in what a reader looks at
    again: int = 0
    sampled: int = 0  # points with more states than are tried


@pytest.mark.parametrize("script", _CHANGING, ids=lambda script: str(script.name))
def test_every_crash_leaves_old_or_new(script: Script, tmp_path: Path) -> None:
    told(script, crashes(script, tmp_path, again=_AGAIN))


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("script", _CHANGING, ids=lambda script: str(script.name))
def test_every_crash_is_recovered_from(script: Script, tmp_path: Path) -> None:
    """As above; from every state the run is done again, and torn scratch files are states of their own."""
    told(script, crashes(script, tmp_path, again=None))


def told(script: Script, found: Counts) -> None:
    print(
        f"{found.states} crash states of {script.name} at {found.points} points, {found.opened} of them "
        f"opened as different, {found.again} done again, seed {_SEED}"
    )


def crashes(script: Script, tmp_path: Path, *, again: int | None) -> Counts:
    """Tries all crashes of a script.

    Args:
        again: from so many of the states the script is run once more; None: from all.
    """
    base, work = tmp_path / "base", tmp_path / "work"
    prepare(script, base)
    before = tree(base)
    url = fresh(base, work)
    with FileCalls(work) as calls:
        script.run(url)
    rng = random.Random(f"{_SEED} {script.name}")
    counts = Counts()
    known: set[bytes] = set()
    retried = []
    for done, state in states(before, calls.events, str(work), counts, rng):
        assert counts.sampled == 0, "so much at once is not synced that not all states can be tried"
        key = digest(done, state, scratch=again is None)
        if key in known:
            continue
        known.add(key)
        counts.opened += 1
        write(state, work)
        check(url, script, done=done, where=(script.name, counts.points, sorted(state)))
        if again is None:
            run_again(script, url, work, done=done)
            counts.again += 1
        else:
            retried.append((done, state))
    for done, state in rng.sample(retried, min(again or 0, len(retried))):
        write(state, work)
        run_again(script, url, work, done=done)
        counts.again += 1
    return counts


def states(
    before: Tree, events: list[Event], root: str, counts: Counts, rng: random.Random
) -> Iterator[tuple[bool, Tree]]:
    """Yields (whether the run had told success, state) of all crashes of a run."""
    disk = Disk(before, root)
    changing = [event for event in events if event.changes or event.name == "open"]
    points = [0, *(number for number, event in enumerate(changing, 1) if event.changes)]
    at = 0
    for point in points:
        for event in changing[at:point]:
            disk.apply(event)
        at = point
        counts.points += 1
        counts.sampled += disk.count() > _MOST
        # What fails or dies after the last change and before the return is told as nothing.
        for done in (False, True) if point == points[-1] else (False,):
            for state in disk.states(_MOST, rng):
                counts.states += 1
                yield done, state


def digest(done: bool, state: Tree, *, scratch: bool) -> bytes:
    """What distinguishes a state: everything, or all but the content of files that no reader opens."""
    parts = [bytes([done])]
    for path, data in sorted(state.items()):
        hidden = not scratch and PurePosixPath(path).name.startswith(SCRATCH_PREFIX)
        content = b"/" if data is None else b"?" if hidden else xxh3_128_digest(data)
        parts.append(path.encode() + b"\0" + content)
    return bytes(xxh3_128_digest(b"\0".join(parts)))


def write(state: Tree, root: Path) -> None:
    """Makes a directory hold a state, and nothing else."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for path, data in sorted(state.items()):
        if data is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(data)


def run_again(script: Script, url: str, work: Path, *, done: bool) -> None:
    """The restarted process does the same: it succeeds, or tells that it was done already."""
    with FileCalls(work) as calls:
        try:
            script.run(url)
        except CkptdError as error:
            assert done or not script.retried, error
    assert calls.held == {}
    check(url, script, done=True, where=(script.name, "again"))


def test_the_disk_loses_keeps_and_tears(tmp_path: Path) -> None:
    """The model itself: what one put may leave before and after each of its syncs."""
    (tmp_path / "s").mkdir()
    before = tree(tmp_path)
    with FileCalls(tmp_path) as calls:
        LocalStore(tmp_path / "s").put("x", [bytes(range(1, 256)) * 5])  # 1275 bytes
    content = bytes(range(1, 256)) * 5
    disk = Disk(before, str(tmp_path))
    rng = random.Random(_SEED)
    seen: list[tuple[str, set[bytes | None]]] = []
    for event in calls.events:
        disk.apply(event)
        if event.changes:
            found = {
                next((data for path, data in state.items() if path != "s"), None)
                for state in disk.states(_MOST, rng)
            }
            seen.append((event.name, found))
    torn = {content[:SECTOR_BYTES], content[: 2 * SECTOR_BYTES], bytes(len(content)), b"", content}
    first = [name for name, _ in seen].index("open")
    assert seen[first : first + 4] == [
        ("open", {None, b""}),
        ("write", {None, *torn}),
        ("fsync", {None, content}),
        ("replace", {None, content}),
    ]
    assert disk.durable() == disk.seen() == {"s": None, "s/x": content}
