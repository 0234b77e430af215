"""Prune: what stays stays, whatever the history, and nothing half removed is ever seen."""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from storagekit import write_split

from ckptd.errors import InvalidRequest, NotFound, Unreachable
from ckptd.image.manifest import MANIFEST_NAME
from ckptd.layout.placements import Replicate
from ckptd.storage import catalog, marks, retention, rollback, writing
from ckptd.storage.lines import Key
from ckptd.storage.local_store import LocalStore
from ckptd.storage.reading import open_checkpoint
from ckptd.storage.retention import Policy

NOW = 1_750_000_000.0
FILE = "rank-00000.safetensors"


@pytest.fixture
def root() -> Iterator[Path]:
    """On memory: what is synced here is not what is tested."""
    with tempfile.TemporaryDirectory(prefix="ckptd-test-", dir="/dev/shm") as directory:
        yield Path(directory)


def where(root: Path, key: Key) -> Path:
    return root / "job" / catalog.entry_of(key).directory


def put(root: Path, key: Key, parent: Key | None, written: float = NOW, *, publish: bool = True) -> None:
    """A tiny checkpoint, written at that time."""
    state = {"w": np.arange(7, dtype="<i4") + key[1]}
    parts = write_split(where(root, key), state, (1,), (Replicate(),), publish=False, step=key[1])
    if publish:
        heading = writing.Heading("job", key[1], key[0], parent=parent)
        writing.publish(LocalStore(where(root, key)), heading, parts)
    for path in (*where(root, key).iterdir(), where(root, key)):
        os.utime(path, (written, written))


def line(root: Path, generation: int, steps: list[int], parent: Key | None = None) -> None:
    for step in steps:
        put(root, (generation, step), parent)
        parent = (generation, step)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def there(root: Path) -> list[Key]:
    return sorted(map(catalog.key_of, catalog.entries(str(root), "job")))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []


def whole(root: Path, key: Key) -> bool:
    with open_checkpoint(str(where(root, key))) as checkpoint:
        return checkpoint.verify() == []


def prune(root: Path, policy: str) -> retention.Done:
    return retention.execute(plan(root, policy), lambda: NOW)


def plan(root: Path, policy: str) -> retention.Plan:
    return retention.plan(str(root), "job", Policy.parse(policy), NOW)


def test_counted_per_line(root: Path) -> None:
    line(root, 1, [10, 20, 30, 40])
    rollback.execute(rollback.plan(str(root), "job", 20, "x", NOW))
    line(root, 3, [30, 40, 50], (1, 20))
    assert prune(root, "last=1").removed == [(1, 10), (1, 20), (1, 30), (3, 30), (3, 40)]
    assert there(root) == [(1, 40), (3, 50)], "one of each line"


def test_the_newest_verified_stays_and_newer_damaged_ones_do_not_count(root: Path) -> None:
    line(root, 1, [10, 20, 30, 40])
    flip(where(root, (1, 40)) / FILE)
    (where(root, (1, 30)) / FILE).unlink()
    made = plan(root, "last=1")
    kept = {each.key: each.why for each in made.keep}
    assert "newest verified" in kept[1, 20] and "last" in kept[1, 20]
    assert kept[1, 40] == kept[1, 30] == ("damaged, may be repaired",)
    assert made.remove == ((1, 10),)


def test_nothing_is_removed_where_nothing_verifies(root: Path) -> None:
    line(root, 1, [10, 20, 30])
    for step in (10, 20, 30):
        flip(where(root, (1, step)) / FILE)
    assert prune(root, "last=1").removed == [] and len(there(root)) == 3


