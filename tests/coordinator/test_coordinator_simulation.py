"""The real machine against a simulated cluster full of faults; see coordinator_world.py."""

from __future__ import annotations

import random

import pytest
from coordinator_node import JOB
from coordinator_world import World

from ckptd.coordinator.events import Spec
from ckptd.coordinator.state import RUNNING, Job

QUICK_SEEDS = 16
SOAK_SEEDS = 3000

FAULTS = ["rank", "node", "node", "reboot", "daemon", "silent", "coordinator", "coordinator-empty", "cut"]


def strike(world: World, fault: str, rng: random.Random) -> None:
    """One fault, and its repair some time later where it has one."""
    up = [node for node in world.nodes.values() if node.awake]
    if not up:
        return
    node = rng.choice(up)
    back = rng.uniform(0.3, 6.0)
    match fault:
        case "rank":
            world.kill_rank(node)
        case "node":
            world.kill_node(node)
            world.after(back + 1.0, lambda: world.start_node(node) if not node.up else None)
        case "reboot":
            world.kill_node(node)
            world.after(rng.uniform(0.01, 0.5), lambda: world.start_node(node) if not node.up else None)
        case "daemon":
            world.kill_daemon(node)
            world.after(back, lambda: world.start_daemon(node))
        case "silent":
            world.freeze(node)
            world.after(back, lambda: world.thaw(node) if node.frozen else None)
        case "cut":
            world.cut(node)
        case _:
            if world.state is not None:
                world.keep_journal = fault == "coordinator"
                world.kill_coordinator()
                world.after(
                    rng.uniform(0.1, 4.0), lambda: world.start_coordinator() if world.state is None else None
                )


def job_of(world: World) -> Job:
    assert world.state is not None
    return world.state.jobs[JOB]


def run_seed(seed: int) -> World:
    rng = random.Random(seed)
    parity = rng.choice([1, 1, 2])
    nodes = rng.choice([4, 4, 5, 3]) + parity - 1
    spec = Spec(JOB, nodes, 1, parity, rng.choice([1, 1, 2, 5]), rng.choice([2, 3, 4]))
    world = World(seed, spec, spares=parity, step_s=rng.choice([0.05, 0.15, 0.4]))
    world.trouble = rng.choice([0.0, 0.0, 0.002])
    world.start_coordinator()
    for node in world.nodes.values():
        world.after(rng.uniform(0.0, 1.5), lambda node=node: world.start_node(node))
    world.run_for(rng.uniform(2.0, 6.0))
    for _ in range(rng.randint(1, 7)):
        strike(world, rng.choice(FAULTS), rng)
        # Often the next fault hits the recovery of the last one.
        world.run_for(rng.choice([0.0, rng.uniform(0.0, 1.0), rng.uniform(2.0, 8.0)]))
    world.trouble = 0.0
    settle(world)
    return world


def settle(world: World) -> None:
    """Faults stop: within a bounded time the job runs and protects new steps."""
    world.run_for(8.0)  # the last repairs
    lost = world.losses() if world.state is not None else 0
    steps = len(world.steps_done)

    def healthy() -> bool:
        if world.state is None or len(world.steps_done) < steps + 3:
            return False
        job = job_of(world)
        schedule = job.schedule
        return (
            job.phase == RUNNING
            and schedule is not None
            and not schedule.paused
            and schedule.watermark is not None
            and schedule.watermark >= world.steps_done[-1][2] - 4 * world.spec.every - 20
        )

    if world.run_for(60.0, healthy):
        return
    job = job_of(world)
    assert world.protected is not None and lost > world.spec.parity, (
        f"{job.phase}, waiting for {job.waiting_for!r}, though only {lost} members of a group were lost"
    )
    assert any(event.name == "unrecoverable" for event in world.events)


def check_timeline(world: World) -> None:
    generations = [event.generation for event in world.events if event.name == "committed"]
    assert len(generations) == len(set(generations)), "a generation is committed once"


@pytest.mark.parametrize("block", range(4))
def test_faults_of_all_kinds(block: int) -> None:
    generations = late = 0
    for seed in range(block, QUICK_SEEDS, 4):
        print("seed", seed)
        world = run_seed(seed)
        check_timeline(world)
        generations += len(world.rosters)
        late += world.late_names
    print(f"{QUICK_SEEDS // 4} seeds, {generations} generations, {late} steps named late")


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_faults_of_all_kinds_soak() -> None:
    generations = 0
    for seed in range(1000, 1000 + SOAK_SEEDS):
        print("seed", seed)
        world = run_seed(seed)
        check_timeline(world)
        generations += len(world.rosters)
    print(f"{SOAK_SEEDS} seeds, {generations} generations")
