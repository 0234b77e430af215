"""Shared test options: `--soak` runs the full counts, and every run ends with what was counted."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, settings

# A line that a test prints to say how much it tried: "66 codes, ...", "seed 7, ...", "demo rank: ...".
_COUNTED = re.compile(r"^(?:\d[\d,]* [a-z]|seed \d|demo |\S+: \d[\d,]* [a-z])")
_counted: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the full counts (long)")


def pytest_configure(config: pytest.Config) -> None:
    # The same examples every time, but for --soak; how long drawing takes is the machine's business.
    settings.register_profile(
        "ckptd",
        deadline=None,
        derandomize=not config.getoption("--soak"),
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("ckptd")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--soak"):
        return
    skip = pytest.mark.skip(reason="full counts; run with --soak")
    for item in items:
        if "soak" in item.keywords:
            item.add_marker(skip)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        name = report.nodeid.partition("::")[2]
        _counted.extend(f"{name}: {line}" for line in report.capstdout.splitlines() if _COUNTED.match(line))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _counted:
        terminalreporter.section("counted")
        for line in _counted:
            terminalreporter.line(line)


@pytest.fixture
def soak(request: pytest.FixtureRequest) -> bool:
    """Whether the full counts were asked for."""
    return bool(request.config.getoption("--soak"))
