"""Random specifications and calls on every machine that the C++ target knows, by the error rule."""

from __future__ import annotations

import pytest
import torch
from cpp_support import NATIVE_ARCHS, run
from error_rule import check_kernel
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from strategies import Attention, Call, cases
from tiers import by_tier

# Each example is compiled: shrinking one would take longer than reading it.
FEW = settings(
    max_examples=by_tier(16),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@st.composite
def typed_cases(draw: st.DrawFn) -> tuple[Attention, Call]:
    return draw(cases(dtype=draw(st.sampled_from(DTYPES))))


@given(arch=st.sampled_from(NATIVE_ARCHS), case=typed_cases())
@settings(FEW)
def test_a_drawn_attention_is_what_it_means(arch: str, case: tuple[Attention, Call]) -> None:
    check(arch, *case)


@pytest.mark.slow
@pytest.mark.parametrize("arch", NATIVE_ARCHS)
@given(case=typed_cases())
@settings(FEW, max_examples=200)
def test_many_drawn_attentions_are_what_they_mean(arch: str, case: tuple[Attention, Call]) -> None:
    check(arch, *case)


def check(arch: str, spec: Attention, call: Call) -> None:
    o, lse = run(spec, call.q, call.k, call.v, call.inputs, call.q_offset, arch)
    check_kernel(o, lse, spec, call.q, call.k, call.v, call.inputs, call.q_offset)
