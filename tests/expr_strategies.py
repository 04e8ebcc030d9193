"""Strategies for the expressions of attentions: ints, bools, masks, scores, weights, row transforms.

What is drawn is tame: captured floats are multiples of 1/8 up to 2 (`strategies.calls` sees to that), so that comparing
them is exact in every type; scores stay within about ±20; nothing jumps where a score is rounded. Every captured tensor
is read within its bounds, by construction or by clamping.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hypothesis import strategies as st

from attncc.ir.nodes import (
    Apply,
    Constant,
    Element,
    Elementwise,
    Expr,
    Hole,
    Index,
    Load,
    Normalizer,
    Parameter,
    Reduce,
    RowName,
    ScalarParameter,
    Size,
    Softmax,
    Sum,
    TensorParameter,
    identity_row,
)
from attncc.ir.rewrite import walk
from attncc.ir.types import FLOATS, INTS, DType, Kind

B, H, HKV, D = Index("b"), Index("h"), Index("hkv"), Index("d")
Q_ROW, Q_IDX, KV_IDX = Index("q_row"), Index("q_idx"), Index("kv_idx")


def op(name: str, *args: Expr) -> Apply:
    return Apply(name, args)


def clamp(x: Expr, low: Expr, high: Expr) -> Expr:
    return op("min", op("max", x, low), high)


def number(x: float) -> Constant:
    return Constant(float(x))


DISTANCE = op("sub", Q_IDX, KV_IDX)
LAST_KEY = op("sub", Size("N"), Constant(1))
Q_CLAMPED = clamp(Q_IDX, Constant(0), LAST_KEY)

# Every captured input that a drawn attention may declare; it declares those that it reads.
REACH = 8  # `relative` holds distances -8 … 8
_TENSORS = (
    TensorParameter("slope", FLOATS, (Size("H"),)),
    TensorParameter("temperature", FLOATS, ()),
    TensorParameter("key_bias", FLOATS, (Size("B"), Size("N"))),
    TensorParameter("row_bias", (DType.F32,), (Size("H"), Size("M"))),
    TensorParameter("pair_bias", FLOATS, (Size("H"), Size("M"), Size("N"))),
    TensorParameter("relative", FLOATS, (Size("H"), Constant(2 * REACH + 1))),
    TensorParameter("gain_q", FLOATS, (Size("H"), Size("D"))),
    TensorParameter("gain_k", FLOATS, (Size("HKV"), Size("D"))),
    TensorParameter("gain_v", FLOATS, (Size("H"), Size("E"))),
    TensorParameter("sinks", FLOATS, (Size("H"),)),
    TensorParameter("row_sinks", FLOATS, (Size("B"), Size("M"))),
    TensorParameter("doc", INTS, (Size("B"), Size("N"))),
    TensorParameter("row_group", INTS, (Size("B"), Size("M"))),
    TensorParameter("length", INTS, (Size("B"),)),
    TensorParameter("layout", (DType.BOOL,), (Size("H"), Constant(8), Constant(8))),
    TensorParameter("padding", (DType.BOOL,), (Size("B"), Size("N"))),
)
_SCALARS = (
    ScalarParameter("window", Kind.INT, 4),
    ScalarParameter("shift", Kind.INT, None),
    ScalarParameter("cap", Kind.FLOAT, 2.0),
    ScalarParameter("flag", Kind.BOOL, None),
)
_PARAMETERS: dict[str, ScalarParameter | TensorParameter] = {p.name: p for p in (*_TENSORS, *_SCALARS)}


def load(name: str, *indices: Expr) -> Load:
    tensor = _PARAMETERS[name]
    assert isinstance(tensor, TensorParameter)
    return Load(name, indices, tensor.dtypes[0].kind)


def scalar(name: str) -> Parameter:
    parameter = _PARAMETERS[name]
    assert isinstance(parameter, ScalarParameter)
    return Parameter(name, parameter.kind)


def parameters_of(exprs: Iterable[Expr]) -> tuple[ScalarParameter | TensorParameter, ...]:
    """The declarations of all that `exprs` read."""
    read = {
        node.tensor if isinstance(node, Load) else node.name
        for expr in exprs
        for node in walk(expr)
        if isinstance(node, Load | Parameter)
    }
    return tuple(p for name, p in _PARAMETERS.items() if name in read)


WINDOW, SHIFT = scalar("window"), scalar("shift")
_DOC_Q, _DOC_KV = load("doc", B, Q_CLAMPED), load("doc", B, KV_IDX)

PLAIN_INTS: tuple[Expr, ...] = (DISTANCE, DISTANCE, Q_IDX, KV_IDX, KV_IDX, Q_ROW, H, B, Size("N"), WINDOW, SHIFT)
TENSOR_INTS: tuple[Expr, ...] = (_DOC_Q, _DOC_KV, load("row_group", B, Q_ROW), load("length", B))
PLAIN_BOOLS: tuple[Expr, ...] = (scalar("flag"), Constant(True))
TENSOR_BOOLS: tuple[Expr, ...] = (
    load("padding", B, KV_IDX),
    load("layout", H, op("mod", op("floordiv", Q_IDX, Constant(4)), Constant(8)), op("mod", KV_IDX, Constant(8))),
    load(
        "layout",
        H,
        clamp(op("floordiv", Q_IDX, Constant(16)), Constant(0), Constant(7)),
        clamp(op("floordiv", KV_IDX, Constant(16)), Constant(0), Constant(7)),
    ),
)


@st.composite
def int_exprs(draw: st.DrawFn, leaves: Sequence[Expr] = PLAIN_INTS, depth: int = 2) -> Expr:
    """Int expressions over `leaves`, whose values stay within 64 bits by far."""
    if depth == 0 or draw(st.integers(0, 2)) == 0:
        return draw(st.sampled_from(leaves)) if draw(st.integers(0, 3)) else Constant(draw(st.integers(-9, 40)))
    inner = int_exprs(leaves, depth - 1)
    name = draw(
        st.sampled_from(
            [
                *("add", "sub", "mul", "floordiv", "mod", "min", "max", "abs", "neg", "where", "bit_and", "bit_or"),
                *("bit_xor", "bit_not", "shl", "shr", "sign", "relu", "popcount", "bit_length", "to_int"),
            ],
        )
    )
    match name:
        case "mul":
            return op(name, draw(inner), Constant(draw(st.integers(-3, 4))))
        case "floordiv" | "mod":
            divisor: Expr = Constant(draw(st.sampled_from((1, 2, 3, 4, 7, 16, 64, -3))))
            return op(name, draw(inner), WINDOW if WINDOW in leaves and draw(st.integers(0, 5)) == 0 else divisor)
        case "bit_and":
            return op(name, draw(inner), Constant(draw(st.sampled_from((1, 3, 7, 12, -4)))))
        case "shl" | "shr":
            return op(name, draw(inner), Constant(draw(st.integers(0, 4))))
        case "where":
            return op(name, draw(bool_exprs(leaves, (), depth - 1)), draw(inner), draw(inner))
        case "to_int":
            return op(name, draw(bool_exprs(leaves, (), depth - 1)))
        case "abs" | "neg" | "bit_not" | "sign" | "relu" | "popcount" | "bit_length":
            return op(name, draw(inner))
        case _:
            return op(name, draw(inner), draw(inner))


@st.composite
def bool_exprs(draw: st.DrawFn, ints: Sequence[Expr], bools: Sequence[Expr], depth: int = 2) -> Expr:
    """Bool expressions over comparisons of ints and over `bools`."""
    if depth > 0 and draw(st.booleans()):
        name = draw(st.sampled_from(("and", "and", "or", "or", "not", "where", "eq", "ne")))
        arity = {"not": 1, "where": 3}.get(name, 2)
        return op(name, *(draw(bool_exprs(ints, bools, depth - 1)) for _ in range(arity)))
    if bools and draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(bools))
    comparison = draw(st.sampled_from(("lt", "le", "gt", "ge", "eq", "ne")))
    return op(comparison, draw(int_exprs(ints, depth)), draw(int_exprs(ints, max(depth - 1, 0))))


CAUSAL = op("ge", Q_IDX, KV_IDX)
SLIDING = op("and", CAUSAL, op("lt", DISTANCE, WINDOW))
PLAIN_MASKS: tuple[Expr, ...] = (
    CAUSAL,
    SLIDING,
    op("le", op("abs", DISTANCE), WINDOW),
    op("or", CAUSAL, op("lt", KV_IDX, SHIFT)),
    op("or", op("lt", KV_IDX, Constant(3)), SLIDING),
    op("and", CAUSAL, op("eq", op("mod", DISTANCE, Constant(3)), Constant(0))),
    op("eq", op("floordiv", Q_IDX, Constant(16)), op("floordiv", KV_IDX, Constant(16))),
    op("ge", op("floordiv", Q_IDX, Constant(5)), op("floordiv", KV_IDX, Constant(5))),
    op("eq", op("mod", Q_IDX, Constant(7)), op("mod", KV_IDX, Constant(7))),
    op("lt", op("mul", DISTANCE, op("add", H, Constant(1))), Constant(20)),
)
TENSOR_MASKS: tuple[Expr, ...] = (
    op("eq", _DOC_Q, _DOC_KV),
    op("and", op("eq", _DOC_Q, _DOC_KV), CAUSAL),
    op("lt", KV_IDX, load("length", B)),
    op("ge", load("key_bias", B, KV_IDX), number(-0.5)),
    op("lt", op("mul", load("slope", H), op("to_float", DISTANCE)), number(4)),
    *TENSOR_BOOLS,
)


def masks(*, tensors: bool = True) -> st.SearchStrategy[Expr]:
    """Masks: the usual ones, their combinations, and random predicates, most of which keep something."""
    usual = st.sampled_from((*PLAIN_MASKS, *TENSOR_MASKS) if tensors else PLAIN_MASKS)
    ints = (*PLAIN_INTS, *TENSOR_INTS) if tensors else PLAIN_INTS
    bools = (*PLAIN_BOOLS, *TENSOR_BOOLS) if tensors else PLAIN_BOOLS
    combined = st.builds(op, st.sampled_from(("and", "or")), usual, usual | bool_exprs(ints, bools, 1))
    return st.one_of(usual, combined, bool_exprs(ints, bools, 2), bool_exprs(ints, bools, 3))


# Terms of a score: bounded, and continuous in everything that is rounded.
_LINEAR_BIAS = op("mul", op("neg", op("abs", load("slope", H))), op("to_float", op("abs", DISTANCE)))
_BUCKET = clamp(op("add", DISTANCE, Constant(REACH)), Constant(0), Constant(2 * REACH))
_TERMS: tuple[Expr, ...] = (
    op("mul", number(0.125), _LINEAR_BIAS),
    load("key_bias", B, KV_IDX),
    load("row_bias", H, Q_ROW),
    load("pair_bias", H, Q_ROW, KV_IDX),
    load("relative", H, _BUCKET),
    op("floor", load("key_bias", B, KV_IDX)),
    op("where", CAUSAL, load("slope", H), number(0)),
    op("sin", op("mul", number(0.5), op("to_float", DISTANCE))),
    op("sigmoid", op("mul", number(0.25), op("to_float", DISTANCE))),
    op("neg", op("log1p", op("to_float", op("abs", DISTANCE)))),
    op("log2", op("to_float", op("add", Constant(1), KV_IDX))),
    op("to_float", op("mod", op("add", Q_IDX, op("mul", Constant(3), KV_IDX)), Constant(5))),
    op("to_float", op("eq", _DOC_Q, _DOC_KV)),
    number(-1.5),
)


@st.composite
def scores(draw: st.DrawFn, depth: int = 2) -> Expr:
    """Scores in `qk`: identity often, else a few bounded steps away from it."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return Hole("qk")
    inner = draw(scores(depth - 1))
    term = st.sampled_from(_TERMS)
    match draw(st.sampled_from(("bias", "bias", "cap", "gate", "where", "clip", "smooth", "temper"))):
        case "bias":
            return op(draw(st.sampled_from(("add", "sub"))), inner, draw(term))
        case "cap":
            cap = draw(st.sampled_from((scalar("cap"), number(3))))
            return op("mul", cap, op("tanh", op("div", inner, cap)))
        case "gate":
            return op("mul", inner, op("sigmoid", draw(term)))
        case "where":
            condition = draw(bool_exprs((DISTANCE, Q_IDX, KV_IDX, H), (), 1))
            return op("where", condition, inner, op("add", inner, draw(term)))
        case "clip":
            return clamp(inner, number(-4), number(draw(st.sampled_from((0.5, 4)))))
        case "smooth":
            name = draw(st.sampled_from(("gelu", "silu", "softplus", "elu", "erf", "abs", "relu")))
            return op(name, inner)
        case _:
            return op("mul", inner, op("exp", op("mul", number(0.25), load("temperature"))))


