"""Random specifications with dropout on the C++ target, and column sums of random softmaxes, by the error rule."""

from __future__ import annotations

import pytest
import torch
from cpp_support import run
from error_rule import check_kernel
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from strategies import Attention, Call, cases
from tiers import by_tier

from attncc.ir.nodes import Softmax, identity_row
from attncc.ir.verify import verify
from attncc.passes.columns import column_sums
from attncc.passes.dropout import dropout_scalars, with_dropout
from attncc.passes.simplify import simplify
from attncc.reference import OutOfRange, evaluate

# Each example is compiled: shrinking one would take longer than reading it.
FEW = settings(
    max_examples=by_tier(8),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@st.composite
def typed_cases(draw: st.DrawFn) -> tuple[Attention, Call]:
    return draw(cases(dtype=draw(st.sampled_from(DTYPES))))


@given(case=typed_cases(), p=st.floats(0, 0.99), seed=st.integers(-(2**63), 2**63 - 1))
@settings(FEW)
def test_a_drawn_attention_with_dropout(case: tuple[Attention, Call], p: float, seed: int) -> None:
    check_dropout(*case, p, seed)


@pytest.mark.slow
@given(case=typed_cases(), p=st.floats(0, 0.99), seed=st.integers(-(2**63), 2**63 - 1))
@settings(FEW, max_examples=150)
def test_many_drawn_attentions_with_dropout(case: tuple[Attention, Call], p: float, seed: int) -> None:
    check_dropout(*case, p, seed)


def check_dropout(spec: Attention, call: Call, p: float, seed: int) -> None:
    dropped, inputs = with_dropout(spec), {**call.inputs, **dropout_scalars(p, seed)}
    o, lse = run(dropped, call.q, call.k, call.v, inputs, call.q_offset)
    check_kernel(o, lse, dropped, call.q, call.k, call.v, inputs, call.q_offset)


@given(case=cases(dtype=torch.float64))
@settings(FEW, max_examples=by_tier(60))
def test_column_sums_of_a_drawn_softmax(case: tuple[Attention, Call]) -> None:
    """The rows of the derived attention are the columns of the weights, by the reference of both."""
    spec, call = case
    assume(isinstance(spec.normalizer, Softmax))
    derived = column_sums(spec)
    verify(derived)
    verify(simplify(derived))
    (batch, heads, m, _), (_, heads_kv, n, _) = call.q.shape, call.k.shape
    offset = n - m if call.q_offset is None else call.q_offset
    group, width = heads // max(heads_kv, 1), call.v.shape[3]
    try:
        _, lse = evaluate(spec, call.q, call.k, call.v, call.inputs, offset)
        columns = [_column(spec, call, offset, j) for j in range(n)]
        more = {"_lse": lse.masked_fill(lse == -torch.inf, torch.inf), "_group": group, "_width_v": width}
        keys, values = call.k.repeat_interleave(group, 1), torch.zeros(batch, heads, m, 1, dtype=torch.float64)
        _, total = evaluate(simplify(derived), keys, call.q, values, {**call.inputs, **more}, -offset)
    except OutOfRange:
        return
    assert total is not None
    expected = torch.stack(columns, -1) if columns else total
    torch.testing.assert_close(total.exp(), expected, rtol=1e-8, atol=1e-10, equal_nan=True)


def _column(spec: Attention, call: Call, offset: int, j: int) -> torch.Tensor:
    """The sums of the weights of key j."""
    v = torch.zeros_like(call.v)
    v[:, :, j] = 1
    plain = Attention(**{name: getattr(spec, name) for name in spec.__dataclass_fields__} | {"v": identity_row("v")})
    return evaluate(plain, call.q, call.k, v, call.inputs, offset)[0][..., 0].sum(-1)
