"""Which checkpoints of a job a store holds.  A directory without a manifest is none."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeVar

from ckptd.errors import (
    CkptdError,
    CorruptCheckpoint,
    InvalidRequest,
    NotFound,
)
from ckptd.image.manifest import MANIFEST_NAME
from ckptd.image.manifest_head import HEAD_BYTES, ManifestHead
from ckptd.image.names import check_name
from ckptd.storage import place
from ckptd.storage.lines import MAX_START_BYTES, Key, Lines, Start
from ckptd.storage.manifests import read_manifest
from ckptd.storage.retrying import SILENT
from ckptd.storage.store import Store, open_store

STARTS: Final = "lines"  # the directory of a job's starts
FOREIGN: Final = "it holds another tool's files, and no tensors"
_START: Final = re.compile(r"g([0-9]{5,15})\.json")
_THREADS: Final = 8  # that look at directories at a time: object stores take their time for each
_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """A checkpoint by its name; entries order by step, then generation."""

    step: int
    generation: int

    @property
    def directory(self) -> str:
        return place.directory_name(self.step, self.generation)


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint's directory as it is listed."""

    entry: Entry
    names: tuple[str, ...]  # files in it

    @property
    def published(self) -> bool:
        return MANIFEST_NAME in self.names


@dataclass(frozen=True)
class Survey:
    """All that a job has in a store, by one small read of each manifest."""

    store: Store  # the job's directory
    heads: dict[Key, ManifestHead | None]  # of the checkpoints; None: it cannot be read
    found: dict[Key, Found]  # the directories without a manifest too
    lines: Lines
    unreadable: dict[int, str] = field(default_factory=dict)  # starts that are damaged: generation, why


def entries(store: str, job: str) -> list[Entry]:
    """Returns the job's checkpoints that have a manifest, in ascending order.

    Raises:
        InvalidRequest: the job's name cannot be used.
        CkptdError: the store cannot be listed.
    """
    return [found.entry for found in directories(job_store(store, job)) if found.published]


def directories(root: Store) -> list[Found]:
    """Returns the checkpoints' directories of a job in ascending order, those without a manifest too."""
    named = [place.parse_directory(name) for name in root.list()]
    wanted = sorted(Entry(*both) for both in named if both is not None)
    return _each(lambda entry: Found(entry, tuple(root.inside(entry.directory).list())), wanted)


def survey(store: str, job: str) -> Survey:
    """Returns what a job has in a store, and its lines.

    Raises:
        InvalidRequest: the job's name cannot be used.
        CkptdError: the store cannot be listed, or not be read.
    """
    root = job_store(store, job)
    found = directories(root)
    published = [each.entry for each in found if each.published]
    heads = dict(zip(map(key_of, published), _each(lambda e: _head(root, e), published), strict=True))
    starts, unreadable = _starts(root)
    parents = {key: None if head is None else head.parent for key, head in heads.items()}
    return Survey(
        root, heads, {key_of(each.entry): each for each in found}, Lines(parents, starts), unreadable
    )


def keyed_lines(store: str, job: str) -> Lines:
    """Returns the job's lines as names and rollbacks alone tell them; no manifest is read.

    `Lines.at_most` needs no more: within a generation a line only grows.

    Raises:
        InvalidRequest, CkptdError: as `survey`.
    """
    root = job_store(store, job)
    published = (each.entry for each in directories(root) if each.published)
    return Lines(dict.fromkeys(map(key_of, published)), _starts(root)[0])


def key_of(entry: Entry) -> Key:
    """Returns an entry as lines name it."""
    return entry.generation, entry.step


def entry_of(key: Key) -> Entry:
    """Returns the entry of what lines name."""
    return Entry(key[1], key[0])


def start_name(generation: int) -> str:
    """Returns the file name of a start."""
    return f"g{generation:05}.json"


class Generations(NamedTuple):
    """What a store says of a job's generations; 0 for none.

    Attributes:
        newest: the greatest one of a checkpoint, of a beginning of one, or of a start; none of these may be
            used again.
        start: the greatest one that begins with a rollback; the state of older ones is not to go on from.
    """

    newest: int = 0
    start: int = 0


def generations(store: str, job: str) -> Generations:
    """Returns the generations that a job used."""
    root = job_store(store, job)
    named = [each[1] for each in map(place.parse_directory, root.list()) if each]
    started = [int(each[1]) for each in map(_START.fullmatch, root.inside(STARTS).list()) if each]
    return Generations(max([*named, *started], default=0), max(started, default=0))


