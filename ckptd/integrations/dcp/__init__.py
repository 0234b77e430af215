"""torch.distributed.checkpoint in universal form: no pickle is written or read.

    dcp.save(state, storage_writer=Writer("ckptd://llama/step-7"))
    dcp.load(state, storage_reader=Reader("ckptd://llama/step-7"))

What Writer saves, `ckptd.open` and `ckptd.load` read too; Reader reads what `ckptd.save` wrote.
"""

from __future__ import annotations

from ckptd.integrations.dcp.reader import Reader
from ckptd.integrations.dcp.writer import Writer

__all__ = ["Reader", "Writer"]
