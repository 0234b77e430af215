"""Lines: which checkpoint of a job goes on from which.

Every manifest names its parent, so checkpoints form lines that begin where a job went back.  A rollback is a
*start*: a generation of its own that has no checkpoint yet, and names the one that its line goes on from.
The line of the greatest generation is the newest one; that is where a job resumes.

Retention takes checkpoints out of lines.  Then a parent that is gone stands for the nearest one before it.

Pure: what is stored is given as values.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from xxhash import xxh3_128_hexdigest

from ckptd.errors import CorruptCheckpoint
from ckptd.image.fields import Fields, MalformedField
from ckptd.image.names import check_name

Key = tuple[int, int]  # generation, step

MAX_START_BYTES: Final = 16 << 10
MAX_REASON: Final = 1000  # characters
_NUMBER: Final = 1 << 52


@dataclass(frozen=True, slots=True)
class Start:
    """The beginning of a line by a rollback.  Invariant: the parent is of a lower generation."""

    generation: int
    parent: Key
    reason: str
    time_s: int  # seconds since 1970, UTC

    def write(self, job: str) -> bytes:
        """Returns the start as JSON with a digest at its end."""
        assert self.parent[0] < self.generation and len(self.reason) <= MAX_REASON
        whole = {
            "ckptd.line": 1,
            "job": job,
            "generation": self.generation,
            "parent": self.parent,
            "reason": self.reason,
            "time_s": self.time_s,
        }
        text = json.dumps(whole, separators=(",", ":")).encode("ascii")[:-1]
        return text + f',"digest":"{xxh3_128_hexdigest(text)}"}}\n'.encode("ascii")

    @classmethod
    def read(cls, data: bytes, generation: int) -> Start:
        """Returns the start that `write` wrote.

        Args:
            generation: as its file's name says.

        Raises:
            CorruptCheckpoint: these are not such bytes.
        """
        try:
            given = Fields(json.loads(data.decode("ascii")), "the start")
            given.one_of("ckptd.line", (1,))
            given.name("job", check_name)
            given.number("generation", generation, least=generation)
            parent = given.pair_of_numbers("parent", _NUMBER)
            found = cls(generation, parent, given.text("reason", MAX_REASON), given.number("time_s", _NUMBER))
            digest = given.text("digest", 32)
            given.done()
            text = data.rpartition(b',"digest":')[0]
            if digest != xxh3_128_hexdigest(text) or parent[0] >= generation:
                raise MalformedField("its bytes do not match its digest, or it goes on from itself")
        except (MalformedField, ValueError, RecursionError) as error:
            raise CorruptCheckpoint(
                f"the start of generation {generation} cannot be used",
                str(error),
                "ckptd rollback starts another line",
            ) from error
        return found


@dataclass(frozen=True, slots=True)
class Line:
    """A line, without what it shares with those before it."""

    head: Key | None  # its newest checkpoint; None: it has only begun
    own: tuple[Key, ...]  # the newest first
    parent: Key | None  # what its oldest own checkpoint goes on from
    start: Start | None  # the rollback that began it
    newest: bool


class Lines:
    """The lines of one job.

    Args:
        parents: of every stored checkpoint, what its manifest names as parent; None where it names none, or
            cannot be read: then the one before it in its generation counts.
        starts: the rollbacks.
    """

    def __init__(self, parents: Mapping[Key, Key | None], starts: Iterable[Start] = ()) -> None:
        self.starts = {start.generation: start for start in starts}
        self._steps: dict[int, list[int]] = {}
        for generation, step in sorted(parents):
            self._steps.setdefault(generation, []).append(step)
        self._generations = sorted(self._steps.keys() | self.starts.keys())
        self.parents = {key: self._parent(key, given) for key, given in parents.items()}

    @property
    def generation(self) -> int:
        """The greatest generation of a checkpoint or a start; 0 where there is none."""
        return self._generations[-1] if self._generations else 0

    @cached_property
    def tip(self) -> Key | None:
        """The newest checkpoint of the newest line."""
        top = self.generation
        if top in self._steps:
            return top, self._steps[top][-1]
        return self.at_most(self.starts[top].parent) if top in self.starts else None

    def at_most(self, key: Key) -> Key | None:
        """Returns the checkpoint `key`, or the nearest one before it in its line that is stored."""
        generation, step = key
        while True:
            steps = self._steps.get(generation, [])
            at = bisect_right(steps, step)
            if at:
                return generation, steps[at - 1]
            if generation in self.starts:
                generation, step = self.starts[generation].parent
                continue
            lower = bisect_left(self._generations, generation)
            if not lower:
                return None
            generation = self._generations[lower - 1]

    def path(self, key: Key | None) -> tuple[Key, ...]:
        """Returns `key` and all that it goes on from, the newest first."""
        found: list[Key] = []
        while key is not None:
            found.append(key)
            key = self.parents[key]
        return tuple(found)

    @cached_property
    def newest(self) -> tuple[Key, ...]:
        """The checkpoints of the newest line, the newest first."""
        return self.path(self.tip)

    @cached_property
    def heads(self) -> tuple[Key, ...]:
        """The checkpoints that none goes on from, the newest first."""
        return tuple(sorted(self.parents.keys() - set(self.parents.values()), reverse=True))

    @cached_property
    def abandoned(self) -> dict[Key, Start]:
        """The checkpoints that a rollback left behind, and which did first."""
        found: dict[Key, Start] = {}
        for _, start in sorted(self.starts.items()):
            kept = set(self.path(self.at_most(start.parent)))
            for key in self.parents.keys() - kept:
                if key[0] < start.generation:
                    found.setdefault(key, start)
        for key in self.newest:  # a later rollback may have come back to it
            found.pop(key, None)
        return found

    @cached_property
    def candidates(self) -> tuple[Key, ...]:
        """What a job may resume from, the best first: the newest line; then all that no rollback left."""
        rest = self.parents.keys() - set(self.newest) - self.abandoned.keys()
        return self.newest + tuple(sorted(rest, reverse=True))

    @cached_property
    def lines(self) -> tuple[Line, ...]:
        """All lines, the newest first; each checkpoint belongs to the first that it is part of."""
        taken: set[Key] = set()
        found = []
        first = () if self.tip is None else (self.tip,)
        for head in (*first, *(key for key in self.heads if key != self.tip)):
            path = self.path(head)
            own = tuple(key for key in path if key not in taken)
            taken.update(own)
            found.append(Line(head, own, self.parents[own[-1]], self._start(own[-1]), head == self.tip))
        if self.generation in self.starts and self.generation not in self._steps:
            begun = self.starts[self.generation]
            found.insert(0, Line(None, (), self.at_most(begun.parent), begun, True))
        return tuple(found)

    def _start(self, first: Key) -> Start | None:
        """The rollback that a line with this oldest checkpoint began with: the newest that led there."""
        fitting = (
            start
            for generation, start in self.starts.items()
            if generation <= first[0]
            and self.at_most(start.parent) == self.parents[first]
            and not any(generation < other < first[0] for other in self._steps)
        )
        return max(fitting, key=lambda start: start.generation, default=None)

    def _parent(self, key: Key, given: Key | None) -> Key | None:
        if given is not None and given < key:
            return self.at_most(given)
        generation, step = key
        steps = self._steps[generation]
        at = bisect_left(steps, step)
        if at:
            return generation, steps[at - 1]
        start = self.starts.get(generation)
        return None if start is None else self.at_most(start.parent)
