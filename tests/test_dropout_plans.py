"""Dropout as a pass: what it draws, what the reference and the plans make of it."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import Golden
from formulas import VARIANTS
from test_backward_plans import EXAMPLES, SIZES, assert_gradients
from torch import Tensor

from attncc.build import check, sources_of
from attncc.eager import eager
from attncc.ir.nodes import Apply, Attention, Constant, Index
from attncc.ir.rewrite import clauses, map_clauses
from attncc.ir.text import to_text
from attncc.ir.types import DType
from attncc.ir.verify import IRError, verify
from attncc.passes.dropout import dropout_scalars, rounded, with_dropout
from attncc.passes.ranges import fits_int32
from attncc.passes.simplify import simplify
from attncc.plan.build import plan_attention
from attncc.plan.nodes import Specialization, Target
from attncc.reference import evaluate

F64 = torch.float64
PLAIN = check("attention plain():\n    mask = true\n")
CAUSAL = check("attention causal():\n    mask = causal\n")


def kept(p: float, seed: int, batch: int = 2, heads: int = 4, rows: int = 128, keys: int = 256) -> Tensor:
    """The multipliers of all pairs, (B, H, M, N), as the reference has them: with scores of 0 and values that tell keys
    apart, o is each weight times 1 / N."""
    q, k = torch.zeros(batch, heads, rows, 1, dtype=F64), torch.zeros(batch, heads, keys, 1, dtype=F64)
    v = torch.eye(keys, dtype=F64).expand(batch, heads, keys, keys)
    return evaluate(with_dropout(PLAIN), q, k, v, dropout_scalars(p, seed))[0] * keys


def test_the_clause() -> None:
    attention = with_dropout(CAUSAL)
    verify(attention)
    assert "dropout   = where(uniform(random_key(" in to_text(attention)
    assert [name for name, _ in clauses(attention)][-1] == "dropout"
    assert map_clauses(attention, lambda expr: expr) == attention
    assert simplify(attention).dropout == attention.dropout
    assert to_text(CAUSAL) == to_text(attention).replace(to_text(attention).splitlines()[-1] + "\n", "").replace(
        "_dropout_p: float, _seed_high: int, _seed_low: int", ""
    )
    wrong = Attention(**{**_fields(attention), "dropout": Index("q_idx")})
    with pytest.raises(IRError, match="dropout: expected float"):
        verify(wrong)


def _fields(attention: Attention) -> dict:
    return {name: getattr(attention, name) for name in attention.__dataclass_fields__}


def test_weights_are_zero_or_divided_by_what_is_kept() -> None:
    multipliers = kept(0.25, 3, rows=16, keys=32)
    assert set(multipliers.flatten().tolist()) == {0.0, 1 / 0.75}


def test_the_rate() -> None:
    """Within 4.5 standard deviations, for a seed that was not chosen."""
    for p in (0.01, 0.1, 0.5, 0.9):
        dropped = kept(p, 1234) == 0
        deviation = math.sqrt(p * (1 - p) / dropped.numel())
        assert abs(dropped.double().mean() - p) < 4.5 * deviation


@pytest.mark.parametrize("axis", [0, 1, 2, 3], ids=["batches", "heads", "queries", "keys"])
def test_neighbours_are_independent(axis: int) -> None:
    x = (kept(0.5, 7) == 0).double() - 0.5
    one, other = x.narrow(axis, 0, x.shape[axis] - 1), x.narrow(axis, 1, x.shape[axis] - 1)
    correlation = 4 * (one * other).mean()
    assert abs(correlation) < 4.5 / math.sqrt(one.numel())


@pytest.mark.parametrize("axis", [2, 3], ids=["queries", "keys"])
def test_rows_and_columns_have_the_variance_of_independent_draws(axis: int) -> None:
    dropped = kept(0.5, 11) == 0
    counts = dropped.double().sum(axis)
    expected = dropped.shape[axis] / 4
    assert abs(counts.var() / expected - 1) < 4.5 * math.sqrt(2 / counts.numel())


def test_seeds_differ_in_all_64_bits() -> None:
    first = kept(0.5, 5, batch=1, heads=1)
    assert torch.equal(first, kept(0.5, 5, batch=1, heads=1))
    for other in (6, 5 + 2**32, 5 - 2**63, -5):
        agreement = (kept(0.5, other, batch=1, heads=1) == first).double().mean()
        assert abs(agreement - 0.5) < 4.5 / math.sqrt(4 * first.numel())


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**32 - 1, -(2**31) - 1, 2**63 - 1, -(2**63), 0x123456789ABCDEF0])
def test_the_two_halves_of_a_seed(seed: int) -> None:
    scalars = dropout_scalars(0.5, seed)
    high, low = scalars["_seed_high"], scalars["_seed_low"]
    assert all(-(2**31) <= half < 2**31 for half in (high, low))
    assert high * 2**32 + low + 2**31 == seed


def test_probabilities_are_rounded_to_what_numbers_can_be() -> None:
    assert rounded(0.5) == 0.5
    assert rounded(0.1) == round(0.1 * 2**24) / 2**24
    assert rounded(1 - 1e-12) == 1 - 2.0**-24
    assert rounded(1e-9) == 0.0


def test_what_is_dropped_depends_on_positions_alone() -> None:
    """The last rows by themselves, as in a call that continues another, lose the same weights."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=F64) for _ in range(3))
    scalars = dropout_scalars(0.4, 2)
    whole, lse = evaluate(with_dropout(CAUSAL), q, k, v, scalars)
    part, _ = evaluate(with_dropout(CAUSAL), q[:, :, 5:], k, v, scalars)
    assert torch.equal(whole[:, :, 5:], part)
    assert torch.equal(lse, evaluate(CAUSAL, q, k, v, {})[1])


