"""What happens when, told one fault at a time on the simulated cluster of coordinator_world.py."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from coordinator_node import JOB
from coordinator_world import World

from ckptd.coordinator import incident, machine
from ckptd.coordinator.directives import status_of
from ckptd.coordinator.effects import Announce, CommitEntry, Record, Send
from ckptd.coordinator.events import NodeReport, Reported, Spec, Submitted, Tick
from ckptd.coordinator.state import FINISHED, RUNNING, Job, State, Timing
from ckptd.errors import InvalidRequest
from ckptd.memory.inventory import Snapshot

SEEDS = range(3)
STEPS = ["stopped", "planned", "committed", "transferred", "started", "running"]


def world(seed: int = 0, *, spares: int = 1, parity: int = 1, nodes: int = 4, **options: float) -> World:
    """A job that has been training for some seconds."""
    made = World(seed, Spec(JOB, nodes, 1, parity, 1, 3), spares, **options)  # type: ignore[arg-type]
    made.start_coordinator()
    for node in made.nodes.values():
        made.start_node(node)
    assert made.run_for(10.0, lambda: len(made.steps_done) >= 10), "the job starts"
    return made


def job_of(made: World) -> Job:
    assert made.state is not None
    return made.state.jobs[JOB]


def names(made: World, since: float = 0.0) -> list[str]:
    return [event.name for event in made.events if event.at >= since and event.name != "protected"]


def first(made: World, name: str, since: float) -> Announce:
    found = [event for event in made.events if event.name == name and event.at >= since]
    assert found, f"no {name} among {names(made, since)}"
    return found[0]


def recovers(made: World, generation: int = 2) -> None:
    def there() -> bool:
        if made.state is None or JOB not in made.state.jobs:
            return False
        return job_of(made).phase == RUNNING and job_of(made).generation >= generation

    assert made.run_for(20.0, there), f"{job_of(made).phase}, {job_of(made).waiting_for}"
    assert job_of(made).generation == generation
    steps = len(made.steps_done)
    assert made.run_for(10.0, lambda: len(made.steps_done) >= steps + 5), "training goes on"


def test_a_job_forms_when_enough_nodes_stand_by() -> None:
    made = World(0, Spec(JOB, 4, 1, 1, 1, 3), 1)
    made.start_coordinator()
    for name in ("n0", "n1", "n2"):
        made.start_node(made.nodes[name])
    made.run_for(3.0)
    assert job_of(made).waiting_for == "1 more node"
    made.start_node(made.nodes["n3"])
    made.run_for(0.2)
    assert job_of(made).members == ("n0", "n1", "n2", "n3")
    order = [n for n in names(made) if n not in ("node-joined", "waiting")]
    assert order == ["job-formed", "planned", "committed", "started"]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rank_dies_and_every_node_resumes_from_its_own_memory(seed: int) -> None:
    made = world(seed)
    done = made.steps_done[-1][2]
    at = made.now
    made.kill_rank(made.nodes["n1"])
    recovers(made)
    assert first(made, "incident", at).at - at < 0.2
    assert names(made, at) == [
        "incident",
        "stopped",
        "planned",
        "committed",
        "transferred",
        "started",
        "running",
    ]
    assert first(made, "transferred", at).rung == "own-memory"
    resumed = made.rosters[2].start.step
    assert 0 <= done - resumed <= 1, f"{done} was done, {resumed} came back"
    assert made.rosters[2].nodes == made.rosters[1].nodes


@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_dies_and_the_spare_takes_its_ranks_and_position(seed: int) -> None:
    made = world(seed)
    at, done = made.now, made.steps_done[-1][2]
    made.kill_node(made.nodes["n2"])
    recovers(made)
    assert first(made, "node-suspect", at).at - at < 0.2
    assert first(made, "node-dead", at).at - at < 1.0
    assert first(made, "planned", at).at - at < 1.2
    assert made.rosters[2].nodes == ("n0", "n1", "n4", "n3")
    assert first(made, "transferred", at).rung == "parity"
    assert done - made.rosters[2].start.step <= 2


@pytest.mark.parametrize("seed", range(8))
def test_a_silent_node_is_dead_within_a_second_and_a_half(seed: int) -> None:
    made = world(seed)
    made.pauses = 0.0
    made.run_for(5.0)
    at = made.now
    made.freeze(made.nodes["n1"])
    made.run_for(1.5)
    dead = first(made, "node-dead", at)
    assert dead.nodes == ("n1",) and 1.0 <= dead.at - at + 0.15 < 1.65
    recovers(made)
    assert "n1" not in job_of(made).members


def test_a_silent_node_that_continues_changes_nothing_and_becomes_a_spare() -> None:
    made = world()
    node = made.nodes["n1"]
    made.freeze(node)
    recovers(made)
    rosters = dict(made.rosters)
    old = [t for t in node.trainers.values() if t.generation == 1]
    assert old, "its trainers are only stopped"
    at = made.now
    made.thaw(node)
    made.run_for(3.0)
    assert made.rosters == rosters and "incident" not in names(made, at)
    assert not node.trainers, "its trainers are told to go"
    assert node.memory.roster == made.rosters[2] and node.memory.stop_through >= 1
    assert all(s.generation > 1 or s.step <= made.rosters[2].start.step for s in node.memory.holdings)
    assert made.state is not None and status_of(made.state, made.state.nodes["n1"]) == "standby"
    made.kill_node(made.nodes["n0"])
    recovers(made, 3)
    assert "n1" in job_of(made).members


def test_nodes_that_all_fall_silent_at_once_are_waited_for() -> None:
    """A starved machine or a cut-off coordinator: nobody died, and nobody could take over."""
    made = world()
    made.pauses = 0.0
    made.run_for(5.0)
    at = made.now
    for node in made.nodes.values():
        made.freeze(node)
    made.run_for(4.0)
    for node in made.nodes.values():
        made.thaw(node)
    made.run_for(5.0)
    assert set(made.rosters) == {1} and names(made, at) == []
    at = made.now
    for node in made.nodes.values():
        made.freeze(node)
    made.run_for(15.0)
    assert "node-dead" in names(made, at), "but not for ever"


@pytest.mark.parametrize("seed", SEEDS)
def test_no_false_alarm_while_nothing_is_wrong(seed: int) -> None:
    """The coordinator itself is held up now and then, and reports are late."""
    made = world(seed)
    at = made.now
    made.run_for(30.0)
    assert names(made, at) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_a_daemon_that_starves_for_most_of_a_second_is_not_dead(seed: int) -> None:
    made = world(seed)
    at = made.now
    for _ in range(10):
        made.freeze(made.nodes["n3"])
        made.run_for(0.8)
        made.thaw(made.nodes["n3"])
        made.run_for(0.5)
    assert "node-dead" not in names(made, at) and "incident" not in names(made, at)


def test_a_coordinator_that_was_held_up_blames_nobody() -> None:
    made = world()
    at = made.now
    made.held_until = made.now + 5.0
    made.run_for(10.0)
    assert names(made, at) == []


def test_ten_deaths_are_one_incident() -> None:
    made = world(nodes=10, spares=0)
    at = made.now
    for node in made.nodes.values():
        made.kill_rank(node)
    recovers(made)
    assert names(made, at).count("incident") == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_a_daemon_dies_and_training_goes_on_without_protection(seed: int) -> None:
    made = world(seed)
    at, node = made.now, made.nodes["n1"]
    made.kill_daemon(node)
    made.run_for(0.5)
    assert first(made, "node-suspect", at).at - at < 0.2
    schedule = job_of(made).schedule
    assert schedule is not None and "n1 is away" in schedule.paused
    made.run_for(30.0)
    assert names(made, at) == ["node-suspect"], "training goes on: this is no death"
    mark = job_of(made).schedule.watermark  # type: ignore[union-attr]
    made.start_daemon(node)
    made.run_for(3.0)
    schedule = job_of(made).schedule
    assert schedule is not None and not schedule.paused
    assert (schedule.watermark or 0) > (mark or 0), "protection returns with the daemon"
    assert names(made, at) == ["node-suspect", "node-joined"]


def test_protection_stays_paused_until_a_new_daemon_has_its_trainers_back() -> None:
    """Else the other ranks would wait for protection, and that rank, inside their collective, for them."""
    made = world(1)
    job = job_of(made)
    assert made.state is not None
    node = made.state.nodes["n1"]
    assert node.report is not None
    assert incident.schedule_away(made.state, job) == {}
    facts = tuple(replace(known, running_generation=0) for known in node.report.jobs)
    fresh = replace(node, report=replace(node.report, jobs=facts))
    state = replace(made.state, nodes={**made.state.nodes, "n1": fresh})
    assert "not back yet" in incident.schedule_away(state, job)["n1"]


def test_a_daemon_that_hangs_while_training_goes_on_is_suspect_and_no_more() -> None:
    made = world()
    at, node = made.now, made.nodes["n1"]
    node.mute = True
    made.run_for(20.0)
    assert names(made, at) == ["node-suspect"]
    node.mute = False
    made.run_for(3.0)
    assert names(made, at) == ["node-suspect"] and made.protected_steps[-1][0] > made.now - 1.0


def test_a_daemon_dies_and_then_another_node() -> None:
    """The daemon that is away is not counted in: its trainers died as well."""
    made = world(spares=2, parity=2)
    made.kill_daemon(made.nodes["n1"])
    made.run_for(2.0)
    made.kill_node(made.nodes["n2"])
    recovers(made)
    assert {"n1", "n2"} & set(job_of(made).members) == set()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("delay", [0.05, 0.4, 0.6, 0.8])
def test_a_second_failure_restarts_planning(seed: int, delay: float) -> None:
    made = world(seed, spares=2, parity=2)
    protected = made.protected
    made.kill_node(made.nodes["n2"])
    made.run_for(delay)
    made.kill_node(made.nodes["n0"])
    made.run_for(5.0)
    recovers(made, job_of(made).generation)
    assert {"n0", "n2"} & set(job_of(made).members) == set()
    assert protected is not None and job_of(made).roster.start.step >= protected[0].step  # type: ignore[union-attr]


def test_without_a_spare_the_job_waits_and_goes_on_when_a_node_joins() -> None:
    made = world(spares=0)
    at = made.now
    made.kill_node(made.nodes["n2"])
    made.run_for(5.0)
    assert job_of(made).waiting_for == "1 more node"
    assert first(made, "waiting", at).text == "1 more node"
    step = max(s.step for s in made.nodes["n0"].memory.holdings)
    made.run_for(20.0)
    assert max(s.step for s in made.nodes["n0"].memory.holdings) == step, "memory is kept"
    made.start_node(made.nodes["n2"])
    recovers(made)
    assert made.rosters[2].start.step >= step - 1


def test_more_losses_than_parity_are_reported_and_healed_by_a_node_that_returns() -> None:
    made = world(spares=2)
    at = made.now
    made.freeze(made.nodes["n1"])
    made.freeze(made.nodes["n2"])
    made.run_for(10.0)
    found = first(made, "unrecoverable", at)
    assert "n1, n2" in found.text and "symbols of stripe" in found.text
    made.run_for(10.0)
    assert names(made, at).count("unrecoverable") == 1, "said once"
    assert "committed" not in names(made, at)
    made.thaw(made.nodes["n2"])
    recovers(made)
    assert made.rosters[2].start.step >= 9


def test_a_finished_job_is_finished_everywhere_and_stays_so() -> None:
    made = world(total=30)
    assert made.run_for(20.0, lambda: job_of(made).phase == FINISHED)
    at = made.now
    made.run_for(1.0)
    made.kill_node(made.nodes["n0"])
    made.run_for(5.0)
    assert "incident" not in names(made, at)
    made.kill_coordinator()
    made.start_coordinator()
    made.run_for(3.0)
    assert job_of(made).phase == FINISHED and set(made.rosters) == {1}


@pytest.mark.parametrize("keep_journal", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_coordinator_dies_and_training_and_protection_go_on(seed: int, keep_journal: bool) -> None:
    made = world(seed)
    at = made.now
    made.keep_journal = keep_journal
    made.kill_coordinator()
    done, protected = len(made.steps_done), made.protected_steps[-1][1]
    made.run_for(5.0)
    assert len(made.steps_done) > done + 20 and made.protected_steps[-1][1] > protected + 20
    # With an empty journal nobody submits again: the nodes tell what the job is.
    made.start_coordinator(submit=keep_journal)
    made.run_for(5.0)
    assert job_of(made).phase == RUNNING and job_of(made).generation == 1
    assert first(made, "running", at).text == "found running by a new coordinator"
    assert "incident" not in names(made, at)
    made.kill_node(made.nodes["n3"])
    recovers(made)


def test_an_empty_journal_leads_to_a_generation_above_all_that_were_seen() -> None:
    made = world(spares=2)
    made.kill_node(made.nodes["n3"])
    recovers(made)
    made.keep_journal = False
    made.kill_coordinator()
    made.kill_rank(made.nodes["n0"])
    made.run_for(2.0)
    made.start_coordinator(submit=False)
    recovers(made, 3)


def test_a_cluster_whose_memory_survived_resumes_from_it() -> None:
    """All processes are gone, the memory is not: the same path as any recovery."""
    made = world()
    made.keep_journal = False
    made.kill_coordinator()
    for node in made.nodes.values():
        made.kill_daemon(node)
        node.trainers = {}
        node.confirmed = node.started
    made.run_for(1.0)
    protected = made.protected
    for node in made.nodes.values():
        made.start_daemon(node)
    made.start_coordinator()
    recovers(made)
    assert protected is not None and made.rosters[2].start.step >= protected[0].step


def test_a_cluster_that_lost_everything_does_not_start_afresh_silently() -> None:
    made = world()
    made.kill_coordinator()
    for node in made.nodes.values():
        made.kill_node(node)
    made.run_for(1.0)
    for node in made.nodes.values():
        made.start_node(node)
    made.start_coordinator()
    made.run_for(20.0)
    assert set(made.rosters) == {1}
    assert "unrecoverable" in names(made)


@pytest.mark.parametrize("coordinator_too", [False, True])
def test_when_memory_has_nothing_the_job_goes_on_from_storage_once_lost_nodes_had_their_time(
    coordinator_too: bool,
) -> None:
    made = world()
    made.stored = Snapshot(1, 7)
    if coordinator_too:
        made.kill_coordinator()
    for node in made.nodes.values():
        made.kill_node(node)
    made.run_for(1.0)
    for node in made.nodes.values():
        made.start_node(node)
    if coordinator_too:
        made.start_coordinator()
    at = made.now
    made.run_for(made.timing.storage_after_s - 5.0)
    assert "unrecoverable" in names(made) and set(made.rosters) == {1}, "lost nodes have time to come back"
    assert made.asked_store == 1
    made.run_for(20.0)
    assert first(made, "planned", at).rung == "storage"
    assert "storage has step 7 of generation 1" in first(made, "planned", at).text
    assert made.rosters[2].start == Snapshot(), "its trainers load the checkpoint themselves"
    recovers(made)


def test_a_store_without_a_checkpoint_is_asked_again_and_nothing_starts_afresh() -> None:
    made = world()
    for node in made.nodes.values():
        made.kill_node(node)
    made.run_for(1.0)
    for node in made.nodes.values():
        made.start_node(node)
    made.run_for(3 * made.timing.storage_after_s)
    assert set(made.rosters) == {1} and made.asked_store == 3


def test_a_member_that_reboots_faster_than_it_is_noticed_does_not_start_its_generation_twice() -> None:
    made = world()
    at = made.now
    made.kill_node(made.nodes["n1"])
    made.start_node(made.nodes["n1"])
    recovers(made)
    assert "came back without its memory" in first(made, "incident", at).text
    assert made.rosters[2].start.step >= 8


def test_a_job_of_one_node_that_reboots_does_not_start_its_generation_twice() -> None:
    """Nobody else is there to die: the job would silently begin anew."""
    made = world(nodes=1, spares=0)
    made.kill_node(made.nodes["n0"])
    made.start_node(made.nodes["n0"])
    steps = len(made.steps_done)
    made.run_for(10.0)
    assert "unrecoverable" in names(made) and len(made.steps_done) == steps


def test_planning_waits_until_every_living_member_has_stopped() -> None:
    made = world()
    slow = made.nodes["n1"]
    stop = slow.launcher_stops
    slow.launcher_stops = lambda through: made.after(3.0, lambda: stop(through))  # type: ignore[method-assign]
    made.kill_rank(made.nodes["n0"])
    made.run_for(2.5)
    assert job_of(made).waiting_for == "n1 to confirm the stop"
    recovers(made)
    assert made.rosters[2].nodes == made.rosters[1].nodes


def test_a_member_that_does_not_confirm_its_stop_counts_as_lost() -> None:
    made = world()
    stuck = made.nodes["n1"]
    stuck.launcher_stops = lambda through: None  # type: ignore[method-assign]
    at = made.now
    made.kill_rank(made.nodes["n0"])
    made.run_for(14.0)
    assert job_of(made).phase == "incident" and job_of(made).waiting_for == "n1 to confirm the stop"
    recovers(made)
    assert first(made, "node-dead", at).nodes == ("n1",)
    assert "n1" not in job_of(made).members


def test_generations_that_fail_at_once_are_retried_more_and_more_slowly() -> None:
    made = world()
    crash = made.nodes["n0"].set_ready

    def crash_at_start(generation: int) -> None:
        crash(generation)
        made.kill_rank(made.nodes["n0"])

    made.nodes["n0"].set_ready = crash_at_start  # type: ignore[method-assign]
    made.kill_rank(made.nodes["n0"])
    made.run_for(60.0)
    commits = [event.at for event in made.events if event.name == "committed"][1:]
    assert len(commits) >= 6
    gaps = [b - a for a, b in itertools.pairwise(commits)]
    assert gaps[-1] > 3 * gaps[0] and gaps[-1] <= 14.0
    del made.nodes["n0"].set_ready
    recovers(made, job_of(made).generation + 1)


def test_the_journal_is_written_before_any_node_hears_of_a_generation() -> None:
    made = World(0, Spec(JOB, 2, 1, 1, 1, 3), 0)
    seen: list[str] = []
    feed = machine.step

    def watched(state: State, event):  # type: ignore[no-untyped-def]
        state, effects = feed(state, event)
        records = [(i, e.entry) for i, e in enumerate(effects) if isinstance(e, Record)]
        for committed, entry in records:
            if not isinstance(entry, CommitEntry):
                continue
            generation = entry.plan.roster.generation
            for i, effect in enumerate(effects):
                if isinstance(effect, Send) and any(
                    w.roster is not None and w.roster.generation == generation for w in effect.directive.jobs
                ):
                    seen.append("sent")
                    assert i > committed
        return state, effects

    try:
        machine.step = watched
        made.start_coordinator()
        for node in made.nodes.values():
            made.start_node(node)
        made.run_for(5.0)
    finally:
        machine.step = feed
    assert len(seen) == 2


def test_the_same_events_lead_to_the_same_state_and_effects_and_change_nothing_old() -> None:
    made = world()
    state = made.state
    assert state is not None
    frozen = repr(state)
    report = state.nodes["n0"].report
    assert report is not None
    session = state.nodes["n0"].session
    for event in (Tick(made.now + 1.0), Reported(made.now, ((session, report),))):
        assert machine.step(state, event) == machine.step(state, event)
    assert repr(state) == frozen


def test_reports_of_an_ended_stream_or_an_older_incarnation_change_nothing() -> None:
    made = world()
    state = made.state
    assert state is not None
    node = state.nodes["n0"]
    report = node.report
    assert report is not None
    old, effects = machine.step(state, Reported(made.now, ((node.session - 1, report),)))
    assert old.nodes == state.nodes and not effects
    again, effects = machine.step(state, Reported(made.now, ((node.session, report),)))
    assert again.nodes == state.nodes and not effects, "a repeated report is no heartbeat"


def test_submissions_are_checked() -> None:
    state = machine.restore([], World(0, Spec(JOB, 2, 1, 1, 1, 3), 0).timing)
    spec = Spec(JOB, 4, 2, 1, 1, 3)
    assert machine.check_submission(state, spec)
    state, effects = machine.step(state, Submitted(1.0, spec))
    assert [type(e) for e in effects] == [Record]
    assert not machine.check_submission(state, spec)
    with pytest.raises(InvalidRequest, match="another specification"):
        machine.check_submission(state, Spec(JOB, 5, 2, 1, 1, 3))
    for bad in (Spec("x", 0, 1, 1, 1, 3), Spec("x", 1, 1, 1, 0, 3), Spec("x", 1, 1, 1, 1, 1)):
        with pytest.raises(InvalidRequest, match="found"):
            machine.check_submission(state, bad)


def test_two_jobs_share_no_node() -> None:
    state = machine.restore([], Timing(settle_s=0.0))
    reports = [(i + 1, NodeReport(f"n{i}", i, 1, control_address=f"n{i}:1")) for i in range(6)]
    state, _ = machine.step(state, Reported(1.0, tuple(reports)))
    for name in ("a", "b"):
        state, _ = machine.step(state, Submitted(1.0, Spec(name, 3, 1, 1, 1, 3)))
    assert state.jobs["a"].members == ("n0", "n1", "n2")
    assert state.jobs["b"].members == ("n3", "n4", "n5")
    state, _ = machine.step(state, Submitted(1.0, Spec("c", 1, 1, 1, 1, 3)))
    assert state.jobs["c"].waiting_for == "1 more node"
