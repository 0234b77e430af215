"""ckptd keeps long PyTorch training jobs alive.

    run = ckptd.attach("llama", model=model, optimizer=optimizer)
    report = run.resume()
    for step in range(report.step, steps):
        loss = train_step()
        run.step(loss=loss)

The names below are loaded when they are first used, so that the daemon, which
imports this package too, pays for no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptd.client.loading import LoadReport as LoadReport
    from ckptd.client.loading import load as load
    from ckptd.client.loading import open as open
    from ckptd.client.report import ResumeReport as ResumeReport
    from ckptd.client.report import Statistics as Statistics
    from ckptd.client.run import Run as Run
    from ckptd.client.run import attach as attach
    from ckptd.client.saving import save as save
    from ckptd.errors import CkptdError as CkptdError

__version__ = "0.1.0"
PREEMPTED = 75  # exit code of a trainer that left because `run.should_stop` said so (EX_TEMPFAIL)
__all__ = [
    "PREEMPTED",
    "CkptdError",
    "LoadReport",
    "ResumeReport",
    "Run",
    "Statistics",
    "attach",
    "erasure",
    "load",
    "open",
    "save",
]

_HOME = {
    "CkptdError": "ckptd.errors",
    "LoadReport": "ckptd.client.loading",
    "ResumeReport": "ckptd.client.report",
    "Run": "ckptd.client.run",
    "Statistics": "ckptd.client.report",
    "attach": "ckptd.client.run",
    "load": "ckptd.client.loading",
    "open": "ckptd.client.loading",
    "save": "ckptd.client.saving",
}


def __getattr__(name: str) -> Any:
    if name == "erasure":
        return importlib.import_module("ckptd.erasure")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'ckptd' has no attribute {name!r}")
