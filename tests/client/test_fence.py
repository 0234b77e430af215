"""A fence and the copier on the same group: whoever has time copies, and nobody goes on too early."""

from __future__ import annotations

import threading

import torch

from ckptd.client.snapshot import Group, Part

DEADLINE_S = 20.0


def test_a_fence_waits_for_the_piece_that_the_copier_is_at() -> None:
    source, target = torch.ones(8), torch.zeros(8)
    begun, may_copy = threading.Event(), threading.Event()

    def piece() -> None:
        begun.set()
        assert may_copy.wait(DEADLINE_S)
        target.copy_(source)

    class Announced(threading.Event):
        """Whoever waits for the copy lets it go on."""

        def wait(self, timeout: float | None = None) -> bool:
            may_copy.set()
            return super().wait(timeout)

    group = Group(frozenset({0}), [Part(torch.device("cpu"), ["w"], [source], [target], [piece])])
    group.copied = Announced()
    copier = threading.Thread(target=group.copy_host)
    copier.start()
    assert begun.wait(DEADLINE_S)
    assert not group.wait(), "nothing is left for the fence to copy"
    source.fill_(2)  # what an optimizer's step does behind its fence
    may_copy.set()
    copier.join(DEADLINE_S)
    assert torch.equal(target, torch.ones(8))


def test_a_fence_copies_what_the_copier_has_not_begun() -> None:
    sources = [torch.full((4,), float(i)) for i in range(3)]
    targets = [torch.zeros(4) for _ in sources]
    pieces = [lambda s=s, t=t: t.copy_(s) for s, t in zip(sources, targets, strict=True)]
    part = Part(torch.device("cpu"), ["a", "b", "c"], sources, targets, pieces)  # type: ignore[arg-type]
    group = Group(frozenset({0}), [part])
    assert group.wait() and group.copied.is_set()
    assert all(torch.equal(t, s) for s, t in zip(sources, targets, strict=True))
    assert not group.wait(), "it is copied once"
