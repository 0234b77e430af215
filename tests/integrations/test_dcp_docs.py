"""The code of docs/dcp.md runs, block after block."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from dcpkit import one_process

PAGE = Path(__file__).parents[2] / "docs" / "dcp.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTD_STORE", str(tmp_path))
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    names: dict[str, object] = {}
    with one_process():
        for number, block in enumerate(blocks):
            exec(compile(block, f"{PAGE.name}, block {number + 1}", "exec"), names)  # our own page
    print(f"{len(blocks)} blocks ran")
