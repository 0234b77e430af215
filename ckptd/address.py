"""host:port, as settings and rosters write it."""

from __future__ import annotations

import ipaddress


def host_of(address: str) -> str:
    """The host of host:port."""
    return address.rpartition(":")[0].strip("[]")


def is_loopback(address: str) -> bool:
    """Whether host:port names this machine only; a name other than localhost may be anybody's."""
    host = host_of(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
