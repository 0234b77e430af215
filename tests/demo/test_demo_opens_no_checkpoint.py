"""Nothing is restored from disk: what every process of a demo opens is watched and judged.

An audit hook, put into every interpreter by a sitecustomize module, writes down each
file that Python code opens.  What native code would write shows in /proc/self/io, which
counts bytes on their way to storage and does not count tmpfs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ckptd.demo import example

SEED = 21
# One image is about 2 MB.
WRITTEN_MAX_BYTES = 512 << 10

HOOK = """
import atexit, json, os, sys

_name = os.path.join(os.environ["OPENED_DIR"], str(os.getpid()))
_out = os.open(_name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def _tell(**fact):
    os.write(_out, (json.dumps(fact) + chr(10)).encode())

def _written():
    with open("/proc/self/io") as io:
        _tell(written=int(dict(line.split(": ") for line in io)["write_bytes"]))

def _hook(event, args):
    if event != "open" or isinstance(args[0], int) or args[0] is None:
        return
    caller = sys._getframe().f_back
    if caller is not None and caller.f_code.co_name == "_get_default_tempdir":
        return  # the standard library tries whether TMPDIR is writable, with five bytes
    path = os.fsdecode(args[0])
    flags = args[2] if len(args) > 2 and isinstance(args[2], int) else 0
    write = bool(flags & (os.O_WRONLY | os.O_RDWR)) or any(c in (args[1] or "") for c in "wax+")
    _tell(path=os.path.realpath(path), write=write)

_tell(argv=sys.orig_argv)
atexit.register(_written)
sys.addaudithook(_hook)
"""

# Read by interpreters and libraries; never written.
LIBRARIES = tuple(
    str(Path(path).resolve())
    for path in {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), str(example.PACKAGE_PARENT)}
)
SYSTEM = ("/etc/", "/usr/", "/lib", "/sys/", "/proc/", "/dev/null", "/dev/urandom", "/dev/random")
PIPES = ("/proc/", "/dev/fd/", "/dev/pts/", "/dev/stdout")


@dataclass
class Opened:
    """What one process opened."""

    argv: list[str] = field(default_factory=list)
    paths: set[tuple[str, bool]] = field(default_factory=set)
    written: int | None = None

    def role(self) -> str:
        for word in ("daemon", "coordinator", "demo"):
            if word in self.argv[:5]:
                return word
        return next((Path(arg).stem for arg in self.argv if arg.endswith(".py")), "other")


def collect(directory: Path) -> list[Opened]:
    found = []
    for log in directory.iterdir():
        process = Opened()
        for line in log.read_text().splitlines():
            fact = json.loads(line)
            if "argv" in fact:
                process.argv = fact["argv"]
            elif "written" in fact:
                process.written = fact["written"]
            else:
                process.paths.add((fact["path"], fact["write"]))
        found.append(process)
    return found


def suspicious(process: Opened, scratch: Path) -> list[str]:
    """Opened paths that are neither code, nor the system's, nor memory, nor a log."""
    strange = []
    for path, write in sorted(process.paths):
        code = not write and path.startswith((*LIBRARIES, *SYSTEM))
        memory = path.startswith("/dev/shm/ckptd-demo-")
        pipe = path.startswith(PIPES)
        log = path.startswith(str(scratch)) and "/logs/" in path and path.endswith(".log")
        hook = path.startswith(str(scratch / "hook"))
        directory = not write and Path(path).is_dir()
        if not (code or memory or pipe or log or hook or directory):
            strange.append(f"{'writes' if write else 'reads'} {path}")
    return strange


def test_a_checkpoint_would_be_noticed(tmp_path: Path) -> None:
    """The judge itself: code, system files and memory pass, state on disk does not."""
    fine = {
        (os.path.realpath(os.__file__), False),
        ("/etc/ld.so.cache", False),
        ("/dev/shm/ckptd-demo-1-x/node0/gpt-demo/rank0.arena", True),
        (str(tmp_path / "ckptd-demo-1-x" / "logs" / "node0.log"), True),
    }
    bad = {
        (str(tmp_path / "ckptd-demo-1-x" / "step-7.pt"), False),
        (str(tmp_path / "state.safetensors"), True),
        ("/dev/shm/other", True),
        (os.path.realpath(os.__file__), True),
    }
    assert suspicious(Opened(paths=fine), tmp_path) == []
    assert len(suspicious(Opened(paths=fine | bad), tmp_path)) == len(bad)


@pytest.mark.timeout(200)
def test_no_process_of_the_demo_opens_a_checkpoint(tmp_path: Path) -> None:
    opened, scratch = tmp_path / "opened", tmp_path / "scratch"
    hook = scratch / "hook"
    for directory in (opened, scratch, hook):
        directory.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK)
    argv = [sys.executable, "-m", "ckptd.cli.main", "demo", "--kill", "node", "--seed", str(SEED), "--json"]
    environment = {
        "PYTHONPATH": os.pathsep.join([str(hook), str(example.PACKAGE_PARENT)]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OPENED_DIR": str(opened),
        "TMPDIR": str(scratch),
    }
    ended = subprocess.run(
        argv, env=os.environ | environment, capture_output=True, text=True, timeout=170, check=False
    )
    print(ended.stderr)
    assert ended.returncode == 0
    assert json.loads(ended.stdout)["rung"] == "parity"

    processes = collect(opened)
    roles = [process.role() for process in processes]
    # The hook really was in all of them: 4 trainers, 4 of the next generation, and the control's.
    assert (roles.count("daemon"), roles.count("coordinator")) == (5, 1)
    assert (roles.count("train"), roles.count("control")) == (8, 4)
    arenas = [
        path for p in processes if p.role() == "daemon" for path, _ in p.paths if path.startswith("/dev/shm/")
    ]
    assert arenas, "the hook saw no daemon open its memory, so it cannot have seen anything else"

    strange = {
        f"{process.role()}: {entry}"
        for process in processes
        if process.role() in ("daemon", "coordinator", "train")
        for entry in suspicious(process, scratch)
    }
    assert not strange, "\n".join(sorted(strange))
    written = {p.role(): p.written for p in processes if p.written is not None}
    print("bytes written towards storage:", written)
    for process in processes:
        if process.role() in ("daemon", "train") and process.written is not None:
            assert process.written < WRITTEN_MAX_BYTES, process.argv
