"""The journal: what goes in comes out, and what it refuses."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from ckptd.coordinator.effects import CommitEntry, Entry, FinishEntry, ProtectedEntry, SpecEntry
from ckptd.coordinator.events import Spec
from ckptd.coordinator.journal import Journal
from ckptd.errors import CorruptImage, InvalidRequest, ProtocolMismatch, Unreachable
from ckptd.memory.inventory import Member, Roster, Snapshot
from ckptd.recovery.ladder import Rung
from ckptd.recovery.plan import Plan, Source, TransferOrder

ROSTER = Roster(7, (Member("n0", "r1", (0, 1), "n0:1", "n0:2"), Member("n4", "", (2, 3))), 1, Snapshot(6, 12))
ORDER = TransferOrder("n4", Rung.PARITY, ("n1",), (Source("n0", "n0:2", "n0"),), ("n0", "n1"), 1, 1 << 40)
PLAN = Plan(ROSTER, (ORDER,), "10.0.0.1", 7777, Rung.PARITY, ("n4 takes ranks 2-3 of n1",))
ENTRIES: list[Entry] = [
    SpecEntry(Spec("llama", 2, 2, 1, 1, 3)),
    CommitEntry("llama", PLAN),
    ProtectedEntry("llama"),
    FinishEntry("llama"),
    SpecEntry(Spec("other", 1, 1, 0, 5, 2)),
]


def test_what_goes_in_comes_out_in_order(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal.sqlite"
    journal = Journal(path)
    for entry in ENTRIES:
        journal.append(entry)
    journal.close()
    again = Journal(path)
    assert again.entries() == ENTRIES
    again.close()


def test_a_generation_is_committed_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    journal.append(CommitEntry("llama", PLAN))
    journal.append(CommitEntry("other", PLAN))
    with pytest.raises(InvalidRequest, match="generation 7 of job llama"):
        journal.append(CommitEntry("llama", PLAN))
    assert len(journal.entries()) == 2
    journal.close()


def test_every_entry_is_synced(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    connection = journal._connection
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,), "FULL"
    journal.close()


def test_two_coordinators_do_not_share_a_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    with pytest.raises(Unreachable, match="another coordinator"):
        Journal(tmp_path / "journal.sqlite")
    journal.close()
    Journal(tmp_path / "journal.sqlite").close()


def test_a_path_that_cannot_be_opened_is_an_error_with_a_next_step(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="choose another --journal"):
        Journal(tmp_path)
    (tmp_path / "text").write_text("this is no database, and it is long enough to be read as one" * 20)
    with pytest.raises(Unreachable, match="choose another --journal"):
        Journal(tmp_path / "text")


def test_a_journal_of_another_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ProtocolMismatch, match="version 99"):
        Journal(path)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("spec", "{"),
        ("nonsense", "{}"),
        ("finish", '{"job": 1}'),
        ("finish", "{}"),
        ("spec", '{"spec": {"job": "a"}}'),
    ],
)
def test_an_entry_that_is_not_ours_is_named(tmp_path: Path, kind: str, body: str) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    journal._connection.execute("INSERT INTO entries (kind, job, body) VALUES (?, 'a', ?)", (kind, body))
    with pytest.raises(CorruptImage, match="entry 1"):
        journal.entries()
    journal.close()