def _starts(root: Store) -> tuple[list[Start], dict[int, str]]:
    inside = root.inside(STARTS)
    found: list[Start] = []
    unreadable: dict[int, str] = {}
    for name in inside.list():
        matched = _START.fullmatch(name)
        if matched is None:
            continue
        try:
            found.append(Start.read(inside.read(name, MAX_START_BYTES), int(matched[1])))
        except CorruptCheckpoint as error:
            unreadable[int(matched[1])] = str(error)
    return found, unreadable


def _head(root: Store, entry: Entry) -> ManifestHead | None:
    try:
        with root.inside(entry.directory).open(MANIFEST_NAME) as reader:
            data = bytearray(min(reader.size, HEAD_BYTES))
            reader.read_into(0, memoryview(data))
        head = ManifestHead.read(bytes(data))
    except (CorruptCheckpoint, NotFound):  # damaged, or removed since it was listed
        return None
    return head if (head.step, head.generation) == (entry.step, entry.generation) else None


def _each(do: Callable[[_In], _Out], items: Iterable[_In]) -> list[_Out]:
    """`do` of each item, in order, by a few threads."""
    wanted = list(items)
    if len(wanted) < _THREADS:
        return [do(item) for item in wanted]
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="ckptd-catalog") as pool:
        return list(pool.map(do, wanted))


def job_store(store: str, job: str) -> Store:
    """Returns the directory of a job."""
    return open_store(store).inside(check_name("job", job))


def find(wanted: place.Wanted) -> Store:
    """Returns the directory of the checkpoint that a `ckptd://` URL asks for.

    Raises:
        NotFound: there is none.
    """
    if wanted.step is None:
        known = survey(wanted.store, wanted.job).lines
        fitting = [entry_of(key) for key in known.candidates[:1]]
    else:
        fitting = [
            entry
            for entry in entries(wanted.store, wanted.job)
            if wanted.step == entry.step and wanted.generation in (None, entry.generation)
        ]
    if not fitting:
        what = "no checkpoint" if wanted.step is None else f"no checkpoint of step {wanted.step}"
        raise NotFound(
            f"{what} of job {wanted.job} in {wanted.store}",
            "no directory with a manifest fits",
            f"ckptd ls {wanted.job} shows what there is",
        )
    return job_store(wanted.store, wanted.job).inside(fitting[-1].directory)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A checkpoint that was passed over, and why."""

    entry: Entry
    why: str


def newest(
    store: str, job: str, damaged: Iterable[tuple[Entry, str]] = ()
) -> tuple[Entry | None, list[Skipped]]:
    """Returns the checkpoint to resume from, and those passed over on the way.

    It is the newest of the newest line whose manifest and parts are in place; what a rollback left is never
    taken.  The bytes of the parts are verified when they are read.

    Args:
        damaged: what was found damaged when it was read, and why; it is passed over.

    Raises:
        CorruptCheckpoint: the newest rollback cannot be read, so nobody knows where to go on.
    """
    known = survey(store, job)
    if known.unreadable and max(known.unreadable) > known.lines.generation:
        raise CorruptCheckpoint(
            f"where job {job} goes on is unknown",
            known.unreadable[max(known.unreadable)],
            f"ckptd rollback {job} --to STEP says it again",
        )
    passed = dict(damaged)
    skipped: list[Skipped] = []
    for entry in map(entry_of, known.lines.candidates):
        why = passed.get(entry) or why_not(known.store, entry)
        if why is None:
            return entry, skipped
        skipped.append(Skipped(entry, why))
    return None, skipped


def why_not(root: Store, entry: Entry) -> str | None:
    """Returns why nothing can resume from a checkpoint, None if its manifest and parts are in place.

    Args:
        root: the job's directory.
    """
    from ckptd.storage.reading import Checkpoint

    inside = root.inside(entry.directory)
    try:
        manifest = read_manifest(inside)
        if manifest.form == "files":
            raise InvalidRequest(FOREIGN)
        if (manifest.step, manifest.generation) != (entry.step, entry.generation):
            raise CorruptCheckpoint(
                f"its manifest is of step {manifest.step}, generation {manifest.generation}"
            )
        checkpoint = Checkpoint(inside, manifest)
        for index in range(len(manifest.objects)):
            checkpoint.open(index).close()
            checkpoint.digests(index)
    except SILENT:  # going back for it would lose steps
        raise
    except CkptdError as error:
        return str(error)
    return None
