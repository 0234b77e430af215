"""Names from outside: what passes is safe in a path, a header and a log."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.errors import InvalidRequest
from ckptd.image import check_name, check_tensor_name

BAD_NAMES = [
    "",
    ".",
    "..",
    "a/b",
    "../x",
    "a\\b",
    "a b",
    "a\n",
    "\n",
    "a\0",
    "é",
    "a" * 129,
    "job:1",
    "~",
    "\ud800",
]
BAD_TENSOR_NAMES = [
    "",
    "a" * 513,
    "a\nb",
    "a\0",
    "\x7f",
    "\ud800",
    "__metadata__",
    "__ckptd",
    "__ckptd.variable",
    "\u2028",
]


@pytest.mark.parametrize("name", ["a", "llama-7b_2.1", "...", "-", "A" * 128])
def test_good_names_come_back(name: str) -> None:
    assert check_name("job", name) == name


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_bad_names_are_refused_and_shown_safely(name: str) -> None:
    with pytest.raises(InvalidRequest, match="this node name cannot be used") as caught:
        check_name("node", name)
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.text(max_size=140))
def test_a_name_passes_exactly_when_the_grammar_says_so(name: str) -> None:
    good = re.fullmatch(r"[A-Za-z0-9._-]{1,128}", name) is not None and name not in {".", ".."}
    if good:
        assert check_name("job", name) == name
    else:
        with pytest.raises(InvalidRequest):
            check_name("job", name)


@pytest.mark.parametrize(
    "name", ["a", "layers.0.weight", "../../etc/x", "größe", "a" * 512, '"', "\\", "\U0001f600", "_x"]
)
def test_good_tensor_names_come_back(name: str) -> None:
    assert check_tensor_name(name) == name


@pytest.mark.parametrize("name", BAD_TENSOR_NAMES, ids=lambda name: ascii(name)[:20])
def test_bad_tensor_names_are_refused_and_shown_safely(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_tensor_name(name)
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()
