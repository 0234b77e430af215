"""What became of each step: the daemon is told once, and it is counted.

Belongs to the trainer's thread, but for `ended`.
"""

from __future__ import annotations

from collections import Counter, deque

from ckptd.client.link import Link
from ckptd.client.snapshot import Snapshot
from ckptd.failpoints import failpoint
from ckptd.v1 import local_pb2

NOT_FINITE = "the loss is not finite"


class Outcomes:
    """Tells the daemon of steps that are captured or given up.

    Invariant: of a step, Captured or Aborted is sent, and each at most once; what a daemon
    that came back may never have had is repeated to it.
    """

    def __init__(self, link: Link) -> None:
        self.dropped: Counter[str] = Counter()  # steps that `every` asked for, by reason
        self.captured = 0
        self.voided = 0  # by an audit
        self.held = False  # a loss was not finite, and nobody accepted that yet
        self._link = link
        self._view = link.view
        self._ended: deque[Snapshot] = deque()
        # Images that the daemon was told of and that are not protected yet; the copier adds to it.
        self._told: dict[int, local_pb2.Captured] = {}

    def give_up(self, step: int, reason: str, *, not_finite: bool = False) -> None:
        """Says that `step` is not captured, so that nobody waits for it."""
        self.held |= not_finite
        if step not in self._view.given_up:
            self._view.given_up.add(step)
            self.dropped[reason] += 1
            self._abort(step, reason, not_finite=not_finite)

    def give_up_missed(self, passed: int) -> None:
        """Gives up the due steps up to `passed` that this rank ran past."""
        for step in self._view.missed(passed):
            self.give_up(step, "this rank had passed it")

    def accept(self) -> None:
        """Ends the hold after a loss that was not finite."""
        self.held = False
        self._link.tell(local_pb2.TrainerMessage(accept=local_pb2.Accept()))

    def ended(self, snapshot: Snapshot) -> None:
        """Tells the daemon of a snapshot that is in place or void; runs on the copier's thread."""
        if snapshot.void:
            self._abort(snapshot.step, snapshot.void, not_finite=snapshot.not_finite)
        else:
            captured = local_pb2.Captured(
                step=snapshot.step, slot=snapshot.slot, plan_hash=snapshot.plan_hash
            )
            self._told[snapshot.step] = captured
            failpoint("trainer.copied")
            self._link.tell(local_pb2.TrainerMessage(captured=captured))
            failpoint("trainer.told")
        self._ended.append(snapshot)

    def collect(self) -> None:
        """Counts what ended since."""
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
            self.held |= snapshot.not_finite
            reason = NOT_FINITE if snapshot.not_finite else "audit" if snapshot.moved else "the copy failed"
            self.dropped[reason] += 1

    def tell_again(self) -> None:
        """A daemon that died between an image's arrival and its record knows nothing of it.

        It gives up what it cannot find, so that nobody waits for that step; what it has, it has.
        """
        for step, captured in sorted(self._told.items()):
            if step > self._view.watermark and step not in self._view.given_up:
                self._link.tell(local_pb2.TrainerMessage(captured=captured))

    def _abort(self, step: int, reason: str, *, not_finite: bool) -> None:
        body = local_pb2.Aborted(step=step, reason=reason, not_finite=not_finite)
        self._link.tell(local_pb2.TrainerMessage(aborted=body))