def test_the_eager_formula_drops_the_same() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 7, 4, dtype=F64) for _ in range(3))
    scalars = dropout_scalars(0.4, 2)
    oracle, _ = evaluate(with_dropout(CAUSAL), q, k, v, scalars)
    torch.testing.assert_close(eager(with_dropout(CAUSAL), q, k, v, scalars), oracle)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_of_backward_plans(name: str) -> None:
    problem = VARIANTS[name].problem(SIZES, F64)
    attention = with_dropout(check(EXAMPLES / f"{name}.attn", **problem.constants))
    inputs = {**problem.inputs, **dropout_scalars(0.3, 99)}
    assert_gradients(attention, problem.q, problem.k, problem.v, inputs)


@pytest.mark.parametrize("target", [Target("cpp", "avx512"), Target("triton", "sm_90")], ids=str)
def test_keys_are_found_once_per_head_in_32_bits(target: Target) -> None:
    plan = plan_attention(with_dropout(CAUSAL), Specialization(DType.BF16, 64, 64), target).forward
    assert plan.dropout is not None
    (key,) = (b for b in plan.head if isinstance(b.value, Apply) and b.value.op == "random_key")
    assert len(plan.call) == 2  # the seed, and 1 / (1 - p)
    condition, dropped, _ = plan.dropout.value.args  # type: ignore[union-attr]
    assert dropped == Constant(0.0)
    drawn = condition.args[0]  # type: ignore[union-attr]
    assert drawn.args[0].name == key.name  # type: ignore[union-attr]
    assert all(fits_int32(argument) for argument in drawn.args[1:])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("target", "statistics"),
    [(Target("cpp", "avx512_bf16"), False), (Target("cpp", "avx2"), True), (Target("triton", "sm_90"), True)],
    ids=str,
)
def test_sources_are_as_recorded(target: Target, statistics: bool, golden: Golden) -> None:
    attention = CAUSAL if statistics else with_dropout(CAUSAL)
    dtype = DType.F32 if target.arch == "avx2" else DType.BF16
    specialization = Specialization(dtype, 64, 64, statistics=statistics)
    program, (text,), _ = sources_of(attention, specialization, target)
    what, extension = "statistics" if statistics else "dropout", "py" if target.backend == "triton" else "cpp"
    path = EXAMPLES.parent / "tests" / "sources" / f"{what}-{target.family}-{target.arch}-{program.forward.name}"
    golden(path.with_name(f"{path.name}.{extension}.expected"), text)
