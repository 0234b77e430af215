"""The uninterrupted control: train.py without ckptd, in processes that never import it."""

from __future__ import annotations

import time

STARTED = time.monotonic()

import os  # noqa: E402
import sys  # noqa: E402

import loop  # noqa: E402


def main() -> None:
    options = loop.options(__doc__)
    log = loop.Log(options.log, int(os.environ["RANK"]))
    log.write("started", STARTED)
    log.write("imported")
    with loop.process_group():
        training = loop.Training(options, log)
        log.write("built")
        training.begin(0)
        for _ in range(options.steps):
            training.step()
        log.write("finished", step=options.steps, digests=training.digests())
    assert not any(name.partition(".")[0] == "ckptd" for name in sys.modules), "the control knows ckptd"


if __name__ == "__main__":
    main()
