"""The language: every layout prints and parses back, and every mistake is a LayoutSyntax with a hint."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.errors import LayoutSyntax
from ckptd.layout import presets
from ckptd.layout.expressions import (
    Align,
    As,
    Average,
    Axis,
    Call,
    Drop,
    Extent,
    Flat,
    Index,
    Layout,
    Name,
    Number,
    On,
    Operation,
    Pad,
    PadTo,
    Product,
    Rep,
    Rest,
    Rule,
    Split,
    SplitOver,
    Store,
    Strip,
    Sum,
    Text,
    Tied,
    Transposed,
    When,
    Wild,
)
from ckptd.layout.language import parse, show
from ckptd.layout.language.parse import DTYPES
from ckptd.layout.language.scan import MAX_BYTES

# --- every layout in normal form -------------------------------------------------------------------

# Words of the language are names as good as any other; only functions and `_` are not.
PARAMETERS, LETS = ("g", "rep", "mesh", "layers"), ("l", "then", "on")
MESH, FOLDED = ("tp", "dp", "cat", "when"), ("ep", "fold")
AXES = (*MESH, *FOLDED)
SIZES = (*PARAMETERS, *LETS, *AXES)
LABELS = st.sampled_from(("q", "k", "v", "gate", "drop", "r"))


def grids(axes: tuple[str, ...]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(axes), min_size=1, max_size=3, unique=True).map(tuple)


def ariths(names: tuple[str, ...], leaves: int = 5) -> st.SearchStrategy[object]:
    leaf = st.integers(0, 10**17).map(Number) | st.sampled_from(names).map(Name)

    def more(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
        calls = st.builds(
            Call, st.sampled_from(("lcm", "min", "max")), st.lists(inner, min_size=1, max_size=3).map(tuple)
        )
        return (
            st.builds(Operation, st.sampled_from("+-*/"), inner, inner)
            | calls
            | st.builds(Call, st.just("ceil"), st.tuples(inner, inner))
        )

    return st.recursive(leaf, more, max_leaves=leaves)


WIDTHS = st.none() | st.lists(st.integers(0, 99), min_size=1, max_size=4).map(tuple)
OWN = ariths((*SIZES, "_"))


def axes() -> st.SearchStrategy[Axis]:
    parts = st.lists(st.tuples(LABELS, OWN), min_size=1, max_size=3, unique_by=lambda part: part[0]).map(
        tuple
    )
    leaf = st.builds(Extent, OWN) | st.builds(Sum, parts)

    def more(inner: st.SearchStrategy[Axis]) -> st.SearchStrategy[Axis]:
        factor = inner.filter(lambda one: not isinstance(one, Product))
        return (
            st.builds(Product, st.lists(factor, min_size=2, max_size=3).map(tuple))
            | st.builds(Split, inner, grids(SIZES), WIDTHS)
            | st.builds(Pad, inner, OWN, st.sampled_from(("zero", "last", "none")))
        )

    return st.recursive(leaf, more, max_leaves=4)


def patterns(ids: tuple[str, ...] = SIZES) -> st.SearchStrategy[tuple[object, ...]]:
    texts = st.text(min_size=1, max_size=6) | st.sampled_from(
        ("layers.", "mesh", "a b", '"\\{', "#;", "norm", "\n")
    )
    grid_and_widths = st.tuples(st.just(()), st.none()) | st.tuples(grids(SIZES), WIDTHS)
    index = st.builds(
        lambda id, grid, start, digits: Index(id, grid[0], start, grid[1], digits),
        st.sampled_from(ids), grid_and_widths, st.just(Number(0)) | ariths(SIZES, 2), st.integers(0, 32),
    )  # fmt: skip
    parts = st.lists(st.builds(Text, texts) | st.builds(Wild) | index, min_size=1, max_size=4)
    return parts.filter(
        lambda found: not any(isinstance(a, Text) and isinstance(b, Text) for a, b in pairwise(found))
    ).map(tuple)


def layouts() -> st.SearchStrategy[Layout]:
    size = ariths(SIZES)
    verbs = (
        st.builds(Rep, grids(AXES)) | st.builds(Average, grids(AXES))
        | st.builds(On, st.sampled_from(AXES), size) | st.builds(Tied, patterns()) | st.builds(Drop)
        | st.builds(As, st.sampled_from(DTYPES))
        | st.builds(Transposed) | st.builds(When, size)
    )  # fmt: skip
    dims = st.builds(
        lambda found, rest: (*found, *rest), st.lists(axes(), max_size=3), st.just(()) | st.just((Rest(),))
    )
    rules = st.builds(
        lambda number, name, *more: Rule((Text(f"n{number}."), Wild(), *name), *more),
        st.integers(0, 10**6), patterns().filter(lambda name: not isinstance(name[0], Text)) | st.just(()),
        st.none() | dims, st.lists(patterns(), max_size=3).map(tuple), st.lists(verbs, max_size=3).map(tuple),
    )  # fmt: skip
    steps = st.lists(
        st.builds(Align, size)
        | st.builds(PadTo, size)
        | st.builds(SplitOver, grids(AXES))
        | st.builds(Strip),
        max_size=3,
    ).map(tuple)
    flats = st.builds(
        Flat, st.sampled_from(("module", "group", "reversed", "cat")), st.booleans(), steps, steps
    )
    stores = st.builds(
        lambda path, key, flat, when: Store(path, key, flat, when=when),
        patterns((*SIZES, "state")), patterns((*SIZES, "state")), st.none() | flats, st.none() | size,
    )  # fmt: skip
    folds = st.just(((FOLDED, MESH[:2]),)) | st.just((((FOLDED[0],), MESH), ((FOLDED[1],), MESH[1:])))
    return st.builds(
        lambda name, folds, lets, states, rules, stores: Layout(
            name, PARAMETERS, MESH, folds, lets, states, rules, stores
        ),
        st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,12}", fullmatch=True), folds,
        st.tuples(*(st.tuples(st.just(name), ariths(PARAMETERS)) for name in LETS)),
        st.lists(st.tuples(LABELS, st.sampled_from(DTYPES)), max_size=2, unique_by=lambda p: p[0]).map(tuple),
        st.lists(rules, max_size=3, unique_by=lambda one: one.pieces or (one.name,)).map(tuple),
        st.lists(stores, max_size=2).map(tuple),
    )  # fmt: skip


def check(layout: Layout) -> None:
    text = show(layout)
    found = parse(text)
    assert found == layout, text
    assert show(found) == text


@settings(deadline=None, max_examples=150)
@given(layouts())
def test_every_layout_parses_back_from_its_text(layout: Layout) -> None:
    check(layout)


@pytest.mark.soak
@settings(deadline=None, max_examples=10_000)
@given(layouts())
def test_every_layout_parses_back_from_its_text_many(layout: Layout) -> None:
    check(layout)


@pytest.mark.parametrize("name", presets.names())
def test_presets_parse_back(name: str) -> None:
    layout = presets.load(name)
    assert parse(show(layout)) == layout
    assert show(parse(show(layout))) == show(layout)


def test_what_the_syntax_means() -> None:
    layout = parse(
        """
        layout example(g, r, d, vocab, l, e)      # a comment, and a line break before the body
        {
          mesh tp * dp * pp, fold etp * ep = tp * dp
          let half = g / 2; let more = half + 1
          states param: bf16
          w.{l@pp+1}.qkv : [g@tp {q:r, k, v:1} d,
                            (vocab^(128*tp)=last @tp)@dp<1,2>, ...]
            = layers.{l}.q | layers.{l}.k
            | "layers {l}" rep dp on pp (pp - 1)
          x.{e@(ep*etp)<3,2>} = y.{e} as BF16
          "mesh" : drop
          * :
          store "f {tp:02}" :: model.* = cat(reversed(module))[ align 64 then ^lcm(dp, 128) @(dp*tp) strip ]
        }
        """
    )
    g, tp = Extent(Name("g")), ("tp",)
    first, second, third, fourth = layout.rules
    assert layout.mesh == ("tp", "dp", "pp") and layout.folds == ((("etp", "ep"), ("tp", "dp")),)
    assert layout.lets[0] == ("half", Operation("/", Name("g"), Number(2)))
    assert first.name == (Text("w."), Index("l", ("pp",), Number(1)), Text(".qkv"))
    assert first.line == 7
    qkv = Sum((("q", Name("r")), ("k", Number(1)), ("v", Number(1))))
    vocabulary = Pad(Extent(Name("vocab")), Operation("*", Number(128), Name("tp")), "last")
    assert first.axes == (
        Product((Split(g, tp), qkv, Extent(Name("d")))),
        Split(Split(vocabulary, tp), ("dp",), (1, 2)),
        Rest(),
    )
    assert first.pieces[2] == (Text("layers "), Index("l"))
    assert first.verbs == (Rep(("dp",)), On("pp", Operation("-", Name("pp"), Number(1))))
    assert second.axes is None and second.verbs == (As("BF16"),)
    assert second.name == (Text("x."), Index("e", ("ep", "etp"), Number(0), (3, 2)))
    assert third == Rule((Text("mesh"),), None, (), (Drop(),)) and fourth == Rule((Wild(),), None)
    whole = (PadTo(Call("lcm", (Name("dp"), Number(128)))), SplitOver(("dp", "tp")), Strip())
    flat = Flat("module", True, (Align(Number(64)),), whole)
    assert layout.stores == (Store((Text("f "), Index("tp", digits=2)), (Text("model."), Wild()), flat),)


def test_a_product_of_products_is_one_product() -> None:
    nested, plain = (parse(f"layout x(a, b, c) {{ w : [{axis}] }}") for axis in ("(a b) ((c))", "a b c"))
    assert nested == plain


# --- mistakes --------------------------------------------------------------------------------------

HEAD = "layout x(hidden, l) {\n  mesh tp * dp * pp\n  "
MISTAKES = [
    # item, the text at the caret, hint
    ("w [hidden]", "[hidden]", "write `:` between the name and its axes"),
    ("w : [hidden] layers.0.w", "layers", "write `=` between the axes and the logical names"),
    ("w : [hidden] repl dp", "repl", "did you mean rep?"),
    ("w : [hidden] rep", "", "rep needs axes"),
    ("w : [hidden] on pp", "", "on needs an axis and a coordinate"),
    ("w : [hidden@ep]", "ep", "known here: hidden, l, tp, dp, pp"),
    ("w : [hidden@tpp]", "tpp", "did you mean tp?"),
    ("w : [_] rep hidden", "hidden", "known here: tp, dp, pp"),
    ("w : [hiden]", "hiden", "did you mean hidden?"),
    ("w : [hidden@]", "]", "@ needs a mesh axis"),
    ("w : [hidden^]", "]", "^ needs a number"),
    ("w : [hidden@tp*dp]", "hidden@tp", "a grid of several axes is in parentheses"),
    ("w : [hidden^128*tp]", "hidden^128", "a multiple that is computed is in parentheses"),
    ("w : [hidden^4=first]", "first", "write =zero, =last"),
    ("w : [hidden,,l]", ",l", "a dimension is missing"),
    ("w : [..., hidden]", "hidden", "put ... at the end"),
    ("w : [{q, q}]", "q}", "rename one"),
    ("w : [-1]", "-1", "no negative numbers"),
    ("w : [hidden", "}", "write ] first"),
    ("w : hidden]", "]", "remove it, or open a bracket before it"),
    ("w : [hidden]\n  w : [l]", "w : [l]", "remove one of the two"),
    ("w : [hidden] as BF17", "BF17", "did you mean BF16?"),
    ("states param: b16", "b16", "did you mean BF16?"),
    ("states param", "", "a state has a dtype"),
    ("let h hidden", "hidden", "write `let name = value`"),
    ("let h = hidden l", "hidden l", "write a * b"),
    ("let tp = 2", "tp", "give this name another name"),
    ("let lcm = 2", "lcm", "give this name another name"),
    ("let h = ceil(l)", "ceil(l)", "write ceil(a, b)"),
    ("meshes tp", "tp", "did you mean mesh?"),
    ("mesh a", "mesh a", "put all axes into one mesh item"),
    ("fold a * b = tp", "a * b", "a fold stands behind the mesh"),
    ("w[0] : [hidden]", "[0]", 'a name with brackets is in quotes: "groups[{g}]"'),
    ("w.{a,b} : [hidden]", ",b}", "two tensors are two rules"),
    ("w.{l@} : [hidden]", "}", "an index is {l}, {l@pp}"),
    ("w.{k} : [hidden]", "k}", "known here: hidden, l, tp, dp, pp"),
    ("w.{l:2} : [hidden]", "l:2", "write {tp:02} for two digits"),
    ('"" : [hidden]', '""', "write the tensor's name"),
    ('"w : [hidden]', '"w', 'end it with " on the same line'),
    ('"\\q" : [hidden]', "\\q", "known are"),
    ("'w' : [hidden]", "'w'", 'write "'),
    ("w : [hidden \u00d7 l]", "\u00d7", "write *"),
    ("\u201cw\u201d : [hidden]", "\u201cw", 'write "'),
    ("// w : [hidden]", "w :", "a comment begins with #"),
    ('store "a" model.*', "model", "write `::` between the path and the key"),
    ('store "a" :: b = module', "module", "a buffer is cat(module)[ steps ]"),
    ('store "a" :: b = cat(module)[ aling 4 ]', "aling", "did you mean align?"),
    ("w : [9999999999999999999]", "9999", ""),
]


@pytest.mark.parametrize(("item", "at", "hint"), MISTAKES, ids=[item[:24] for item, _, _ in MISTAKES])
def test_a_mistake_says_where_it_is_and_what_to_write(item: str, at: str, hint: str) -> None:
    text = f"{HEAD}{item}\n}}\n"
    with pytest.raises(LayoutSyntax) as caught:
        parse(text)
    error = caught.value
    line = text.splitlines()[error.line - 1]
    assert line[error.column - 1 :].startswith(at) and (at or error.column == len(line) + 1), str(error)
    assert hint in error.hint and (error.hint or not hint)
    message = str(error).splitlines()
    assert message[0].startswith(f"line {error.line}, column {error.column}: ")
    assert message[-2] == "    " + "".join(c if c.isprintable() else " " for c in line)
    assert message[-1] == " " * (4 + error.column - 1) + "^"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "a layout begins with `layout NAME(parameters) {`"),
        ("w : [a]", "a layout begins with"),
        ("layout", "write the layout's name"),
        ("layout x", "its items in {...}"),
        ("layout x {", "close it with }"),
        ("layout x { } layout y { }", "a text holds one layout"),
        ("layout x(a, a) { }", "give this parameter another name"),
        ("layout x(_) { }", "give this parameter another name"),
    ],
)
def test_a_mistake_outside_of_the_items(text: str, hint: str) -> None:
    with pytest.raises(LayoutSyntax) as caught:
        parse(text)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "#" * (MAX_BYTES + 1),
        "\u00e4" * (MAX_BYTES // 2 + 1),
        "layout x { w : [" + "(" * 100_000,
        "layout x(a) { w : [" + "(" * 65 + "a" + ")" * 65 + "] }",
        "layout x(a) { w : [a" + "^2" * 5_000 + "] }",
        "layout x(a) { w : [a" + "+a" * 5_000 + "] }",
        "layout x(a) { w : [" + "a*(" * 63 + "a" + ")" * 63 + "] }",
        "layout x(a) { w{" + "a" * 100_000 + "} : [a] }",
        "layout x { " + "a*" * 100_000 + " : drop }",
        "layout x { " + "w : drop;" * 6_000 + " }",
        "layout x(a) { w : [" + "a " * 500_000 + "] }",
        "layout x {" + "\n" * 1_000_000 + "=}",
    ],
    ids=lambda text: text[:24],
)
def test_bounds_are_checked_before_anything_overflows(text: str) -> None:
    with pytest.raises(LayoutSyntax):
        parse(text)


def test_as_deep_as_allowed() -> None:
    text = "layout x(a) { w : [" + "(" * 60 + "a" + ")" * 60 + "^2" * 60 + "] }"
    layout = parse(text)
    assert parse(show(layout)) == layout


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_no_text_raises_anything_but_layout_syntax(data: st.DataObject) -> None:
    """Presets with pieces cut out, doubled, exchanged and replaced by anything."""
    text = presets.text(data.draw(st.sampled_from(presets.names())))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        end = min(len(text), at + data.draw(st.integers(0, 6)))
        tokens = st.sampled_from(re.findall(r"\w+|\S", text) or ["x"])
        text = text[:at] + data.draw(st.just("") | tokens | st.text(max_size=3)) + text[end:]
    try:
        layout = parse(text)
    except LayoutSyntax as error:
        assert 1 <= error.line <= text.count("\n") + text.count("\r") + 1
    else:
        assert parse(show(layout)) == layout
