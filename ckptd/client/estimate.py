"""Before training starts: will the state fit?

Counts what exists, and what the optimizers will add at their first step (a throw-away
optimizer on the meta device tells).
"""

from __future__ import annotations

import logging

from ckptd.client import optimizers as optim
from ckptd.client.capture import plan_of
from ckptd.client.link import Link
from ckptd.client.state import Survey
from ckptd.client.tensors import spec_of
from ckptd.image import ImagePlan, TensorSpec, roomy_capacity
from ckptd.v1 import local_pb2

log = logging.getLogger("ckptd")


def reserve(link: Link, survey: Survey) -> None:
    """Asks the daemon whether the images will fit; notes where that is known only after the first step.

    Raises:
        NoSpace: they will not, with the numbers and who holds what.
        UnsafeObject: something has no safe form; the message names its path.
    """
    image_bytes, unknown = estimated_bytes(survey)
    message = local_pb2.TrainerMessage(reserve=local_pb2.Reserve(image_bytes=image_bytes))
    reserved = link.request(message, "reserved", link.terms.timeout_s).message.reserved
    log.info(
        "memory: %s bytes needed, %s available", f"{reserved.needed_bytes:,}", f"{reserved.available_bytes:,}"
    )
    if unknown:
        log.warning(
            "the size of %s is not known before the first step: the memory budget is checked after it",
            ", ".join(unknown),
        )


def estimated_bytes(survey: Survey) -> tuple[int, list[str]]:
    """Returns one image's size in bytes, and the optimizers whose state is not counted in it.

    Args:
        survey: a tentative one will do.
    """
    tree = survey.tree_of()
    known = plan_of(survey, tree)
    extra: list[TensorSpec] = []
    unknown = []
    for name, optimizer in survey.attached.optimizers.items():
        if optimizer.state:
            continue
        states = optim.estimate(optimizer)
        if states is None:
            unknown.append(name)
            continue
        owned = [parameter for group in survey.groups[name] for parameter in group]
        for parameter, state in zip(owned, states, strict=True):
            extra += [spec_of(f"{name}.{parameter.name}.{key}", value) for key, value in state.items()]
    if not extra:
        return known.image_bytes, unknown
    capacity = roomy_capacity(len(tree.encoded))
    return ImagePlan.build([*known.tensors, *extra], objects_capacity=capacity).image_bytes, unknown
