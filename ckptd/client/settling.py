"""When a completed step is safe: sealed, protected, durable.  What `Run.save` waits for."""

from __future__ import annotations

import time

from ckptd import errors
from ckptd.client.connection import error_of
from ckptd.client.link import Link
from ckptd.client.protection import Protection
from ckptd.v1 import local_pb2


def settle(protection: Protection, link: Link, step: int, *, protected: bool, deadline: float) -> None:
    """Returns when `step` is in the daemon's memory, or protected.

    Raises:
        InvalidRequest: it was not captured.
        DeadlineExceeded, Unreachable, StaleGeneration: it did not get there.
    """
    finished = protection.capture.finish(deadline)
    protection.take_news()
    view = link.view
    if view.watermark >= step:
        return
    if protection.last_captured != step or step in view.given_up:
        raise errors.InvalidRequest(
            f"step {step} was not captured",
            "it was not due, had no free slot, or was voided",
            "save after a step that is due (every=), with max_lag= so that none is dropped",
        )
    flushed = finished and link.flush(max(0.0, deadline - time.monotonic()))
    if flushed and protected:
        link.wait_until(lambda: view.watermark >= step or bool(view.standing), deadline)
    protection.take_news()
    if link.detached:
        raise errors.Unreachable(f"the daemon went away before step {step} was safe", next="see its log")
    if view.watermark >= step or (flushed and not protected):
        return
    why = view.standing or f"the newest protected step is {view.watermark}"
    raise errors.DeadlineExceeded(f"step {step} did not become protected in time", why, "see `ckptd status`")


def make_durable(link: Link, step: int, deadline: float) -> str:
    """Returns the URL of the checkpoint of `step`, when it is in the store; every rank of the job asks.

    Raises:
        NoSpace, CorruptImage, NotFound: it could not be written; the message says why.
        DeadlineExceeded, Unreachable, StaleGeneration: it did not get there.
    """
    message = local_pb2.TrainerMessage(flush=local_pb2.Flush(step=step))
    arrival = link.request(message, "flushed", max(0.0, deadline - time.monotonic()))
    flushed = arrival.message.flushed
    if not flushed.url:
        raise error_of(local_pb2.Failure(error=flushed.error))
    return flushed.url
