"""The daemon's memory for the live state: survey, plan and arena, which change together."""

from __future__ import annotations

import logging
import os
import time

from ckptd import errors
from ckptd.client.arena import Arena
from ckptd.client.attached import Attached
from ckptd.client.capture import Capture, plan_of
from ckptd.client.connection import Arrival
from ckptd.client.link import Link
from ckptd.client.state import Survey, Tree
from ckptd.client.tensors import spec_of
from ckptd.image import ImagePlan
from ckptd.v1 import local_pb2

log = logging.getLogger("ckptd")


class Room:
    """Keeps an arena that the attached state fits into, and the capture bound to both.

    Invariant: `arena`, where there is one, is of the newest plan that the daemon took.
    """

    def __init__(self, attached: Attached, link: Link, capture: Capture, timeout_s: float) -> None:
        self.arena: Arena | None = None
        self.replans = 0
        self._attached = attached
        self._link = link
        self._capture = capture
        self._timeout_s = timeout_s
        self._survey: Survey | None = None
        self._plan: ImagePlan | None = None
        self._refused = False  # the newest plan did not fit: nothing is captured until it changes

    @property
    def announced(self) -> local_pb2.Plan | None:
        """The plan of the arena, as a daemon that comes back is told of it; None without an arena."""
        if self._plan is None or self.arena is None:
            return None
        return _message(self._plan)

    def renew(self) -> None:
        """Makes survey, plan and arena fit the live state; there may be no arena afterwards.

        Raises:
            NoSpace: the first plan does not fit.
            UnsafeObject, InvalidRequest: the state cannot be kept.
        """
        unchanged = self._survey is not None and self._survey.unchanged()
        if unchanged and (self.arena is not None or self._refused):
            return
        if not unchanged or self._survey is None:
            self._survey = Survey(self._attached)
        tree = self._survey.tree_of()
        plan = plan_of(self._survey, tree)
        known, arena = self._plan, self.arena
        if known is not None and arena is not None and _same_geometry(plan, known, tree):
            self._capture.bind(self._survey, arena)
        else:
            self._announce(plan)

    def tree(self) -> Tree:
        """Returns the surveyed state as it is now.

        Raises:
            UnsafeObject, InvalidRequest: it cannot be kept.
        """
        assert self._survey is not None
        return self._survey.tree_of()

    def fits(self, tree: Tree) -> bool:
        """Whether the arena can take a tree of the surveyed state."""
        assert self._plan is not None and self._survey is not None
        specs = tuple(spec_of(name, tensor) for name, tensor in tree.tensors)
        fits = specs == self._plan.tensors[len(self._survey.entries) :]
        return fits and len(tree.encoded) <= self._plan.objects_capacity

    def grow(self, tree: Tree) -> None:
        """Gets another arena, for a tree that outgrew this one; there may be none afterwards."""
        assert self._survey is not None
        self._announce(plan_of(self._survey, tree))

    def take_back(self, arrival: Arrival) -> bool:
        """Takes up the arena of a daemon that came back; whether it is the same memory as before.

        Where it is not, all that was captured is gone.
        """
        assert arrival.fd is not None and self._plan is not None
        stat = os.fstat(arrival.fd)
        if self.arena is not None and self.arena.inode == (stat.st_dev, stat.st_ino):
            os.close(arrival.fd)
            return True
        self._link.view.start_over()
        self.let_go()
        self._map(self._plan, arrival)
        return False

    def let_go(self) -> None:
        """Releases the arena; nothing is captured without one."""
        self._capture.unbind()
        if self.arena is not None:
            self.arena.release()
            self.arena = None

    def _announce(self, plan: ImagePlan) -> None:
        """Gets an arena for a new plan; without one, nothing is captured and training goes on.

        Raises:
            NoSpace: the first plan does not fit.
        """
        self._capture.finish(time.monotonic() + self._timeout_s)
        self.let_go()
        first, self._refused = self._plan is None, False
        try:
            arrival = self._link.request(
                local_pb2.TrainerMessage(plan=_message(plan)), "arena_ready", self._timeout_s
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
        self.arena = Arena(arrival.fd, plan, ready.slots, ready.slot_bytes)
        self._link.view.forget_grants()
        self._capture.bind(self._survey, self.arena)


def _message(plan: ImagePlan) -> local_pb2.Plan:
    return local_pb2.Plan(plan_hash=plan.plan_hash, image_bytes=plan.image_bytes)


def _same_geometry(plan: ImagePlan, known: ImagePlan, tree: Tree) -> bool:
    return plan.tensors == known.tensors and len(tree.encoded) <= known.objects_capacity
