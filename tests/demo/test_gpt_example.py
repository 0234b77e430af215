"""The example GPT: its text, its sampler's order, and what the demo relies on."""

from __future__ import annotations

import ast
import importlib.util
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ckptd.demo import example
from ckptd.demo.scratch import STATE_BYTES


def load(name: str) -> ModuleType:
    """A module of examples/gpt under a name that nothing else has."""
    spec = importlib.util.spec_from_file_location(f"gpt_{name}", example.directory() / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


data, model = load("data"), load("model")


def sampler(rank: int = 0, seed: int = 7, world_size: int = 4) -> Any:
    text = bytes(range(256)) * 40
    return data.Sampler(text, context=16, batch=3, rank=rank, world_size=world_size, seed=seed)


def test_the_corpus_is_bounded_and_the_same_every_time() -> None:
    text = data.corpus(200_000)
    assert len(text) == 200_000
    assert text == data.corpus(200_000)
    assert data.corpus(1_000) == text[:1_000]


def test_targets_are_one_byte_ahead() -> None:
    inputs, targets = next(sampler())
    assert inputs.shape == targets.shape == (3, 16)
    assert inputs.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_order_is_a_function_of_seed_position_and_rank_only() -> None:
    first = list(islice(sampler(), 6))
    again = sampler()
    again.load_state_dict({"position": 4, "seed": 7})
    for (a, _), (b, _) in zip(first[4:], islice(again, 2), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0][0], next(sampler(rank=1))[0])
    assert not torch.equal(first[0][0], next(sampler(seed=8))[0])


def test_global_samples_are_shared_out_without_overlap() -> None:
    """Four ranks with batch 3 draw the very samples that one rank with batch 12 draws."""
    text = bytes(range(256)) * 40
    whole = data.Sampler(text, context=16, batch=12, rank=0, world_size=1, seed=7)
    for _ in range(3):
        parts = [sampler(rank) for rank in range(4)]
        for part in parts:
            part.load_state_dict(whole.state_dict())
        assert torch.equal(torch.cat([next(part)[0] for part in parts]), next(whole)[0])


def test_a_state_of_another_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed 7, this sampler's is 8"):
        sampler(seed=8).load_state_dict(sampler().state_dict())


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="3 bytes"):
        data.Sampler(b"abc", context=16, batch=1, rank=0, world_size=1, seed=0)


def test_the_model_is_causal_and_small_enough_for_the_demo() -> None:
    torch.manual_seed(0)
    gpt = model.GPT(model.Shape()).eval()
    tokens = torch.randint(0, 256, (2, model.Shape().context))
    changed = tokens.clone()
    changed[:, 40] = (changed[:, 40] + 1) % 256
    with torch.no_grad():
        before, after = gpt(tokens), gpt(changed)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.equal(before[:, 40:], after[:, 40:])
    parameters = sum(parameter.numel() for parameter in gpt.parameters())
    assert parameters < 1_000_000
    # Weights and AdamW's two moments: what the demo's memory sum is made of.
    assert 3 * 4 * parameters <= STATE_BYTES


def test_dropout_makes_the_random_state_matter() -> None:
    gpt = model.GPT(model.Shape(blocks=1))
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = gpt(tokens)
    second = gpt(tokens)
    torch.set_rng_state(state)
    assert torch.equal(gpt(tokens), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["control.py", "loop.py", "model.py", "data.py"])
def test_the_control_imports_nothing_of_ckptd(name: str) -> None:
    for node in ast.walk(ast.parse((example.directory() / name).read_text())):
        if isinstance(node, ast.Import):
            assert all(not alias.name.startswith("ckptd") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("ckptd")


def test_train_and_control_differ_by_ckptds_lines_only() -> None:
    """Every statement of the control's main() but its loop header is in train.py, too."""

    def statements(name: str) -> list[str]:
        tree = ast.parse((example.directory() / name).read_text())
        (main,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main")
        return [ast.unparse(n) for n in ast.walk(main) if isinstance(n, ast.stmt)]

    trained = "\n".join(statements("train.py"))
    for statement in (
        "options = loop.options(__doc__)",
        "training = loop.Training(options, log)",
        "training.step()",
    ):
        assert statement in trained
        assert statement in "\n".join(statements("control.py"))


def test_the_example_is_found_beside_or_inside_the_package() -> None:
    files = {path.name for path in Path(example.directory()).glob("*.py")}
    assert {"train.py", "control.py", "loop.py", "model.py", "data.py"} <= files
    assert len(example.source_digest()) == 64
