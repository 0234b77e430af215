"""The trainer's line to its daemon: attach, requests, pushes, loss and return.

Losing the daemon never stops training.  The line is then *detached*: what is told
goes nowhere, and every `step` tries to get it back (`revive`): connecting takes no
time, and the handshake runs on the copier's thread.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ckptd import errors
from ckptd.client.connection import Arrival, Connection, ConnectionLost, dial, error_of
from ckptd.client.schedule import ScheduleView
from ckptd.protocol import PROTOCOL
from ckptd.v1 import local_pb2

log = logging.getLogger("ckptd")

_REVIVE_EVERY_S = 0.05
_BUSY_S = 0.01


@dataclass(frozen=True, slots=True)
class Terms:
    """What a rank says of itself in its Hello, and how long it waits for answers."""

    job: str
    rank: int
    world_size: int
    local_world_size: int
    every: int
    slots: int
    parity: int
    generation: int
    timeout_s: float


class Link:
    """One trainer's line.  Only `tell` may be called from another thread than the trainer's."""

    def __init__(self, endpoint: Path, terms: Terms) -> None:
        self.endpoint = endpoint
        self.terms = terms
        self.generation = terms.generation
        self.welcome = local_pb2.Welcome()
        self.view = ScheduleView(terms.generation)
        self.fatal: errors.StaleGeneration | None = None
        self.reconnects = 0
        self._connection: Connection | None = None
        self._revived: tuple[Connection, Arrival | None] | None = None
        self._reviving = False
        self._next_revival = 0.0
        self._warned = False

    @property
    def detached(self) -> bool:
        return self._connection is None

    def attach(self) -> local_pb2.Welcome:
        """Connects and says hello.

        Raises:
            Unreachable: nobody listens, or nobody answers in time.
            ProtocolMismatch, RankTaken, StaleGeneration, InvalidRequest: as the daemon says.
        """
        deadline = time.monotonic() + self.terms.timeout_s
        sock = _dial_patiently(self.endpoint, deadline)
        self._connection, self.welcome = _shake_hands(
            sock, self.terms, self.generation, deadline, reconnect=False
        )
        self.generation = self.view.generation = self.welcome.generation
        return self.welcome

    def request(self, message: local_pb2.TrainerMessage, answer: str, timeout_s: float) -> Arrival:
        """Sends a message and returns its answer; pushes that come first are taken in.

        Raises:
            DeadlineExceeded: no answer in time.
            Unreachable: the daemon is gone.
            CkptdError: the daemon refused, as the class says.
        """
        deadline = time.monotonic() + timeout_s
        self.tell(message, timeout_s)
        while self._connection is not None:
            try:
                found = _await(self._connection, answer, deadline, self._push)
            except ConnectionLost as lost:
                self.lose(str(lost))
                break
            except errors.StaleGeneration as stale:
                self.fatal = stale
                raise
            if found is not None:
                return found
            raise errors.DeadlineExceeded(
                f"the daemon at {self.endpoint} gave no {answer} within {timeout_s:g} s",
                next="see the daemon's log",
            )
        if self.fatal is not None:
            raise self.fatal
        raise errors.Unreachable(
            f"the daemon at {self.endpoint} is gone", next="see its log, and start it again"
        )

    def tell(self, message: local_pb2.TrainerMessage, timeout_s: float | None = None) -> bool:
        """Sends a message that has no answer; False when there is nobody to tell."""
        connection = self._connection
        if connection is None:
            return False
        try:
            connection.send(message, timeout_s or self.terms.timeout_s)
        except ConnectionLost as lost:
            self.lose(str(lost))
            return False
        return True

    def drain(self) -> None:
        """Takes in everything that was pushed, without waiting."""
        try:
            while self._connection is not None and (arrival := self._connection.take()) is not None:
                self._push(arrival)
        except (ConnectionLost, errors.ProtocolMismatch) as lost:
            self.lose(str(lost))

    def wait_until(self, condition: Callable[[], bool], deadline: float) -> bool:
        """Takes in pushes until `condition` holds; False at the deadline, or when the daemon is gone."""
        while not condition():
            self.drain()
            if condition():
                return True
            if self._connection is None or self.fatal is not None or time.monotonic() >= deadline:
                return False
            try:
                self._connection.wait(deadline)
            except ConnectionLost as lost:
                self.lose(str(lost))
        return True

    def flush(self, timeout_s: float) -> bool:
        """Waits until the daemon's socket has everything; False when it has not in time."""
        deadline = time.monotonic() + timeout_s
        while (connection := self._connection) is not None:
            try:
                if connection.flushed():
                    return True
                if time.monotonic() >= deadline:
                    return False
                connection.wait(deadline)
            except ConnectionLost as lost:
                self.lose(str(lost))
        return False

    def lose(self, why: str) -> None:
        """Notes that the daemon is gone; warns once until it is back."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            self.view.forget_grants()
            if not self._warned and self.fatal is None:
                self._warned = True
                log.warning("protection is off: %s; training goes on, reconnecting to %s", why, self.endpoint)

    def revive(self, submit: Callable[[Callable[[], None]], None], plan: local_pb2.Plan | None) -> None:
        """Starts getting the line back, at most every 50 ms; `adopt` takes it up.

        Args:
            submit: runs the handshake elsewhere.
            plan: the plan to announce, or None where there is none yet.
        """
        if self._reviving or self.fatal is not None or time.monotonic() < self._next_revival:
            return
        self._next_revival = time.monotonic() + _REVIVE_EVERY_S
        try:
            sock = dial(self.endpoint)
        except OSError:
            return
        self._reviving = True
        submit(lambda: self._revive(sock, plan))

    def adopt(self) -> Arrival | None:
        """Takes up a line that came back; returns its ArenaReady, if a plan was announced."""
        revived, self._revived = self._revived, None
        if revived is None:
            return None
        self._connection, arrival = revived
        self.reconnects += 1
        self._warned = False
        self.view.forget_grants()
        log.info("the daemon at %s is back", self.endpoint)
        return arrival

    def close(self, *, park: bool | None) -> None:
        """Ends the line; with a Goodbye unless `park` is None."""
        if park is not None and self.tell(local_pb2.TrainerMessage(goodbye=local_pb2.Goodbye(park=park))):
            self.flush(self.terms.timeout_s)
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        self._drop_revived()

    def disarm(self) -> None:
        """In a forked child: closes its copy of the socket, so that the daemon sees the trainer's end."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _revive(self, sock: socket.socket, plan: local_pb2.Plan | None) -> None:
        deadline = time.monotonic() + self.terms.timeout_s
        try:
            connection, _ = _shake_hands(sock, self.terms, self.generation, deadline, reconnect=True)
        except errors.StaleGeneration as stale:
            self.fatal = stale
        except errors.CkptdError as refused:
            self._next_revival = time.monotonic() + self.terms.timeout_s
            log.warning("the daemon at %s does not take this rank back: %s", self.endpoint, refused)
        else:
            self._announce(connection, plan, deadline)
        finally:
            self._reviving = False

    def _announce(self, connection: Connection, plan: local_pb2.Plan | None, deadline: float) -> None:
        arrival = None
        try:
            if plan is not None:
                connection.send(local_pb2.TrainerMessage(plan=plan), self.terms.timeout_s)
                # Grants that precede ArenaReady name slots of an arena that is not mapped yet.
                arrival = _await(connection, "arena_ready", deadline, lambda _: None)
        except (ConnectionLost, errors.CkptdError) as lost:
            log.warning("the daemon at %s came back without an arena: %s", self.endpoint, lost)
            connection.close()
            return
        if plan is not None and arrival is None:
            connection.close()
        else:
            self._revived = connection, arrival

    def _push(self, arrival: Arrival) -> None:
        """Takes in what nobody asked for."""
        message = arrival.message
        body = message.WhichOneof("body")
        if body == "grants":
            self.view.update(message.grants)
        elif body == "failure":
            error = error_of(message.failure)
            if isinstance(error, errors.StaleGeneration):
                self.fatal = error
            elif isinstance(error, errors.InvalidRequest):
                log.info("the daemon refused: %s", error)  # of a step that others gave up meanwhile, mostly
            else:
                log.warning("the daemon says: %s", error)
        elif arrival.fd is not None:  # the answer to a request that ran into its deadline
            os.close(arrival.fd)

    def _drop_revived(self) -> None:
        revived, self._revived = self._revived, None
        if revived is not None:
            revived[0].close()
            if revived[1] is not None and revived[1].fd is not None:
                os.close(revived[1].fd)


