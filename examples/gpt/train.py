"""Trains the GPT under ckptd: the four marked lines are all that a training loop needs."""

from __future__ import annotations

import time

STARTED = time.monotonic()

import os  # noqa: E402
from dataclasses import asdict  # noqa: E402

import loop  # noqa: E402

import ckptd  # noqa: E402


def main() -> None:
    options = loop.options(__doc__)
    log = loop.Log(options.log, int(os.environ["RANK"]))
    log.write("started", STARTED)
    log.write("imported")
    with loop.process_group():
        training = loop.Training(options, log)
        log.write("built")
        run = ckptd.attach(  # 1
            "gpt-demo",
            model=training.model,
            optimizer=training.optimizer,
            scheduler=training.scheduler,
            data=training.sampler,
            every=1,
            max_lag=2,
        )
        report = run.resume()  # 2
        training.begin(report.step, rung=report.rung, verified=report.verified)
        for step in range(report.step, options.steps):
            loss = training.step()
            run.step(loss=loss)  # 3
            log.write("kept", step=step + 1, statistics=asdict(run.statistics()))
        log.write("finished", step=options.steps, digests=training.digests())
        run.close()  # 4


if __name__ == "__main__":
    main()
