"""What the coordinator must not forget, in SQLite: on stable storage before anybody hears of it.

Only decisions are kept: jobs, generations with their plans, the first protected step,
the end.  The step-by-step watermark is not, since inventories give it back.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any

from ckptd.coordinator.effects import CommitEntry, Entry, FinishEntry, ProtectedEntry, SpecEntry
from ckptd.errors import CorruptImage, InvalidRequest, ProtocolMismatch, Unreachable

_VERSION = 1
_KINDS: dict[str, type[Entry]] = {
    "spec": SpecEntry,
    "commit": CommitEntry,
    "protected": ProtectedEntry,
    "finish": FinishEntry,
}
_SCHEMA = """
CREATE TABLE entries (
  sequence INTEGER PRIMARY KEY AUTOINCREMENT,
  kind TEXT NOT NULL,
  job TEXT NOT NULL,
  generation INTEGER,
  body TEXT NOT NULL,
  UNIQUE (job, generation)
) STRICT;
"""


class Journal:
    """An append-only list of entries; opening it makes the file where there is none.

    Raises:
        Unreachable: the file cannot be opened or is in use by another coordinator.
        ProtocolMismatch: it was written by another version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, isolation_level=None, timeout=1.0)
        except (OSError, sqlite3.Error) as error:
            raise Unreachable(
                f"cannot open the journal {path}", str(error), "choose another --journal"
            ) from None
        try:
            self._open()
        except sqlite3.Error as error:
            self._connection.close()
            raise Unreachable(
                f"cannot use the journal {path}",
                str(error),
                "another coordinator may be running on it; choose another --journal",
            ) from None
        except ProtocolMismatch:
            self._connection.close()
            raise

    def _open(self) -> None:
        run = self._connection.execute
        # One process at a time: two coordinators on one journal would propose the same generation.
        run("PRAGMA locking_mode = EXCLUSIVE")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        run("BEGIN IMMEDIATE")
        (version,) = run("PRAGMA user_version").fetchone()
        if version == 0:
            run(_SCHEMA)
            run(f"PRAGMA user_version = {_VERSION}")
        run("COMMIT")
        if version not in (0, _VERSION):
            raise ProtocolMismatch(
                f"the journal {self._path} has version {version}",
                f"this coordinator writes version {_VERSION}",
                "use the ckptd that wrote it, or another --journal",
            )

    def append(self, entry: Entry) -> None:
        """Returns once the entry is on stable storage.

        Raises:
            InvalidRequest: this generation of the job was committed before.
            Unreachable: the storage refuses.
        """
        kind = next(name for name, cls in _KINDS.items() if cls is type(entry))
        job, generation = _place(entry)
        try:
            self._connection.execute(
                "INSERT INTO entries (kind, job, generation, body) VALUES (?, ?, ?, ?)",
                (kind, job, generation, json.dumps(dataclasses.asdict(entry), default=_plain)),
            )
        except sqlite3.IntegrityError as error:
            raise InvalidRequest(
                f"generation {generation} of job {job} is in the journal {self._path} already", str(error)
            ) from None
        except sqlite3.Error as error:
            raise Unreachable(f"cannot write to the journal {self._path}", str(error)) from None

    def entries(self) -> list[Entry]:
        """All entries, oldest first.

        Raises:
            CorruptImage: an entry that is not one of ours.
        """
        rows = self._connection.execute(
            "SELECT kind, body, sequence FROM entries ORDER BY sequence"
        ).fetchall()
        found: list[Entry] = []
        for kind, body, sequence in rows:
            try:
                found.append(_value(_KINDS[kind], json.loads(body)))
            except (KeyError, TypeError, ValueError) as error:
                raise CorruptImage(
                    f"entry {sequence} of the journal {self._path} cannot be read",
                    repr(error),
                    "move the file away; the coordinator learns the jobs from their nodes",
                ) from error
        return found

    def close(self) -> None:
        self._connection.close()


def _place(entry: Entry) -> tuple[str, int | None]:
    if isinstance(entry, SpecEntry):
        return entry.spec.job, None
    return entry.job, entry.plan.roster.generation if isinstance(entry, CommitEntry) else None


def _plain(value: object) -> object:
    assert isinstance(value, Enum)
    return value.value


def _value(kind: Any, data: Any) -> Any:
    """The value of type `kind` that `dataclasses.asdict` and JSON made `data` of."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _value(hints[name], item) for name, item in data.items()})  # type: ignore[operator]
    origin = typing.get_origin(kind)
    if origin is tuple:
        return tuple(_value(typing.get_args(kind)[0], item) for item in data)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (option for option in typing.get_args(kind) if option is not type(None))
        return None if data is None else _value(inner, data)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(data)
    if not isinstance(data, kind):
        raise TypeError(f"expected {kind.__name__}, found {data!r}")
    return data
