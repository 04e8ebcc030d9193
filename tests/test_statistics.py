"""Statistics of rows and columns of weights, on both targets, against formulas written by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from call_support import BF16, F16, F32, F64, INTERPRETED, SPECS, TARGETS, built, captured, operands
from cpp_support import NATIVE_ARCHS
from formulas import VARIANTS
from formulas import Sizes as CallSizes
from tiers import by_type, tiered
from torch import Tensor

import attncc
from attncc.build import check
from attncc.diagnostics import CallError
from attncc.ir.nodes import identity_row
from attncc.ir.verify import verify
from attncc.passes.blocks import block_structure
from attncc.passes.columns import column_sums
from attncc.reference import evaluate

EXAMPLES = Path(__file__).parent.parent / "examples"

ALL = ("max", "entropy", "column_sums")
NAMES = [n for n in SPECS if n not in ("chosen", "rates", "required", "table") and "weight = s" not in SPECS[n]]
# As "capped" and "biased" are, but for one thing.
ALIKE = {"scaled", "documents"}
NAMES = [*[n for n in NAMES if n != "summed"], "sink"]


def by_hand(attn: Any, q: Tensor, k: Tensor, inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """From the weights themselves: with values that tell keys apart, o is the matrix of weights. Scores are their
    logarithms plus lse."""
    n = k.shape[2]
    eye = torch.eye(n, dtype=F64).expand(*k.shape[:2], n, n)
    plain_values = replace(attn.attention, v=identity_row("v"))
    weights, lse = evaluate(plain_values, q.double(), k.double(), eye, inputs, **options)
    assert lse is not None
    score = weights.log() + lse[..., None]  # -inf where masked, and where the weight is too small to matter
    return {
        "max": score.nan_to_num(nan=-torch.inf, neginf=-torch.inf).amax(-1) if n else lse,
        "entropy": -torch.special.xlogy(weights, weights).sum(-1),
        "column_sums": weights.sum(2),
    }


def assert_right(
    name: str, target: str, dtype: torch.dtype, options: dict[str, Any] | None = None, **sizes: int
) -> None:
    attn, options = built(name, target), options or {}
    q, k, v = operands(**{"M": 37, "N": 53, "H": 4, "HKV": 2, "B": 2, **sizes}, dtype=dtype)
    inputs = captured(name, q, k)
    o, lse, found = attn(q, k, v, return_lse=True, stats=ALL, **inputs, **options)
    assert list(found) == list(ALL)
    plain_o, plain_lse = attn(q, k, v, return_lse=True, **inputs, **options)
    torch.testing.assert_close(o, plain_o, rtol=0, atol=0)
    torch.testing.assert_close(lse, plain_lse, rtol=0, atol=0)
    tensors = {n: torch.as_tensor(x) for n, x in inputs.items()}
    expected = by_hand(attn, q, k, tensors, **options)
    tolerance = {F64: 1e-11, F32: 2e-5, F16: 2e-3, BF16: 2e-2}[dtype]
    for n, x in found.items():
        assert x.dtype == (F64 if dtype == F64 else F32)
        torch.testing.assert_close(
            x.double(), expected[n], rtol=tolerance, atol=tolerance, msg=lambda m, n=n: f"{name} {n}: {m}"
        )


@pytest.mark.representative(2)
@pytest.mark.parametrize(
    ("name", "dtype"),
    by_type(NAMES, (F32, BF16), representative=("biased", "sink"), alike=ALIKE),
    ids=str,
)
def test_cpp(name: str, dtype: torch.dtype) -> None:
    assert_right(name, "cpp", dtype)


@pytest.mark.representative(1)
@pytest.mark.parametrize(
    ("name", "dtype"), tiered(lambda name, dtype: name == "sink", ("sink", "rows"), (F16, F64)), ids=str
)
def test_cpp_in_other_types(name: str, dtype: torch.dtype) -> None:
    assert_right(name, "cpp", dtype)


@pytest.mark.representative(1)
@pytest.mark.parametrize(
    ("name", "dtype", "arch"),
    tiered(
        lambda name, dtype, arch: (name == "sink" and dtype == F32) or (name == "rows" and arch == NATIVE_ARCHS[-1]),
        ("sink", "rows"),
        (F32, BF16),
        NATIVE_ARCHS[1:],
    ),
    ids=str,
)
def test_cpp_for_other_machines(name: str, dtype: torch.dtype, arch: str) -> None:
    assert_right(name, f"cpp:{arch}", dtype)


@pytest.mark.representative(3)
@pytest.mark.parametrize("name", NAMES)
def test_triton(name: str) -> None:
    assert_right(name, INTERPRETED, F32)


# --- calls ------------------------------------------------------------------------------------------------------------


@TARGETS
def test_only_what_is_asked_for(target: str) -> None:
    attn = built("causal", target)
    q, k, v = operands(M=9, N=9)
    o, everything = attn(q, k, v, stats=ALL)
    for names in (("max",), ("column_sums",), ("entropy", "max"), ["column_sums", "entropy"], "entropy"):
        result = attn(q, k, v, stats=names)
        assert torch.equal(result[0], o)
        assert list(result[1]) == ([names] if isinstance(names, str) else list(names))
        assert all(torch.equal(x, everything[n]) for n, x in result[1].items())
    assert torch.equal(attn(q, k, v, stats=()), o)


@TARGETS
def test_rows_that_keep_nothing(target: str) -> None:
    """Queries before the first key, and keys that no query sees."""
    attn = built("causal", target)
    q, k, v = operands(M=12, N=6)
    o, found = attn(q, k, v, stats=ALL, q_offset=-6)
    assert (o[:, :, :6] == 0).all()
    assert (found["max"][:, :, :6] == -torch.inf).all()
    assert (found["entropy"][:, :, :6] == 0).all()
    assert found["max"][:, :, 6:].isfinite().all()
    torch.testing.assert_close(found["column_sums"].sum(-1), torch.full((1, 2), 6.0))
    unseen = attn(q, k, v, stats=ALL, q_offset=-9)[1]["column_sums"]
    assert (unseen[:, :, 3:] == 0).all()
    assert (unseen[:, :, :3] > 0).all()


@TARGETS
@pytest.mark.parametrize(("m", "n", "batch"), [(0, 5, 1), (5, 0, 1), (1, 1, 1), (3, 4, 0)])
def test_lengths_of_none_and_one(m: int, n: int, batch: int, target: str) -> None:
    q, k, v = operands(M=m, N=n, B=batch)
    found = built("plain", target)(q, k, v, stats=ALL)[1]
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "max": (batch, 2, m),
        "entropy": (batch, 2, m),
        "column_sums": (batch, 2, n),
    }
    torch.testing.assert_close(found["column_sums"].sum(-1), torch.full((batch, 2), float(m if n else 0)))
    assert n > 1 or (found["entropy"].abs() < 1e-6).all()
    assert n or (found["max"] == -torch.inf).all()


@TARGETS
def test_large_scores_and_scores_of_infinity(target: str) -> None:
    attn = attncc.build("attention biased_row(bias: f32[N]):\n    score = qk + bias[kv_idx]\n", target=target)
    q, k, v = (x * 1e-3 for x in operands(M=3, N=300))
    bias = torch.zeros(300)
    bias[:100], bias[100:200], bias[200:] = -1e4, 1e4, -torch.inf
    _, found = attn(q, k, v, bias=bias, stats=ALL)
    torch.testing.assert_close(found["max"], torch.full((1, 2, 3), 1e4), rtol=1e-6, atol=0)
    torch.testing.assert_close(found["entropy"], torch.full((1, 2, 3), math.log(100)), rtol=1e-4, atol=0)
    assert (found["column_sums"][:, :, :100] == 0).all()
    assert (found["column_sums"][:, :, 200:] == 0).all()
    _, nothing = attn(q, k, v, bias=torch.full((300,), -torch.inf), stats=ALL)
    assert (nothing["max"] == -torch.inf).all()
    assert (nothing["entropy"] == 0).all()
    assert (nothing["column_sums"] == 0).all()


@TARGETS
@pytest.mark.parametrize("sink", [-torch.inf, -1e4, 0.0, 50.0, 1e4, torch.inf])
def test_sinks(sink: float, target: str) -> None:
    """The sink takes weight, and is no key: its share counts in none of the statistics."""
    attn = built("sink", target)
    q, k, v = operands(M=20, N=20)
    sinks = torch.full((2,), sink)
    found = attn(q, k, v, sinks=sinks, stats=ALL)[1]
    score = ((q @ k.mT) / 4).double().masked_fill(~torch.ones(20, 20).tril().bool(), -torch.inf)
    total = torch.logaddexp(score.logsumexp(-1), torch.tensor(sink))
    weights = torch.exp(score - total[..., None])
    expected = (score.amax(-1), -torch.special.xlogy(weights, weights).sum(-1), weights.sum(2))
    for x, y in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-5)


@TARGETS
def test_sinks_of_rows(target: str) -> None:
    """Infinite ones beside finite ones."""
    attn = attncc.build("attention f(s: f32[M]):\n    weight = softmax(score, sink=s[q_row])\n", target=target)
    q, k, v = operands(M=20, N=500)
    s = torch.linspace(-5, 5, 20)
    s[3], s[5] = torch.inf, -torch.inf
    found = attn(q, k * 30, v, s=s, stats=ALL)[1]
    score = (q @ k.mT * 30 / 4).double()
    total = torch.logaddexp(score.logsumexp(-1), s)
    weights = torch.exp(score - total[..., None])
    expected = (score.amax(-1), -torch.special.xlogy(weights, weights).sum(-1), weights.sum(2))
    for x, y in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=5e-5, atol=5e-5)


@TARGETS
def test_no_gradients_but_those_of_the_output(target: str) -> None:
    attn = built("causal", target)
    q, k, v = (x.requires_grad_() for x in operands(M=9, N=9))
    o, lse, found = attn(q, k, v, return_lse=True, stats=ALL)
    assert not any(x.requires_grad for x in found.values())
    gradients = torch.autograd.grad(o.sum() + lse.sum(), (q, k, v))
    o, lse = attn(q, k, v, return_lse=True)
    assert all(map(torch.equal, gradients, torch.autograd.grad(o.sum() + lse.sum(), (q, k, v))))
    plain = attn(q.detach(), k.detach(), v.detach(), stats=ALL)[1]
    assert all(torch.equal(x, plain[n]) for n, x in found.items())


@TARGETS
def test_of_the_weights_before_dropout(target: str) -> None:
    attn = built("causal", target)
    q, k, v = operands(M=30, N=30)
    o, found = attn(q, k, v, stats=ALL, dropout_p=0.5, seed=1)
    assert torch.equal(o, attn(q, k, v, dropout_p=0.5, seed=1))
    plain = attn(q, k, v, stats=ALL)[1]
    assert all(torch.equal(x, plain[n]) for n, x in found.items())


def test_tensors_of_any_strides() -> None:
    attn = built("causal")
    q, k, v = operands(M=16, N=16, H=4, HKV=2, B=2)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    expanded = [x[:1].expand(2, -1, -1, -1) for x in (q, k, v)]
    for one, other in ((strided, (q, k, v)), (expanded, [x.contiguous() for x in expanded])):
        found, plain = attn(*one, stats=ALL)[1], attn(*other, stats=ALL)[1]
        assert all(torch.equal(x, plain[n]) for n, x in found.items())


def test_what_is_refused() -> None:
    q, k, v = operands()
    for stats in (("maximum",), ("max", 3), 7):
        with pytest.raises(CallError) as caught:
            built("causal")(q, k, v, stats=stats)
        assert [d.code for d in caught.value.diagnostics] == ["A0609"]
        assert '`stats` must be names among "max", "entropy", "column_sums"' in str(caught.value)
    for name in ("sigmoid", "summed"):
        with pytest.raises(CallError) as caught:
            built(name)(q, k, v, stats=("max",))
        assert [d.code for d in caught.value.diagnostics] == ["A0617"]


# --- the derived attention --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in VARIANTS if n not in ("sigmoid", "relu_squared")])
def test_column_sums_of_every_example(name: str) -> None:
    """By the reference: the rows of the derived attention, against the columns of the weights."""
    sizes = CallSizes(B=2, H=4, HKV=2, M=9, N=13, D=8, E=6)
    problem = VARIANTS[name].problem(sizes, F64)
    attention = check(EXAMPLES / f"{name}.attn", **problem.constants)
    verify(column_sums(attention))
    attn, inputs = attncc.build(EXAMPLES / f"{name}.attn", **problem.constants), dict(problem.inputs)
    expected = by_hand(attn, problem.q, problem.k, {n: torch.as_tensor(x) for n, x in inputs.items()})
    _, lse = evaluate(attention, problem.q, problem.k, problem.v, inputs)
    assert lse is not None
    more = {"_lse": lse.masked_fill(lse == -torch.inf, torch.inf), "_group": 2, "_width_v": problem.v.shape[3]}
    m, n = problem.q.shape[2], problem.k.shape[2]
    keys, values = problem.k.repeat_interleave(2, 1), torch.zeros(2, 4, m, 1, dtype=F64)
    _, total = evaluate(column_sums(attention), keys, problem.q, values, {**inputs, **more}, m - n)
    assert total is not None
    torch.testing.assert_close(total.exp(), expected["column_sums"], rtol=1e-10, atol=1e-12)


def test_the_derived_attention_has_a_closed_form_block_structure_too() -> None:
    for mask, ranges in (("causal", 1), ("causal and q_idx - kv_idx < 5", 1), ("kv_idx < 3 or window(4)", 2)):
        attention = check(f"attention masked():\n    mask = {mask}\n")
        structure = block_structure(column_sums(attention).mask)
        assert structure.strategy == "bounds"
        assert len(structure.ranges) <= ranges
        assert structure.ranges[0].full_lo != structure.ranges[0].full_hi
