"""A real S3 server on loopback, one for all tests of a session, and a proxy in front of it."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from fault_proxy import FaultProxy, Schedule

from ckptd.storage.retrying import Policy, Retrying
from ckptd.storage.s3 import S3Store
from ckptd.storage.s3_calls import Calls, connect

# Deadlines are for tests; a slow machine makes more tries, and no other result.
QUICK = Policy(tries=8, try_s=2.0, total_s=20.0, first_pause_s=0.002, most_pause_s=0.05, budget=40)
PART_BYTES = 40_000  # S3 itself takes no less than 5 MiB; moto is told to


@dataclass
class S3:
    """The server: directly, and through the proxy."""

    direct: str
    proxy: FaultProxy
    bucket: str

    def store(self, prefix: str, *, direct: bool = False, policy: Policy = QUICK, seed: int = 0) -> S3Store:
        """A store at a prefix of the bucket, which shares a client with others, and nothing else."""
        shared = connect(self.bucket, policy=QUICK, endpoint_url=self.direct if direct else self.proxy.url)
        retrying = Retrying(policy, clock=time.monotonic, sleep=time.sleep, random=random.Random(seed).random)
        calls = Calls(shared.fs, self.bucket, retrying)
        return S3Store(calls, prefix, f"s3://{self.bucket}/{prefix}", part_bytes=PART_BYTES)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    from moto.s3 import models
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "S3_UPLOAD_PART_MIN_SIZE", 256)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        proxy = FaultProxy((host, port))
        s3 = S3(f"http://{host}:{port}", proxy, "tests")
        connect(s3.bucket, policy=QUICK, endpoint_url=s3.direct).call("no bucket", "create_bucket")
        yield s3
        proxy.close()
        server.stop()


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """The server, with a proxy that does nothing unless it is told to; CKPTD_STORE may name s3:// URLs."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_server.proxy.url,
    }.items():
        monkeypatch.setenv(name, value)
    s3_server.proxy.use(Schedule())
    yield s3_server
    s3_server.proxy.use(Schedule())
