"""One question to a daemon: are you there?

A connection alone proves nothing: the kernel accepts it for a stopped process.  Only
an answer of the health service does, or any other answer of a gRPC server.
"""

from __future__ import annotations

import asyncio
import time

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ckptd.coordinator.events import Answer

_OPTIONS = [
    # Of its own, not one shared with an earlier probe that is in its reconnect pause.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
]


async def probe(address: str, timeout_s: float) -> Answer:
    """How the daemon at host:port takes a health check, within `timeout_s` altogether."""
    began = time.monotonic()
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return Answer.REFUSED
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        writer.close()
    except TimeoutError:
        return Answer.SILENT
    except OSError:
        return Answer.REFUSED
    left_s = max(0.01, timeout_s - (time.monotonic() - began))
    async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=left_s)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                return Answer.SILENT
            # It went away between the two questions.
            return Answer.REFUSED if error.code() == grpc.StatusCode.UNAVAILABLE else Answer.ANSWERED
    return Answer.ANSWERED
