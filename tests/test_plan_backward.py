"""Plans of backward passes: well formed for every example, and as they were when someone last looked at them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from conftest import Golden

import attncc
from attncc.ir.nodes import Element, Expr, Hole, Index, Load, Parameter, Reduce, Variable
from attncc.ir.rewrite import kind_of, walk
from attncc.ir.text import to_text
from attncc.ir.types import DType, Kind
from attncc.plan.backward import plan_backward
from attncc.plan.nodes import (
    BackwardPlan,
    BackwardProgram,
    Binding,
    KernelPlan,
    RowsPlan,
    RowTypes,
    Specialization,
    Staged,
    StagedValues,
    Target,
)
from attncc.plan.reads import block_exprs

EXAMPLES = Path(__file__).parent.parent / "examples"
FOLDER = Path(__file__).parent / "plans"
TARGETS = (Target("cpp", "avx512"), Target("triton", "sm_90"))
EVERY = pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.attn")))


def program_of(name: str, target: Target = TARGETS[0], dtype: DType = DType.F32) -> BackwardProgram:
    """With gradients of every captured tensor that can have one."""
    attention = attncc.check(EXAMPLES / f"{name}.attn")
    tensors = tuple((tensor.name, tensor.dtypes[0]) for tensor in attention.tensors)
    wanted = {tensor.name for tensor in attention.tensors if tensor.dtypes[0].kind is Kind.FLOAT}
    return plan_backward(attention, Specialization(dtype, 64, 32, tensors), target, wanted)


def plan_of(spec: str, target: Target, dtype: DType, *tensors: tuple[str, DType]) -> BackwardProgram:
    """With gradients of every captured tensor."""
    specialization = Specialization(dtype, 16, 8, tensors)
    return plan_backward(attncc.check(spec), specialization, target, {name for name, _ in tensors})


class Scope:
    """The variables that a level sees: those of the levels around it, and its own that came before."""

    def __init__(self, *around: Scope) -> None:
        self.names: set[str] = set().union(*(scope.names for scope in around))
        self.exprs: list[Expr] = []

    def bind(self, bindings: Iterable[Binding]) -> Scope:
        for binding in bindings:
            self.read(binding.value)
            assert kind_of(binding.value) is binding.kind
            assert binding.name not in self.names, f"{binding.name} is bound twice"
            self.names.add(binding.name)
        return self

    def read(self, expr: Expr) -> None:
        for node in walk(expr):
            assert not isinstance(node, Variable) or node.name in self.names, f"{to_text(node)} in {to_text(expr)}"
        self.exprs.append(expr)


def nodes(scopes: Iterable[Scope]) -> Iterator[Expr]:
    return (node for scope in scopes for expr in scope.exprs for node in walk(expr))


def check_inputs(plan: RowsPlan | BackwardPlan, scopes: tuple[Scope, ...]) -> None:
    """The kernel takes what it reads, and no name means two things."""
    read = list(nodes(scopes))
    assert {node.tensor for node in read if isinstance(node, Load)} == {tensor.name for tensor in plan.tensors}
    assert {node.name for node in read if isinstance(node, Parameter)} == {scalar.name for scalar in plan.scalars}
    bound = set().union(*(scope.names for scope in scopes))
    assert not bound & {parameter.name for parameter in plan.spec.parameters}


def check_backward(plan: BackwardPlan) -> None:
    call = Scope().bind(plan.call)
    head = Scope(call).bind(plan.head)
    row, key = Scope(head).bind(plan.row), Scope(head).bind(plan.key)
    for expr in (plan.scale, plan.dot_factor):
        head.read(expr)
    for expr in block_exprs(plan.blocks):
        head.read(expr)
    if plan.key_blocks is not None:
        for expr in block_exprs(plan.key_blocks):
            head.read(expr)
    assert not row.names & key.names - head.names
    pair, masked = Scope(row, key).bind(plan.pair.bindings), Scope(row, key)
    for expr in plan.pair.values:
        pair.read(expr)
        assert kind_of(expr) is Kind.FLOAT
    assert len(plan.pair.values) == 2 + len(plan.adjoints)
    for adjoint in plan.adjoints:
        assert (adjoint.place is None) == (adjoint.along != "pair")
        if adjoint.place is not None:
            pair.read(adjoint.place)
    if plan.mask is not None:
        masked.bind(plan.mask.bindings).read(plan.mask.value)
    assert pair.names & masked.names == row.names | key.names
    scopes = (call, head, row, key, pair, masked)
    assert all(node == Hole("dot") for node in nodes([pair]) if isinstance(node, Hole))
    assert not any(isinstance(node, Hole) for node in nodes((call, head, row, key, masked)))
    assert not any(isinstance(node, Element | Reduce) for node in nodes(scopes))
    assert not any(node == Index("kv_idx") for node in nodes([row]))
    assert not any(node in (Index("q_idx"), Index("q_row")) for node in nodes([key]))
    check_inputs(plan, scopes)


def check_rows(plan: RowsPlan) -> None:
    call = Scope().bind(plan.call)
    position = Scope(call).bind(plan.position)
    element_of_position, row = Scope(position).bind(plan.position_element), Scope(position).bind(plan.row_values)
    element = Scope(element_of_position, row).bind(plan.element.bindings)
    element.read(plan.element.value)
    scopes = (call, position, element_of_position, row, element)
    assert not any(isinstance(node, Hole) for node in nodes(scopes))
    assert not any(isinstance(node, Element) for node in nodes((call, position, element_of_position)))
    read = [node for node in nodes(scopes) if isinstance(node, Element)]
    assert all(node.row == plan.row for node in read)
    assert any(node.upstream for node in read) == (plan.upstream is not None)
    check_inputs(plan, scopes)


@pytest.mark.representative(60)
@EVERY
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F64], ids=lambda dtype: dtype.value)
def test_plans_of_examples_are_well_formed(name: str, target: Target, dtype: DType) -> None:
    program = program_of(name, target, dtype)
    check_backward(program.backward)
    for plan in program.kernels:
        if isinstance(plan, RowsPlan):
            check_rows(plan)
    names = [plan.name for plan in program.kernels]
    assert len(set(names)) == len(names)
    assert [plan.row for plan in program.transposed] == [plan.row for plan in program.rows]
    assert program.backward.tile is not None


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize(("dtype", "sums"), [(DType.F16, DType.F32), (DType.F32, DType.F32), (DType.F64, DType.F64)])
def test_gradients_are_rounded_once(target: Target, dtype: DType, sums: DType) -> None:
    """Those of transformed rows, which another kernel reads, are as exact as the sums that they are."""
    program = plan_of("attention a():\n    q = rope(q, q_idx)\n    v = tanh(v)\n", target, dtype)
    assert program.backward.stored == RowTypes(q=sums, k=dtype, v=sums)
    assert [(plan.row, plan.upstream, plan.stored) for plan in program.transposed] == [
        ("q", sums, dtype),
        ("v", sums, dtype),
    ]
    assert all(plan.upstream is None and plan.stored is dtype for plan in program.rows)


def test_gradients_of_heads_are_rounded_once_they_are_added_up() -> None:
    """Where the query heads that share a key have each a transform of it."""
    spec = "attention a(g: float[H]):\n    q = l2norm(q)\n    k = k * g[h]\n"
    program = plan_of(spec, TARGETS[0], DType.BF16, ("g", DType.F32))
    assert program.operand_heads == "H"
    assert [(plan.row, plan.stored) for plan in program.transposed] == [
        ("q", DType.BF16),
        ("k", DType.F32),
        ("v", DType.F32),
    ]
    assert [adjoint.rows.upstream for adjoint in program.row_adjoints] == [DType.F32]


# --- as text ---------------------------------------------------------------------------------------------------------


def text(program: BackwardProgram) -> str:
    return "\n".join(line for kernel in program.kernels for line in kernel_lines(kernel))


def kernel_lines(plan: KernelPlan) -> Iterator[str]:
    yield f"{plan.name}: {plan.kernel}"
    match plan:
        case RowsPlan():
            levels = {"call": plan.call, "position": plan.position, "position and d": plan.position_element}
            yield from level_lines({**levels, "row": plan.row_values})
            yield from staged_lines("element", plan.element)
        case BackwardPlan():
            yield from level_lines({"call": plan.call, "head": plan.head, "row": plan.row, "key": plan.key})
            yield f"  scale      {to_text(plan.scale)}{', in the exponential' if plan.fold_scale else ''}"
            yield f"  dot factor {to_text(plan.dot_factor)}"
            yield from staged_lines("pair", plan.pair)
            for adjoint in plan.adjoints:
                place = "" if adjoint.place is None else f", read at {to_text(adjoint.place)}"
                yield f"  adjoint    {to_text(adjoint.part)} along the {adjoint.along}{place}"
            if plan.mask is not None:
                yield from staged_lines("mask", plan.mask)
        case _:
            yield from level_lines({"call": plan.call})


def level_lines(levels: dict[str, tuple[Binding, ...]]) -> Iterator[str]:
    for level, bindings in levels.items():
        if bindings:
            yield f"  {level}"
        for binding in bindings:
            yield f"    {binding.name} = {to_text(binding.value)}"


def staged_lines(name: str, staged: Staged | StagedValues) -> Iterator[str]:
    yield f"  {name}"
    for binding in staged.bindings:
        yield f"    {binding.name} = {to_text(binding.value)}"
    for value in staged.values if isinstance(staged, StagedValues) else (staged.value,):
        yield f"    {to_text(value)}"


@pytest.mark.parametrize("name", ["alibi", "cosine", "rope", "softcap"])
def test_plans_are_as_recorded(name: str, golden: Golden) -> None:
    golden(FOLDER / f"{name}-backward.expected", text(program_of(name)))
