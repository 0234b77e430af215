"""Is this node alive?  Evidence weighed, one node at a time.

Three kinds of evidence end in `dead`:

* The stream ended and the port refuses: the daemon is gone.  Where its job's trainers
  died as well, or nothing runs there, so is the node.  Where other ranks go on
  completing steps, its trainers live and only the daemon is away: suspect, and no more.
* Silence without an end of the stream (a stopped process, a cut cable) and probes that
  nobody answers.
* Nothing of this, but no step for several typical ones while the daemon is gone.

Patience is counted in `State.now`, which stands still while the coordinator itself is
held up.  Where all nodes fall silent at once, it is more likely cut off, or on a machine that starves
everybody, than everybody is dead: then it waits longer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ckptd.coordinator.events import Answer
from ckptd.coordinator.state import (
    ADOPTING,
    FINISHED,
    RUNNING,
    STARTING,
    Job,
    Node,
    ProbeState,
    Timing,
)

# A silent node is probed from this share of its limit on, so that the answer, or its
# absence, is there when the limit is reached.
_PROBE_FROM = 0.6
# The limit widens with the pauses seen lately, by no more than this factor.
_WIDEST = 1.3
# And by this one while nobody at all is heard.
_ALL_SILENT = 10.0
_GAPS_TOLERATED = 4
_GAP_DECAY = 0.98


@dataclass(frozen=True)
class Finding:
    """The node as it is to be seen from now on."""

    node: Node
    # Set when it is to be probed.
    probe: bool = False
    # Set when it became suspect or dead just now.
    news: str = ""
    why: str = ""


def silence_limit(node: Node, timing: Timing) -> float:
    """Seconds without a report after which this node is silent."""
    return min(_WIDEST * timing.silence_s, max(timing.silence_s, _GAPS_TOLERATED * node.gap_s))


def heard(node: Node, now: float) -> Node:
    """The node after a report of its own arrived."""
    gap = now - node.heard if node.connected and not node.dead else 0.0
    return replace(
        node,
        heard=now,
        connected=True,
        left=None,
        gap_s=max(gap, _GAP_DECAY * node.gap_s),
        suspect=False,
        dead=False,
        probe=None,
    )


def stall_bound(job: Job, timing: Timing) -> float:
    """Seconds without a completed step after which this job stands still."""
    if job.phase == STARTING:
        # Nobody computes yet, and a rendezvous with a dead node would wait for minutes.
        return timing.stall_min_s
    if job.progress.step_s is None:
        return timing.daemon_grace_s
    return min(timing.daemon_grace_s, max(timing.stall_min_s, 3 * job.progress.step_s))


def nobody_is_heard(nodes: Iterable[Node], now: float, timing: Timing) -> bool:
    """Whether all of several nodes whose streams are open are silent."""
    open_ones = [node for node in nodes if node.connected and not node.dead]
    least = _PROBE_FROM * timing.silence_s
    return len(open_ones) > 1 and all(now - node.heard >= least for node in open_ones)


def examine(node: Node, job: Job | None, now: float, timing: Timing, all_silent: bool = False) -> Finding:
    """What to think of `node`, a member of `job` (None: of no unfinished one).

    A node that is heard again is no business of this function: see `heard`.

    Args:
        all_silent: nobody else is heard either (`nobody_is_heard`).
    """
    if node.dead:
        return Finding(node)
    if node.connected:
        return _silence(node, job, now, timing, all_silent)
    if node.left is None:
        # Known from the journal, never heard: it gets the time to find the new coordinator.
        return Finding(replace(node, left=now) if now >= timing.settle_s else node)
    return _absence(node, job, now, timing)


def _silence(node: Node, job: Job | None, now: float, timing: Timing, all_silent: bool) -> Finding:
    silent_s = now - node.heard
    limit = silence_limit(node, timing) * (_ALL_SILENT if all_silent else 1.0)
    if silent_s < _PROBE_FROM * limit:
        return Finding(node)
    probe = _due_for_probe(node, node.heard, now, timing)
    if silent_s < limit:
        return Finding(node, probe)
    if _unanswered(node, node.heard) and not _moving(job, now, timing):
        return _dead(node, f"silent for {silent_s:.2f} s, and no answer to a probe")
    if node.suspect:
        return Finding(node, probe)
    return Finding(replace(node, suspect=True), probe, "node-suspect", f"silent for {silent_s:.2f} s")


def _absence(node: Node, job: Job | None, now: float, timing: Timing) -> Finding:
    assert node.left is not None
    away_s = now - node.left
    probe = _due_for_probe(node, node.left, now, timing)
    if _unanswered(node, node.left) and away_s >= _patience(node, job, now, timing):
        return _dead(node, f"its stream ended {away_s:.2f} s ago, and its port does not answer")
    if node.suspect:
        return Finding(node, probe)
    return Finding(replace(node, suspect=True), probe, "node-suspect", "its stream ended")


def _patience(node: Node, job: Job | None, now: float, timing: Timing) -> float:
    """Seconds of absence after which a daemon that is gone means a node that is gone."""
    facts = node.facts(job.spec.job) if job is not None else None
    if job is None or (facts is not None and facts.finished):
        return timing.dead_after_s
    if job.phase not in (RUNNING, STARTING, ADOPTING):
        # Its trainers died, or none were started: nothing proves that the node lives.
        return timing.dead_after_s
    assert node.left is not None
    # Steps completed after it left prove that its trainers live, however long it takes.
    since_proof = max(job.progress.at, node.left) - node.left
    return since_proof + stall_bound(job, timing)


def _moving(job: Job | None, now: float, timing: Timing) -> bool:
    return (
        job is not None
        and job.phase == RUNNING
        and job.progress.at > 0
        and now - job.progress.at < timing.moving_s
    )


def _due_for_probe(node: Node, since: float, now: float, timing: Timing) -> bool:
    probe = node.probe
    if probe is None or probe.asked < since:
        return True
    pause = timing.probe_lost_s if probe.answer is None else timing.probe_every_s
    return now - probe.asked >= pause


def _unanswered(node: Node, since: float) -> bool:
    probe = node.probe
    return probe is not None and probe.asked >= since and probe.answer in (Answer.REFUSED, Answer.SILENT)


def _dead(node: Node, why: str) -> Finding:
    return Finding(replace(node, dead=True, suspect=True), False, "node-dead", why)


def status(node: Node, job: Job | None) -> str:
    """The node's state as the wire names it; `job` is the unfinished job it is a member of."""
    if node.report is None:
        return "dead" if node.dead else "joining"
    if node.dead:
        return "dead"
    if node.suspect:
        return "suspect"
    return "active" if job is not None and job.phase != FINISHED else "standby"


def asked(node: Node, number: int, now: float) -> Node:
    """The node after the probe with this number was sent."""
    return replace(node, probe=ProbeState(number, now))


def answered(node: Node, number: int, answer: Answer) -> Node:
    """The node after a probe's outcome; one of an older probe changes nothing."""
    if node.probe is None or node.probe.number != number:
        return node
    return replace(node, probe=replace(node.probe, answer=answer))
