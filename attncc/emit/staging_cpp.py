"""What the C++ template of a core needs to make operands itself: the inputs of a call, and the steps as text.

Channels lie in the lanes of vector registers. A value of one number for each channel is an array of vectors, what lies
beyond the last channel is without meaning; one for a token is a scalar.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from attncc.emit.cpp_expressions import Expressions, called_functions
from attncc.emit.cpp_machine import ELEMENT_TYPES, Field, Format, Reals, mangle
from attncc.emit.cpp_text import Printed
from attncc.emit.features_cpp import feature_variables, phases_of, rows_read
from attncc.ir.nodes import Expr, Parameter, Variable
from attncc.ir.rewrite import walk
from attncc.ir.types import Kind
from attncc.plan.factors import FACTOR
from attncc.plan.recurrent import CorePlan
from attncc.plan.sequential import Axis, Step
from attncc.plan.staged_inputs import Input
from attncc.plan.staging import Staging

# Steps over the tokens of a head: constant; of a token, what rows are made of or what is made of them; and the rest.
_Which = Literal["constant", "rows", "numbers", "all"]

_SCALARS = {Kind.FLOAT: "real", Kind.INT: "int64", Kind.BOOL: "bool"}


@dataclass(frozen=True, slots=True)
class StagedOperand:
    """An operand of a core, `name`.

    element  C++ type of its numbers in memory
    axes     one channel, or none
    source   the input that it is as it lies in memory; None where steps make it
    """

    name: str
    element: str
    axes: tuple[Axis, ...]
    source: Input | None


def staged_operands(plan: CorePlan) -> list[StagedOperand]:
    """The operands of a plan that makes them, and their factors."""
    assert plan.staging is not None
    found: list[StagedOperand] = []
    for step in plan.staging.steps:
        if not step.name.startswith("z"):
            source = _source(plan, step)
            element = _element(plan, step.name) if source is None else ELEMENT_TYPES[source.dtype]
            found.append(StagedOperand(step.name, element, step.axes, source))
    return found


def staging_fields(plan: CorePlan) -> tuple[Field, ...]:
    """What a call passes beside the members of `Arguments`: inputs, with slots `X`, `X_group`, `X_stride_b`, `_h` and
    `_row`, and scalars."""
    staging = plan.staging
    if staging is None:
        return ()
    return (*map(_input, staging.passed), *(_scalar(name, kind) for name, kind in staging.scalars))


def _scalar(name: str, kind: Kind) -> Field:
    """A run-time scalar of the specification."""
    if kind is Kind.FLOAT:
        return Field(f"double {mangle(name)};", "", ((name, "d"),))
    return Field(f"int64 {mangle(name)};", "", ((name, "q"),))


def _input(x: Input) -> Field:
    strides = tuple[tuple[str, Format], ...]((f"{x.name}_{part}", "q") for part in _INPUT_PARTS)
    places = ", ".join(map(str, x.places))
    return Field(f"Input<{ELEMENT_TYPES[x.dtype]}> {x.name};", f"{x.tensor}[{places}]", ((x.name, "Q"), *strides))


_INPUT_PARTS = ("group", "stride_b", "stride_h", "stride_row")


class _Expressions(Expressions):
    """Run-time scalars that are ints come with 64 bits, as captured tensors do."""

    def print(self, expr: Expr) -> Printed:
        match expr:
            case Parameter(name=name, kind=Kind.INT):
                return Printed(mangle(name), Kind.INT, wide=True)
            case _:
                return super().print(expr)


class StagingText:
    """The filters of the template."""

    def __init__(self, plan: CorePlan, machine: Reals) -> None:
        assert plan.staging is not None
        self._staging: Staging = plan.staging
        self._cpp = _Expressions(machine, {})
        values = (*plan.staging.inputs, *plan.staging.steps)
        self._cpp.variables = {x.name: _variable(x) for x in values}
        self._cpp.variables |= feature_variables(plan.staging.features)
        self._varying = _varying(plan.staging)

    def filters(self) -> Mapping[str, Callable[..., object]]:
        return {
            "staged_operands": staged_operands,
            "staging_arguments": staging_fields,
            "staging_functions": self._functions,
            "staging_lanes": lambda expr: self._cpp.to_lanes(self._cpp.print(expr)).text,
            "staging_scalar": lambda expr: self._cpp.print(expr).text,
            "staging_type": lambda step: _SCALARS[step.kind],
            "staging_reads": self._reads,
            "staging_steps": self._steps,
            "staging_carried": self._carried,
            "feature_phases": lambda plan: phases_of(plan.staging.features),
            "feature_rows": lambda plan: rows_read(plan.staging.features),
        }

    def _steps(self, plan: CorePlan, which: _Which = "all") -> list[Step]:
        """The steps, but for operands that are read where they lie."""
        in_place = {operand.name for operand in staged_operands(plan) if operand.source is not None}
        steps = [step for step in self._staging.steps if step.name not in in_place]
        if which == "all":
            return steps
        if which == "constant":
            return [step for step in steps if step.name not in self._varying]
        varying = [step for step in steps if step.name in self._varying]
        needed = set[str]()
        for step in reversed(varying):
            if step.axes or step.over or step.name in needed:
                needed |= {step.name, *_variables([step])}
        return [step for step in varying if (step.name in needed) == (which == "rows")]

    def _carried(self, plan: CorePlan) -> list[Step]:
        """The numbers that come with steps of rows, and that others of a token read."""
        read = _variables(self._steps(plan, "numbers"))
        return [step for step in self._steps(plan, "rows") if step.name in read]

    def _reads(self, plan: CorePlan, which: _Which = "all") -> list[Input]:
        """The inputs that these steps read."""
        read = _variables(self._steps(plan, which))
        return [x for x in self._staging.inputs if x.name in read]

    def _functions(self, plan: CorePlan) -> list[str]:
        """The functions of the operator table that steps call, those that others use first."""
        del plan
        steps = (*self._staging.features.steps, *self._staging.steps)
        return called_functions(step.value for step in steps if isinstance(step, Step))


def _variables(steps: Iterable[Step]) -> set[str]:
    nodes = (node for step in steps for node in walk(step.value))
    return {node.name for node in nodes if isinstance(node, Variable)}


def _varying(staging: Staging) -> set[str]:
    """What differs between the tokens of a head."""
    varying = {x.name for x in staging.inputs if x.varies}
    for step in staging.steps:
        if varying & _variables([step]):
            varying.add(step.name)
    return varying


def _variable(value: Input | Step) -> Printed:
    kind = value.dtype.kind if isinstance(value, Input) else value.kind
    return Printed(f"{value.name}[i]" if value.axes else value.name, kind, bool(value.axes), wide=kind is Kind.INT)


def _element(plan: CorePlan, operand: str) -> str:
    wide = operand in ("log_decay", "gate", "bonus") or operand.endswith(FACTOR)
    return ELEMENT_TYPES[plan.state_dtype if wide else plan.dtype]


def _source(plan: CorePlan, step: Step) -> Input | None:
    """The input that an operand is, in its type: such an operand is read where it lies. Gates and bonuses that steps
    make are not rounded; those that are inputs may as well be of the type of the rows."""
    assert plan.staging is not None
    if step.name.endswith(FACTOR):
        return None
    inputs = {x.name: x for x in plan.staging.inputs}
    types = {_element(plan, step.name)}
    if step.name in ("gate", "bonus"):
        types.add(ELEMENT_TYPES[plan.dtype])
    match step.value:
        case Variable(name=name) if name in inputs and ELEMENT_TYPES[inputs[name].dtype] in types:
            return inputs[name] if inputs[name].axes == step.axes else None
        case _:
            return None
