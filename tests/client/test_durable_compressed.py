"""A daemon that is told to compress: what it makes durable is smaller, and comes back as it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from trainees import assert_same, plain, state_of

import ckptd
from ckptd.client import embedded


@pytest.mark.parametrize("compress", ["1", "0"])
def test_the_daemon_compresses_what_becomes_durable(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: str
) -> None:
    monkeypatch.setenv("CKPTD_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("CKPTD_COMPRESS", compress)  # read by the daemon that is started
    torch.manual_seed(5)
    trainee = plain()
    with ckptd.attach("small", max_lag=1, **trainee.objects) as run:
        run.resume()
        trainee.step(0)
        run.step()
        url = run.save(wait="durable")
    wanted = state_of(trainee)
    with ckptd.open(url) as checkpoint:
        assert checkpoint.verify() == []
        (stored,) = checkpoint.manifest.objects
        assert (stored.packed is not None) == (compress == "1")
        assert stored.file_bytes < stored.nbytes or compress == "0"
    while embedded._started:  # the daemon dies, and all that it held with it
        process = embedded._started.pop()
        process.kill()
        process.wait()
    shutil.rmtree(embedded.Environment.read().memory_dir)
    torch.manual_seed(99)
    revived = plain()
    with ckptd.attach("small", max_lag=1, **revived.objects) as run:
        report = run.resume()
        assert (report.step, report.rung) == (1, "storage")
        assert_same(wanted, state_of(revived))
