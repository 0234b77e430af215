"""What happens with a completed step: is it due, is there a slot, is the plan still right?

Belongs to the trainer's thread, but for `_on_ended`.  The daemon's absence, a full
memory and a slow watermark never stop training; they are counted, and reported once.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ckptd import errors
from ckptd.client.arena import Arena
from ckptd.client.attached import Attached
from ckptd.client.capture import Capture, Origin, plan_of
from ckptd.client.connection import Arrival
from ckptd.client.copier import Copier
from ckptd.client.device import PendingLoss
from ckptd.client.link import Link
from ckptd.client.schedule import Verdict
from ckptd.client.snapshot import Snapshot
from ckptd.client.state import Survey, Tree
from ckptd.client.tensors import spec_of
from ckptd.failpoints import failpoint
from ckptd.image import ImagePlan
from ckptd.v1 import local_pb2

log = logging.getLogger("ckptd")

NOT_FINITE = "the loss is not finite"
BUSY = "protection was busy with earlier steps"


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long training may be made to wait, and for what."""

    max_lag: int | None
    max_lag_wait_s: float
    timeout_s: float


class Protection:
    """Takes completed steps to the daemon.

    Invariants: of a step, Captured or Aborted is sent, and each at most once; a slot
    is written only for the step it was granted for.
    """

    def __init__(
        self, attached: Attached, link: Link, copier: Copier, bounds: Bounds, *, audit: int, eager: bool
    ) -> None:
        terms = link.terms
        origin = Origin(terms.job, terms.rank, terms.world_size)
        self.capture = Capture(origin, copier, self._on_ended, audit=audit, eager=eager)
        self.dropped: Counter[str] = Counter()
        self.captured = 0
        self.voided = 0
        self.replans = 0
        self.lag_wait_s = 0.0
        self.last_captured: int | None = None
        self._attached = attached
        self._link = link
        self._view = link.view
        self._copier = copier
        self._bounds = bounds
        self._survey: Survey | None = None
        self._plan: ImagePlan | None = None
        self._arena: Arena | None = None
        self._refused = False  # the newest plan did not fit: nothing is captured until it changes
        self._ended: deque[Snapshot] = deque()
        # Images that the daemon was told of and that are not protected yet; the copier adds to it.
        self._told: dict[int, local_pb2.Captured] = {}
        self._losses: deque[tuple[int, PendingLoss]] = deque()
        self._held = False
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
        self._give_up_missed(step - 1)
        tree = None if self._held else self._prepare(step)
        if self._held and self._view.verdict(step) in (Verdict.CAPTURE, Verdict.NO_SLOT):
            self._give_up(step, NOT_FINITE, not_finite=True)
        # After the verdict, since a daemon grants no step that is past; before the cut, since
        # the copier competes with what comes behind it.
        self._tell(progress=local_pb2.Progress(step=step))
        if tree is not None and step in self._view.grants:
            self._cut(step, tree, pending)
        else:
            self._count_passed(step)

    def take_news(self) -> None:
        """Takes in what the daemon pushed and what the copier ended.

        Raises:
            StaleGeneration: a newer generation exists.
        """
        self._take_ended()
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
        if view.lag(step) <= bound or self._held or self._link.detached or self._gave_up_at == view.watermark:
            return
        began = time.monotonic()
        deadline = began + self._bounds.max_lag_wait_s
        # A snapshot under way cannot become protected before its last fence.
        self.capture.finish(deadline)
        self._take_ended()
        done = self._link.wait_until(lambda: view.lag(step) <= bound or not view.may_advance(), deadline)
        self.lag_wait_s += time.monotonic() - began
        if not done and not self._link.detached:
            self._waited_in_vain(f"step {view.watermark} is the newest protected one before step {step}")

    def settle(self, step: int, *, protected: bool, deadline: float) -> None:
        """Returns when `step` is in the daemon's memory, or protected.

        Raises:
            InvalidRequest: it was not captured.
            DeadlineExceeded, Unreachable, StaleGeneration: it did not get there.
        """
        finished = self.capture.finish(deadline)
        self.take_news()
        view = self._view
        if view.watermark >= step:
            return
        if self.last_captured != step or step in view.given_up:
            raise errors.InvalidRequest(
                f"step {step} was not captured",
                "it was not due, had no free slot, or was voided",
                "save after a step that is due (every=), with max_lag= so that none is dropped",
            )
        flushed = finished and self._link.flush(max(0.0, deadline - time.monotonic()))
        if flushed and protected:
            self._link.wait_until(lambda: view.watermark >= step or bool(view.standing), deadline)
        self.take_news()
        if self._link.detached:
            raise errors.Unreachable(f"the daemon went away before step {step} was safe", next="see its log")
        if view.watermark >= step or (flushed and not protected):
            return
        why = view.standing or f"the newest protected step is {view.watermark}"
        raise errors.DeadlineExceeded(
            f"step {step} did not become protected in time", why, "see `ckptd status`"
        )

    def accept(self) -> None:
        """Ends the hold after a loss that was not finite."""
        self._held = False
        self._losses.clear()
        self._tell(accept=local_pb2.Accept())

    def close(self, deadline: float) -> None:
        """Finishes what is under way and lets go of the arena."""
        self.capture.finish(deadline)
        self._take_ended()
        self.capture.unbind()
        if self._arena is not None:
            self._arena.release()
            self._arena = None

    # Capture

    def _prepare(self, step: int) -> Tree | None:
        """Returns the tree to capture if `step` is to be captured now; brings plan and arena up to date."""
        if self._arena is not None and self._passes(step):
            return None
        with self._keeping_on(step):
            self._renew()
            if self._arena is None:
                if self._view.verdict(step) is Verdict.NO_SLOT:
                    self._give_up(step, "no arena")
                return None
            verdict = self._verdict(step)
            if verdict is Verdict.CAPTURE:
                return self._fitting_tree(step)
            if verdict is Verdict.NO_SLOT:
                self._give_up(step, verdict.value)
        return None

    def _passes(self, step: int) -> bool:
        """Whether `step` is surely not captured, so that nothing need be looked at."""
        verdict = self._view.verdict(step)
        return verdict is Verdict.NOT_DUE or (verdict is Verdict.UNKNOWN and self._bounds.max_lag is None)

    def _fitting_tree(self, step: int) -> Tree | None:
        """Returns the tree as it is now, after a new plan where it outgrew the old one."""
        assert self._survey is not None
        tree = self._survey.tree_of()
        if not self._fits(tree):
            self._announce(plan_of(self._survey, tree))
            if self._arena is None or self._verdict(step) is not Verdict.CAPTURE:
                self._give_up(step, "the state outgrew its plan")
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
            self._give_up(step, "the state cannot be kept")

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
            self._give_up_missed(step - 1)
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
        elif self._held:
            reason = NOT_FINITE
        elif step in self._view.schedule.aborted:
            reason = "another rank gave it up"
        else:
            reason = self._view.standing or BUSY
        self.dropped[reason] += 1

    def _give_up_missed(self, passed: int) -> None:
        for step in self._view.missed(passed):
            self._give_up(step, "this rank had passed it")

    def _give_up(self, step: int, reason: str, *, not_finite: bool = False) -> None:
        if step not in self._view.given_up:
            self._view.given_up.add(step)
            self.dropped[reason] += 1
            self._tell(aborted=local_pb2.Aborted(step=step, reason=reason, not_finite=not_finite))

    def _on_ended(self, snapshot: Snapshot) -> None:
        """Tells the daemon; runs on the copier's thread."""
        if snapshot.void:
            body = local_pb2.Aborted(step=snapshot.step, reason=snapshot.void, not_finite=snapshot.not_finite)
            self._tell(aborted=body)
        else:
            captured = local_pb2.Captured(
                step=snapshot.step, slot=snapshot.slot, plan_hash=snapshot.plan_hash
            )
            self._told[snapshot.step] = captured
            failpoint("trainer.copied")
            self._tell(captured=captured)
            failpoint("trainer.told")
        self._ended.append(snapshot)

    def collect(self) -> None:
        """Counts what ended since."""
        self._take_ended()

    def _take_ended(self) -> None:
        for step in list(self._told):  # a copy: the copier adds to it
            if step <= self._view.watermark:
                del self._told[step]
        while self._ended:
            snapshot = self._ended.popleft()
            if not snapshot.void:
                self.captured += 1
                continue
            self._view.given_up.add(snapshot.step)
            self.voided += bool(snapshot.moved)
            self._held |= snapshot.not_finite
            reason = NOT_FINITE if snapshot.not_finite else "audit" if snapshot.moved else "the copy failed"
            self.dropped[reason] += 1

    def _judge_losses(self) -> None:
        """Looks at the losses that have arrived; a CUDA loss is judged a step later."""
        while self._losses:
            step, loss = self._losses[0]
            finite = loss.judge()
            if finite is None:
                return
            self._losses.popleft()
            if not finite:
                self._held = True
                self._give_up(step, NOT_FINITE, not_finite=True)

    # Plan and arena

    def _renew(self) -> None:
        """Makes survey, plan and arena fit the live state."""
        unchanged = self._survey is not None and self._survey.unchanged()
        if unchanged and (self._arena is not None or self._refused):
            return
        if not unchanged or self._survey is None:
            self._survey = Survey(self._attached)
        tree = self._survey.tree_of()
        plan = plan_of(self._survey, tree)
        known, arena = self._plan, self._arena
        if known is not None and arena is not None and self._same_geometry(plan, known, tree):
            self.capture.bind(self._survey, arena)
        else:
            self._announce(plan)

    def _same_geometry(self, plan: ImagePlan, known: ImagePlan, tree: Tree) -> bool:
        return plan.tensors == known.tensors and len(tree.encoded) <= known.objects_capacity

    def _fits(self, tree: Tree) -> bool:
        assert self._plan is not None and self._survey is not None
        specs = tuple(spec_of(name, tensor) for name, tensor in tree.tensors)
        fits = specs == self._plan.tensors[len(self._survey.entries) :]
        return fits and len(tree.encoded) <= self._plan.objects_capacity

    def _announce(self, plan: ImagePlan) -> None:
        """Gets an arena for a new plan; without one, nothing is captured and training goes on.

        Raises:
            NoSpace: the first plan does not fit.
        """
        self.capture.finish(time.monotonic() + self._bounds.timeout_s)
        self._take_ended()
        self._let_go()
        message = local_pb2.Plan(plan_hash=plan.plan_hash, image_bytes=plan.image_bytes)
        first, self._refused = self._plan is None, False
        try:
            arrival = self._link.request(
                local_pb2.TrainerMessage(plan=message), "arena_ready", self._bounds.timeout_s
            )
        except errors.NoSpace as error:
            if first:
                raise
            self._refused = True
            log.warning("protection is off, the state has grown: %s", error)
            return
        except errors.DeadlineExceeded as error:
            self._link.lose(str(error))
            return
        except errors.Unreachable:
            return  # the link has said so
        self.replans += not first
        self._plan = plan
        self._map(plan, arrival)

    def _map(self, plan: ImagePlan, arrival: Arrival) -> None:
        ready = arrival.message.arena_ready
        assert arrival.fd is not None and self._survey is not None
        if ready.plan_hash != plan.plan_hash:
            os.close(arrival.fd)
            raise errors.ProtocolMismatch("the daemon answered with the arena of another plan")
        self._arena = Arena(arrival.fd, plan, ready.slots, ready.slot_bytes)
        self._view.forget_grants()
        self.capture.bind(self._survey, self._arena)

    def _let_go(self) -> None:
        self.capture.unbind()
        if self._arena is not None:
            self._arena.release()
            self._arena = None

    def _return(self, completed: int) -> None:
        """Takes up the daemon that came back, or starts looking for it."""
        arrival = self._link.adopt()
        # What is due must lie in this rank's future; a restarted daemon does not know how far it is.
        self._tell(progress=local_pb2.Progress(step=completed))
        if self._link.detached:
            plan = None
            if self._plan is not None and self._arena is not None:
                plan = local_pb2.Plan(plan_hash=self._plan.plan_hash, image_bytes=self._plan.image_bytes)
            self._link.revive(self._copier.submit, plan)
        elif arrival is not None and arrival.fd is not None:
            assert self._plan is not None
            stat = os.fstat(arrival.fd)
            if self._arena is not None and self._arena.inode == (stat.st_dev, stat.st_ino):
                os.close(arrival.fd)
                self._tell_again()
            else:
                self._view.start_over()
                self._let_go()
                self._map(self._plan, arrival)

    def _tell_again(self) -> None:
        """A daemon that died between an image's arrival and its record knows nothing of it.

        It gives up what it cannot find, so that nobody waits for that step; what it has, it has.
        """
        for step, captured in sorted(self._told.items()):
            if step > self._view.watermark and step not in self._view.given_up:
                self._tell(captured=captured)

    # Words

    def _waited_in_vain(self, what: str) -> None:
        self._gave_up_at = self._view.watermark
        log.warning(
            "%s, after %g s; training goes on without waiting until protection does",
            what,
            self._bounds.max_lag_wait_s,
        )

    def _tell(self, **body: object) -> None:
        self._link.tell(local_pb2.TrainerMessage(**body))  # type: ignore[arg-type]