_SCORE = Hole("score")
_POSITIVE_WEIGHTS: tuple[Expr, ...] = (
    op("sigmoid", _SCORE),
    op("exp", op("min", _SCORE, number(3))),
    op("softplus", _SCORE),
    op("add", op("mul", op("relu", _SCORE), op("relu", _SCORE)), number(0.25)),
    op("mul", op("exp2", clamp(_SCORE, number(-4), number(4))), op("sigmoid", load("slope", H))),
)
_WEIGHTS: tuple[Expr, ...] = (
    _SCORE,
    op("pow", op("relu", _SCORE), number(2)),
    op("div", op("tanh", _SCORE), op("to_float", op("max", Size("N"), Constant(1)))),
    op("sub", op("sigmoid", _SCORE), load("slope", H)),
)
_SINKS: tuple[Expr | None, ...] = (
    None,
    None,
    None,
    number(0),
    load("sinks", H),
    op("mul", number(0.5), load("row_sinks", B, Q_ROW)),
    op("where", op("lt", Q_IDX, SHIFT), number(-float("inf")), load("sinks", H)),
)


def normalizers() -> st.SearchStrategy[Normalizer]:
    softmax = st.builds(Softmax, st.sampled_from(_SINKS))
    weights = st.sampled_from(_POSITIVE_WEIGHTS)
    return st.one_of(
        softmax, softmax, st.builds(Sum, weights), st.builds(Elementwise, weights | st.sampled_from(_WEIGHTS))
    )


