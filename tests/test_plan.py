"""What the planner decides, on specifications where the decision is known."""

from __future__ import annotations

import pytest

import attncc
from attncc.ir.nodes import Apply, Constant, Expr, Hole, Index, Load, Variable
from attncc.ir.rewrite import walk
from attncc.ir.types import DType
from attncc.plan.build import plan_attention
from attncc.plan.nodes import GROUP_SIZE, ForwardPlan, Program, RowsPlan, Specialization, Target

CPP = Target("cpp", "avx512")
TRITON = Target("triton", "sm_90")


def plan(spec: str, *tensors: tuple[str, DType], target: Target = CPP, dtype: DType = DType.F32) -> Program:
    return plan_attention(attncc.check(spec), Specialization(dtype, 64, 32, tensors), target)


def kernels(program: Program) -> list[str]:
    return [kernel.name for kernel in program.kernels]


def test_a_plain_spec_is_one_kernel_with_its_scale_in_the_exponential() -> None:
    program = plan("attention full():\n    score = qk")
    assert kernels(program) == ["full_forward"]
    assert program.forward.fold_scale
    assert program.forward.scale == Constant(0.125)
    assert program.forward.score.value == Hole("dot")
    assert program.forward.mask is None


@pytest.mark.parametrize(
    "clauses", ["score = qk + 1.0", "scale = -1.0", "scale = tau", "weight = sigmoid(score)", "scale = 1.0 / (1 + h)"]
)
def test_other_scales_multiply_the_dot_product(clauses: str) -> None:
    forward = plan(f"attention a(tau: float):\n    {clauses}").forward
    assert not forward.fold_scale
    assert any(node == Hole("dot") for node in walk(forward.score.value))


def test_division_by_what_is_constant_becomes_a_product_but_not_in_f64() -> None:
    spec = "attention capped(cap: float):\n    score = cap * tanh(qk / cap)"

    def divides(expr: Expr) -> bool:
        return any(isinstance(node, Apply) and node.op == "div" for node in walk(expr))

    forward = plan(spec).forward
    assert not divides(forward.score.value)
    assert any(divides(b.value) for b in forward.call)
    assert divides(plan(spec, dtype=DType.F64).forward.score.value)


def test_loads_are_hoisted_to_the_level_that_they_vary_with() -> None:
    spec = (
        "attention a(s: f32[H], x: f32[M], y: f32[B, N], z: f32[H, M, N]):\n"
        "    score = qk * s[h] + x[q_row] + y[b, kv_idx] + z[h, q_row, kv_idx]"
    )
    forward = plan(spec, *((name, DType.F32) for name in "sxyz")).forward

    def tensors(bindings: tuple[object, ...]) -> set[str]:
        return {n.tensor for b in bindings for n in walk(b.value) if isinstance(n, Load)}  # type: ignore[attr-defined]

    assert [tensors(level) for level in (forward.call, forward.head, forward.row, forward.key)] == [
        set(),
        {"s"},
        {"x"},
        {"y"},
    ]
    assert {n.tensor for n in walk(forward.score.value) if isinstance(n, Load)} == {"z"}
    assert [t.name for t in forward.tensors] == list("sxyz")


def test_a_kernel_takes_only_what_it_reads() -> None:
    spec = "attention a(window: int, tau: float, gain: f32[D]):\n    q = q * gain\n    mask = q_idx - kv_idx < window"
    program = plan(spec, ("gain", DType.F32))
    rows, forward = program.kernels
    assert isinstance(rows, RowsPlan) and isinstance(forward, ForwardPlan)
    assert [t.name for t in rows.tensors] == ["gain"] and rows.scalars == ()
    assert forward.tensors == () and [s.name for s in forward.scalars] == ["window"]


def test_rows_that_vary_with_the_query_head_are_written_once_per_head() -> None:
    program = plan("attention a(gain: f32[H]):\n    k = k * gain[h]\n    score = qk + hkv", ("gain", DType.F32))
    assert [(p.row, p.heads) for p in program.kernels if isinstance(p, RowsPlan)] == [("k", "H"), ("v", "H")]
    assert program.operand_heads == "H"
    assert GROUP_SIZE in [s.name for s in program.forward.scalars]
    exprs = [b.value for b in (*program.forward.call, *program.forward.head)]
    assert not any(node == Index("hkv") for e in exprs for node in walk(e))


def test_rows_that_vary_with_the_key_head_keep_their_heads() -> None:
    program = plan("attention a(gain: f32[HKV]):\n    k = k * gain[hkv]", ("gain", DType.F32))
    assert [(p.row, p.heads) for p in program.kernels if isinstance(p, RowsPlan)] == [("k", "HKV")]
    assert program.operand_heads == "HKV"


def test_angles_of_rope_belong_to_the_position() -> None:
    rows = plan("attention a():\n    q = rope(q, q_idx)").kernels[0]
    assert isinstance(rows, RowsPlan)
    ops = {n.op for b in rows.position_element for n in walk(b.value) if isinstance(n, Apply)}
    assert {"cos", "sin"} <= ops
    left = {n.op for n in walk(rows.element.value) if isinstance(n, Apply)}
    assert not left & {"cos", "sin", "pow", "exp", "lt"}


def test_reductions_belong_to_the_row() -> None:
    rows = plan("attention a():\n    q = l2norm(q)").kernels[0]
    assert isinstance(rows, RowsPlan)
    assert len(rows.row_values) >= 1
    assert any(isinstance(node, Variable) for node in walk(rows.element.value))


@pytest.mark.parametrize("target", [CPP, TRITON], ids=str)
def test_documents_get_tables_and_lists(target: Target) -> None:
    program = plan(
        "attention a(doc: int[B, N]):\n    mask = doc[b, q_idx] == doc[b, kv_idx]", ("doc", DType.I32), target=target
    )
    assert kernels(program) == ["a_tiles", "a_forward"]
    blocks = program.forward.blocks
    assert blocks.strategy == "list" and blocks.summaries
    assert blocks.per_batch and not blocks.per_head


def test_a_causal_window_needs_no_tables() -> None:
    program = plan("attention a(w: int):\n    mask = causal and q_idx - kv_idx < w")
    assert kernels(program) == ["a_forward"]
    assert program.forward.blocks.strategy == "bounds"


def test_names_of_bindings_do_not_meet_those_of_the_spec() -> None:
    program = plan(
        "attention a(s: f32[H], s_h: float, t0: float):\n    score = tanh(qk * s[h]) * tanh(qk * s[h]) + s_h + t0",
        ("s", DType.F32),
    )
    forward = program.forward
    names = [
        b.name
        for level in (forward.call, forward.head, forward.row, forward.key, forward.score.bindings)
        for b in level
    ]
    assert len(set(names)) == len(names) and not set(names) & {"s", "s_h", "t0"}
