"""The deliberate faults of tools/mutants.toml still fit the code; `make mutants` runs them."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_fault_has_its_place_and_its_tests() -> None:
    table = tomllib.loads((ROOT / "tools" / "mutants.toml").read_text())["mutant"]
    assert len(table) >= 20 and len({each["name"] for each in table}) == len(table)
    for each in table:
        found = (ROOT / each["file"]).read_text().count(each["before"])
        assert found == 1, f"{each['name']}: its text occurs {found} times in {each['file']}"
        assert each["before"] != each["after"]
        for test in each["tests"]:
            assert (ROOT / test.partition("::")[0]).exists(), f"{each['name']}: no test {test}"
