"""The random states that belong to every rank's state without being asked for.

torch on the CPU, CUDA where it is in use, numpy's global generator and Python's
`random`.  All as numpy arrays and plain values: about 10 KiB.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from ckptd.client.device import cuda_in_use
from ckptd.errors import StateMismatch


def capture_random() -> dict[str, Any]:
    """Returns the four random states; never synchronises a device and draws no number."""
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy(),
        "numpy": np.random.get_state(legacy=False),
        "python": (version, np.array(internal, dtype=np.uint64), gauss),
    }
    if cuda_in_use():
        # A generator's seed and offset live on the host.
        state["cuda"] = [torch.cuda.get_rng_state(i).numpy() for i in range(torch.cuda.device_count())]
        state["cuda_current"] = torch.cuda.current_device()
    return state


def restore_random(state: dict[str, Any]) -> None:
    """Sets all random states to what `capture_random` returned.

    A rank's own device may have another index now; its state follows it.

    Raises:
        StateMismatch: the state was captured with CUDA, and there is none here.
    """
    version, internal, gauss = state["python"]
    cuda = state.get("cuda")
    if cuda is not None and not torch.cuda.is_available():
        raise StateMismatch("the state holds CUDA's random state", "there is no CUDA device here")
    torch.set_rng_state(torch.from_numpy(state["torch"].copy()))
    np.random.set_state(state["numpy"])
    random.setstate((version, tuple(int(word) for word in internal), gauss))
    if cuda is not None:
        here, there = torch.cuda.current_device(), int(state["cuda_current"])
        for index, value in enumerate(cuda):
            target = here if index == there else index
            if target < torch.cuda.device_count() and (index == there or target != here):
                torch.cuda.set_rng_state(torch.from_numpy(value.copy()), target)
