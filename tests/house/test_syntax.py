"""What the package must not contain, seen in its syntax trees."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import ckptd

PACKAGE = Path(ckptd.__file__).parent
ROOT = PACKAGE.parent

# The only uses of what is forbidden below.  DCP's planners take an object as torch.save's bytes and nothing
# else: the reader makes them in memory, from values that it decoded from JSON.  Lightning's `meta.pt` is such
# bytes by its own format; Lightning reads it.
ALLOWED = frozenset(
    {"ckptd/integrations/dcp/reader.py torch.save", "ckptd/integrations/lightning.py torch.save"}
)

_LINE = re.compile(r":\d+")
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
    found = {entry for path in files for entry in violations(path) if _LINE.sub("", entry) not in ALLOWED}
    assert not found, "\n".join(sorted(found))


def test_the_check_sees_what_it_is_for(tmp_path: Path) -> None:
    bad = ROOT / "tests" / "house" / "_bad_example.py"
    bad.write_text("import pickle\nfrom torch import load\nimport torch\ntorch.load('x')\neval('1')\n")
    try:
        names = {entry.split()[-1] for entry in violations(bad)}
    finally:
        bad.unlink()
    assert names == {"pickle", "torch.load", "eval"}


def function_body(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[ast.AST]:
    """The nodes of a function, without those of the functions in it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting.extend(ast.iter_child_nodes(node))


def broad(handler: ast.ExceptHandler) -> bool:
    caught = handler.type
    return caught is None or (isinstance(caught, ast.Name) and caught.id in {"Exception", "BaseException"})


def raises_again(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def test_broad_excepts_stand_only_at_a_top_frame() -> None:
    """`except Exception` hides bugs: one that does not raise again may stand at these top frames alone."""
    top_frames = {
        ("ckptd/memory/bulk.py", "_serve"),
        ("ckptd/memory/peer.py", "_run"),
        ("ckptd/daemon/scrub.py", "run"),
        ("ckptd/daemon/trainers.py", "_serve_one"),
        ("ckptd/daemon/transfer.py", "_run"),
        ("ckptd/client/copier.py", "_run"),
        ("ckptd/integrations/streams.py", "_run"),
        ("ckptd/storage/patient.py", "run"),
    }
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for node in function_body(function):
                if isinstance(node, ast.ExceptHandler) and broad(node) and not raises_again(node):
                    found.add((str(path.relative_to(ROOT)), function.name))
    print(sorted(found))
    assert found <= top_frames, f"broad excepts at {sorted(found - top_frames)}"


def test_exported_names_are_there() -> None:
    assert len(set(ckptd.__all__)) == len(ckptd.__all__)
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
