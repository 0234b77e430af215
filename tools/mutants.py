"""Breaks our own code on purpose, one fault after another, and shows which test notices.

Usage: python tools/mutants.py [--json] [--only NAME ...] [--list]

The faults stand in tools/mutants.toml: a file, a text in it that occurs exactly once, what
replaces it, and the tests that must then fail.  Everything happens in a copy of the tree;
the tests are first run unbroken.  Exit code 1 where a fault survives.

Examples:
  python tools/mutants.py                      all faults, as a table
  python tools/mutants.py --only release-early fold-twice
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tools" / "mutants.toml"
_DEADLINE_S = 300
_PYTEST_FAILED = 1


@dataclass(frozen=True)
class Mutant:
    """One deliberate fault."""

    name: str
    fault: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    def broken(self, text: str) -> str:
        """`text` with the fault in it.

        Raises:
            SystemExit: the place is not there exactly once.
        """
        if text.count(self.before) != 1:
            raise SystemExit(
                f"mutant {self.name}: its text occurs {text.count(self.before)} times in {self.file}, "
                f"expected once; bring {TABLE.name} up to date"
            )
        return text.replace(self.before, self.after)


@dataclass(frozen=True)
class Verdict:
    """What became of one mutant."""

    name: str
    fault: str
    caught_by: str  # "": it survived
    seconds: float


def load() -> list[Mutant]:
    """The table of faults."""
    with TABLE.open("rb") as file:
        return [Mutant(**{**row, "tests": tuple(row["tests"])}) for row in tomllib.load(file)["mutant"]]


def copy_of_tree(target: Path) -> None:
    """Everything that git knows or does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run_tests(tree: Path, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Runs tests against the copy, which goes before the installed package."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, timeout=_DEADLINE_S
    )


def try_mutant(tree: Path, mutant: Mutant) -> Verdict:
    """Puts the fault in, runs its tests, takes it out."""
    path = tree / mutant.file
    whole = path.read_text()
    path.write_text(mutant.broken(whole))
    began = time.monotonic()
    try:
        done = run_tests(tree, mutant.tests)
    finally:
        path.write_text(whole)
    failed = [line.split(" ")[1] for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    if done.returncode == _PYTEST_FAILED:
        caught = failed[0] if failed else "an error while testing"
    elif done.returncode == 0:
        caught = ""
    else:
        raise SystemExit(f"mutant {mutant.name}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}")
    return Verdict(mutant.name, mutant.fault, caught, round(time.monotonic() - began, 1))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="the verdicts as JSON on stdout")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants alone")
    parser.add_argument("--list", action="store_true", help="show the faults, run nothing")
    options = parser.parse_args()
    mutants = [m for m in load() if not options.only or m.name in options.only]
    if options.list:
        for mutant in mutants:
            print(f"{mutant.name:28s} {mutant.fault}")
        return 0
    with tempfile.TemporaryDirectory(prefix="ckptd-mutants-") as scratch:
        verdicts = _try_all(Path(scratch), mutants)
    survivors = [verdict for verdict in verdicts if not verdict.caught_by]
    if options.json:
        print(json.dumps({"version": 1, "mutants": [asdict(v) for v in verdicts]}, indent=2))
    else:
        for verdict in verdicts:
            print(f"{verdict.name:28s} {verdict.caught_by or 'SURVIVED':70s} {verdict.seconds:6.1f} s")
        print(f"{len(verdicts) - len(survivors)} of {len(verdicts)} faults are caught")
    return 1 if survivors else 0


def _try_all(tree: Path, mutants: list[Mutant]) -> list[Verdict]:
    copy_of_tree(tree)
    tests = tuple(sorted({test for mutant in mutants for test in mutant.tests}))
    print(f"unbroken: {len(tests)} selections of tests ...", file=sys.stderr)
    unbroken = run_tests(tree, tests)
    if unbroken.returncode:
        raise SystemExit(f"the tests fail without any fault\n{unbroken.stdout[-3000:]}")
    verdicts = []
    for mutant in mutants:
        verdicts.append(try_mutant(tree, mutant))
        print(f"{mutant.name}: {verdicts[-1].caught_by or 'SURVIVED'}", file=sys.stderr)
    return verdicts


if __name__ == "__main__":
    raise SystemExit(main())
