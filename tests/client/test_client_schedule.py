"""What a rank concludes from its schedule; pure."""

from __future__ import annotations

from ckptd.client.schedule import ScheduleView, Verdict
from ckptd.v1 import common_pb2, local_pb2


def grants(slots: dict[int, int] | None = None, generation: int = 3, **schedule: object) -> local_pb2.Grants:
    if "watermark" in schedule:
        schedule["has_watermark"] = True
    return local_pb2.Grants(
        schedule=common_pb2.Schedule(generation=generation, **schedule),
        grants=[local_pb2.Grant(step=step, slot=slot) for step, slot in (slots or {}).items()],
    )


def view(*messages: local_pb2.Grants, floor: int = 0) -> ScheduleView:
    made = ScheduleView(3, floor)
    for message in messages:
        made.update(message)
    return made


def test_before_anything_is_known() -> None:
    assert view().verdict(1) is Verdict.UNKNOWN
    assert view(floor=7).watermark == 7
    assert view(floor=7).lag(9) == 2


def test_a_granted_step_is_captured_and_a_due_one_without_a_grant_is_not() -> None:
    v = view(grants({4: 1}, due=[4, 6]))
    assert [v.verdict(step) for step in (3, 4, 5, 6, 7)] == [
        Verdict.NOT_DUE,
        Verdict.CAPTURE,
        Verdict.NOT_DUE,
        Verdict.NO_SLOT,
        Verdict.UNKNOWN,
    ]


def test_nothing_is_due_while_the_job_is_held_or_protection_is_paused() -> None:
    assert view(grants(held=True)).verdict(5) is Verdict.NOT_DUE
    assert view(grants(paused="n2 is away")).verdict(5) is Verdict.NOT_DUE
    assert view(grants(paused="n2 is away")).standing == "n2 is away"


def test_steps_given_up_by_the_job_or_by_this_rank_are_not_due() -> None:
    v = view(grants(due=[5, 6], aborted=[5]))
    v.given_up.add(6)
    assert v.verdict(5) is v.verdict(6) is Verdict.NOT_DUE


def test_messages_replace_each_other_and_the_watermark_only_grows() -> None:
    v = view(grants({4: 0}, due=[4], watermark=3), grants({5: 1}, due=[5], watermark=2))
    assert v.grants == {5: 1}
    assert v.watermark == 3


def test_another_generations_schedule_changes_nothing() -> None:
    v = view(grants({4: 0}, due=[4], watermark=3), grants({9: 0}, generation=2, due=[9], watermark=8))
    assert (v.watermark, v.grants) == (3, {4: 0})


def test_due_steps_that_this_rank_ran_past_are_missed_once() -> None:
    v = view(grants(due=[3, 4, 5, 9], watermark=2, aborted=[5]))
    v.captured.add(4)
    assert v.missed(8) == [3]
    v.given_up.add(3)
    assert v.missed(8) == []


def test_waiting_has_a_point_only_while_a_captured_step_can_become_protected() -> None:
    v = view(grants(due=[4], watermark=3))
    assert not v.may_advance()
    v.captured.add(4)
    assert v.may_advance()
    v.update(grants(due=[5], watermark=3, aborted=[4]))
    assert not v.may_advance()
    v.update(grants(due=[5], watermark=3))
    assert v.may_advance()
    v.given_up.add(4)
    assert not v.may_advance()
    v.given_up.clear()
    v.update(grants(due=[5], watermark=3, paused="peers away"))
    assert not v.may_advance()


def test_a_daemon_that_was_away_may_name_steps_of_the_past() -> None:
    """Steps that this rank took are left alone, since they may be protected; others stand in the way."""
    v = view(grants(due=[9], watermark=8), floor=5)
    v.captured |= {7, 8}
    v.update(grants(due=[5, 6, 7, 8], watermark=5))
    assert v.watermark == 8
    assert v.missed(9) == [6]


def test_what_lies_far_behind_the_watermark_is_forgotten() -> None:
    v = view(grants(due=[4], watermark=3))
    v.captured |= {4, 5000}
    v.given_up |= {4}
    v.update(grants(due=[4, 6000], watermark=5000))
    assert (v.captured, v.given_up) == ({5000}, set())
    assert v.missed(5999) == []