def _dial_patiently(endpoint: Path, deadline: float) -> socket.socket:
    while True:
        try:
            return dial(endpoint)
        except BlockingIOError:  # its backlog is full: others attach at this moment
            if time.monotonic() >= deadline:
                raise errors.Unreachable(f"the daemon at {endpoint} accepts nobody") from None
            time.sleep(_BUSY_S)
        except OSError as error:
            raise errors.Unreachable(
                f"no daemon answers at {endpoint}",
                error.strerror or str(error),
                f"start one with `ckptd daemon --socket {endpoint}`, "
                "or leave out CKPTD_SOCKET and socket= for an embedded one",
            ) from error


def _shake_hands(
    sock: socket.socket, terms: Terms, generation: int, deadline: float, *, reconnect: bool
) -> tuple[Connection, local_pb2.Welcome]:
    connection = Connection(sock, terms.job, generation)
    hello = local_pb2.Hello(
        protocol=PROTOCOL,
        rank=terms.rank,
        world_size=terms.world_size,
        local_world_size=terms.local_world_size,
        every=terms.every,
        slots=terms.slots,
        parity=terms.parity,
        reconnect=reconnect,
    )
    try:
        connection.send(local_pb2.TrainerMessage(hello=hello), terms.timeout_s)
        arrival = _await(connection, "welcome", deadline, lambda _: None)
        if arrival is None:
            raise errors.Unreachable("the daemon does not answer", f"no welcome within {terms.timeout_s:g} s")
        welcome = arrival.message.welcome
        if welcome.protocol != PROTOCOL:
            raise errors.ProtocolMismatch(
                "the daemon is of another version",
                f"it speaks protocol {welcome.protocol}, this trainer {PROTOCOL}",
                "use the same ckptd for both",
            )
    except ConnectionLost as lost:
        connection.close()
        raise errors.Unreachable("the daemon does not answer", str(lost), "see its log") from lost
    except errors.CkptdError:
        connection.close()
        raise
    connection.generation = welcome.generation
    return connection, welcome


def _await(
    connection: Connection, answer: str, deadline: float, other: Callable[[Arrival], None]
) -> Arrival | None:
    """Returns the message of the kind `answer`, or None at the deadline; raises a Failure.

    What else arrives goes to `other`.
    """
    while True:
        arrival = connection.take()
        if arrival is None:
            if time.monotonic() >= deadline:
                return None
            connection.wait(deadline)
            continue
        body = arrival.message.WhichOneof("body")
        if body == answer:
            return arrival
        if body == "failure":
            raise error_of(arrival.message.failure)
        other(arrival)
