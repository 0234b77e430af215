"""Which checkpoints of a job a store holds.  A directory without a manifest is none."""

from __future__ import annotations

from dataclasses import dataclass

from ckptd.errors import CkptdError, InvalidRequest, NotFound
from ckptd.image.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest
from ckptd.image.names import check_name
from ckptd.storage import place
from ckptd.storage.store import Store, open_store


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """A checkpoint by its name; entries order by step, then generation."""

    step: int
    generation: int

    @property
    def directory(self) -> str:
        return place.directory_name(self.step, self.generation)


def entries(store: str, job: str) -> list[Entry]:
    """Returns the job's checkpoints that have a manifest, in ascending order.

    Raises:
        InvalidRequest: the job's name cannot be used.
        CkptdError: the store cannot be listed.
    """
    root = job_store(store, job)
    named = [place.parse_directory(name) for name in root.list()]
    found = [Entry(*both) for both in named if both is not None]
    return sorted(entry for entry in found if MANIFEST_NAME in root.inside(entry.directory).list())


def job_store(store: str, job: str) -> Store:
    """Returns the directory of a job."""
    return open_store(store).inside(check_name("job", job))


def find(wanted: place.Wanted) -> Store:
    """Returns the directory of the checkpoint that a `ckptd://` URL asks for.

    Raises:
        NotFound: there is none.
    """
    fitting = [
        entry
        for entry in entries(wanted.store, wanted.job)
        if wanted.step in (None, entry.step) and wanted.generation in (None, entry.generation)
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


def newest(store: str, job: str) -> tuple[Entry | None, list[Skipped]]:
    """Returns the newest checkpoint whose manifest and parts are in place, and those passed over on the way.

    Newest is the greatest generation first: going back starts a new generation, and a step of the line
    that was
    left does not count.  The bytes of the parts are verified when they are read.
    """
    from ckptd.storage.reading import Checkpoint

    skipped: list[Skipped] = []
    root = job_store(store, job)
    for entry in sorted(entries(store, job), key=lambda e: (e.generation, e.step), reverse=True):
        inside = root.inside(entry.directory)
        try:
            manifest = Manifest.read(inside.read(MANIFEST_NAME, MAX_MANIFEST_BYTES))
            if manifest.form == "files":
                raise InvalidRequest("it holds another tool's files, and no tensors")
            checkpoint = Checkpoint(inside, manifest)
            for index in range(len(manifest.objects)):
                checkpoint.open(index).close()
                checkpoint.digests(index)
        except CkptdError as error:
            skipped.append(Skipped(entry, str(error)))
            continue
        return entry, skipped
    return None, skipped
