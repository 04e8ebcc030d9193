"""From text to IR: what each form lowers to, what names and constants mean, and that nothing makes the checker fall."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import by_tier

from attncc.check.specification import check_all, check_source
from attncc.diagnostics import SpecError
from attncc.ir.nodes import (
    Apply,
    Attention,
    Constant,
    Elementwise,
    Expr,
    Hole,
    Index,
    Load,
    Parameter,
    ScalarParameter,
    Size,
    Softmax,
    Sum,
    TensorParameter,
    identity_row,
)
from attncc.ir.rewrite import walk
from attncc.ir.text import to_text
from attncc.ir.types import FLOATS, INTS, DType, Kind
from attncc.ir.verify import verify
from attncc.source import Source

if TYPE_CHECKING:
    from conftest import Golden

ROOT = Path(__file__).parent.parent
LOWERED = sorted((ROOT / "tests" / "lowering").glob("*.attn"))
VALID = [path.read_text(encoding="utf-8") for path in (*LOWERED, *sorted((ROOT / "examples").glob("*.attn")))]


def check(text: str, **constants: object) -> Attention:
    return check_source(Source("test.attn", text), constants=constants)


def clause(name: str, text: str, parameters: str = "") -> Expr:
    return getattr(check(f"attention a({parameters}):\n    {name} = {text}\n"), name)


@pytest.mark.parametrize("path", LOWERED, ids=lambda path: path.stem)
def test_golden(path: Path, golden: Golden) -> None:
    attention = check(path.read_text(encoding="utf-8"))
    verify(attention)
    golden(path.with_suffix(".ir"), to_text(attention))


def test_the_default_attention() -> None:
    scale = Apply("div", (Constant(1.0), Apply("sqrt", (Apply("to_float", (Size("D"),)),))))
    assert check('attention plain():\n    """Nothing but defaults."""\n') == Attention(
        name="plain",
        doc="Nothing but defaults.",
        parameters=(),
        q=identity_row("q"),
        k=identity_row("k"),
        v=identity_row("v"),
        scale=scale,
        score=Hole("qk"),
        mask=Constant(value=True),
        normalizer=Softmax(),
    )


def test_a_default_that_is_written_out_is_the_same() -> None:
    lines = ["q = q", "scale = 1 / sqrt(D)", "score = qk", "mask = true", "weight = softmax(score)"]
    written = check("attention plain():\n" + "".join(f"    {line}\n" for line in lines))
    assert written == check('attention plain():\n    """"""\n')


def test_parameters() -> None:
    attention = check(
        "attention p(a: int, b1: float = 2, c: bool = true, d: const int = 3, e: int[B], f: f16[d, N], g: bool[]):\n"
        "    mask = causal\n"
    )
    assert attention.parameters == (
        ScalarParameter("a", Kind.INT, None),
        ScalarParameter("b1", Kind.FLOAT, 2.0),
        ScalarParameter("c", Kind.BOOL, default=True),
        TensorParameter("e", INTS, (Size("B"),)),
        TensorParameter("f", (DType.F16,), (Constant(3), Size("N"))),
        TensorParameter("g", (DType.BOOL,), ()),
    )
    assert [type(p.default) for p in attention.scalars] == [type(None), float, bool]


def test_tensors_of_no_axis_are_scalars() -> None:
    attention = check("attention p(tau: float[]):\n    scale = tau\n")
    assert attention.scale == Load("tau", (), Kind.FLOAT)
    assert attention.tensors[0].dtypes == FLOATS


def test_constants_take_the_place_of_their_names() -> None:
    text = "attention p(size: const int = 64, tau: const float = 1):\n    score = qk * tau\n    mask = kv_idx < size\n"
    assert check(text).mask == Apply("lt", (Index("kv_idx"), Constant(64)))
    given_ = check(text, size=np.int64(8), tau=2)
    assert given_.mask == Apply("lt", (Index("kv_idx"), Constant(8)))
    assert given_.score == Apply("mul", (Hole("qk"), Constant(2.0)))
    assert given_.parameters == ()


def test_a_definition_of_the_file_wins_over_the_prelude() -> None:
    text = "define causal = kv_idx < q_idx\n\nattention strict():\n    mask = causal\n"
    assert check(text).mask == Apply("lt", (Index("kv_idx"), Index("q_idx")))


def test_a_parameter_may_share_its_name_with_a_function() -> None:
    attention = check("attention s(window: int, max: int):\n    mask = window(max(window, max))\n")
    both = Apply("max", (Parameter("window", Kind.INT), Parameter("max", Kind.INT)))
    assert both in set(walk(attention.mask))


def test_definitions_see_their_own_parameters_only() -> None:
    text = "define f(x, y=2) = x + y\n\nattention d(y: int):\n    mask = f(y) > f(x=1, y=f(0))\n"
    left = Apply("add", (Parameter("y", Kind.INT), Constant(2)))
    assert check(text).mask == Apply("gt", (left, Constant(3)))


def test_use(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "base.attn").write_text("define reach = 8\n")
    (folder / "masks.attn").write_text('use "base.attn"\ndefine near(n) = abs(q_idx - kv_idx) < n + reach\n')
    source = Source(str(tmp_path / "spec.attn"), 'use "shared/masks.attn"\n\nattention n():\n    mask = near(4)\n')
    distance = Apply("abs", (Apply("sub", (Index("q_idx"), Index("kv_idx"))),))
    assert check_source(source).mask == Apply("lt", (distance, Constant(12)))


def test_a_name_chooses_among_several() -> None:
    source = Source(
        "two.attn", "attention one():\n    mask = causal\n\nattention two(n: const int):\n    mask = kv_idx < n\n"
    )
    assert check_source(source, name="one").name == "one"
    assert check_source(source, name="two", constants={"n": 3}).mask == Apply("lt", (Index("kv_idx"), Constant(3)))
    assert list(check_all(source, {"n": 3})) == ["one", "two"]


def test_spans_point_into_the_spec_of_the_user() -> None:
    text = "attention d(doc: int[B, N]):\n    mask = same(doc)\n"
    loads = [node for node in walk(check(text).mask) if isinstance(node, Load)]
    assert [load.span.text for load in loads if load.span] == ["same(doc)"] * 2
    (direct,) = (n for n in walk(clause("score", "qk + bias[h]", "bias: float[H]")) if isinstance(n, Load))
    assert direct.span is not None
    assert direct.span.text == "bias[h]"


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("q_idx / 2", "qk + to_float(q_idx) / 2.0"),
        ("q_idx // 2", "qk + to_float(q_idx // 2)"),
        ("(2 * 3 - 1)", "qk + 5.0"),
        ("q_idx ** 0", "qk + 1.0"),
        ("q_idx ** 2", "qk + to_float(q_idx * q_idx)"),
        ("2.0 ** h", "qk + 2.0 ** to_float(h)"),
        ("q_idx ** -1", "qk + to_float(q_idx) ** (-1.0)"),
        ("max(q_idx, 1, 2.0)", "qk + max(to_float(max(q_idx, 1)), 2.0)"),
        ("(q_idx if q_idx > 1 else 0.5)", "qk + where(q_idx > 1, to_float(q_idx), 0.5)"),
        ("int(2.5)", "qk + to_float(to_int(2.5))"),
        ("float(causal)", "qk + to_float(kv_idx <= q_idx)"),
        ("+q_idx", "qk + to_float(q_idx)"),
        ("1 // 0", "qk + to_float(1 // 0)"),
    ],
)
def test_conversions_are_written_out(text: str, meaning: str) -> None:
    expr = clause("score", f"qk + {text}")
    assert to_text(expr) == meaning


def test_weights() -> None:
    def normalizer(*lines: str) -> object:
        return check("attention w():\n" + "".join(f"    {line}\n" for line in lines)).normalizer

    score = Hole("score")
    assert normalizer("weight = sigmoid(score)") == Elementwise(Apply("sigmoid", (score,)))
    assert normalizer("weight = sigmoid(qk)") == Elementwise(Apply("sigmoid", (score,)))
    assert normalizer("weight = score", "normalize = none") == Elementwise(score)
    assert normalizer("weight = 1", "normalize = sum") == Sum(Constant(1.0))
    assert normalizer("weight = softmax(qk)") == Softmax()
    assert normalizer("weight = softmax(score, sink=0)") == Softmax(Constant(0.0))


# Rotary embedding, beside the formulas as they are published.


def element(expr: Expr, row: np.ndarray, position: int, factors: np.ndarray | None = None) -> np.ndarray:
    """All elements of the row that `expr` describes, with numpy."""
    size = len(row)
    simple = {
        "neg": np.negative, "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "pow": np.power,
        "floordiv": lambda a, b: a // np.where(b == 0, 1, b), "mod": lambda a, b: a % np.where(b == 0, 1, b),
        "lt": np.less, "eq": np.equal, "where": np.where, "min": np.minimum, "max": np.maximum, "log": np.log,
        "floor": np.floor, "ceil": np.ceil, "cos": np.cos, "sin": np.sin, "sqrt": np.sqrt, "bit_xor": np.bitwise_xor,
        "to_float": lambda a: np.asarray(a, np.float64),
    }  # fmt: skip

    def value(node: Expr) -> np.ndarray:
        match node:
            case Constant(value=constant):
                return np.asarray(constant)
            case Index(name="d"):
                return np.arange(size)
            case Index(name="q_idx"):
                return np.asarray(position)
            case Size(name="D"):
                return np.asarray(size)
            case Load(indices=(index,)):
                assert factors is not None
                return factors[np.clip(value(index), 0, len(factors) - 1)]
            case Apply(op=op, args=args):
                return simple[op](*map(value, args))
        at = value(node.index)  # pyright: ignore[reportAttributeAccessIssue]
        assert np.all((at >= 0) & (at < size)), "an element outside the row is read"
        return row[at]

    with np.errstate(divide="ignore", invalid="ignore"):
        return np.broadcast_to(value(expr), (size,))


def rotated(row: np.ndarray, angles: np.ndarray, amplitude: float = 1.0, *, interleaved: bool = False) -> np.ndarray:
    """The row with pair p turned by angles[p]."""
    half = len(angles)
    result = row.copy()
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(0, half), slice(half, 2 * half))
    )
    cosine, sine = amplitude * np.cos(angles), amplitude * np.sin(angles)
    result[first] = row[first] * cosine - row[second] * sine
    result[second] = row[second] * cosine + row[first] * sine
    return result


@pytest.mark.parametrize("size", [1, 2, 3, 16, 31])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [None, 2, 8])
def test_rope(size: int, dim: int | None, *, interleaved: bool) -> None:
    arguments = f"interleaved={str(interleaved).lower()}" + (f", dim={dim}" if dim else "")
    expr = clause("q", f"rope(q, q_idx, base=500.0, {arguments})")
    row = np.random.default_rng(0).normal(size=size)
    pairs = min(dim or size, size) // 2
    angles = 37 * 500.0 ** (-np.arange(pairs) / max(pairs, 1))
    np.testing.assert_allclose(element(expr, row, 37), rotated(row, angles, interleaved=interleaved), atol=1e-12)


def _yarn(theta: np.ndarray, factor: float, original: float, base: float, dim: int) -> tuple[np.ndarray, float]:
    def correction(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(correction(32)), 0), min(math.ceil(correction(1)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    keep = 1 - ramp
    return theta / factor * (1 - keep) + theta * keep, 0.1 * math.log(factor) + 1


def _llama3(theta: np.ndarray, factor: float, original: float) -> tuple[np.ndarray, float]:
    result = []
    for frequency in theta:
        wavelength = 2 * math.pi / frequency
        if wavelength < original / 4:
            result.append(frequency)
        elif wavelength > original:
            result.append(frequency / factor)
        else:
            smooth = (original / wavelength - 1) / (4 - 1)
            result.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(result), 1.0


@pytest.mark.parametrize(
    "scaling", ["linear(4)", "ntk(4)", "yarn(16, 4096)", "longrope(factors, 4096, 32)", "llama3(8, 8192)"]
)
def test_scalings_of_rope(scaling: str) -> None:
    dim, base, position = 64, 10000.0, 1234
    expr = clause("q", f"rope(q, q_idx, scaling={scaling})", "factors: float[D // 2]")
    rng = np.random.default_rng(1)
    row, factors = rng.normal(size=dim), rng.uniform(1, 8, size=dim // 2)
    theta = base ** (-2 * np.arange(dim // 2) / dim)
    amplitude = 1.0
    match scaling.split("(", maxsplit=1)[0]:
        case "linear":
            theta = theta / 4
        case "ntk":
            theta = (base * 4 ** (dim / (dim - 2))) ** (-2 * np.arange(dim // 2) / dim)
        case "yarn":
            theta, amplitude = _yarn(theta, 16, 4096, base, dim)
        case "longrope":
            theta, amplitude = theta / factors, math.sqrt(1 + math.log(32) / math.log(4096))
        case _:
            theta, amplitude = _llama3(theta, 8, 8192)
    expected = rotated(row, position * theta, amplitude)
    np.testing.assert_allclose(element(expr, row, position, factors), expected, rtol=1e-10, atol=1e-10)


# Robustness

TOKENS = re.compile(r'"""[\s\S]*?"""|\n *|\w+|[^\w\s]| +')


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A valid spec with some tokens taken out, doubled, swapped or put in the place of others."""
    tokens = TOKENS.findall(draw(st.sampled_from(VALID)))
    pool = TOKENS.findall(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 4))):
        if len(tokens) < 2:
            break
        at = draw(st.integers(0, len(tokens) - 1))
        match draw(st.integers(0, 4)):
            case 0:
                del tokens[at]
            case 1:
                tokens.insert(at, tokens[at])
            case 2:
                other = draw(st.integers(0, len(tokens) - 1))
                tokens[at], tokens[other] = tokens[other], tokens[at]
            case 3:
                tokens[at] = draw(st.sampled_from(pool))
            case _:
                tokens.insert(at, draw(st.sampled_from(pool)))
    return "".join(tokens)


@given(mutated())
@settings(max_examples=by_tier(500), deadline=None)
def test_a_broken_spec_is_refused_and_nothing_worse(text: str) -> None:
    try:
        attentions = check_all(Source("fuzz.attn", text))
    except SpecError as error:
        assert error.diagnostics
        assert str(error).startswith("error[A0")
        assert all(d.span is None or d.span.end <= len(d.span.source.text) for d in error.diagnostics)
    else:
        for attention in attentions.values():
            verify(attention)


def test_a_small_spec_is_checked_in_a_few_milliseconds() -> None:
    source = Source("fast.attn", (ROOT / "examples" / "softcap.attn").read_text(encoding="utf-8"))
    check_source(source)
    start = time.thread_time()
    for _ in range(20):
        check_source(source)
    assert (time.thread_time() - start) / 20 < 0.02
