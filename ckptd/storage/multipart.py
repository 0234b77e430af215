"""One object to S3 in parts, several at a time, from a bounded number of buffers.

An upload that fails is aborted; one whose writer died is aborted by a later writer (`abort_stale`): its
parts are seen nowhere, and cost.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final

from ckptd.errors import CkptdError, NotFound
from ckptd.storage.s3_calls import Answer, Calls, code_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger("ckptd.storage")

PART_BYTES: Final = 16 << 20
LEAST_PART_BYTES: Final = 5 << 20  # S3's own bound, of all parts but the last
PARALLEL: Final = 6  # parts on the way; with the one being filled, so many buffers are held
STALE_S: Final = 24 * 3600.0  # an upload that began so long ago has no writer any more
TOKEN: Final = "ckptd-put"  # in the metadata: whose put this is
_PARTS_OF_A_SIZE: Final = 1000  # then they double: S3 takes 10,000


def buffers(pieces: Iterable[Buffer], part_bytes: int = PART_BYTES) -> Iterator[bytes]:
    """Yields the bytes of `pieces` in parts of `part_bytes`, doubled after every 1,000; the last is shorter.

    Nothing is yielded where there are no bytes.
    """
    held, count, size = io.BytesIO(), 0, part_bytes
    for piece in pieces:
        if not memoryview(piece).nbytes:
            continue
        view = memoryview(piece).cast("B")
        at = 0
        while at < len(view):
            at += held.write(view[at : at + size - held.tell()])
            if held.tell() == size:
                yield held.getvalue()
                held, count = io.BytesIO(), count + 1
                size = part_bytes << count // _PARTS_OF_A_SIZE
    if held.tell():
        yield held.getvalue()


def upload(calls: Calls, key: str, parts: Iterator[bytes], token: str, what: str) -> None:
    """Writes an object of these parts; it is there when this returns, and not before.

    Args:
        token: of this put and no other; an answer that was lost is found by it.
        what: begins the message of an error.

    Raises:
        CkptdError: as `Calls` says; the upload is aborted.
    """
    made = calls.call(what, "create_multipart_upload", Key=key, Metadata={TOKEN: token})
    number = str(made["UploadId"])
    try:
        tags, nbytes = _send(calls, key, number, parts, what)
        calls.call(
            what,
            "complete_multipart_upload",
            settle=lambda: written(calls, key, token, nbytes),
            nbytes=nbytes,  # the store may put the parts together before it answers
            Key=key,
            UploadId=number,
            MultipartUpload={"Parts": [{"PartNumber": n, "ETag": tag} for n, tag in enumerate(tags, 1)]},
        )
    except BaseException:
        abort(calls, key, number)
        raise


def written(calls: Calls, key: str, token: str, nbytes: int | None = None) -> Answer | None:
    """Returns what is known of an object if the put of this token made it; None if not."""
    found = about(calls, key)
    if found is None or (nbytes is not None and found["ContentLength"] != nbytes):
        return None
    return found if found.get("Metadata", {}).get(TOKEN) == token else None


def about(calls: Calls, key: str) -> Answer | None:
    """Returns an object's length and metadata; None where there is none."""
    try:
        return calls.call(f"{key} in s3://{calls.bucket} cannot be looked at", "head_object", Key=key)
    except NotFound:
        return None


def abort(calls: Calls, key: str, number: str) -> None:
    """Aborts an upload; one that cannot be reached is left to `abort_stale`."""
    try:
        calls.call(
            f"the upload of {key} cannot be aborted", "abort_multipart_upload", Key=key, UploadId=number
        )
    except CkptdError as error:
        if code_of(error) != "NoSuchUpload":  # an earlier try did it, and the answer was lost
            log.warning("an upload to %s is left behind: %s", key, error)


def abort_stale(calls: Calls, prefix: str, older_s: float = STALE_S) -> int:
    """Aborts the uploads below `prefix` that began more than `older_s` ago by the store's own clock.

    Returns how many.  Raises as `Calls` says.
    """
    found = 0
    for key, number, began, now in uploads(calls, prefix):
        if (now - began).total_seconds() > older_s:
            abort(calls, key, number)
            found += 1
    return found


def uploads(calls: Calls, prefix: str) -> Iterator[tuple[str, str, datetime, datetime]]:
    """Yields key, number, beginning, and the store's present time, of each upload below `prefix`."""
    markers: dict[str, Any] = {}
    while True:
        page = calls.call(
            f"uploads to {prefix} cannot be listed", "list_multipart_uploads", Prefix=prefix, **markers
        )
        now = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
        for one in page.get("Uploads", []):
            if one["Key"].startswith(prefix):  # some stores do not filter
                yield one["Key"], one["UploadId"], one["Initiated"], now
        if not page.get("IsTruncated"):
            return
        markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def _send(calls: Calls, key: str, number: str, parts: Iterator[bytes], what: str) -> tuple[list[str], int]:
    """Uploads all parts; returns their tags in order, and the bytes in all."""

    def send(index: int, data: bytes) -> str:
        answer = calls.call(
            what, "upload_part", nbytes=len(data), Key=key, UploadId=number, PartNumber=index, Body=data
        )
        return str(answer["ETag"])

    tags: list[str] = []
    nbytes = 0
    running: deque[Future[str]] = deque()
    with ThreadPoolExecutor(PARALLEL, thread_name_prefix="upload") as pool:
        try:
            for index, data in enumerate(parts, 1):
                running.append(pool.submit(send, index, data))
                nbytes += len(data)
                if len(running) == PARALLEL:
                    tags.append(running.popleft().result())
            while running:
                tags.append(running.popleft().result())
        except BaseException:
            for future in running:
                future.cancel()
            # A part that arrives behind the abort would stay.
            for future in running:
                with contextlib.suppress(CkptdError, CancelledError):
                    future.result()
            raise
    return tags, nbytes
