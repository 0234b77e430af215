"""moto's S3 server as a process: says on stdout where it listens, and ends when its stdin does.

What moto does otherwise than S3, and tests rely on, is put right here.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Any

from moto.s3 import models, responses
from moto.s3.exceptions import NoSuchUpload
from moto.server import ThreadedMotoServer


def main() -> None:
    vars(models)["S3_UPLOAD_PART_MIN_SIZE"] = 256  # S3's is 5 MiB; tests are small
    _tell_when_uploads_began()
    _refuse_to_complete_what_is_no_upload()
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    print(host, port, flush=True)
    sys.stdin.read()


def _tell_when_uploads_began() -> None:
    """moto says 2010 of every upload, so that all of them look forgotten."""
    began: dict[str, str] = {}
    begin, result_of = models.FakeMultipart.__init__, vars(responses)["ActionResult"]

    def dated_begin(self: Any, *arguments: Any, **more: Any) -> None:
        begin(self, *arguments, **more)
        began[self.id] = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")

    def dated_result(result: Any) -> Any:
        for one in result.get("Uploads", []) if isinstance(result, dict) else []:
            one["Initiated"] = began[one["UploadId"]]
        return result_of(result)

    models.FakeMultipart.__init__ = dated_begin  # type: ignore[method-assign]
    vars(responses)["ActionResult"] = dated_result


def _refuse_to_complete_what_is_no_upload() -> None:
    """moto fails with a KeyError, and so a 500, where S3 says NoSuchUpload."""
    complete = models.S3Backend.complete_multipart_upload

    def checked(self: Any, bucket_name: str, multipart_id: str, *arguments: Any) -> Any:
        if multipart_id not in self.get_bucket(bucket_name).multiparts:
            raise NoSuchUpload(upload_id=multipart_id)
        return complete(self, bucket_name, multipart_id, *arguments)

    models.S3Backend.complete_multipart_upload = checked  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    main()