def test_a_store_that_does_not_answer_makes_no_plan(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line(root, 1, [10, 20])

    def fail(*_: object) -> None:
        raise Unreachable("nobody answers")

    monkeypatch.setattr(retention, "open_checkpoint", fail)
    with pytest.raises(Unreachable):
        plan(root, "last=1")


def test_what_a_rollback_goes_on_from_stays_until_there_is_something_newer(root: Path) -> None:
    line(root, 1, [900, 1000, 1500])
    rollback.execute(rollback.plan(str(root), "job", 900, "x", NOW))
    prune(root, "last=1")
    assert there(root) == [(1, 900), (1, 1500)]
    assert catalog.newest(str(root), "job")[0] == catalog.Entry(900, 1)


def test_periods_keep_the_newest_of_each(root: Path) -> None:
    hour = 3600.0
    for number, age in enumerate((50.0, 49.5, 26.0, 25.0, 3.0, 2.9, 1.0, 0.0)):
        put(root, (1, number), (1, number - 1) if number else None, NOW - age * hour)
    made = plan(root, "hourly=2,daily=3")
    why = {each.key[1]: each.why for each in made.keep}
    day = datetime.fromtimestamp(NOW, UTC)
    assert sorted(why) == [1, 3, 6, 7] and f"daily {day:%Y-%m-%d}" in why[7]
    assert f"hourly {day:%Y-%m-%d %H}" in why[7] and why[6][0].startswith("hourly")


@pytest.mark.parametrize(
    "text", ["", "last=0", "last", "last=-1", "last=1,last=2", "yearly=3", "last=x", "last=1,"]
)
def test_a_policy_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--keep"):
        Policy.parse(text)


def test_a_pin_and_a_lease_keep_until_they_end(root: Path) -> None:
    line(root, 1, [10, 20, 30])
    marks.pin(LocalStore(where(root, (1, 10))), "paper", NOW)
    with marks.reading(LocalStore(where(root, (1, 20)))):
        made = retention.plan(str(root), "job", Policy(last=1), time.time())
        assert made.remove == ()
    assert [each.why for each in made.keep if each.key == (1, 10)] == [("pinned: paper",)]
    assert marks.unpin(LocalStore(where(root, (1, 10)))) and not marks.unpin(LocalStore(where(root, (1, 10))))
    assert prune(root, "last=1").removed == [(1, 10), (1, 20)]


@pytest.mark.parametrize("kind", ["read", "pinned"])
def test_who_begins_between_plan_and_removal_is_spared(root: Path, kind: str) -> None:
    line(root, 1, [10, 20, 30])
    made = plan(root, "last=1")

    def begin(url: str) -> None:
        store = LocalStore(Path(url))
        if kind == "read":
            store.put(f"lease-{int(NOW) + 60:012}-{'0' * 16}", [b""])
        else:
            marks.pin(store, "paper", NOW)

    done = retention.execute(made, lambda: NOW, begin)
    assert done.removed == [] and [each.key for each in done.spared] == [(1, 10), (1, 20)]
    assert whole(root, (1, 10)) and not any(map(marks.is_doom, names(where(root, (1, 10)))))


def test_no_reader_begins_while_a_prune_is_at_it(root: Path) -> None:
    line(root, 1, [10])
    store = LocalStore(where(root, (1, 10)))
    store.put(marks.doom_name(time.time()), [b""])
    with pytest.raises(NotFound, match="being removed"), marks.reading(store):
        pass
    with pytest.raises(NotFound):
        marks.pin(store, "paper", time.time())
    assert not marks.leases(store.list(), 0)[0], "a reader that was refused leaves nothing"


def test_what_a_dead_prune_or_reader_left_ends_by_itself(root: Path) -> None:
    line(root, 1, [10, 20])
    store = LocalStore(where(root, (1, 20)))
    store.put(marks.doom_name(time.time() - marks.DOOM_S - 5), [b""])
    with marks.reading(store):
        pass
    LocalStore(where(root, (1, 10))).put(f"lease-{int(NOW) - 60:012}-{'0' * 16}", [b""])
    assert prune(root, "last=1").removed == [(1, 10)]
    assert not where(root, (1, 10)).exists()


def test_a_prune_that_took_too_long_gives_up(root: Path) -> None:
    line(root, 1, [10, 20])
    clock = iter([NOW, *[NOW + marks.DOOM_S] * 9])
    done = retention.execute(plan(root, "last=1"), lambda: next(clock))
    assert done.removed == [] and "took 3600 s" in done.spared[0].why[0]
    assert whole(root, (1, 10))


def test_a_full_disk_can_be_pruned(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line(root, 1, [10, 20])
    from ckptd.storage import local_store

    def full(descriptor: int, view: memoryview) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local_store, "_write_all", full)
    assert prune(root, "last=1").removed == [(1, 10)]
    assert there(root) == [(1, 20)]


def test_a_lease_ends_with_its_reader_and_only_where_a_prune_could_come(root: Path) -> None:
    line(root, 1, [10])
    store = LocalStore(where(root, (1, 10)))
    with marks.leased(store):
        assert len(marks.leases(store.list(), time.time())[0]) == 1
    assert marks.leases(store.list(), 0) == ([], [])
    shutil.move(where(root, (1, 10)), root / "elsewhere")
    before = names(root / "elsewhere")
    with marks.leased(LocalStore(root / "elsewhere")):
        assert names(root / "elsewhere") == before


def test_leftovers_are_taken_when_nobody_wrote_to_them_for_long(root: Path) -> None:
    line(root, 1, [10])
    put(root, (1, 20), None, NOW - retention.GRACE_S - 60, publish=False)
    put(root, (1, 30), None, NOW - retention.GRACE_S + 60, publish=False)
    put(root, (1, 40), None, NOW, publish=False)
    LocalStore(where(root, (1, 40))).put(marks.doom_name(NOW), [b""])
    made = plan(root, "last=1")
    assert [(each.key, each.why) for each in made.garbage] == [
        ((1, 20), "left by a writer"),
        ((1, 40), "left by a prune"),
    ]
    assert retention.execute(made, lambda: NOW).collected == [(1, 20), (1, 40)]
    assert names(root / "job") == ["step-00000010.g00001", "step-00000030.g00001"]


def test_what_was_published_after_the_plan_is_no_leftover(root: Path) -> None:
    line(root, 1, [10])
    put(root, (1, 20), None, NOW - retention.GRACE_S - 60, publish=False)
    made = plan(root, "last=1")
    shutil.rmtree(where(root, (1, 20)))
    put(root, (1, 20), (1, 10))
    assert retention.execute(made, lambda: NOW).collected == [] and whole(root, (1, 20))


def test_wherever_a_prune_dies_a_checkpoint_is_whole_or_not_there(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deletes = 0
    original = LocalStore.delete

    def one(self: LocalStore, name: str) -> None:
        nonlocal deletes
        deletes -= 1
        if deletes < 0:
            raise Died
        original(self, name)

    monkeypatch.setattr(LocalStore, "delete", one)
    line(root, 1, [10, 20])
    for after in range(5):
        if not there(root)[1:]:
            shutil.rmtree(where(root, (1, 10)), ignore_errors=True)
            put(root, (1, 10), None)
        deletes = after
        try:
            prune(root, "last=1")
        except Died:
            assert there(root) == [(1, 20)] if after else whole(root, (1, 10))
        deletes = 99
    assert prune(root, "last=1").removed == [] and there(root) == [(1, 20)]


# Any history


@dataclass
class History:
    """What a job did, told by itself: no code under test is asked."""

    paths: dict[Key, tuple[Key, ...]] = field(
        default_factory=dict
    )  # each checkpoint's line, the newest first
    times: dict[Key, float] = field(default_factory=dict)
    parents: dict[Key, Key | None] = field(default_factory=dict)
    rollbacks: list[tuple[int, Key]] = field(default_factory=list)  # generation, where it goes back to
    now_at: tuple[Key, ...] = ()  # the line that the job is on

    @classmethod
    def of(cls, events: list[tuple[str, int, int]]) -> History:
        self, generation, step, path, written = cls(), 1, 0, (), NOW - 40 * 86_400
        for kind, number, minutes in events:
            written += 60.0 * minutes
            if kind == "crash":
                generation += 1
            elif kind == "rollback" and self.paths:
                back = sorted(self.paths)[number % len(self.paths)]
                self.rollbacks.append((generation + 1, back))
                generation, step, path = generation + 2, back[1], self.paths[back]
            else:
                step += 1 + number % 3
                key = (generation, step)
                self.parents[key], path = path[0] if path else None, (key, *path)
                self.paths[key], self.times[key] = path, written
        self.now_at = path
        return self

    def lines(self) -> list[list[Key]]:
        """Each checkpoint in one line: the job's own first, then those with the newest heads."""
        heads = sorted(set(self.paths) - set(self.parents.values()), reverse=True)
        taken: set[Key] = set()
        found = []
        for path in (self.now_at, *(self.paths[head] for head in heads)):
            found.append([key for key in path if key not in taken])
            taken.update(path)
        return [own for own in found if own]

    def left(self) -> set[Key]:
        """What a rollback left, and none came back to."""
        found: set[Key] = set()
        for generation, back in self.rollbacks:
            found |= {key for key in self.paths if key[0] < generation} - set(self.paths[back])
        return found - set(self.now_at)

    def expected(self, marked: dict[Key, str], policy: Policy) -> set[Key]:
        """What has to stay, and nothing else: computed the slow and obvious way."""
        bad = {key for key, mark in marked.items() if mark in ("data", "manifest", "gone")}
        order = [*self.now_at, *sorted(set(self.paths) - set(self.now_at) - self.left(), reverse=True)]
        newest = next((key for key in order if key not in bad), None)
        if newest is None:
            return set(self.paths)
        newer_damaged = set(order[: order.index(newest)])
        kept = {newest} | newer_damaged | {key for key, mark in marked.items() if mark in ("pin", "lease")}
        for own in self.lines():
            counted = [key for key in own if key not in newer_damaged]
            kept.update(counted[: policy.last])
            for count, seconds in ((policy.hourly, 3600), (policy.daily, 86_400)):
                by_period: dict[int, list[Key]] = defaultdict(list)
                for key in counted:
                    by_period[int(self.times[key] // seconds)].append(key)
                seen: list[int] = []
                for key in counted:
                    period = int(self.times[key] // seconds)
                    if period not in seen and len(seen) < count:
                        seen.append(period)
                        kept.add(by_period[period][0])
        return kept

    def write(self, root: Path, marked: dict[Key, str]) -> None:
        for key, parent in self.parents.items():
            put(root, key, parent, self.times[key])
        for generation, back in self.rollbacks:
            made = rollback.Rollback(str(root), "job", rollback.Start(generation, back, "x", int(NOW)), ())
            rollback.execute(made)
        for key, mark in marked.items():
            inside = where(root, key)
            written = (inside / MANIFEST_NAME).stat().st_mtime
            if mark == "pin":
                marks.pin(LocalStore(inside), "x", NOW)
            elif mark in ("lease", "ended"):
                end = int(NOW) + (60 if mark == "lease" else -60)
                (inside / f"lease-{end:012}-{'0' * 16}").touch()
            elif mark == "data":
                flip(inside / FILE)
            elif mark == "manifest":
                flip(inside / MANIFEST_NAME)
            elif mark == "gone":
                (inside / FILE).unlink()
            os.utime(inside / MANIFEST_NAME, (written, written))


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["save"] * 6 + ["crash", "rollback"]), st.integers(0, 99), st.integers(0, 2000)
    ),
    min_size=1,
    max_size=14,
)
MARKS = st.lists(
    st.sampled_from([""] * 8 + ["pin", "lease", "ended", "data", "manifest", "gone"]),
    min_size=14,
    max_size=14,
)
POLICIES = st.builds(Policy, st.integers(0, 3), st.integers(0, 4), st.integers(0, 3)).filter(
    lambda policy: policy != Policy()
)


class Died(Exception):
    """The process that prunes is killed here."""


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def any_history(events: list[tuple[str, int, int]], given: list[str], policy: Policy, seed: int) -> None:
    history = History.of(events)
    marked = {key: mark for key, mark in zip(sorted(history.paths), given, strict=False) if mark}
    with tempfile.TemporaryDirectory(prefix="ckptd-test-", dir="/dev/shm") as directory:
        root = Path(directory)
        history.write(root, marked)
        before, resumed = files(root), catalog.newest(str(root), "job")
        made = retention.plan(str(root), "job", policy, NOW)
        expected = history.expected(marked, policy)
        assert files(root) == before, "a plan changes nothing"
        assert {each.key for each in made.keep} == expected
        assert set(made.remove) == set(history.paths) - expected and made.garbage == ()

        die_in(root, made, random.Random(seed))
        after = files(root)
        for key in history.paths:
            named = {name: data for name, data in before.items() if f"/{where(root, key).name}/" in name}
            kept = {name: after.get(name) for name in named}
            if key in expected or kept == named:
                assert kept == named, (key, "it has to stay, every byte of it")
            else:
                assert f"job/{where(root, key).name}/{MANIFEST_NAME}" not in after, (
                    key,
                    "half of it is visible",
                )
        assert catalog.newest(str(root), "job")[0] == resumed[0]

        again = retention.plan(str(root), "job", policy, NOW)
        assert {each.key for each in again.keep} == expected, "the same again after it was interrupted"
        retention.execute(again, lambda: NOW)
        assert set(there(root)) == expected
        assert len(names(root / "job")) == len(expected) + bool(history.rollbacks), "no garbage stays"
        third = retention.plan(str(root), "job", policy, NOW)
        assert {each.key for each in third.keep} == expected and third.remove == third.garbage == ()


def die_in(root: Path, made: retention.Plan, chance: random.Random) -> None:
    """Executes a plan until a call of the store that chance chooses."""
    calls = chance.randrange(1 + 6 * len(made.remove))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("put", "delete", "list", "remove"):
            original = getattr(LocalStore, name)

            def one(*args: object, original: object = original) -> object:
                nonlocal calls
                calls -= 1
                if calls < 0:
                    raise Died
                return original(*args)  # type: ignore[operator]

            patch.setattr(LocalStore, name, one)
        try:
            retention.execute(made, lambda: NOW)
        except Died:
            return


@given(EVENTS, MARKS, POLICIES, st.integers(0, 2**32))
@settings(deadline=None, max_examples=30, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_history_keeps_what_has_to_stay(
    events: list[tuple[str, int, int]], given: list[str], policy: Policy, seed: int
) -> None:
    any_history(events, given, policy, seed)


@pytest.mark.soak
@given(EVENTS, MARKS, POLICIES, st.integers(0, 2**32))
@settings(deadline=None, max_examples=2000, suppress_health_check=list(HealthCheck))
def test_any_of_many_histories_keeps_what_has_to_stay(
    events: list[tuple[str, int, int]], given: list[str], policy: Policy, seed: int
) -> None:
    any_history(events, given, policy, seed)
