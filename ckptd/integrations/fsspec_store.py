"""The fsspec protocol `ckptd://`: files of other tools, stored as they are, under our commit.

    torch.distributed.checkpoint.save(state, checkpoint_id="ckptd://llama/step-7")

A path is `JOB/step-N[.gG]/FILE` in the configured store (`CKPTD_STORE`); no daemon is needed.  A checkpoint's
files are not there for anyone until `.metadata` is renamed to its place, which is how DCP says that all of
them are written, or until the fsspec transaction ends in which they are written, which is how Lightning saves
its one file: that publishes the manifest, with the digests of all files, and from then on nothing in the
directory changes.  Reading verifies the digests.

The files are DCP's own, and `.metadata` is a pickle: whoever reads them with DCP trusts who wrote them.  The
form without pickles is `ckptd.integrations.dcp`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from fsspec import AbstractFileSystem
from fsspec.transaction import Transaction

from ckptd.errors import InvalidRequest, NotFound
from ckptd.image import check_name
from ckptd.image.digest_table import TABLE_SUFFIX
from ckptd.image.manifest import MANIFEST_NAME
from ckptd.integrations import drafts
from ckptd.integrations.lines import generation_for, parent_in
from ckptd.integrations.streams import VerifiedFile
from ckptd.storage import catalog, place
from ckptd.storage.manifests import read_manifest
from ckptd.storage.reading import Checkpoint
from ckptd.storage.store import AlreadyThere, open_store

COMMIT: Final = ".metadata"  # the file whose appearance says that a DCP checkpoint is complete
_COMMIT_OF_RANK: Final = re.compile(r"__[0-9]+\.metadata")
_COPY_BYTES: Final = 4 << 20


@dataclass(frozen=True)
class _Where:
    """A path taken apart; what it does not reach is None."""

    path: str
    job: str | None = None
    wanted: place.Wanted | None = None
    file: str | None = None

    @property
    def directory(self) -> str:
        return "/".join(self.path.split("/")[:2])


class _Transaction(Transaction):  # type: ignore[misc]  # fsspec has no types
    """The files written in it are whole checkpoints when it ends."""

    def complete(self, commit: bool = True) -> None:
        system: CkptdFileSystem = self.fs
        written = [file.name for file in self.files]
        whole = False
        try:
            super().complete(commit)
            whole = commit
        finally:
            system._end_transaction(written, whole)


class CkptdFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Checkpoints as directories of files.

    Args:
        store: URL or path of the store; None: the configured one.

    Raises (all methods):
        FileNotFoundError, FileExistsError, PermissionError: as file systems do.
        InvalidRequest: a path names no place for a checkpoint.
        CorruptCheckpoint: what is read does not match its digest.
        NoSpace, CkptdError: as the store says.
    """

    protocol = "ckptd"
    # What is being written is known to one instance: each user gets its own.
    cachable = False
    transaction_type = _Transaction

    def __init__(self, store: str | None = None, **options: Any) -> None:
        super().__init__(store=store, **options)
        self._store = store or place.store_url()
        self._lock = threading.Lock()
        self._drafts: dict[str, drafts.Draft] = {}  # by directory
        self._opened: dict[str, Checkpoint] = {}  # by directory
        if self._store.startswith(place.SCHEME):
            raise InvalidRequest(f"{self._store} is no store", next="set CKPTD_STORE to a folder or bucket")

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        where = self._reading(path)
        if where.file is not None:
            with _os_errors(path):
                return {"name": where.path, "size": self._size(where), "type": "file"}
        if where.wanted is not None and where.directory not in self._drafts:
            with _os_errors(path):
                self._checkpoint(where)
        elif where.job is not None and not catalog.entries(self._store, where.job) and where.wanted is None:
            raise FileNotFoundError(errno.ENOENT, "no checkpoint of this job", path)
        return {"name": where.path, "size": 0, "type": "directory"}

    def exists(self, path: str, **_: Any) -> bool:
        """Whether it is there; a store that cannot be asked is an error, not a no."""
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """Returns jobs, steps (each once, by its newest generation), or files."""
        where = self._reading(path)
        found = [self.info(path)] if where.file is not None else self._inside(where)
        return found if detail else [entry["name"] for entry in found]

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Directories appear with their files; this only checks the name."""
        self._where(path)

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        self._where(path)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> io.BufferedIOBase:
        if mode == "rb":
            where = self._reading(path)
            if where.file is None:
                raise IsADirectoryError(errno.EISDIR, "it is a directory", path)
            with _os_errors(path):
                return self._reader(where)
        if mode != "wb":
            raise InvalidRequest(
                f"{path} cannot be opened with {mode!r}", "files are written once", "use rb, wb"
            )
        where = self._writing(path)
        assert where.file is not None
        with _os_errors(path):
            file = drafts.writer(self._draft(where).store, where.file)
        file.name = where.path
        return file

    def mv(self, path1: str, path2: str, **_: Any) -> None:
        """Renames a file of a checkpoint that is being written; as `.metadata`, it is the commit."""
        old, new = self._writing(path1), self._writing(path2)
        assert old.file is not None and new.file is not None
        if old.directory != new.directory:
            raise InvalidRequest(f"{path1} cannot be moved to {path2}", "a file stays in its checkpoint")
        if _COMMIT_OF_RANK.fullmatch(new.file):
            raise InvalidRequest(
                f"{new.directory} cannot be committed",
                "with use_collectives=False no rank knows when all of them have written",
                "call dcp.save without use_collectives=False",
            )
        with _os_errors(path1):
            draft = self._draft(old)
            source, target = drafts.unpublished(draft.store, old.file), drafts.writer(draft.store, new.file)
            with source, target:
                while piece := source.read(_COPY_BYTES):
                    target.write(piece)
            drafts.delete(draft.store, old.file)
            if new.file == COMMIT:
                self._forget(new.directory)  # even if it fails: it may be there all the same
                drafts.publish(draft)

    def rm_file(self, path: str) -> None:
        """Removes a file of a checkpoint that is being written."""
        where = self._writing(path)
        if where.directory not in self._drafts:
            raise _file_stays(path)
        assert where.file is not None
        drafts.delete(self._drafts[where.directory].store, where.file)

    def rm(self, path: str | list[str], recursive: bool = False, maxdepth: int | None = None) -> None:
        """Removes files that are being written, or whole checkpoints: all generations, if none is named.

        A checkpoint of one file is removed by that file's name, too; recursively, as any other.
        """
        for one in [path] if isinstance(path, str) else path:
            where = self._reading(one)
            if where.file is not None and (not recursive or where.directory in self._drafts):
                self.rm_file(one)
            elif where.wanted is None or where.wanted.step is None or not recursive:
                raise PermissionError(errno.EPERM, "only a checkpoint is removed, and only recursively", one)
            else:
                self._remove(where, where.wanted)

    # Paths

    def _where(self, path: str) -> _Where:
        stripped = self._strip_protocol(path)
        parts = [part for part in stripped.split("/") if part]
        clean = "/".join(parts)
        if len(parts) > 3:
            raise InvalidRequest(f"{path} names no file of a checkpoint", "expected ckptd://JOB/step-N/FILE")
        if len(parts) < 2:
            return _Where(clean, check_name("job", parts[0]) if parts else None)
        wanted = place.parse(place.SCHEME + "/".join(parts[:2]), {"CKPTD_STORE": self._store})
        assert isinstance(wanted, place.Wanted)
        return _Where(clean, parts[0], wanted, check_name("file", parts[2]) if len(parts) == 3 else None)

    def _reading(self, path: str) -> _Where:
        try:
            return self._where(path)
        except InvalidRequest as error:
            raise FileNotFoundError(errno.ENOENT, str(error), path) from error

    def _writing(self, path: str) -> _Where:
        where = self._where(path)
        if where.file is None or where.wanted is None or where.wanted.step is None:
            raise InvalidRequest(f"{path} names no file to write", "expected ckptd://JOB/step-N/FILE")
        if where.file == MANIFEST_NAME or where.file.endswith(TABLE_SUFFIX):
            raise InvalidRequest(f"{path} cannot be written", "this name is ckptd's own", "choose another")
        return where

    # What is there

    def _inside(self, where: _Where) -> list[dict[str, Any]]:
        if where.job is None:
            names = open_store(self._store).list()
            return [{"name": name, "size": 0, "type": "directory"} for name in names]
        if where.wanted is None:
            steps = sorted({entry.step for entry in catalog.entries(self._store, where.job)})
            return [{"name": f"{where.job}/step-{step}", "size": 0, "type": "directory"} for step in steps]
        draft = self._drafts.get(where.directory)
        with _os_errors(where.path):
            if draft is None:
                sizes = {o.name: o.nbytes for o in self._checkpoint(where).manifest.objects}
            else:
                files = drafts.written(draft.store)
                sizes = {name: drafts.described(draft.store, name, 0).nbytes for name in files}
        base = where.directory
        return [{"name": f"{base}/{name}", "size": size, "type": "file"} for name, size in sizes.items()]

    def _size(self, where: _Where) -> int:
        assert where.file is not None
        draft = self._drafts.get(where.directory)
        if draft is not None:
            return drafts.described(draft.store, where.file, 0).nbytes
        checkpoint = self._checkpoint(where)
        return checkpoint.manifest.objects[_index(checkpoint, where.file)].nbytes

    def _reader(self, where: _Where) -> io.BufferedIOBase:
        assert where.file is not None
        draft = self._drafts.get(where.directory)
        if draft is not None:
            return drafts.unpublished(draft.store, where.file)
        checkpoint = self._checkpoint(where)
        index = _index(checkpoint, where.file)
        return VerifiedFile.buffered(checkpoint.open(index), checkpoint.digests(index), where.file)

    def _checkpoint(self, where: _Where) -> Checkpoint:
        assert where.wanted is not None
        with self._lock:
            if where.directory not in self._opened:
                store = catalog.find(where.wanted)
                self._opened[where.directory] = Checkpoint(store, read_manifest(store))
            return self._opened[where.directory]

    # What is written

    def _draft(self, where: _Where) -> drafts.Draft:
        """The checkpoint that a file is written to; the first file decides its generation."""
        wanted = where.wanted
        assert wanted is not None and wanted.step is not None
        with self._lock:
            if where.directory not in self._drafts:
                known = catalog.keyed_lines(self._store, wanted.job)
                generation = wanted.generation
                if generation is None:
                    generation = generation_for(known, wanted.step)
                entry = catalog.Entry(wanted.step, generation)
                if catalog.key_of(entry) in known.parents:
                    raise AlreadyThere(f"a checkpoint is at {where.directory}", "files are written once")
                parent = parent_in(known, wanted.step, generation)
                store = catalog.job_store(self._store, wanted.job).inside(entry.directory)
                draft = drafts.Draft(store, wanted.job, wanted.step, generation, parent)
                self._drafts[where.directory] = draft
            return self._drafts[where.directory]

    def _end_transaction(self, written: list[str], whole: bool) -> None:
        names: dict[str, list[str]] = {}  # by directory
        for where in map(self._where, written):
            assert where.file is not None
            names.setdefault(where.directory, []).append(where.file)
        # One that is published or removed meanwhile has none.  All are forgotten even where one cannot be
        # published: it may be there all the same, and what is there is never written again.
        ended = [(self._drafts.get(directory), files) for directory, files in names.items()]
        for directory in names:
            self._forget(directory)
        for draft, files in ended:
            if draft is None:
                continue
            if whole:
                with _os_errors(draft.store.url):
                    drafts.publish(draft, files)
            else:
                for name in files:
                    drafts.delete(draft.store, name)

    def _remove(self, where: _Where, wanted: place.Wanted) -> None:
        entries = catalog.entries(self._store, wanted.job)
        fitting = [e for e in entries if e.step == wanted.step and wanted.generation in (None, e.generation)]
        if not fitting:
            raise FileNotFoundError(errno.ENOENT, "there is no such checkpoint", where.path)
        stores = [catalog.job_store(self._store, wanted.job).inside(entry.directory) for entry in fitting]
        if where.file is not None:
            stores = [store for store in stores if drafts.published(store) == [where.file]]
            if not stores:
                raise _file_stays(where.path)
        for store in stores:
            store.delete(MANIFEST_NAME)  # first: from here on there is no checkpoint
            for name in store.list():
                store.delete(name)
        self._forget(where.directory)

    def _forget(self, directory: str) -> None:
        with self._lock:
            self._drafts.pop(directory, None)
            self._opened.pop(directory, None)


def _file_stays(path: str) -> PermissionError:
    why = "files of a checkpoint stay; remove it whole: rm(directory, recursive=True)"
    return PermissionError(errno.EPERM, why, path)


def _index(checkpoint: Checkpoint, name: str) -> int:
    for index, stored in enumerate(checkpoint.manifest.objects):
        if stored.name == name:
            return index
    count = len(checkpoint.manifest.objects)
    raise NotFound(f"{name} is not in {checkpoint.store.url}", f"it has {count} files")


@contextlib.contextmanager
def _os_errors(path: str) -> Iterator[None]:
    """Makes of our errors those that users of file systems look for."""
    try:
        yield
    except NotFound as error:
        raise FileNotFoundError(errno.ENOENT, str(error), path) from error
    except AlreadyThere as error:
        raise FileExistsError(errno.EEXIST, str(error), path) from error
