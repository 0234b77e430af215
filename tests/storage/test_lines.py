"""Lines: what goes on from what, where a job resumes, what a rollback leaves."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from storagekit import write_split

from ckptd.errors import CorruptCheckpoint, InvalidRequest, NotFound
from ckptd.image.manifest import MANIFEST_NAME
from ckptd.layout.placements import Replicate
from ckptd.storage import catalog, rollback, snapshot, writing
from ckptd.storage.lines import Key, Lines, Start
from ckptd.storage.local_store import LocalStore
from ckptd.storage.store import AlreadyThere


def straight(generation: int, steps: list[int], parent: Key | None = None) -> dict[Key, Key | None]:
    before = [parent, *((generation, step) for step in steps)]
    return {(generation, step): before[i] for i, step in enumerate(steps)}


def start(generation: int, parent: Key) -> Start:
    return Start(generation, parent, "loss spike", 1_700_000_000)


def test_generations_that_go_on_are_one_line() -> None:
    lines = Lines(straight(1, [10, 20]) | straight(2, [30, 40], (1, 20)))
    assert lines.newest == ((2, 40), (2, 30), (1, 20), (1, 10))
    assert lines.heads == ((2, 40),) and len(lines.lines) == 1 and lines.abandoned == {}


def test_going_back_leaves_a_line_and_both_stay() -> None:
    stored = straight(1, [900, 1000, 1500])
    begun = Lines(stored, [start(2, (1, 900))])
    assert begun.tip == (1, 900) and begun.newest == ((1, 900),)
    assert set(begun.abandoned) == {(1, 1000), (1, 1500)}
    assert begun.candidates == ((1, 900),), "what was left is no way back"
    went_on = Lines(stored | straight(3, [1000, 1100], (1, 900)), [start(2, (1, 900))])
    assert went_on.newest == ((3, 1100), (3, 1000), (1, 900))
    newest, old = went_on.lines
    assert newest.newest and newest.own == ((3, 1100), (3, 1000), (1, 900)) and newest.parent is None
    assert old.own == ((1, 1500), (1, 1000)) and old.parent == (1, 900) and not old.newest


def test_a_line_that_has_only_begun_is_shown() -> None:
    begun = Lines(straight(1, [900, 1000]), [start(2, (1, 900))])
    first = begun.lines[0]
    assert (first.head, first.parent, first.newest, first.start) == (None, (1, 900), True, start(2, (1, 900)))


def test_a_later_rollback_may_come_back_to_what_an_earlier_one_left() -> None:
    lines = Lines(straight(1, [10, 20, 30]), [start(2, (1, 10)), start(3, (1, 30))])
    assert lines.newest == ((1, 30), (1, 20), (1, 10)) and lines.abandoned == {}


def test_a_parent_that_is_gone_stands_for_the_one_before_it() -> None:
    stored = straight(1, [10, 20, 30]) | straight(3, [25, 35], (1, 20)) | straight(4, [45], (3, 35))
    starts = [start(2, (1, 20))]
    for gone in ((1, 20), (3, 35), (3, 25)):
        del stored[gone]
        lines = Lines(stored, starts)
        assert (1, 30) not in lines.newest and lines.newest[-1] == (1, 10)
        assert (1, 30) in lines.abandoned, gone
    assert lines.newest == ((4, 45), (1, 10)), "all of generation 3 is gone, its start is not"


def test_an_unknown_or_impossible_parent_is_the_one_before_in_its_generation() -> None:
    lines = Lines({(1, 10): None, (1, 20): None, (1, 30): (1, 40), (2, 5): None})
    assert lines.path((1, 30)) == ((1, 30), (1, 20), (1, 10))
    assert lines.parents[2, 5] is None
    assert lines.candidates == ((2, 5), (1, 30), (1, 20), (1, 10)), "the others come last"


def test_every_history_of_rollbacks_is_followed() -> None:
    """A job that trains, stores, crashes and rolls back at random: the newest line is what it remembers."""
    seed = 20
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(200):
        generation, step, last = 1, 0, None
        stored: dict[Key, Key | None] = {}
        starts: list[Start] = []
        truth: dict[Key, tuple[Key, ...]] = {}
        path: tuple[Key, ...] = ()
        for _ in range(chance.randrange(1, 25)):
            step += chance.randrange(1, 4)
            stored[generation, step] = last
            last = (generation, step)
            path = (last, *path)
            truth[last] = path
            event = chance.random()
            if event < 0.3:  # a crash
                generation += 1
            elif event < 0.5:  # a rollback
                last = chance.choice(sorted(stored))
                starts.append(start(generation + 1, last))
                generation, step, path = generation + 2, last[1], truth[last]
        lines = Lines(stored, starts)
        assert lines.newest == path, (seed, stored, starts)
        assert not set(lines.abandoned) & set(path)
        assert sorted(key for line in lines.lines for key in line.own) == sorted(stored)


def test_a_start_is_read_back_or_refused() -> None:
    written = start(7, (3, 900)).write("llama")
    assert Start.read(written, 7) == start(7, (3, 900))
    for at in range(0, len(written) - 1, 3):
        damaged = bytearray(written)
        damaged[at] ^= 1
        with pytest.raises(CorruptCheckpoint):
            Start.read(bytes(damaged), 7)
    with pytest.raises(CorruptCheckpoint):
        Start.read(written, 8)


def store_line(root: Path, generation: int, steps: list[int], parent: Key | None = None) -> None:
    """Checkpoints as daemons publish them, each named by its parent."""
    state = {"w": np.arange(40_000, dtype="<i4") + steps[0]}
    for step in steps:
        directory = root / "job" / catalog.Entry(step, generation).directory
        parts = write_split(directory, state, (1,), (Replicate(),), publish=False, step=step)
        heading = writing.Heading("job", step, generation, parent=parent)
        writing.publish(LocalStore(directory), heading, parts)
        parent = (generation, step)


def test_rolling_back_is_a_generation_and_resume_takes_it(tmp_path: Path) -> None:
    store_line(tmp_path, 1, [900, 1000, 1500])
    store = str(tmp_path)
    assert catalog.newest(store, "job") == (catalog.Entry(1500, 1), [])
    made = rollback.plan(store, "job", 900, "loss spike at 940", 1_700_000_000.5)
    assert made.left == ((1, 1500), (1, 1000)) and made.start.generation == 2
    assert catalog.newest(store, "job")[0] == catalog.Entry(1500, 1), "a plan changes nothing"
    rollback.execute(made)
    assert catalog.newest(store, "job") == (catalog.Entry(900, 1), [])
    assert snapshot.generations(store, "job") == (2, 2), "the next generation is greater than the start's"
    with pytest.raises(AlreadyThere):
        rollback.execute(made)
    store_line(tmp_path, 3, [1000], (1, 900))
    assert catalog.newest(store, "job")[0] == catalog.Entry(1000, 3)
    assert len(catalog.entries(store, "job")) == 4, "both lines stay"
    (tmp_path / "job" / "step-00001000.g00003" / MANIFEST_NAME).write_bytes(b"{}")
    found, skipped = catalog.newest(store, "job")
    assert found == catalog.Entry(900, 1), "never what the rollback left"
    assert [each.entry for each in skipped] == [catalog.Entry(1000, 3)]


def test_a_rollback_to_nothing_or_to_what_is_broken_is_refused(tmp_path: Path) -> None:
    store_line(tmp_path, 1, [10, 20])
    with pytest.raises(NotFound, match="step 15"):
        rollback.plan(str(tmp_path), "job", 15, "x", 0)
    with pytest.raises(InvalidRequest, match="--reason"):
        rollback.plan(str(tmp_path), "job", 10, " ", 0)
    (tmp_path / "job" / "step-00000010.g00001" / "rank-00000.safetensors").unlink()
    with pytest.raises(InvalidRequest, match="nothing can resume"):
        rollback.plan(str(tmp_path), "job", 10, "x", 0)


def test_a_damaged_start_stops_resuming_and_its_generation_counts(tmp_path: Path) -> None:
    store_line(tmp_path, 1, [10, 20])
    rollback.execute(rollback.plan(str(tmp_path), "job", 10, "x", 0))
    (tmp_path / "job" / "lines" / "g00002.json").write_bytes(b"{}")
    with pytest.raises(CorruptCheckpoint, match="ckptd rollback job"):
        catalog.newest(str(tmp_path), "job")
    again = rollback.plan(str(tmp_path), "job", 10, "x", 0)
    assert again.start.generation == 3
    rollback.execute(again)
    assert catalog.newest(str(tmp_path), "job")[0] == catalog.Entry(10, 1)


def test_only_the_beginnings_of_manifests_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store_line(tmp_path, 1, list(range(1, 12)))
    read = []
    original = LocalStore.open

    def counting(self: LocalStore, name: str) -> object:
        reader = original(self, name)
        fill = reader.read_into
        reader.read_into = lambda start, into: (read.append(len(into)), fill(start, into))  # type: ignore[method-assign]
        return reader

    monkeypatch.setattr(LocalStore, "open", counting)
    known = catalog.survey(str(tmp_path), "job")
    assert len(known.lines.newest) == 11 and len(read) == 11 and max(read) <= 1024


def test_latest_is_the_newest_of_the_newest_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTD_STORE", str(tmp_path))
    from ckptd.storage.reading import open_checkpoint

    store_line(tmp_path, 1, [10, 20])
    rollback.execute(rollback.plan(str(tmp_path), "job", 10, "x", 0))
    assert open_checkpoint("ckptd://job/latest").manifest.step == 10
    assert open_checkpoint("ckptd://job/step-20").manifest.step == 20
