"""The S3 server that the tests of this folder share."""

from s3kit import s3, s3_server

__all__ = ["s3", "s3_server"]
