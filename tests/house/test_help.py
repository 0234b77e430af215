"""Every command explains itself, and a wrong call is a sentence with an exit code."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMMANDS = ["daemon", "coordinator", "demo", "status", "forget"]


def ckptd(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ckptd.cli.main", *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    shown = ckptd(command, "--help")
    assert shown.returncode == 0, shown.stderr
    assert "Example" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["daemon", "--listen", "0.0.0.0:7600"], 2, "reachable from other machines"),
        (["daemon", "--node", "a/b"], 2, "a/b"),
        (["daemon", "--park-s", "-1"], 2, "--park-s"),
        (["status", "--socket", "/nonexistent/ckptd.sock"], 6, "no ckptd daemon"),
        (["demo", "--kill", "everything"], 2, "everything"),
    ],
)
def test_a_wrong_call_is_a_sentence(arguments: list[str], code: int, words: str) -> None:
    shown = ckptd(*arguments)
    assert shown.returncode == code, (shown.returncode, shown.stderr)
    assert words in shown.stderr and "Traceback" not in shown.stderr
