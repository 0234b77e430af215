"""host:port, as settings and rosters write it."""

from __future__ import annotations


def host_of(address: str) -> str:
    """The host of host:port."""
    return address.rpartition(":")[0].strip("[]")


def is_loopback(address: str) -> bool:
    """Whether host:port names this machine only."""
    host = host_of(address)
    return host in {"localhost", "::1"} or host.startswith("127.")