def _norm(row: RowName, width: Size) -> Expr:
    square = op("mul", Element(row, D), Element(row, D))
    mean = op("div", Reduce("sum", square, width), op("to_float", width))
    return op("mul", Element(row, D), op("rsqrt", op("add", mean, number(2.0**-10))))


def _rotated(row: RowName, width: Size, position: Expr) -> Expr:
    """Neighbouring elements turned by an angle that falls with d; an odd last element turns with itself."""
    even = op("eq", op("mod", D, Constant(2)), Constant(0))
    frequency = op("exp2", op("neg", op("to_float", op("floordiv", D, Constant(2)))))
    angle = op("mul", op("to_float", position), frequency)
    after = Element(row, op("min", op("add", D, Constant(1)), op("sub", width, Constant(1))))
    before = Element(row, op("sub", D, Constant(1)))
    partner = op("where", even, op("neg", after), before)
    return op("add", op("mul", Element(row, D), op("cos", angle)), op("mul", partner, op("sin", angle)))


def rows(row: RowName) -> st.SearchStrategy[Expr]:
    """Row transforms: identity mostly."""
    width, position = Size("E" if row == "v" else "D"), Q_IDX if row == "q" else KV_IDX
    gain = load(f"gain_{row}", HKV if row == "k" else H, D)
    peak = Reduce("max", op("abs", Element(row, D)), width)
    changed = (
        _norm(row, width),
        op("mul", Element(row, D), gain),
        op("mul", _norm(row, width), gain),
        _rotated(row, width, position),
        op("div", Element(row, D), op("add", peak, number(1))),
        op("mul", Element(row, D), op("sigmoid", op("mul", number(0.125), op("to_float", position)))),
    )
    same = st.just(identity_row(row))
    return st.one_of(same, same, same, st.sampled_from(changed))


SCALES: tuple[Expr, ...] = (
    op("rsqrt", op("to_float", Size("D"))),
    op("rsqrt", op("to_float", Size("D"))),
    number(0.25),
    op("div", op("sigmoid", load("slope", H)), op("sqrt", op("to_float", Size("D")))),
    op("div", op("log", op("to_float", op("add", Q_ROW, Constant(3)))), op("to_float", Size("D"))),
    op("div", op("sub", load("key_bias", B, KV_IDX), number(0.5)), op("to_float", Size("D"))),
)
