"""The daemon's settings: defaults < file < CKPTD_* environment < flags."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from ckptd.address import is_loopback
from ckptd.errors import InvalidRequest
from ckptd.image.names import check_name
from ckptd.storage import place


class DaemonSettings(BaseSettings):
    """One node's daemon.  Every field is also CKPTD_<NAME> in the environment."""

    model_config = SettingsConfigDict(env_prefix="CKPTD_", extra="ignore")

    node: str = Field(default_factory=lambda: socket.gethostname().split(".")[0])
    # Failure domain (rack, switch, power supply); empty: the node is its own.
    domain: str = ""
    listen: str = "127.0.0.1:0"
    bulk: str = "127.0.0.1:0"
    socket: Path = Path("/run/ckptd/ckptd.sock")
    memory_dir: Path = Path("/dev/shm/ckptd")
    # 0: nine tenths of what the tmpfs has free when the daemon starts.
    memory_limit_bytes: int = Field(default=0, ge=0)
    # host:port; empty: this daemon serves one node alone.
    coordinator: str = ""
    embedded: bool = False
    # An embedded daemon with no trainer ends after this time.
    idle_s: float = Field(default=3600.0, gt=0)
    # A finished or abandoned job's memory is freed after this time.
    park_s: float = Field(default=24 * 3600.0, gt=0)
    heartbeat_s: float = Field(default=0.1, gt=0)
    bulk_timeout_s: float = Field(default=10.0, gt=0)
    # How long a trainer may wait for a dying one of the same rank.
    rank_handover_s: float = Field(default=5.0, ge=0)
    stop_grace_s: float = Field(default=0.5, ge=0)
    # Niceness of the threads that move and code bulk bytes: protection yields to training.
    bulk_nice: int = Field(default=5, ge=0, le=19)
    # What protection may send, bytes per second and node; 0: as fast as it goes.
    bulk_bytes_per_s: int = Field(default=0, ge=0)
    # What the scrub may read while it looks for flipped bits, bytes per second and node; 0: it is off.
    scrub_bytes_per_s: int = Field(default=64 << 20, ge=0)
    # Where durable checkpoints go, a path or any fsspec URL; empty: a folder of this user's state directory.
    store: str = ""
    # Snapshots of every so many steps become durable in the background; 0: only what a trainer asks for.
    flush_every: int = Field(default=0, ge=0)
    # What the flush may write, bytes per second and node; 0: as fast as it goes.
    flush_bytes_per_s: int = Field(default=0, ge=0)
    # Whether what becomes durable is compressed (`docs/operations.md`): fewer bytes for more processor time.
    compress: bool = False
    # How long the node that publishes waits for the others' parts.
    flush_timeout_s: float = Field(default=600.0, gt=0)
    # When the daemon is told to end: how long it may take to make the newest protected steps durable.
    last_flush_s: float = Field(default=20.0, ge=0)
    # Listen beyond loopback without TLS; the name says what that is.
    insecure: bool = False

    @field_validator("node")
    @classmethod
    def _node_is_a_name(cls, value: str) -> str:
        return check_name("node", value)

    @model_validator(mode="after")
    def _listens_safely(self) -> DaemonSettings:
        for flag, address in (("--listen", self.listen), ("--bulk", self.bulk)):
            if not self.insecure and not is_loopback(address):
                raise InvalidRequest(
                    f"{flag} {address} is reachable from other machines",
                    "there is no TLS yet, and whoever reaches it can read and change the job's state",
                    "use a loopback address, or --insecure on a network that you trust",
                )
        return self

    def store_url(self) -> str:
        """Where durable checkpoints go."""
        return self.store or place.store_url()

    def limit_bytes(self) -> int:
        """The memory this daemon may take, in bytes."""
        if self.memory_limit_bytes:
            return self.memory_limit_bytes
        stat = os.statvfs(self.memory_dir)
        used = sum(path.stat().st_size for path in self.memory_dir.rglob("*.arena"))
        return (stat.f_bavail * stat.f_frsize + used) * 9 // 10
