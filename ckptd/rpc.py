"""What our gRPC servers and channels have in common: bounds, keepalive, health, reflection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ckptd.errors import Unreachable

MAX_MESSAGE_BYTES = 64 << 20
_BOUNDS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A peer that vanished without a word is noticed by heartbeats first; this ends its stream.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
]
CHANNEL_OPTIONS = [
    *_BOUNDS,
    # gRPC's own first retry comes after a second: a killed process is back sooner.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]
_SERVER_OPTIONS = [
    *_BOUNDS,
    ("grpc.max_concurrent_streams", 4096),
    ("grpc.keepalive_permit_without_calls", 1),
    # Both sides ping: what the other one sends must not count as abuse.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    # A second process on this port must fail, not share it.
    ("grpc.so_reuseport", 0),
]


async def make_server(
    service: str, register: Callable[[grpc.aio.Server], Any], listen: str
) -> tuple[grpc.aio.Server, int]:
    """A server that is not started yet, with health and reflection, and the port it will listen on.

    Args:
        service: full name, "ckptd.v1.Daemon".
        register: adds the servicer.
        listen: host:port; port 0 takes a free one.

    Raises:
        Unreachable: the address cannot be listened on.
    """
    server = grpc.aio.server(options=_SERVER_OPTIONS)
    register(server)
    status = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    for name in ("", service):
        await status.set(name, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection((service, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        return server, server.add_insecure_port(listen)
    except RuntimeError as error:
        raise Unreachable(f"cannot listen on {listen}", str(error), "choose another --listen") from error
