"""Calls of S3's own operations, each with a deadline, retries, and errors that say what to do.

Session, credentials, endpoint and the event loop are s3fs's, so that fsspec's configuration and the usual AWS
environment count; the operations are those of its client, because s3fs's own calls retry without an end
and hide how a call failed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import io
import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import aiohttp
import fsspec.config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError
from botocore.exceptions import ConnectionError as CannotConnect
from botocore.parsers import ResponseParserError
from s3fs import S3FileSystem

from ckptd.errors import CkptdError, InvalidRequest, NoSpace, NotFound
from ckptd.storage.retrying import Failed, Policy, Retrying

Answer = dict[str, Any]

_GRACE_S: Final = 5.0  # for the loop to say that a deadline passed
_MISSING: Final = {"404", "NoSuchKey", "NotFound"}
_FULL: Final = {"507", "QuotaExceeded", "XMinioStorageFull", "InsufficientStorage"}
_BUSY: Final = {
    "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests",
    "ConditionalRequestConflict", "OperationAborted", "RequestTimeTooSkewed",
}  # fmt: skip
_BUSY_STATUS: Final = {408, 429}
_SERVER_STATUS: Final = {500, 502, 503, 504}
# The connection failed.  An object's body comes from aiohttp itself.
_BROKEN: Final = (
    HTTPClientError, CannotConnect, IncompleteReadError, ResponseParserError, aiohttp.ClientError, OSError,
)  # fmt: skip


class Calls:
    """One bucket's operations; thread-safe.

    Raises (`call` and `get`):
        NotFound: no such object.
        NoSpace: the store is full.
        InvalidRequest: no such bucket.
        DeadlineExceeded, Unreachable: it did not answer in time, or not as often as it was asked.
        CkptdError: it refused otherwise.
    """

    def __init__(self, fs: S3FileSystem, bucket: str, retrying: Retrying) -> None:
        self.fs = fs
        self.bucket = bucket
        self.retrying = retrying
        # What was found out about this bucket: whether it has conditional puts; which prefixes were swept.
        self.conditional: bool | None = None
        self.swept: dict[str, float] = {}
        self.lock = threading.Lock()

    def call(
        self,
        what: str,
        method: str,
        *,
        settle: Callable[[], Answer | None] | None = None,
        nbytes: int = 0,
        **arguments: Any,
    ) -> Answer:
        """Returns S3's answer to `method` of this bucket, called until it succeeds (see `Retrying.call`)."""
        return self.retrying.call(
            what,
            lambda deadline_s: self._try(what, self._plain(method, arguments), deadline_s),
            settle=settle,
            nbytes=nbytes,
        )

    def get(self, what: str, key: str, start: int, stop: int) -> bytes:
        """Returns the bytes [start, stop) of an object; fewer if it ends before."""
        found: bytes = self.retrying.call(
            what,
            lambda deadline_s: self._try(what, self._range(key, start, stop), deadline_s),
            nbytes=stop - start,
        )
        return found

    def _try(self, what: str, operation: Callable[[], Any], deadline_s: float) -> Any:
        """Runs one try on the loop of s3fs.  Raises Failed."""

        async def bounded() -> Any:
            return await asyncio.wait_for(operation(), deadline_s)

        future = asyncio.run_coroutine_threadsafe(bounded(), self.fs.loop)
        try:
            return future.result(deadline_s + _GRACE_S)
        except (TimeoutError, concurrent.futures.TimeoutError) as error:
            late = CkptdError(what, f"no answer in {deadline_s:.1f} s", "see whether the store answers")
            raise Failed(late, again=True) from error
        except (ClientError, BotoCoreError, *_BROKEN) as error:
            raise judged(what, error) from error
        finally:
            future.cancel()

    def _plain(self, method: str, arguments: Mapping[str, Any]) -> Callable[[], Any]:
        async def operation() -> Answer:
            call = getattr(await self.fs.set_session(), method)
            if "Body" in arguments:
                # A stream, which the loop sends piece by piece; each try has its own, of the same bytes.
                arguments_now = {**arguments, "Body": io.BytesIO(arguments["Body"])}
            else:
                arguments_now = dict(arguments)
            # With the options that s3fs was given for all requests: encryption, who pays.
            found: Answer = await call(
                **self.fs._get_s3_method_kwargs(call, Bucket=self.bucket, **arguments_now)
            )
            return found

        return operation

    def _range(self, key: str, start: int, stop: int) -> Callable[[], Any]:
        arguments = {"Key": key, "Range": f"bytes={start}-{stop - 1}"}

        async def operation() -> bytes:
            answer = await self._plain("get_object", arguments)()
            async with answer["Body"] as body:
                return bytes(await body.read())

        return operation


def judged(what: str, error: Exception) -> Failed:
    """Returns what a failure of S3's client means."""
    if isinstance(error, ClientError):
        return _refused(what, error)
    if isinstance(error, _BROKEN):
        return Failed(CkptdError(what, str(error), "see whether the store answers"), again=True)
    return Failed(CkptdError(what, str(error), "set the AWS credentials, region and endpoint"), again=False)


def code_of(error: CkptdError) -> str:
    """Returns the store's own name of what a call failed with, such as "PreconditionFailed"; "" for none."""
    cause = error.__cause__
    return cause.code if isinstance(cause, Failed) else ""


def _refused(what: str, error: ClientError) -> Failed:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    why = str(error)
    if code in _BUSY or status in _BUSY_STATUS:
        return Failed(CkptdError(what, why, "ask the store less often"), again=True, code=code)
    if code in _FULL or status == 507:
        told: CkptdError = NoSpace(what, why, "free space, or choose another store")
    elif code == "NoSuchBucket":
        told = InvalidRequest(what, why, "make the bucket")
    elif code in _MISSING:
        told = NotFound(what, "there is no such object", "ckptd ls shows what there is")
    elif status in _SERVER_STATUS:
        return Failed(CkptdError(what, why, "see whether the store answers"), again=True, code=code)
    else:
        told = CkptdError(
            what, why, "check the credentials' rights" if status == 403 else "look at the store"
        )
    return Failed(told, again=False, code=code)


_shared: dict[str, Calls] = {}
_shared_lock = threading.Lock()


def connect(bucket: str, *, policy: Policy | None = None, endpoint_url: str | None = None) -> Calls:
    """Returns the calls of a bucket; those of one bucket and configuration share a client and a budget."""
    policy = policy or Policy()
    options: dict[str, Any] = dict(fsspec.config.conf.get("s3", {}))
    if endpoint_url is not None:
        options["endpoint_url"] = endpoint_url
    options["config_kwargs"] = {
        "connect_timeout": policy.try_s,
        "read_timeout": policy.try_s,
        "max_pool_connections": 64,
        **options.get("config_kwargs", {}),
        "retries": {"total_max_attempts": 1, "mode": "standard"},  # they are ours
    }
    # A client keeps what it found in the environment when it was made, and lives in one process.
    amazon = sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    key = json.dumps([os.getpid(), bucket, repr(policy), repr(options), amazon])
    with _shared_lock:
        if key not in _shared:
            fs = S3FileSystem(**options, skip_instance_cache=True, use_listings_cache=False)
            clocks = Retrying(policy, clock=time.monotonic, sleep=time.sleep, random=random.random)
            _shared[key] = Calls(fs, bucket, clocks)
        return _shared[key]
