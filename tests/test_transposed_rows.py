"""Gradients of row transforms: against float64 autograd of what the reference makes of the transform."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from expr_strategies import Q_IDX, Q_ROW, B, D, H, load, number, op, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import by_tier

import attncc
from attncc.ir.errors import IRError
from attncc.ir.nodes import Attention, Constant, Element, Expr, Load, Reduce, Size
from attncc.ir.rewrite import map_children, substitute, walk
from attncc.ir.text import to_text
from attncc.ir.types import DType, Kind
from attncc.passes.differentiate_rows import part_gradients, transposed_row
from attncc.passes.parts import learned_elements
from attncc.plan.nodes import Specialization
from attncc.plan.rows import specialize
from attncc.reference import Scope, transformed, value

ROWS, HEADS, F64 = 5, 3, torch.float64
POSITIONS = {"q_row": torch.arange(ROWS), "q_idx": torch.arange(ROWS) + 2}


def scope_of(width: int, inputs: dict[str, torch.Tensor]) -> Scope:
    head = {"b": torch.tensor(1), "h": torch.tensor(2), "hkv": torch.tensor(1)}
    sizes = {"B": 2, "H": HEADS, "HKV": 2, "M": ROWS, "N": 7, "D": width, "E": width, "q_offset": 2}
    return Scope(head, sizes, inputs, [], {}, {})


def at_rows(expr: Expr, x: torch.Tensor, upstream: torch.Tensor, scope: Scope) -> torch.Tensor:
    """`expr` over the row q and its upstream gradient, which the reference reads as a row k."""

    def renamed(node: Expr) -> Expr:
        node = map_children(node, renamed)
        return Element("k", node.index) if isinstance(node, Element) and node.upstream else node

    indices = {name: index[:, None] for name, index in POSITIONS.items()} | {"d": torch.arange(x.shape[1])[None, :]}
    position = torch.arange(ROWS)[:, None]
    inner = replace(
        scope,
        indices={**scope.indices, **indices},
        rows={"q": x, "k": upstream},
        position=position,
        reads=[],
        axes={"d": -1},
    )
    return value(renamed(expr), inner).broadcast_to(x.shape)


def assert_gradients(transform: Expr, x: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
    """Of the row and of every captured tensor that `transform` reads."""
    width = x.shape[1]
    generator = torch.Generator().manual_seed(7)
    upstream = torch.randn(x.shape, dtype=F64, generator=generator)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    scope = scope_of(width, leaves)
    row = x.clone().requires_grad_()
    y = transformed(transform, "q", row, POSITIONS, scope)
    expected = torch.autograd.grad(y, [row, *leaves.values()], upstream, materialize_grads=True)

    found = at_rows(transposed_row(transform, "q", width), x, upstream, scope)
    torch.testing.assert_close(found, expected[0], rtol=1e-9, atol=1e-11)

    parts = learned_elements(transform, leaves.keys())
    captured = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for part, gradient in zip(parts, part_gradients(transform, parts, "q", width), strict=True):
        entries = at_rows(gradient, x, upstream, scope).detach()
        values = at_rows(part, x, upstream, scope)
        through = torch.autograd.grad(values, list(leaves.values()), entries, materialize_grads=True)
        captured = {name: captured[name] + more for name, more in zip(leaves, through, strict=True)}
    for (name, found), wanted in zip(captured.items(), expected[1:], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def of_spec(spec: str, width: int) -> tuple[Expr, Attention]:
    attention = attncc.check(spec)
    tensors = tuple((tensor.name, DType.F64) for tensor in attention.tensors)
    return specialize(attention, Specialization(DType.F64, width, width, tensors)).q, attention


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


SPECS = {
    "identity": "q",
    "rope": "rope(q, q_idx)",
    "rope interleaved": "rope(q, q_idx, interleaved=true)",
    "rope of a part": "rope(q, q_idx, dim=6)",
    "rope of a part interleaved": "rope(q, q_idx, dim=6, interleaved=true)",
    "yarn": "rope(q, q_idx, scaling=yarn(4, 16))",
    "longrope": "rope(q, q_idx, dim=6, scaling=longrope(factors, 16))",
    "longrope of the norm": "rope(l2norm(q), q_idx, dim=6, scaling=longrope(factors, 16))",
    "rope of rope": "rope(rope(q, q_idx), 3, dim=4)",
    "rope at a learned position": "rope(q, q_idx * tau[h])",
    "l2norm": "l2norm(q)",
    "l2norm twice": "l2norm(q * l2norm(q))",
    "rmsnorm with gain": "rmsnorm(q) * gain[h, :]",
    "rope of rmsnorm with gain": "rope(rmsnorm(q) * gain[h, :], q_idx)",
    "rmsnorm of rope": "rmsnorm(rope(q, q_idx)) * (1 + tau[h])",
    "by the greatest": "q / max(abs(q))",
    "by the least": "q * min(q)",
    "softmax": "softmax(q)",
    "softmax with temperature": "softmax(q * exp(tau[h])) * tau[h]",
    "feature map": "elu(q) + 1",
    "mean taken off": "q - mean(q)",
    "by the head": "q * sigmoid(tau[h]) if h > 1 else q",
    "gain twice": "q * exp(gain[h, :]) + sum(q * gain[h, :]) * gain[h, :]",
    "softmax of a gain": "q * softmax(gain[h, :]) * sum(gain[h, :])",
    "shorter row of its own": "q * norm(factors)",
    "clipped": "clamp(q, -0.5, 0.5)",
}


@pytest.mark.parametrize("width", [8, 7])
@pytest.mark.parametrize("name", SPECS)
def test_transforms(name: str, width: int) -> None:
    parameters = {"factors": "factors: float[3]", "tau": "tau: float[H]", "gain": "gain: float[H, D]"}
    used = [text for key, text in parameters.items() if key in SPECS[name]]
    transform, attention = of_spec(f"attention a({', '.join(used)}):\n    q = {SPECS[name]}\n", width)
    shapes = {"factors": (3,), "tau": (HEADS,), "gain": (HEADS, width)}
    inputs = {tensor.name: 1.5 + 0.3 * normal(*shapes[tensor.name], seed=1) for tensor in attention.tensors}
    assert_gradients(transform, normal(ROWS, width), inputs)


@pytest.mark.parametrize("transform", ["q / max(q)", "q * max(abs(q))", "softmax(q)", "q - min(q)"])
def test_the_greatest_elements_share_a_gradient(transform: str) -> None:
    x = torch.tensor([[1.0, 3.0, 3.0, 2.0]]).double().repeat(ROWS, 1)
    x[1] = 2.0
    x[2, 0] = -3.0
    assert_gradients(of_spec(f"attention a():\n    q = {transform}\n", 4)[0], x, {})


def test_rotations_are_gathered_from_where_they_lead() -> None:
    """An index that is its own inverse adds one term."""
    transform, _ = of_spec("attention a():\n    q = rope(q, q_idx, interleaved=true)\n", 8)
    elements = [n for n in walk(transposed_row(transform, "q", 8)) if isinstance(n, Element)]
    assert {to_text(element) for element in elements} == {"dq[d]", "dq[where(d < 8, d ^ 1, d)]"}


def test_a_row_that_is_left_as_it_is_hands_its_gradient_on() -> None:
    assert transposed_row(Element("q", D), "q", 8) == Element("q", D, upstream=True)
    assert transposed_row(Constant(1.0), "q", 8) == Constant(0.0)


@pytest.mark.parametrize("index", [op("add", D, H), load("doc", B, D), op("add", D, Size("M"))])
def test_rows_are_read_at_what_d_decides(index: Expr) -> None:
    with pytest.raises(IRError, match="depends on more than d"):
        transposed_row(Element("q", index), "q", 8)


# --- random transforms ----------------------------------------------------------------------------------------------

GAIN, SLOPE, ROW = load("gain_q", H, D), load("slope", H), load("row_sinks", B, Q_ROW)


def at(expr: Expr, index: Expr) -> Expr:
    return substitute(expr, {D: index})


@st.composite
def transforms(draw: st.DrawFn, width: int, depth: int = 3) -> Expr:
    """A few steps from the row: elementwise, over the whole row, or to other places in it."""
    if depth == 0:
        return Element("q", D)
    x = draw(transforms(width, depth - 1))
    size, last = Constant(width), Constant(width - 1)
    greatest, even = Reduce("max", x, size), op("eq", op("mod", D, Constant(2)), Constant(0))
    steps = {
        "same": x,
        "gain": op("mul", x, draw(st.sampled_from((GAIN, SLOPE, ROW, op("exp", SLOPE), op("tanh", GAIN))))),
        "bias": op("add", x, draw(st.sampled_from((GAIN, SLOPE, ROW, Reduce("sum", GAIN, size))))),
        "bend": op(draw(st.sampled_from(("tanh", "silu", "sigmoid", "gelu"))), x),
        "square": op("mul", x, op("mul", number(0.5), x)),
        "position": op("mul", x, op("cos", op("mul", number(0.5), op("to_float", op("add", Q_IDX, D))))),
        "norm": op("mul", x, op("rsqrt", op("add", Reduce("sum", op("mul", x, x), size), number(0.5)))),
        "inner": op("mul", x, Reduce("sum", op("mul", x, GAIN), size)),
        "peak": op("div", x, op("add", op("abs", greatest), number(1))),
        "softmax": op("exp", op("sub", x, op("log", Reduce("sum", op("exp", x), size)))),
        "reversed": at(x, op("sub", last, D)),
        "shifted": op("where", op("gt", D, Constant(0)), at(x, op("sub", D, Constant(1))), number(0.5)),
        "folded": op("add", x, at(x, op("min", op("add", D, Constant(2)), last))),
        "first": op("mul", x, at(x, Constant(0))),
        "turned": op(
            "where", even, at(x, op("min", op("add", D, Constant(1)), last)), at(x, op("sub", D, Constant(1)))
        ),
    }
    return steps[draw(st.sampled_from(list(steps)))]


def inputs_of(expr: Expr, width: int) -> dict[str, torch.Tensor]:
    shapes = {"gain_q": (HEADS, width), "slope": (HEADS,), "row_sinks": (2, ROWS)}
    names = sorted({node.tensor for node in walk(expr) if isinstance(node, Load) and node.kind is Kind.FLOAT})
    return {name: normal(*shapes[name], seed=i) for i, name in enumerate(names)}


@settings(deadline=None, max_examples=by_tier(120))
@given(st.data(), st.integers(2, 6))
def test_random_transforms(data: st.DataObject, width: int) -> None:
    transform = data.draw(transforms(width))
    x = normal(ROWS, width, seed=data.draw(st.integers(0, 50)))
    assert_gradients(transform, x, inputs_of(transform, width))


@settings(deadline=None, max_examples=40)
@given(rows("q"), st.integers(2, 9))
def test_transforms_of_random_attentions(transform: Expr, width: int) -> None:
    transform = substitute(transform, {Size("D"): Constant(width)})
    assert_gradients(transform, normal(ROWS, width), inputs_of(transform, width))


@pytest.mark.parametrize(
    "transform", ["l2norm(q) * gain[h, :]", "softmax(q) * gain[h, :]", "rope(q * gain[h, :], q_idx)"]
)
def test_a_row_that_nothing_reads_may_hold_anything(transform: str) -> None:
    spec = f"attention a(gain: float[H, D]):\n    q = {transform}\n"
    expr, _ = of_spec(spec, 4)
    x, upstream = normal(ROWS, 4), normal(ROWS, 4, seed=1)
    x[1], upstream[1], upstream[2, 0] = torch.nan, 0.0, torch.nan
    scope = scope_of(4, {"gain": normal(HEADS, 4, seed=2)})
    parts = learned_elements(expr, {"gain"})
    for gradient in (transposed_row(expr, "q", 4), *part_gradients(expr, parts, "q", 4)):
        found = at_rows(gradient, x, upstream, scope)
        assert (found[1] == 0).all() and found[2].isnan().any()
        assert found[[0, 3, 4]].isfinite().all()
