"""A store in S3, or in anything that speaks its protocol.

There is no rename: an object is there when its put, or the completion of its upload, succeeded.  A
checkpoint is committed by a conditional put (`If-None-Match: *`).  Not every store has that, and some
ignore it: it is tried out once for every bucket, and where it does not hold, the put is guarded by a
lock (`claims`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ckptd.errors import CkptdError, CorruptCheckpoint, InvalidRequest
from ckptd.storage import claims, multipart, place
from ckptd.storage.s3_calls import Calls, code_of, connect
from ckptd.storage.store import SCRATCH_PREFIX, AlreadyThere, Reader, Store

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger("ckptd.storage")

_READ_BYTES: Final = 16 << 20  # of one request
_SWEEP_EVERY_S: Final = 3600.0
_UNKNOWN_CONDITION: Final = {"NotImplemented", "501", "InvalidArgument", "InvalidRequest", "MalformedHeader"}
_LOST: Final = {"PreconditionFailed", "412"}


class _Found(NamedTuple):
    name: str
    modified: float  # seconds since 1970
    is_prefix: bool


class S3Store(Store):
    """The objects below a prefix.

    Args:
        root: the prefix below which uploads of writers that died are aborted.
        token: a string that names one put and no other.
    """

    def __init__(
        self,
        calls: Calls,
        prefix: str,
        url: str,
        *,
        root: str | None = None,
        part_bytes: int = multipart.PART_BYTES,
        token: Callable[[], str] = lambda: os.urandom(12).hex(),
    ) -> None:
        self._calls = calls
        self._prefix = prefix.strip("/")
        self._root = self._prefix if root is None else root
        self._part_bytes = part_bytes
        self._token = token
        self.url = url.rstrip("/")

    def put(self, name: str, pieces: Iterable[Buffer]) -> None:
        key, what = self._key(name), f"{name} cannot be written to {self.url}"
        parts = multipart.buffers(pieces, self._part_bytes)
        first = next(parts, b"")
        second = next(parts, None)
        if second is None:
            self._calls.call(what, "put_object", nbytes=len(first), Key=key, Body=first)
            return
        self._sweep()
        multipart.upload(self._calls, key, chain([first, second], parts), self._token(), what)

    def put_if_absent(self, name: str, data: bytes) -> None:
        key = self._key(name)
        if self._has_conditional_put():
            self._put_conditionally(key, name, data)
            return
        with claims.held(self._claims(), name, self._token(), self._calls.retrying) as check:
            if multipart.about(self._calls, key) is not None:
                raise _taken(name, self.url)
            check()
            self._calls.call(f"{name} cannot be written to {self.url}", "put_object", Key=key, Body=data)

    def open(self, name: str) -> Reader:
        key = self._key(name)
        about = self._calls.call(f"{name} in {self.url} cannot be opened", "head_object", Key=key)
        return _S3Reader(self._calls, key, f"{self.url}/{name}", int(about["ContentLength"]))

    def list(self) -> list[str]:
        names = {each.name for each in self._found()}
        return sorted(name for name in names if not name.startswith(SCRATCH_PREFIX))

    def delete(self, name: str) -> None:
        key = self._key(name)
        self._calls.call(f"{name} in {self.url} cannot be removed", "delete_object", Key=key)

    def modified(self, name: str) -> float:
        what = f"{name} in {self.url} cannot be looked at"
        about = self._calls.call(what, "head_object", Key=self._key(name))
        return float(about["LastModified"].timestamp())

    def touched(self) -> float:
        times = [each.modified for each in self._found() if not each.is_prefix]
        under = f"{self._prefix}/" if self._prefix else ""
        times += [began.timestamp() for _, _, began, _ in multipart.uploads(self._calls, under)]
        return max(times, default=0.0)

    def remove(self, before: float) -> None:
        found = list(self._found())
        if all(not each.is_prefix and each.name.startswith(SCRATCH_PREFIX) for each in found):
            for each in found:
                if each.modified < before:
                    self.delete(each.name)

    def inside(self, name: str) -> S3Store:
        return S3Store(
            self._calls,
            self._key(name),
            place.join(self.url, name),
            root=self._root,
            part_bytes=self._part_bytes,
            token=self._token,
        )

    def _key(self, name: str) -> str:
        return place.join(f"/{self._prefix}", name).lstrip("/")

    def _found(self) -> Iterator[_Found]:
        """The objects and the prefixes right below, page after page."""
        prefix = f"{self._prefix}/" if self._prefix else ""
        more: dict[str, Any] = {}
        while True:
            page = self._calls.call(
                f"{self.url} cannot be listed", "list_objects_v2", Prefix=prefix, Delimiter="/", **more
            )
            for one in page.get("Contents", []):
                if one["Key"] != prefix:  # what some tools leave to mark a directory
                    yield _Found(one["Key"][len(prefix) :], one["LastModified"].timestamp(), False)
            for one in page.get("CommonPrefixes", []):
                yield _Found(one["Prefix"][len(prefix) :].rstrip("/"), 0.0, True)
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _put_conditionally(self, key: str, name: str, data: bytes) -> None:
        token = self._token()
        try:
            self._calls.call(
                f"{name} cannot be written to {self.url}",
                "put_object",
                settle=lambda: multipart.written(self._calls, key, token),
                Key=key,
                Body=data,
                IfNoneMatch="*",
                Metadata={multipart.TOKEN: token},
            )
        except CkptdError as error:
            if code_of(error) in _LOST:
                raise _taken(name, self.url) from error
            raise

    def _has_conditional_put(self) -> bool:
        """Whether the store refuses a second conditional put; tried out once for each bucket."""
        with self._calls.lock:
            if self._calls.conditional is None:
                self._calls.conditional = self._try_out()
                if not self._calls.conditional:
                    log.warning(
                        "%s has no conditional put; manifests are written under a lock object", self.url
                    )
            return self._calls.conditional

    def _try_out(self) -> bool:
        key = self._key(f"{SCRATCH_PREFIX}try-{self._token()}")
        what = f"whether {self.url} has a conditional put cannot be found out"

        def put() -> str:
            try:
                self._calls.call(what, "put_object", Key=key, Body=b"", IfNoneMatch="*")
            except CkptdError as error:
                code = code_of(error)
                if code in _LOST or code in _UNKNOWN_CONDITION:
                    return code
                raise
            return ""

        try:
            first = put()
            return first in _LOST or (not first and put() in _LOST)
        finally:
            self._calls.call(what, "delete_object", Key=key)

    def _claims(self) -> claims.Place:
        what = f"{self.url} cannot be locked"

        def put(name: str) -> None:
            self._calls.call(what, "put_object", Key=self._key(name), Body=b"")

        return claims.Place(put, lambda: [each.name for each in self._found()], self.delete)

    def _sweep(self) -> None:
        """Aborts what dead writers left below the root, now and then; a failure of that is no failure."""
        now = self._calls.retrying.clock()
        with self._calls.lock:
            last = self._calls.swept.get(self._root)
            if last is not None and now - last < _SWEEP_EVERY_S:
                return
            self._calls.swept[self._root] = now
        try:
            found = multipart.abort_stale(self._calls, f"{self._root}/" if self._root else "")
        except CkptdError as error:
            log.warning("uploads of dead writers below %s are not removed: %s", self._root, error)
            return
        if found:
            log.info("%d uploads of dead writers below %s were aborted", found, self._root)


class _S3Reader(Reader):
    def __init__(self, calls: Calls, key: str, shown: str, size: int) -> None:
        self._calls = calls
        self._key = key
        self._shown = shown
        self.size = size

    def read_into(self, start: int, into: memoryview) -> None:
        # A store answers a range behind the end with an error, and one across it with less.
        if start + len(into) > self.size:
            raise CorruptCheckpoint(
                f"{self._shown} is truncated",
                f"it ends at byte {self.size}, {start + len(into)} were expected",
                "use another checkpoint",
            )
        for at in range(0, len(into), _READ_BYTES):
            part = into[at : at + _READ_BYTES]
            what = f"{self._shown} cannot be read"
            data = self._calls.get(what, self._key, start + at, start + at + len(part))
            if len(data) != len(part):
                raise CorruptCheckpoint(
                    f"{self._shown} is truncated",
                    f"{len(data)} bytes came from byte {start + at} on, {len(part)} were expected",
                    "use another checkpoint",
                )
            part[:] = data

    def close(self) -> None:
        pass


def open_s3(url: str) -> S3Store:
    """Returns the store at s3://BUCKET/PREFIX.

    Raises:
        InvalidRequest: the URL names no bucket.
    """
    bucket, _, prefix = url.partition("://")[2].partition("/")
    if not bucket:
        raise InvalidRequest(f"the store {url} cannot be opened", "it names no bucket", "s3://BUCKET/PREFIX")
    return S3Store(connect(bucket), prefix, url)


def _taken(name: str, url: str) -> AlreadyThere:
    return AlreadyThere(f"{name} exists in {url}", next="read it")
