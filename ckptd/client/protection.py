"""What happens with a completed step: is it due, is there a slot, is the plan still right?

Belongs to the trainer's thread.  The daemon's absence, a full memory and a slow
watermark never stop training; they are counted, and reported once.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ckptd import errors
from ckptd.client.attached import Attached
from ckptd.client.capture import Capture, Origin
from ckptd.client.copier import Copier
from ckptd.client.device import PendingLoss
from ckptd.client.link import Link
from ckptd.client.outcomes import NOT_FINITE, Outcomes
from ckptd.client.room import Room
from ckptd.client.schedule import Verdict
from ckptd.client.state import Tree
from ckptd.failpoints import failpoint
from ckptd.v1 import local_pb2

log = logging.getLogger("ckptd")

BUSY = "protection was busy with earlier steps"


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long training may be made to wait, and for what."""

    max_lag: int | None
    max_lag_wait_s: float
    timeout_s: float


class Protection:
    """Takes completed steps to the daemon.

    Invariant: a slot is written only for the step it was granted for.
    """

    def __init__(
        self, attached: Attached, link: Link, copier: Copier, bounds: Bounds, *, audit: int, eager: bool
    ) -> None:
        terms = link.terms
        origin = Origin(terms.job, terms.rank, terms.world_size)
        self.outcomes = Outcomes(link)
        self.capture = Capture(origin, copier, self.outcomes.ended, audit=audit, eager=eager)
        self.room = Room(attached, link, self.capture, bounds.timeout_s)
        self.lag_wait_s = 0.0
        self.last_captured: int | None = None
        self._link = link
        self._view = link.view
        self._copier = copier
        self._bounds = bounds
        self._losses: deque[tuple[int, PendingLoss]] = deque()
        self._gave_up_at: int | None = None  # the watermark at which waiting was in vain

    # Steps

    def complete(self, step: int, loss: float | torch.Tensor | None) -> None:
        """Captures `step` if it is due, and says how far this rank is.

        Raises:
            StaleGeneration: a newer generation exists.
            NoSpace: the first plan does not fit.
            UnsafeObject, InvalidRequest: at the first step, the state cannot be kept.
        """
        pending = PendingLoss(loss, self.capture.side)
        self._losses.append((step, pending))
        self.take_news()
        if self._link.detached:
            self._return(step - 1)
        self._judge_losses()
        if self._link.detached:
            self._count_passed(step)
            return
        outcomes = self.outcomes
        outcomes.give_up_missed(step - 1)
        tree = None if outcomes.held else self._prepare(step)
        if outcomes.held and self._view.verdict(step) in (Verdict.CAPTURE, Verdict.NO_SLOT):
            outcomes.give_up(step, NOT_FINITE, not_finite=True)
        # After the verdict, since a daemon grants no step that is past; before the cut, since
        # the copier competes with what comes behind it.
        self._tell_progress(step)
        if tree is not None and step in self._view.grants:
            self._cut(step, tree, pending)
        else:
            self._count_passed(step)

    def take_news(self) -> None:
        """Takes in what the daemon pushed and what the copier ended.

        Raises:
            StaleGeneration: a newer generation exists.
        """
        self.outcomes.collect()
        self._link.drain()
        if self._link.fatal is not None:
            raise self._link.fatal

    def wait_for_lag(self, step: int) -> None:
        """Waits before optimizer step `step` while it would leave more than `max_lag` steps unprotected.

        Gives up at the deadline, and then waits no more until the watermark moves.
        """
        bound, view = self._bounds.max_lag, self._view
        if bound is None or view.lag(step) <= bound:
            return
        self._link.drain()
        if view.lag(step) <= bound or self.outcomes.held or self._link.detached:
            return
        if self._gave_up_at == view.watermark:
            return
        began = time.monotonic()
        deadline = began + self._bounds.max_lag_wait_s
        # A snapshot under way cannot become protected before its last fence.
        self.capture.finish(deadline)
        self.outcomes.collect()
        done = self._link.wait_until(lambda: view.lag(step) <= bound or not view.may_advance(), deadline)
        self.lag_wait_s += time.monotonic() - began
        if not done and not self._link.detached:
            self._waited_in_vain(f"step {view.watermark} is the newest protected one before step {step}")

    def accept(self) -> None:
        """Ends the hold after a loss that was not finite."""
        self._losses.clear()
        self.outcomes.accept()

    def close(self, deadline: float) -> None:
        """Finishes what is under way and lets go of the arena."""
        self.capture.finish(deadline)
        self.outcomes.collect()
        self.room.let_go()

    # Capture

    def _prepare(self, step: int) -> Tree | None:
        """Returns the tree to capture if `step` is to be captured now; brings plan and arena up to date."""
        if self.room.arena is not None and self._passes(step):
            return None
        with self._keeping_on(step):
            self.room.renew()
            if self.room.arena is None:
                if self._view.verdict(step) is Verdict.NO_SLOT:
                    self.outcomes.give_up(step, "no arena")
                return None
            verdict = self._verdict(step)
            if verdict is Verdict.CAPTURE:
                return self._fitting_tree(step)
            if verdict is Verdict.NO_SLOT:
                self.outcomes.give_up(step, verdict.value)
        return None

    def _passes(self, step: int) -> bool:
        """Whether `step` is surely not captured, so that nothing need be looked at."""
        verdict = self._view.verdict(step)
        return verdict is Verdict.NOT_DUE or (verdict is Verdict.UNKNOWN and self._bounds.max_lag is None)

    def _fitting_tree(self, step: int) -> Tree | None:
        """Returns the tree as it is now, after a new plan where it outgrew the old one."""
        tree = self.room.tree()
        if not self.room.fits(tree):
            self.room.grow(tree)
            if self.room.arena is None or self._verdict(step) is not Verdict.CAPTURE:
                self.outcomes.give_up(step, "the state outgrew its plan")
                return None
        return tree

    def _cut(self, step: int, tree: Tree, loss: PendingLoss) -> None:
        slot = self._view.grants.pop(step)
        self._view.captured.add(step)
        self.last_captured = step
        failpoint("trainer.cut")
        self.capture.cut(step, self._link.generation, slot, tree, loss)

    @contextmanager
    def _keeping_on(self, step: int) -> Iterator[None]:
        """What cannot be kept is refused at the start; later it must not end a running job."""
        try:
            yield
        except (errors.UnsafeObject, errors.InvalidRequest) as error:
            if self.last_captured is None:
                raise
            log.warning("step %d cannot be kept: %s", step, error)
            self.outcomes.give_up(step, "the state cannot be kept")

    def _verdict(self, step: int) -> Verdict:
        """What to do with `step`; with `max_lag` set, waits while that is not known."""
        view = self._view
        settled = (Verdict.CAPTURE, Verdict.NOT_DUE)
        verdict = view.verdict(step)
        if verdict in settled or self._bounds.max_lag is None:
            return verdict
        if view.standing or self._gave_up_at == view.watermark:
            return verdict
        deadline = time.monotonic() + self._bounds.max_lag_wait_s

        def known_now() -> bool:
            # Steps that this rank ran past (while it was detached) stand in the way of newer ones.
            self.outcomes.give_up_missed(step - 1)
            return view.verdict(step) in settled or bool(view.standing)

        known = self._link.wait_until(known_now, deadline)
        if not known and not self._link.detached and self._link.fatal is None:
            self._waited_in_vain(f"no slot was granted for step {step}")
        return view.verdict(step)

    def _count_passed(self, step: int) -> None:
        """Counts a step that `every` asked for and nobody captures, with the reason that is known here."""
        if step % self._link.terms.every or step in self._view.given_up:
            return
        if self._link.detached:
            reason = "no daemon"
        elif self.outcomes.held:
            reason = NOT_FINITE
        elif step in self._view.schedule.aborted:
            reason = "another rank gave it up"
        else:
            reason = self._view.standing or BUSY
        self.outcomes.dropped[reason] += 1

    def _judge_losses(self) -> None:
        """Looks at the losses that have arrived; a CUDA loss is judged a step later."""
        while self._losses:
            step, loss = self._losses[0]
            finite = loss.judge()
            if finite is None:
                return
            self._losses.popleft()
            if not finite:
                self.outcomes.give_up(step, NOT_FINITE, not_finite=True)

    def _return(self, completed: int) -> None:
        """Takes up the daemon that came back, or starts looking for it."""
        arrival = self._link.adopt()
        # What is due must lie in this rank's future; a restarted daemon does not know how far it is.
        self._tell_progress(completed)
        if self._link.detached:
            self._link.revive(self._copier.submit, self.room.announced)
        elif arrival is not None and arrival.fd is not None and self.room.take_back(arrival):
            self.outcomes.tell_again()

    def _waited_in_vain(self, what: str) -> None:
        self._gave_up_at = self._view.watermark
        log.warning(
            "%s, after %g s; training goes on without waiting until protection does",
            what,
            self._bounds.max_lag_wait_s,
        )

    def _tell_progress(self, step: int) -> None:
        self._link.tell(local_pb2.TrainerMessage(progress=local_pb2.Progress(step=step)))
