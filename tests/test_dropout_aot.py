"""Kernels with dropout, and those that write statistics, compiled ahead of time: none of them spills."""

from __future__ import annotations

import pytest

import attncc
from attncc.diagnostics import BuildError
from attncc.emit.printers import printer_of
from attncc.emit.render import render
from attncc.ir.nodes import Attention
from attncc.ir.types import DType
from attncc.passes.columns import column_sums
from attncc.passes.dropout import with_dropout
from attncc.plan.backward import plan_backward
from attncc.plan.build import plan_attention
from attncc.plan.nodes import KernelPlan, Specialization, Target
from attncc.plan.triton_tiles import MACHINES
from attncc.runtime.triton_aot import Request, compile_all

CAUSAL = attncc.check("attention causal():\n    mask = causal\n")


def forward(attention: Attention, width: int, width_v: int, arch: str, *, statistics: bool = False) -> KernelPlan:
    tensors = tuple((tensor.name, DType.F32) for tensor in attention.tensors)
    specialization = Specialization(DType.BF16, width, width_v, tensors, statistics)
    return plan_attention(attention, specialization, Target("triton", arch)).forward


def assert_no_spill(plans: list[KernelPlan], arch: str) -> None:
    requests = [Request(plan, render(plan, printer_of(plan)), arch) for plan in plans]
    for plan, result in zip(plans, compile_all(requests), strict=True):
        assert not isinstance(result, BuildError), result
        for resources in result.values():
            assert resources.spilled == 0, f"{plan.name} for {arch}"
            assert not resources.warnings


def test_statistics_and_dropout() -> None:
    plans = [forward(with_dropout(CAUSAL), 64, 64, "sm_90"), forward(CAUSAL, 64, 64, "sm_90", statistics=True)]
    assert_no_spill(plans, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("arch", MACHINES)
def test_on_every_target(arch: str) -> None:
    plans: list[KernelPlan] = []
    for width in (64, 128):
        plans += [forward(with_dropout(CAUSAL), width, width, arch), forward(column_sums(CAUSAL), width, 1, arch)]
        plans += [forward(CAUSAL, width, width, arch, statistics=True)]
        plans += [forward(with_dropout(CAUSAL), width, width, arch, statistics=True)]
    assert_no_spill(plans, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", MACHINES)
def test_backward_passes_with_dropout_compile(arch: str) -> None:
    specialization = Specialization(DType.BF16, 64, 64)
    plan = plan_backward(with_dropout(CAUSAL), specialization, Target("triton", arch), frozenset()).backward
    (result,) = compile_all([Request(plan, render(plan, printer_of(plan)), arch)])
    assert not isinstance(result, BuildError), result
