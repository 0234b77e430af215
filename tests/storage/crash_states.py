"""What a crash may leave of recorded file calls: a model of a disk that keeps only what was synced.

    disk = Disk(tree(root))
    for event in calls.events:
        disk.apply(event)
        for state in disk.states(): ...        # each a tree: relative path -> content

The weakest disk that the rules allow.  What was written to a file and not synced is there, or not, or only
as zeros, or torn at a multiple of 512 bytes; every change of a directory (a name made, moved, removed) that
was not followed by a sync of that directory is there or not, whatever became of earlier and later ones.
A move within a directory is one change.  What a failed sync was to bring to a file may be lost for ever: no
later sync of that file brings it back.  A directory's names are in a journal: a later sync does bring them.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Final

from failing_calls import Event

SECTOR_BYTES: Final = 512
Tree = dict[str, "bytes | None"]  # relative path -> content, None for a directory
_LOST, _ZEROS = 0, -1  # choices for a write; otherwise how many of its bytes are there


@dataclass(eq=False)
class _Write:
    offset: int
    data: bytes
    synced: bool = False
    dropped: bool = False  # by a failed sync

    def choices(self) -> list[int]:
        if self.synced:
            return [len(self.data)]
        return [_LOST, _ZEROS, *range(SECTOR_BYTES, len(self.data), SECTOR_BYTES), len(self.data)]


@dataclass(eq=False)
class _File:
    writes: list[_Write] = field(default_factory=list)

    def content(self, chosen: Mapping[object, int]) -> bytes:
        data = bytearray()
        for write in self.writes:
            count = chosen.get(write, len(write.data) if write.synced else _LOST)
            kept = bytes(len(write.data)) if count == _ZEROS else write.data[:count]
            data.extend(bytes(max(0, write.offset + len(kept) - len(data))))
            data[write.offset : write.offset + len(kept)] = kept
        return bytes(data)


@dataclass(eq=False)
class _Change:
    """Of a directory: names and what they mean from now on; None for nothing."""

    names: dict[str, _File | _Directory | None]
    synced: bool = False

    def choices(self) -> list[int]:
        return [1] if self.synced else [0, 1]


@dataclass(eq=False)
class _Directory:
    changes: list[_Change] = field(default_factory=list)

    def entries(self, chosen: Mapping[object, int] | None = None) -> dict[str, _File | _Directory]:
        """What is in it; by default as programs see it."""
        found: dict[str, _File | _Directory] = {}
        for change in self.changes:
            if chosen is None or chosen.get(change, int(change.synced)):
                for name, meant in change.names.items():
                    found.pop(name, None)
                    if meant is not None:
                        found[name] = meant
        return found


class Disk:
    """A disk, as programs see it and as it would be after a crash.

    Args:
        tree: what is there, durably.
        root: the directory that the events' paths begin with.
    """

    def __init__(self, tree: Tree, root: str) -> None:
        self._root = root.rstrip("/")
        self._top = _Directory()
        self._files: list[_File] = []
        self._directories: list[_Directory] = [self._top]
        self._open: dict[int, _File | _Directory] = {}  # by handle
        for path, data in sorted(tree.items()):
            if data is None:
                self._change(path, self._new_directory())
            else:
                self._change(path, self._new_file([_Write(0, data, synced=True)]))
        for directory in self._directories:
            _sync_directory(directory)

    def apply(self, event: Event) -> None:
        """Follows a call; those that failed change nothing, but a failed sync loses what it was to bring.

        The descriptors of an earlier process mean nothing in a later one: apply all of one, then the other.
        """
        if event.error:
            found = self._open.get(event.handle)
            if event.name in ("fsync", "fdatasync") and isinstance(found, _File):
                for write in found.writes:
                    write.dropped |= not write.synced
            return
        path, other = self._relative(event.path), self._relative(event.other)
        match event.name:
            case "open":
                found = self._find(path)
                if found is None:
                    found = self._new_file([])
                    self._change(path, found)
                self._open[event.handle] = found
            case "write" | "pwrite":
                file = self._open[event.handle]
                assert isinstance(file, _File)
                file.writes.append(_Write(event.offset, event.data))
            case "fsync" | "fdatasync":
                self._sync(self._open[event.handle])
            case "mkdir":
                self._change(path, self._new_directory())
            case "link":
                self._change(other, self._find(path))
            case "rename" | "replace":
                self._move(path, other)
            case "unlink" | "remove" | "rmdir":
                self._change(path, None)
            case _:
                assert not event.changes, f"{event.name} is not followed yet"

    def durable(self) -> Tree:
        """What is certainly there: all that is not synced is lost."""
        return self._tree({})

    def seen(self) -> Tree:
        """What programs see."""
        everything: dict[object, int] = {c: 1 for d in self._directories for c in d.changes}
        return self._tree(everything | {w: len(w.data) for f in self._files for w in f.writes})

    def count(self) -> int:
        """How many states a crash may leave now."""
        return math.prod(len(one.choices()) for one in self._pending())

    def states(self, most: int, rng: random.Random) -> Iterator[Tree]:
        """Yields all states that a crash may leave now, or `most` of them, at random."""
        pending = self._pending()
        options = [one.choices() for one in pending]
        if self.count() <= most:
            combinations: Iterable[Sequence[int]] = itertools.product(*options)
        else:
            combinations = ([rng.choice(each) for each in options] for _ in range(most))
        for chosen in combinations:
            yield self._tree(dict(zip(pending, chosen, strict=True)))

    def _pending(self) -> list[_Write | _Change]:
        """What is not certain, of all that may be reached."""
        changes = [c for d in self._directories for c in d.changes if not c.synced]
        return [*changes, *(w for f in self._files for w in f.writes if not w.synced)]

    def _tree(self, chosen: Mapping[object, int]) -> Tree:
        found: Tree = {}

        def walk(directory: _Directory, prefix: str) -> None:
            for name, meant in directory.entries(chosen).items():
                if isinstance(meant, _File):
                    found[prefix + name] = meant.content(chosen)
                else:
                    found[prefix + name] = None
                    walk(meant, f"{prefix}{name}/")

        walk(self._top, "")
        return found

    def _sync(self, what: _File | _Directory) -> None:
        if isinstance(what, _Directory):
            _sync_directory(what)
            return
        for write in what.writes:
            write.synced |= not write.dropped

    def _move(self, path: str, other: str) -> None:
        moved = self._find(path)
        assert moved is not None, path
        if self._parent(path) is not self._parent(other):
            self._change(other, moved)
            self._change(path, None)
            return
        names = {PurePosixPath(path).name: None, PurePosixPath(other).name: moved}
        self._parent(path).changes.append(_Change(names))

    def _change(self, path: str, meant: _File | _Directory | None) -> None:
        self._parent(path).changes.append(_Change({PurePosixPath(path).name: meant}))

    def _parent(self, path: str) -> _Directory:
        found = self._find(str(PurePosixPath(path).parent))
        assert isinstance(found, _Directory), path
        return found

    def _find(self, path: str) -> _File | _Directory | None:
        at: _File | _Directory | None = self._top
        for name in PurePosixPath(path).parts:
            assert isinstance(at, _Directory), path
            at = at.entries().get(name)
            if at is None:
                return None
        return at

    def _new_file(self, writes: list[_Write]) -> _File:
        self._files.append(_File(writes))
        return self._files[-1]

    def _new_directory(self) -> _Directory:
        self._directories.append(_Directory())
        return self._directories[-1]

    def _relative(self, path: str) -> str:
        return path.removeprefix(self._root).strip("/")


def _sync_directory(directory: _Directory) -> None:
    for change in directory.changes:
        change.synced = True
