"""What a store is changed by: save, prune, rollback, verify; on a small store, with what each may leave.

Before each script the store holds steps 10, 20 and 30 of one line, and what a dead writer left.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from storagekit import same

from ckptd.image import ImagePlan, TensorSpec, Variable, cell_digests, encode
from ckptd.image.variable import write_variable
from ckptd.storage import catalog, marks, retention, rollback, shares, snapshot
from ckptd.storage.lines import Key
from ckptd.storage.reading import open_checkpoint
from ckptd.storage.snapshot import SealedImage
from ckptd.storage.store import SCRATCH_PREFIX
from ckptd.storage.writing import Heading

JOB: Final = "job"
RANKS: Final = 2
WRITTEN: Final = 1_700_000_000  # seconds since 1970: the store's files
NOW: Final = WRITTEN + 3 * 86_400
_OLD: Final = frozenset({(1, 10), (1, 20), (1, 30)})


@functools.cache
def image(rank: int, step: int) -> SealedImage:
    """A rank's image: one small tensor, some 4 KiB with its header."""
    values = np.random.default_rng([rank, step]).integers(0, 99, 20, "i4")
    objects = encode({"step": step})
    plan = ImagePlan.build([TensorSpec(f"r{rank}.w", "I32", values.shape)], objects_capacity=len(objects))
    data = memoryview(bytearray(plan.image_bytes))
    data[: len(plan.header)] = plan.header
    at = plan.offset_of[f"r{rank}.w"]
    data[at : at + values.nbytes] = memoryview(values).cast("B")
    write_variable(plan, data, Variable(JOB, 1, step, rank, RANKS, objects))
    return SealedImage(rank, data, cell_digests(data))


def images(step: int) -> list[SealedImage]:
    return [image(rank, step) for rank in range(RANKS)]


def save(url: str, step: int) -> None:
    """What the daemons do of one snapshot; returns when it is durable, as their reports say."""
    store = snapshot.directory_of(url, JOB, step, 1)
    parent = snapshot.parent_of(url, JOB, 1, step, (0, 0))
    nodes = [snapshot.described([one]) for one in images(step)]
    for offered in nodes:
        shares.put_offers(store, [each.part for each in offered])
    assert shares.put_when_whole(store, range(RANKS)), "all offers were left"
    for offered in nodes:
        shared = shares.read(store, [each.part for each in offered])
        snapshot.write_parts(store, offered, shared)
    heading = Heading(JOB, step, 1, world_size=RANKS, parent=parent)
    assert snapshot.publish_when_whole(store, heading, range(RANKS)), "all parts were written"


def save_next(url: str) -> None:
    save(url, 40)


def prune(url: str) -> retention.Done:
    made = retention.plan(url, JOB, retention.Policy(last=1), NOW)
    return retention.execute(made, lambda: float(NOW))


def roll_back(url: str) -> None:
    rollback.execute(rollback.plan(url, JOB, 10, "loss spike", NOW))


def verify(url: str) -> list[Any]:
    directory = catalog.entry_of((1, 30)).directory
    with open_checkpoint(f"{url}/{JOB}/{directory}") as checkpoint, marks.reading(checkpoint.store):
        return checkpoint.verify()


def resume(url: str) -> catalog.Entry | None:
    return catalog.newest(url, JOB)[0]


@dataclass(frozen=True)
class Script:
    """A change of the store, and what there may be before, in between and afterwards."""

    name: str
    run: Callable[[str], Any]
    stays: frozenset[Key] = _OLD
    comes: frozenset[Key] = frozenset()
    goes: frozenset[Key] = frozenset()
    new: Key = (1, 30)  # where a job resumes afterwards; before, it is (1, 30)
    first: bool = False  # begins with no store at all
    retried: bool = True  # a second run after an undisturbed one is fine

    @property
    def old(self) -> Key | None:
        return None if self.first else (1, 30)


SCRIPTS: Final = (
    Script("save", save_next, comes=frozenset({(1, 40)}), new=(1, 40)),
    Script("first save", save_next, frozenset(), frozenset({(1, 40)}), new=(1, 40), first=True),
    Script("prune", prune, frozenset({(1, 30)}), goes=frozenset({(1, 10), (1, 20)})),
    Script("rollback", roll_back, new=(1, 10), retried=False),
    Script("verify", verify),
    Script("resume", resume),
)


def prepare(script: Script, root: Path) -> None:
    """Makes the store that the script begins with, at `root/a/store`."""
    if script.first:
        root.mkdir()
        return
    url = str(root / "a" / "store")
    for step in (10, 20, 30):
        save(url, step)
    left = Path(url) / JOB / catalog.Entry(5, 1).directory
    left.mkdir()
    for name in ("rank-00000.safetensors", f"{SCRATCH_PREFIX}1-0"):
        (left / name).write_bytes(bytes(600))
    for path in (*root.rglob("*"), root):
        os.utime(path, (WRITTEN, WRITTEN))


def fresh(base: Path, root: Path) -> str:
    """Copies a prepared store to `root`, in place of what is there; returns its URL."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(base, root)
    return str(root / "a" / "store")


def check(url: str, script: Script, *, done: bool, where: object) -> None:
    """What must hold in every state: only whole checkpoints are seen, none is missing that was not removed.

    Args:
        done: the script returned, and said that it succeeded.
        where: for the message.
    """
    present = {catalog.key_of(entry) for entry in catalog.entries(url, JOB)}
    assert script.stays <= present <= script.stays | script.comes | script.goes, (where, present)
    if done:
        assert present == script.stays | script.comes, (where, present)
    for generation, step in sorted(present):
        directory = catalog.Entry(step, generation).directory
        with open_checkpoint(f"{url}/{JOB}/{directory}") as checkpoint:
            assert (checkpoint.manifest.generation, checkpoint.manifest.step) == (generation, step), where
            assert same(checkpoint, images(step)), (where, step)
    tip, skipped = catalog.newest(url, JOB)
    key = None if tip is None else catalog.key_of(tip)
    assert skipped == [] and key in (script.old, script.new), (where, key)
    assert not done or key == script.new, (where, key)
    assert key == script.new or not script.comes <= present or not script.comes, where
