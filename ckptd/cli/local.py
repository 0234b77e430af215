"""How operator commands reach the daemon of their own machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from ckptd.client.settings import Environment
from ckptd.daemon.server import control_socket
from ckptd.errors import CkptdError, InvalidRequest, NotFound, Unreachable
from ckptd.v1 import common_pb2, daemon_pb2_grpc

SYSTEM_SOCKET = Path("/run/ckptd/ckptd.sock")
TIMEOUT_S = 5.0
_ERRORS = {
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.FAILED_PRECONDITION: InvalidRequest,
}


def header(job: str = "") -> common_pb2.Header:
    """The header of an operator's request."""
    return common_pb2.Header(job=job, timeout_ms=int(TIMEOUT_S * 1000))


def address_of(address: str | None, socket: Path | None) -> str:
    """The gRPC target of the daemon to ask: what was given, else the first local one.

    Raises:
        Unreachable: there is none.
    """
    if address:
        return address
    environment = Environment.read()
    places = (
        [socket] if socket else [environment.socket, SYSTEM_SOCKET, environment.runtime_dir / "ckptd.sock"]
    )
    for place in places:
        if place is not None and control_socket(place).exists():
            return f"unix:{control_socket(place)}"
    looked = ", ".join(str(place) for place in places if place is not None)
    raise Unreachable(
        "no ckptd daemon on this machine",
        f"no socket at {looked}",
        "start `ckptd daemon`, or a trainer that attaches (it starts an embedded one)",
    )


@contextlib.contextmanager
def daemon(target: str) -> Iterator[Any]:
    """A stub of the daemon at `target`; its errors are ours.

    Raises:
        Unreachable, NotFound, InvalidRequest: as the daemon says.
    """
    try:
        with grpc.insecure_channel(target) as channel:
            yield daemon_pb2_grpc.DaemonStub(channel)
    except grpc.RpcError as error:
        kind: type[CkptdError] = _ERRORS.get(error.code(), Unreachable)
        raise kind(error.details() or str(error.code())) from error
