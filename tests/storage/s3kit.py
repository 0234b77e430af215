"""A real S3 server on loopback, one for all tests of a session, and a proxy in front of it."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fault_proxy import FaultProxy, Schedule

from ckptd.storage.retrying import Policy, Retrying
from ckptd.storage.s3 import S3Store
from ckptd.storage.s3_calls import Calls, connect

# Deadlines are for tests; a slow machine makes more tries, and no other result.
QUICK = Policy(tries=8, try_s=2.0, total_s=20.0, first_pause_s=0.002, most_pause_s=0.05, budget=40)
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}
PART_BYTES = 40_000  # S3 itself takes no less than 5 MiB


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
    command = [sys.executable, str(Path(__file__).with_name("s3_server.py"))]
    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as server,
    ):
        assert server.stdout is not None
        assert server.stdin is not None
        host, port = server.stdout.readline().split()
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        proxy = FaultProxy((host, int(port)))
        s3 = S3(f"http://{host}:{port}", proxy, "tests")
        connect(s3.bucket, policy=QUICK, endpoint_url=s3.direct).call("no bucket", "create_bucket")
        yield s3
        proxy.close()
        server.stdin.close()


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """The server, with a proxy that does nothing unless it is told to; CKPTD_STORE may name s3:// URLs."""
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": s3_server.proxy.url}.items():
        monkeypatch.setenv(name, value)
    s3_server.proxy.use(Schedule())
    yield s3_server
    s3_server.proxy.use(Schedule())
