"""What the package must not contain, seen in its syntax trees."""

from __future__ import annotations

import ast
from pathlib import Path

import ckptd

PACKAGE = Path(ckptd.__file__).parent
ROOT = PACKAGE.parent

# module:name pairs that may use what is forbidden below.  Empty, and meant to stay so.
ALLOWED: frozenset[str] = frozenset()

FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {("torch", "load"), ("torch", "save"), ("numpy", "load"), ("np", "load")}


def violations(path: Path) -> list[str]:
    """Uses of a forbidden name in one file, as "file:line name"."""
    found = []

    def note(node: ast.AST, name: str) -> None:
        found.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")  # type: ignore[attr-defined]

    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in FORBIDDEN_MODULES:
                    note(node, alias.name)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
                note(node, node.module or "")
            for alias in node.names:
                if (node.module, alias.name) in FORBIDDEN_ATTRIBUTES:
                    note(node, f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            note(node, node.func.id) if node.func.id in FORBIDDEN_CALLS else None
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used = (node.value.id, node.attr)
            note(node, ".".join(used)) if used in FORBIDDEN_ATTRIBUTES else None
    return found


def test_nothing_in_the_package_can_execute_data() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if "examples" not in path.parts]
    assert len(files) > 30
    found = {entry for path in files for entry in violations(path)} - ALLOWED
    assert not found, "\n".join(sorted(found))


def test_the_check_sees_what_it_is_for(tmp_path: Path) -> None:
    bad = ROOT / "tests" / "house" / "_bad_example.py"
    bad.write_text("import pickle\nfrom torch import load\nimport torch\ntorch.load('x')\neval('1')\n")
    try:
        names = {entry.split()[-1] for entry in violations(bad)}
    finally:
        bad.unlink()
    assert names == {"pickle", "torch.load", "eval"}


def test_broad_excepts_stand_only_at_a_top_frame() -> None:
    """`except Exception` hides bugs; only these top frames of threads, tasks and servers may have one."""
    top_frames = {
        ("ckptd/memory/bulk.py", "_serve"),
        ("ckptd/memory/peer.py", "_run"),
        ("ckptd/daemon/scrub.py", "run"),
        ("ckptd/daemon/trainers.py", "_serve_one"),
        ("ckptd/daemon/transfer.py", "_run"),
        ("ckptd/client/copier.py", "_run"),
    }
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.ExceptHandler) and (
                    node.type is None
                    or (isinstance(node.type, ast.Name) and node.type.id in {"Exception", "BaseException"})
                ):
                    found.add((str(path.relative_to(ROOT)), function.name))
    print(sorted(found))
    assert found <= top_frames, f"broad excepts at {sorted(found - top_frames)}"


def test_exported_names_are_sorted_and_there() -> None:
    assert ckptd.__all__ == sorted(ckptd.__all__)
    for name in ckptd.__all__:
        assert getattr(ckptd, name) is not None


def test_every_dependency_says_why() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    start = lines.index("dependencies = [")
    for line in lines[start + 1 : lines.index("]", start)]:
        assert ">=" in line and "  # " in line, f"no lower bound with a reason: {line}"


def test_constraints_pin_every_dependency() -> None:
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().split()
    }
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    start = lines.index("dependencies = [")
    for line in lines[start + 1 : lines.index("]", start)]:
        name = line.strip().strip('"').split(">=")[0]
        assert name in pinned, f"{name} is not pinned in constraints.txt"
