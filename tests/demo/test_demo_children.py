"""Child processes: noticed when they end, ended for certain, never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ckptd.demo.children import Child, Children, RecordPipe, tail

PYTHON = [sys.executable, "-I", "-c"]
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x'); time.sleep(60)"
DEADLINE_S = 20.0


def children(tmp_path: Path) -> Children:
    return Children(tmp_path, tmp_path)


def gone(pid: int) -> bool:
    """Whether no such process exists, or only its zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.01)


async def run_stubborn(group: Children) -> Any:
    """A process that ignores SIGTERM, and certainly does so already."""
    told: list[Any] = []
    pipe = RecordPipe(told.append)
    code = STUBBORN.replace("print('x')", f"open({pipe.path!r}, 'w').write('1\\n')")
    child = group.spawn("stubborn", [*PYTHON, code], os.environ, pass_fds=[pipe.write_end])
    pipe.handed_over()
    async with asyncio.timeout(DEADLINE_S):
        while not told:
            await asyncio.sleep(0.01)
    return child


@pytest.mark.parametrize(
    ("code", "status"), [("pass", 0), ("raise SystemExit(3)", 3), ("import os; os.abort()", -6)]
)
def test_the_status_is_that_of_waitpid(tmp_path: Path, code: str, status: int) -> None:
    async def body() -> int:
        async with children(tmp_path) as group:
            return await group.spawn("one", [*PYTHON, code], os.environ).wait()

    assert asyncio.run(body()) == status


def test_end_kills_what_ignores_sigterm(tmp_path: Path) -> None:
    async def body() -> int:
        async with children(tmp_path) as group:
            child: Child = await run_stubborn(group)
            return await child.end(grace_s=0.05)

    assert asyncio.run(body()) == -signal.SIGKILL


def test_end_kills_what_is_stopped(tmp_path: Path) -> None:
    async def body() -> tuple[bool, int]:
        async with children(tmp_path) as group:
            child = await run_stubborn(group)
            child.send(signal.SIGSTOP)
            return child.alive, await child.end(grace_s=0.05)

    assert asyncio.run(body()) == (True, -signal.SIGKILL)


def test_leaving_ends_everything_even_by_an_exception(tmp_path: Path) -> None:
    pids: list[int] = []

    async def body() -> None:
        async with children(tmp_path) as group:
            pids.extend([(await run_stubborn(group)).pid, (await run_stubborn(group)).pid])
            raise KeyError("anything")

    with pytest.raises(KeyError):
        asyncio.run(body())
    assert all(gone(pid) for pid in pids)


def test_what_a_killed_child_had_written_is_read_to_the_end(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    count = 500

    async def body() -> None:
        async with children(tmp_path) as group:
            pipe = RecordPipe(told.append)
            code = (
                "import json, os, signal\n"
                f"out = open({pipe.path!r}, 'w', buffering=1)\n"
                f"for i in range({count}): out.write(json.dumps({{'i': i}}) + chr(10))\n"
                "os.kill(os.getpid(), signal.SIGKILL)\n"
            )
            child = group.spawn("writer", [*PYTHON, code], os.environ, pass_fds=[pipe.write_end])
            pipe.handed_over()
            assert await child.wait() == -signal.SIGKILL
            async with asyncio.timeout(DEADLINE_S):
                while len(told) < count:
                    await asyncio.sleep(0.01)

    asyncio.run(body())
    assert [record["i"] for record in told] == list(range(count))


def test_the_warden_ends_everything_when_the_demo_itself_is_killed(tmp_path: Path) -> None:
    memory = tmp_path / "ckptd-demo-1-x"
    kept = tmp_path / "other"
    program = f"""
import asyncio, os, pathlib, sys
from ckptd.demo.children import Children
memory, kept = pathlib.Path({str(memory)!r}), pathlib.Path({str(kept)!r})
async def body():
    async with Children(memory.parent, memory.parent) as group:
        for path in (memory, kept):
            (path / "node0").mkdir(parents=True)
            group.guard_directory(path)
        child = group.spawn("sleeper", {[*PYTHON, "import time; time.sleep(60)"]!r}, os.environ)
        print(child.pid, flush=True)
        await child.wait()
asyncio.run(body())
"""
    demo = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert demo.stdout is not None
    with demo, demo.stdout:
        pid = int(demo.stdout.readline())
        assert not gone(pid)
        demo.kill()
    wait_for(lambda: gone(pid) and not memory.exists())
    assert kept.exists()


def test_a_tail_is_the_end_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "one.log"
    assert "no log" in tail(log)
    log.write_text("\n".join(str(i) for i in range(100)))
    assert tail(log, 2) == "    98\n    99"
