"""Generates ckptd/v1 from proto/; `--check` fails when the tree is not fresh.

Usage: python tools/protos.py [--check]
"""

from __future__ import annotations

import argparse
import filecmp
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "proto" / "ckptd" / "v1").glob("*.proto"))
WITH_SERVICE = {"daemon", "coordinator"}


def generate(out: Path) -> list[Path]:
    """Writes messages, stubs and services below `out`; returns the files written."""
    builtin = Path(grpc_tools.__file__).parent / "_proto"
    common = ["protoc", f"-I{ROOT / 'proto'}", f"-I{builtin}"]
    for source in SOURCES:
        flags = [f"--python_out={out}", f"--pyi_out={out}"]
        if source.stem in WITH_SERVICE:
            flags.append(f"--grpc_python_out={out}")
        if protoc.main([*common, *flags, str(source)]) != 0:
            raise SystemExit(f"protoc failed on {source}")
    return sorted((out / "ckptd" / "v1").glob("*_pb2*"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, change nothing")
    if not parser.parse_args().check:
        generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        fresh = generate(Path(scratch))
        there = {path.name for path in (ROOT / "ckptd" / "v1").glob("*_pb2*")}
        stale = [
            path.name
            for path in fresh
            if path.name not in there
            or not filecmp.cmp(path, ROOT / "ckptd" / "v1" / path.name, shallow=False)
        ]
        stale += sorted(there - {path.name for path in fresh})
    if stale:
        print(f"generated code is not fresh: {', '.join(stale)}; run 'make protos'", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
