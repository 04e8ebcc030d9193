"""The IR's helpers: walking and rebuilding, the text form, and every refusal of the verifier."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import attentions, int_exprs, masks, scores
from tiers import by_tier

from attncc.ir.nodes import (
    Apply,
    Attention,
    Constant,
    Element,
    Elementwise,
    Expr,
    Hole,
    Index,
    Load,
    Parameter,
    Reduce,
    ScalarParameter,
    Size,
    Softmax,
    Sum,
    Summary,
    TensorParameter,
    Variable,
    identity_row,
)
from attncc.ir.rewrite import (
    children,
    clauses,
    contains,
    has_free_d,
    kind_of,
    map_children,
    map_clauses,
    substitute,
    walk,
)
from attncc.ir.text import to_text
from attncc.ir.types import FLOATS, INTS, DType, Kind
from attncc.ir.verify import IRError, verify
from attncc.source import Source, Span

D, Q_IDX, KV_IDX, H, QK = Index("d"), Index("q_idx"), Index("kv_idx"), Index("h"), Hole("qk")
W = Parameter("w", Kind.INT)
BIAS = Load("bias", (H, Q_IDX), Kind.FLOAT)


def op(name: str, *args: Expr) -> Apply:
    return Apply(name, args)


PLAIN = Attention(
    name="plain",
    doc="",
    parameters=(
        ScalarParameter("w", Kind.INT, 4),
        TensorParameter("bias", FLOATS, (Size("H"), Size("M"))),
        TensorParameter("ids", INTS, (Size("N"),)),
    ),
    q=identity_row("q"),
    k=identity_row("k"),
    v=identity_row("v"),
    scale=Constant(1.0),
    score=QK,
    mask=Constant(True),
    normalizer=Softmax(),
)


# --- rewriting ------------------------------------------------------------------------------------------------------

EVERY_NODE: tuple[Expr, ...] = (
    Constant(1.0),
    D,
    Size("N"),
    W,
    BIAS,
    Element("q", D),
    Reduce("sum", Element("q", D), Size("D")),
    QK,
    op("add", Q_IDX, KV_IDX),
    Variable("x", Kind.BOOL),
    Summary("min", Load("ids", (KV_IDX,), Kind.INT), "kv"),
)


@pytest.mark.parametrize("expr", EVERY_NODE, ids=lambda expr: type(expr).__name__)
def test_children_can_be_replaced(expr: Expr) -> None:
    span = Span(Source("s", "abc"), 0, 3)
    expr = replace(expr, span=span)
    marks = iter(range(100))
    before = children(expr)
    assert map_children(expr, lambda child: child) is expr
    after = map_children(expr, lambda child: replace(BIAS, tensor=f"x{next(marks)}"))
    assert type(after) is type(expr) and after.span == span
    assert [child.tensor for child in children(after)] == [f"x{i}" for i in range(len(before))]
    assert next(walk(expr)) is expr and len(list(walk(expr))) >= 1 + len(before)


def test_a_summary_is_of_a_load() -> None:
    with pytest.raises(IRError, match="only a load"):
        map_children(EVERY_NODE[-1], lambda _: Q_IDX)


def test_kinds() -> None:
    kinds = [kind_of(expr) for expr in EVERY_NODE]
    b, i, f = Kind.BOOL, Kind.INT, Kind.FLOAT
    assert kinds == [f, i, i, i, f, f, f, f, i, b, i]
    assert kind_of(Constant(True)) is b and kind_of(Constant(1)) is i
    assert kind_of(op("lt", Q_IDX, KV_IDX)) is b and kind_of(op("to_float", Q_IDX)) is f
    for wrong in (op("nothing", Q_IDX), op("exp", Q_IDX), Apply("exp", ())):
        with pytest.raises(IRError):
            kind_of(wrong)


def test_equal_numbers_of_different_kinds_are_different_constants() -> None:
    ones = {Constant(1), Constant(1.0), Constant(True), Constant(1), Constant(0.0), Constant(-0.0)}
    assert len(ones) == 5


def test_substitution() -> None:
    sum_of = op("add", Q_IDX, op("mul", Q_IDX, KV_IDX))
    assert substitute(sum_of, {Q_IDX: W}) == op("add", W, op("mul", W, KV_IDX))
    assert substitute(sum_of, {op("mul", Q_IDX, KV_IDX): W, Q_IDX: H}) == op("add", H, W)
    # Replacements are not substituted into again.
    assert substitute(sum_of, {Q_IDX: KV_IDX, KV_IDX: Q_IDX}) == op("add", KV_IDX, op("mul", KV_IDX, Q_IDX))
    assert substitute(sum_of, {}) is sum_of and substitute(sum_of, {W: H}) is sum_of


def test_substitution_respects_what_a_reduction_binds() -> None:
    inner = op("mul", Element("q", D), op("to_float", D))
    expr = op("add", op("to_float", D), Reduce("sum", inner, Size("D")))
    assert substitute(expr, {D: W}) == op("add", op("to_float", W), Reduce("sum", inner, Size("D")))
    assert substitute(expr, {Size("D"): Constant(8)}) == op("add", op("to_float", D), Reduce("sum", inner, Constant(8)))
    reading = Reduce("sum", op("mul", Element("q", D), op("to_float", Q_IDX)), Size("D"))
    assert contains(substitute(reading, {Q_IDX: W}), lambda node: node == W)
    with pytest.raises(IRError, match="capture"):
        substitute(reading, {Q_IDX: D})
    # A key that does not occur inside captures nothing.
    assert substitute(reading, {H: D}) == reading
    assert not has_free_d(reading) and has_free_d(expr) and has_free_d(Reduce("sum", inner, D))


@settings(deadline=None, max_examples=by_tier(50))
@given(attentions())
def test_clauses_are_all_there_is(attention: Attention) -> None:
    seen = [expr for _, expr in clauses(attention)]
    mapped: list[Expr] = []

    def note(expr: Expr) -> Expr:
        mapped.append(expr)
        return expr

    assert map_clauses(attention, note) == attention
    assert mapped == seen


def test_map_clauses_replaces_each() -> None:
    a = replace(PLAIN, normalizer=Softmax(BIAS))
    for normalizer, last in ((Softmax(BIAS), "sink"), (Sum(BIAS), "weight"), (Elementwise(BIAS), "weight")):
        counter = itertools.count()
        changed = map_clauses(replace(a, normalizer=normalizer), lambda _, c=counter: Constant(next(c)))
        assert [name for name, _ in clauses(changed)] == ["q", "k", "v", "scale", "score", "mask", last]
        assert [expr for _, expr in clauses(changed)] == [Constant(i) for i in range(7)]
        assert type(changed.normalizer) is type(normalizer)


# --- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expr", "text"),
    [
        (op("sub", op("sub", Q_IDX, KV_IDX), W), "q_idx - kv_idx - w"),
        (op("sub", Q_IDX, op("sub", KV_IDX, W)), "q_idx - (kv_idx - w)"),
        (op("mul", op("add", Q_IDX, W), Constant(-3)), "(q_idx + w) * -3"),
        (op("neg", Constant(3)), "-(3)"),
        (op("neg", op("add", Q_IDX, W)), "-(q_idx + w)"),
        (op("pow", op("neg", QK), Constant(-2.0)), "(-qk) ** (-2.0)"),
        (op("pow", op("pow", QK, QK), op("pow", QK, QK)), "(qk ** qk) ** (qk ** qk)"),
        (op("eq", op("lt", Q_IDX, W), Constant(True)), "(q_idx < w) == true"),
        (
            op("and", op("or", Constant(True), Constant(False)), op("not", op("lt", W, W))),
            "(true or false) and not w < w",
        ),
        (op("not", op("and", Constant(True), Constant(False))), "not (true and false)"),
        (op("bit_and", op("bit_or", W, W), op("shl", W, Constant(1))), "(w | w) & w << 1"),
        (op("where", Constant(True), QK, Constant(float("-inf"))), "where(true, qk, -inf)"),
        (op("min", op("floordiv", W, Constant(2)), Constant(3)), "min(w // 2, 3)"),
        (Constant(3.0), "3.0"),
        (BIAS, "bias[h, q_idx]"),
        (Load("temperature", (), Kind.FLOAT), "temperature[]"),
        (Reduce("max", op("abs", Element("q", D)), Size("D")), "max(d < D: abs(q[d]))"),
        (Variable("row_0", Kind.INT), "%row_0"),
        (Summary("max", Load("ids", (KV_IDX,), Kind.INT), "kv"), "max_kv(ids[kv_idx])"),
    ],
)
def test_text_of_expressions(expr: Expr, text: str) -> None:
    assert to_text(expr) == text


def test_text_of_an_attention() -> None:
    a = replace(
        PLAIN,
        doc="Two lines:\nhere.",
        score=op("add", QK, BIAS),
        normalizer=Softmax(BIAS),
        parameters=(
            *PLAIN.parameters,
            ScalarParameter("flag", Kind.BOOL, None),
            TensorParameter("x", (DType.F32,), ()),
        ),
    )
    assert to_text(a) == (
        "attention plain(w: int = 4, bias: f16|bf16|f32|f64[H, M], ids: i32|i64[N], flag: bool, x: f32[])\n"
        "  doc       = 'Two lines:\\nhere.'\n"
        "  q         = q[d]\n"
        "  k         = k[d]\n"
        "  v         = v[d]\n"
        "  scale     = 1.0\n"
        "  score     = qk + bias[h, q_idx]\n"
        "  mask      = true\n"
        "  weight    = softmax\n"
        "  sink      = bias[h, q_idx]\n"
    )
    assert to_text(replace(a, normalizer=Sum(Hole("score")))).endswith("weight    = score\n  normalize = sum\n")
    assert to_text(replace(a, normalizer=Elementwise(QK))).endswith("weight    = qk\n  normalize = none\n")


EXPRS = st.one_of(int_exprs(), masks(), scores())


@settings(deadline=None, max_examples=200)
@given(EXPRS, EXPRS)
def test_different_expressions_print_differently(a: Expr, b: Expr) -> None:
    assert (to_text(a) == to_text(b)) == (a == b)


def test_associativity_is_not_lost() -> None:
    """Every pair of infix operators, nested both ways, prints four different things or says so by its structure."""
    names = ("add", "sub", "mul", "floordiv", "mod", "bit_and", "bit_or", "bit_xor", "shl", "shr")
    texts: dict[str, Expr] = {}
    for outer, inner in itertools.product(names, names):
        for expr in (op(outer, op(inner, Q_IDX, W), H), op(outer, Q_IDX, op(inner, W, H))):
            assert texts.setdefault(to_text(expr), expr) == expr


# --- the verifier ---------------------------------------------------------------------------------------------------


def test_drawn_and_plain_attentions_pass() -> None:
    verify(PLAIN)


@settings(deadline=None, max_examples=by_tier(100))
@given(attentions())
def test_drawn_attentions_pass(attention: Attention) -> None:
    verify(attention)


def tensor(name: str, shape: Expr, dtypes: tuple[DType, ...] = FLOATS) -> TensorParameter:
    return TensorParameter(name, dtypes, (shape,))


TRUE, ONE = Constant(True), Constant(1)
SCORE = Hole("score")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # Kinds.
        ({"mask": QK}, "mask: `qk` has no value here"),
        ({"mask": ONE}, "mask: expected bool, found int"),
        ({"score": ONE}, "score: expected float, found int"),
        ({"scale": TRUE}, "scale: expected float, found bool"),
        ({"score": op("add", QK, ONE)}, r"`add` does not take \(float, int\)"),
        ({"score": op("sinh", QK)}, "`sinh` is no operator"),
        ({"score": op("exp", QK, QK)}, r"`exp` does not take \(float, float\)"),
        ({"score": Apply("exp", ())}, r"`exp` does not take \(\)"),
        ({"score": op("where", ONE, QK, QK)}, r"`where` does not take \(int, float, float\)"),
        ({"score": Constant(float("nan"))}, "NaN is no constant"),
        ({"mask": op("lt", Q_IDX, Constant(2**63))}, "does not fit 64 bits"),
        # Names.
        ({"mask": op("lt", Q_IDX, Parameter("x", Kind.INT))}, "`x` is not declared as int"),
        ({"score": op("mul", QK, Parameter("w", Kind.FLOAT))}, "`w` is not declared as float"),
        ({"score": Load("nothing", (H,), Kind.FLOAT)}, "tensor `nothing` is not declared"),
        ({"score": Load("ids", (KV_IDX,), Kind.FLOAT)}, "`ids` holds int, not float"),
        ({"score": Load("bias", (H,), Kind.FLOAT)}, "`bias` has 2 axes"),
        ({"score": Load("bias", (H, QK), Kind.FLOAT)}, "expected int, found float"),
        ({"parameters": (*PLAIN.parameters, PLAIN.parameters[0])}, "`w`: declared twice"),
        ({"parameters": (ScalarParameter("q_idx", Kind.INT, 1),)}, "not a name that a parameter can have"),
        ({"parameters": (ScalarParameter("a b", Kind.INT, 1),)}, "not a name that a parameter can have"),
        ({"parameters": (ScalarParameter("w", Kind.INT, 1.0),)}, "default 1.0 is no int"),
        ({"parameters": (ScalarParameter("w", Kind.INT, True),)}, "default True is no int"),
        ({"parameters": (ScalarParameter("w", Kind.INT, 2**31),)}, "does not fit 32 bits"),
        ({"parameters": (tensor("x", ONE, (DType.F32, DType.I32)),)}, "element types of one kind"),
        ({"parameters": (tensor("x", ONE, ()),)}, "element types of one kind"),
        ({"parameters": (tensor("x", QK),)}, "shape of `x`: `qk` has no value here"),
        ({"parameters": (tensor("x", TRUE),)}, "shape of `x`: expected int, found bool"),
        ({"parameters": (tensor("x", Size("q_offset")),)}, "`q_offset` has no value here"),
        ({"parameters": (ScalarParameter("w", Kind.INT, 4), tensor("x", W))}, "`w` is not declared as int"),
        ({"parameters": (tensor("x", Q_IDX),)}, "`q_idx` has no value here"),
        # What stands where.
        ({"q": op("mul", Element("q", D), op("to_float", KV_IDX))}, "q: `kv_idx` has no value here"),
        ({"k": op("mul", Element("k", D), op("to_float", Q_IDX))}, "k: `q_idx` has no value here"),
        ({"v": op("mul", Element("v", D), op("to_float", Index("q_row")))}, "v: `q_row` has no value here"),
        ({"q": Element("k", D)}, "q: elements of k cannot be read here"),
        ({"q": Element("q", Constant(1.0))}, "expected int, found float"),
        ({"v": op("mul", Element("v", D), QK)}, "v: `qk` has no value here"),
        ({"scale": op("to_float", D)}, "scale: `d` has no value here"),
        ({"scale": QK}, "scale: `qk` has no value here"),
        ({"score": op("to_float", Index("q_lo"))}, "`q_lo` has no value here"),
        ({"score": SCORE}, "score: `score` has no value here"),
        ({"score": Hole("dot")}, "score: `dot` has no value here"),
        ({"score": Element("q", ONE)}, "score: elements of q cannot be read here"),
        ({"score": Reduce("sum", Constant(1.0), ONE)}, "a reduction stands in a row transform only"),
        ({"normalizer": Softmax(op("to_float", KV_IDX))}, "sink: `kv_idx` has no value here"),
        ({"normalizer": Softmax(QK)}, "sink: `qk` has no value here"),
        ({"normalizer": Softmax(ONE)}, "sink: expected float, found int"),
        ({"normalizer": Sum(QK)}, "weight: `qk` has no value here"),
        ({"normalizer": Elementwise(TRUE)}, "weight: expected float, found bool"),
        ({"normalizer": Elementwise(op("to_float", D))}, "weight: `d` has no value here"),
        ({"score": Variable("x", Kind.FLOAT)}, "a Variable belongs to a plan"),
        (
            {"mask": op("lt", Q_IDX, Summary("min", Load("ids", (KV_IDX,), Kind.INT), "kv"))},
            "a Summary belongs to a plan",
        ),
        # Reductions.
        ({"q": Reduce("sum", ONE, Size("D"))}, "q: expected float, found int"),
        ({"q": Reduce("sum", Element("q", D), D)}, "size of a reduction: `d` has no value here"),
        ({"q": Reduce("sum", Element("q", D), W)}, "size of a reduction: `w` is not declared"),
        ({"q": Reduce("sum", Element("q", D), Constant(1.0))}, "size of a reduction: expected int, found float"),
        ({"q": Reduce("sum", Element("q", KV_IDX), Size("D"))}, "q: `kv_idx` has no value here"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    with pytest.raises(IRError, match=message):
        verify(replace(PLAIN, **change))  # type: ignore[arg-type]


def test_what_may_stand_where() -> None:
    """The other side of the refusals: each clause with everything that has a value there."""
    row = op("add", Element("q", op("mod", D, Size("D"))), op("to_float", op("add", Index("q_row"), Q_IDX)))
    peak = Reduce("max", Reduce("sum", Element("k", D), Constant(2)), op("mul", Size("D"), Constant(2)))
    coordinates = op("add", op("add", Index("b"), H), op("add", Index("hkv"), Size("q_offset")))
    at_rows = op("to_float", op("add", coordinates, op("add", Q_IDX, Index("q_row"))))
    at_pairs = op("add", at_rows, op("to_float", KV_IDX))
    a = replace(
        PLAIN,
        q=op("add", row, op("to_float", coordinates)),
        k=op("add", peak, op("to_float", KV_IDX)),
        scale=at_pairs,
        score=op("add", QK, at_pairs),
        mask=op("lt", op("add", Q_IDX, W), Load("ids", (KV_IDX,), Kind.INT)),
    )
    for normalizer in (Softmax(at_rows), Sum(op("add", SCORE, at_pairs)), Elementwise(op("add", SCORE, at_pairs))):
        verify(replace(a, normalizer=normalizer))
