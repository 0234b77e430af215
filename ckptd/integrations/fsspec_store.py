"""The fsspec protocol `ckptd://`: files of other tools, stored as they are, under our commit.

    torch.distributed.checkpoint.save(state, checkpoint_id="ckptd://llama/step-7")

A path is `JOB/step-N[.gG]/FILE` in the configured store (`CKPTD_STORE`); no daemon is needed.  A checkpoint's
files are not there for anyone until `.metadata` is renamed to its place, which is how DCP says that all of
them are written: that publishes the manifest, with the digests of all files, and from then on nothing in the
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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from fsspec import AbstractFileSystem

from ckptd.errors import InvalidRequest, NotFound
from ckptd.image import DIGEST_BYTES, check_name
from ckptd.image.digest import digest_of_digests
from ckptd.image.digest_table import HEAD_BYTES, TABLE_SUFFIX, read_table, table_bytes, write_table
from ckptd.image.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, StoredObject
from ckptd.integrations.lines import generation_for, parent_in
from ckptd.integrations.streams import VerifiedFile, WrittenFile
from ckptd.storage import catalog, place
from ckptd.storage.reading import Checkpoint
from ckptd.storage.store import AlreadyThere, Store, open_store
from ckptd.storage.writing import Digesting

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


@dataclass(frozen=True)
class _Draft:
    """A checkpoint that this file system is writing."""

    store: Store
    job: str
    step: int
    generation: int
    parent: tuple[int, int] | None


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

    def __init__(self, store: str | None = None, **options: Any) -> None:
        super().__init__(store=store, **options)
        self._store = store or place.store_url()
        self._lock = threading.Lock()
        self._drafts: dict[str, _Draft] = {}  # by directory
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
            return _writer(self._draft(where).store, where.file)

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
            with _unpublished(draft.store, old.file) as source, _writer(draft.store, new.file) as target:
                while piece := source.read(_COPY_BYTES):
                    target.write(piece)
            _delete(draft.store, old.file)
            if new.file == COMMIT:
                _publish(draft)
                self._forget(new.directory)

    def rm_file(self, path: str) -> None:
        """Removes a file of a checkpoint that is being written."""
        where = self._writing(path)
        if where.directory not in self._drafts:
            why = "files of a checkpoint stay; remove it whole: rm(directory, recursive=True)"
            raise PermissionError(errno.EPERM, why, path)
        assert where.file is not None
        _delete(self._drafts[where.directory].store, where.file)

    def rm(self, path: str | list[str], recursive: bool = False, maxdepth: int | None = None) -> None:
        """Removes files that are being written, or whole checkpoints: all generations, if none is named."""
        for one in [path] if isinstance(path, str) else path:
            where = self._reading(one)
            if where.file is not None:
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
                there = draft.store.list()
                files = [name for name in there if name + TABLE_SUFFIX in there]
                sizes = {name: _object(draft.store, name, 0).nbytes for name in files}
        base = where.directory
        return [{"name": f"{base}/{name}", "size": size, "type": "file"} for name, size in sizes.items()]

    def _size(self, where: _Where) -> int:
        assert where.file is not None
        draft = self._drafts.get(where.directory)
        if draft is not None:
            return _object(draft.store, where.file, 0).nbytes
        checkpoint = self._checkpoint(where)
        return checkpoint.manifest.objects[_index(checkpoint, where.file)].nbytes

    def _reader(self, where: _Where) -> io.BufferedIOBase:
        assert where.file is not None
        draft = self._drafts.get(where.directory)
        if draft is not None:
            return _unpublished(draft.store, where.file)
        checkpoint = self._checkpoint(where)
        index = _index(checkpoint, where.file)
        return VerifiedFile.buffered(checkpoint.open(index), checkpoint.digests(index), where.file)

    def _checkpoint(self, where: _Where) -> Checkpoint:
        assert where.wanted is not None
        with self._lock:
            if where.directory not in self._opened:
                store = catalog.find(where.wanted)
                manifest = Manifest.read(store.read(MANIFEST_NAME, MAX_MANIFEST_BYTES))
                self._opened[where.directory] = Checkpoint(store, manifest)
            return self._opened[where.directory]

    # What is written

    def _draft(self, where: _Where) -> _Draft:
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
                self._drafts[where.directory] = _Draft(store, wanted.job, wanted.step, generation, parent)
            return self._drafts[where.directory]

    def _remove(self, where: _Where, wanted: place.Wanted) -> None:
        entries = catalog.entries(self._store, wanted.job)
        fitting = [e for e in entries if e.step == wanted.step and wanted.generation in (None, e.generation)]
        if not fitting:
            raise FileNotFoundError(errno.ENOENT, "there is no such checkpoint", where.path)
        for entry in fitting:
            store = catalog.job_store(self._store, wanted.job).inside(entry.directory)
            store.delete(MANIFEST_NAME)  # first: from here on there is no checkpoint
            for name in store.list():
                store.delete(name)
        self._forget(where.directory)

    def _forget(self, directory: str) -> None:
        with self._lock:
            self._drafts.pop(directory, None)
            self._opened.pop(directory, None)


def _writer(store: Store, name: str) -> WrittenFile:
    def put(pieces: Iterable[bytes]) -> None:
        _delete(store, name)  # what an earlier try left
        stream = Digesting(pieces)
        store.put(name, stream)
        store.put(name + TABLE_SUFFIX, [write_table(stream.nbytes, stream.digests())])

    return WrittenFile(put)


def _delete(store: Store, name: str) -> None:
    """Removes a file; without its digests it does not count."""
    store.delete(name + TABLE_SUFFIX)
    store.delete(name)


def _object(store: Store, name: str, number: int) -> StoredObject:
    """A file that is written, as a manifest describes it."""
    with store.open(name) as reader:
        nbytes = reader.size
    table = store.read(name + TABLE_SUFFIX, table_bytes(nbytes))
    root = digest_of_digests(table[HEAD_BYTES:])
    read_table(name, table, nbytes, root)
    return StoredObject(name, nbytes, root, number)


def _unpublished(store: Store, name: str) -> io.BufferedReader:
    found = _object(store, name, 0)
    digests = store.read(name + TABLE_SUFFIX, table_bytes(found.nbytes))[HEAD_BYTES:]
    assert len(digests) % DIGEST_BYTES == 0
    return VerifiedFile.buffered(store.open(name), digests, name)


def _index(checkpoint: Checkpoint, name: str) -> int:
    for index, stored in enumerate(checkpoint.manifest.objects):
        if stored.name == name:
            return index
    count = len(checkpoint.manifest.objects)
    raise NotFound(f"{name} is not in {checkpoint.store.url}", f"it has {count} files")


def _publish(draft: _Draft) -> None:
    """Writes the manifest of all files that have their digests.

    A file that an earlier try with more ranks left is among them: DCP's own index does not name it.
    """
    there = draft.store.list()
    names = [name for name in there if name + TABLE_SUFFIX in there]
    files = tuple(_object(draft.store, name, number) for number, name in enumerate(names))
    manifest = Manifest(
        draft.job, draft.generation, draft.step, "files", 1, files, tensors=(), parent=draft.parent
    )
    data = manifest.write()
    Manifest.read(data)  # what we cannot read ourselves is never published
    try:
        draft.store.put_if_absent(MANIFEST_NAME, data)
    except AlreadyThere:
        # The answer to an earlier try of ours may have been lost.
        if draft.store.read(MANIFEST_NAME, MAX_MANIFEST_BYTES) != data:
            raise


@contextlib.contextmanager
def _os_errors(path: str) -> Iterator[None]:
    """Makes of our errors those that users of file systems look for."""
    try:
        yield
    except NotFound as error:
        raise FileNotFoundError(errno.ENOENT, str(error), path) from error
    except AlreadyThere as error:
        raise FileExistsError(errno.EEXIST, str(error), path) from error
