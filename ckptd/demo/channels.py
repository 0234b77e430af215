"""gRPC channels on loopback that come back quickly after a process was restarted."""

from __future__ import annotations

import time

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ckptd.demo.options import DemoFailed

OPTIONS = [
    # gRPC's own first retry comes after a second: a killed daemon is back sooner.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
]


def channel(address: str) -> grpc.aio.Channel:
    """A channel to host:port."""
    return grpc.aio.insecure_channel(address, options=OPTIONS)


async def serving(connection: grpc.aio.Channel, name: str, deadline_s: float) -> None:
    """Returns once the process behind the channel says that it serves.

    Raises:
        DemoFailed: it does not within `deadline_s`.
    """
    deadline = time.monotonic() + deadline_s
    while True:
        left = deadline - time.monotonic()
        try:
            reply = await health_pb2_grpc.HealthStub(connection).Check(
                health_pb2.HealthCheckRequest(), timeout=max(left, 0.0), wait_for_ready=True
            )
            break
        except grpc.aio.AioRpcError as error:
            # A call that was sent to the process just killed fails at once: its successor is asked.
            if error.code() != grpc.StatusCode.UNAVAILABLE or left <= 0:
                why = str(error.details())
                raise DemoFailed(f"{name} is not ready after {deadline_s:.0f} s", why) from None
    if reply.status != health_pb2.HealthCheckResponse.SERVING:
        raise DemoFailed(f"{name} is not ready", f"its health is {reply.status}")
