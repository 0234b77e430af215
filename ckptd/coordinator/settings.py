"""The coordinator's settings: defaults < CKPTD_COORDINATOR_* environment < flags."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from ckptd.address import is_loopback
from ckptd.coordinator.state import Timing
from ckptd.errors import InvalidRequest
from ckptd.storage import place


class CoordinatorSettings(BaseSettings):
    """One coordinator.  Every field is also CKPTD_COORDINATOR_<NAME> in the environment."""

    model_config = SettingsConfigDict(env_prefix="CKPTD_COORDINATOR_", extra="ignore")

    # host:port; port 0 takes a free one, and the log says which.
    listen: str = "127.0.0.1:7070"
    journal: Path = Path("/var/lib/ckptd/coordinator.sqlite")
    # How often daemons report when nothing changes.
    heartbeat_s: float = Field(default=0.1, gt=0)
    # A daemon that says nothing for so long, and answers no probe, is dead.
    silence_s: float = Field(default=1.0, gt=0)
    # How long evidence is gathered before an incident is judged.
    gather_s: float = Field(default=0.15, ge=0)
    tick_s: float = Field(default=0.05, gt=0)
    probe_timeout_s: float = Field(default=0.2, gt=0)
    # After its start the coordinator listens so long before it decides anything.
    settle_s: float = Field(default=1.0, ge=0)
    # How long a daemon may be away while no step tells whether its trainers live.
    daemon_grace_s: float = Field(default=30.0, gt=0)
    stop_timeout_s: float = Field(default=15.0, gt=0)
    transfer_stall_s: float = Field(default=10.0, gt=0)
    start_timeout_s: float = Field(default=600.0, gt=0)
    # When memory has nothing whole any more: how long lost nodes may take to come back with theirs.
    storage_after_s: float = Field(default=30.0, gt=0)
    # Where the jobs' durable checkpoints are; empty: CKPTD_STORE, or a folder of this user's state directory.
    store: str = ""
    # Timeline events that are kept for watchers, over all jobs.
    kept_events: int = Field(default=10_000, ge=1)
    # Listen beyond loopback without TLS; the name says what that is.
    insecure: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> CoordinatorSettings:
        if not self.insecure and not is_loopback(self.listen):
            raise InvalidRequest(
                f"--listen {self.listen} is reachable from other machines",
                "there is no TLS yet, and whoever reaches it can stop and redirect every job",
                "use a loopback address, or --insecure on a network that you trust",
            )
        if self.silence_s < 4 * self.heartbeat_s:
            raise InvalidRequest(
                f"silence_s is {self.silence_s:g}, less than four heartbeats of {self.heartbeat_s:g} s",
                "one late report would look like a death",
                f"set silence_s to {4 * self.heartbeat_s:g} or more",
            )
        if self.probe_timeout_s + self.tick_s > self.silence_s / 2:
            raise InvalidRequest(
                f"a probe takes up to {self.probe_timeout_s:g} s, and a tick {self.tick_s:g} s",
                f"two probes do not fit into silence_s = {self.silence_s:g}",
                "shorten probe_timeout_s and tick_s, or lengthen silence_s",
            )
        return self

    def store_url(self) -> str:
        """Where the jobs' durable checkpoints are."""
        return self.store or place.store_url()

    def timing(self) -> Timing:
        """The times of the machine."""
        return Timing(
            tick_s=self.tick_s,
            silence_s=self.silence_s,
            gather_s=self.gather_s,
            settle_s=self.settle_s,
            daemon_grace_s=self.daemon_grace_s,
            stop_timeout_s=self.stop_timeout_s,
            transfer_stall_s=self.transfer_stall_s,
            start_timeout_s=self.start_timeout_s,
            storage_after_s=self.storage_after_s,
        )
