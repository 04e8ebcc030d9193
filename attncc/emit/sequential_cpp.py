"""The sequential kernel in C++: its source, and the arguments of a call.

Value channels lie in the lanes of vector registers. A value over e is an array of vectors, one over d an array of
scalars, one over both an array of rows of vectors; one over neither is a scalar.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from attncc.emit.cpp_expressions import Expressions, called_functions
from attncc.emit.cpp_machine import ELEMENT_TYPES, Field, Format, Machine
from attncc.emit.cpp_text import Printed, tidy
from attncc.emit.render import fill
from attncc.ir.text import to_text
from attncc.ir.types import DType, Kind
from attncc.plan.cpp_tiles import choose_tile
from attncc.plan.sequential import STATE, Axis, Operand, SequentialPlan, Step

_SCALARS = {Kind.FLOAT: "real", Kind.INT: "int64", Kind.BOOL: "bool"}
_LANES = {Kind.FLOAT: "floats", Kind.INT: "longs", Kind.BOOL: "ints"}


def source_of(plan: SequentialPlan, templates: Sequence[Path] = ()) -> str:
    """The source of the kernel. Raises BuildError where its template cannot be rendered."""
    return fill("sequential.cpp.jinja", plan, plan.name, plan.target, SequentialCppPrinter(plan).filters(), templates)


def argument_fields(plan: SequentialPlan) -> tuple[Field, ...]:
    """The members of a kernel's `Arguments`, in order. Slots of an operand: its pointer `NAME` and its strides in
    elements, `NAME_stride_b`, `_h`, `_t`, `_d` and `_e`."""
    real = ELEMENT_TYPES[plan.state_dtype]
    states = f"(sequences, H, {plan.key_width}, {plan.value_width}), contiguous"
    return (
        *(_stream(operand) for operand in plan.operands),
        Field(f"{ELEMENT_TYPES[plan.stored]}* o;", f"(B, H, N, {plan.value_width}), contiguous", (("o", "Q"),)),
        Field(f"const {real}* initial;", f"{states}; or null", (("initial", "Q"),)),
        Field(f"{real}* last;", f"{states}; or null", (("last", "Q"),)),
        Field("const int64* offsets;", "where packed sequences begin and the last ends; or null", (("offsets", "Q"),)),
        Field("int64 sequences, H, N;", "", (("sequences", "q"), ("H", "q"), ("N", "q"))),
        Field("int64 num_threads;", "", (("num_threads", "q"),)),
    )


def _stream(operand: Operand) -> Field:
    strides = tuple[tuple[str, Format], ...]((f"{operand.name}_stride_{axis}", "q") for axis in "bhtde")
    element = ELEMENT_TYPES[operand.dtype]
    return Field(f"Stream<{element}> {operand.name};", to_text(operand.source), ((operand.name, "Q"), *strides))


class SequentialCppPrinter:
    """The filters of the template."""

    def __init__(self, plan: SequentialPlan) -> None:
        self.machine = _machine(plan)
        self._cpp = Expressions(self.machine, {})
        kinds = {STATE: Kind.FLOAT, **{x.name: x.kind for x in (*plan.operands, *plan.steps)}}
        self._cpp.variables = {name: self._variable(name, kinds[name], axes) for name, axes in plan.axes.items()}

    def filters(self) -> Mapping[str, Callable[..., object]]:
        return {
            "machine": lambda _: self.machine,
            "arguments": argument_fields,
            "functions": _functions,
            "element_types": _element_types,
            "specification": lambda plan: to_text(plan.spec).splitlines(),
            "tidy": tidy,
            "cpp": lambda expr: self._cpp.print(expr).text,
            "lanes": lambda expr: self._cpp.to_lanes(self._cpp.print(expr)).text,
            "channels": lambda value: "".join(axis.channel for axis in value.axes),
            "type": self._type,
            "extents": lambda value: "".join(f"[{self._extent(axis)}]" for axis in value.axes),
            "vectors": self._extent,
        }

    def _variable(self, name: str, kind: Kind, axes: tuple[Axis, ...]) -> Printed:
        lanes = _in_lanes(axes)
        # Int lanes are as wide as float lanes; scalars that are no floats come with 64 bits.
        wide = kind is Kind.INT and not (lanes and self.machine.real == "double")
        return Printed(name + "".join(f"[{axis.channel}]" for axis in axes), kind, lanes, wide)

    def _type(self, value: Operand | Step) -> str:
        """The C++ type of one element of a value, or of the vectors that hold it."""
        return (_LANES if _in_lanes(value.axes) else _SCALARS)[value.kind]

    def _extent(self, axis: Axis) -> int:
        """How many elements an array has along an axis: channels, or vectors of value channels."""
        return -(-axis.size // self.machine.lanes) if axis.channel == "e" else axis.size


def _in_lanes(axes: tuple[Axis, ...]) -> bool:
    return any(axis.channel == "e" for axis in axes)


def _functions(plan: SequentialPlan) -> list[str]:
    """The functions of the operator table that the kernel calls, those that others use first."""
    return called_functions(step.value for step in plan.steps)


def _element_types(plan: SequentialPlan) -> set[str]:
    """The C++ types of all elements that the kernel reads or writes."""
    return {ELEMENT_TYPES[dtype] for dtype in (plan.stored, plan.state_dtype, *(x.dtype for x in plan.operands))}


def _machine(plan: SequentialPlan) -> Machine:
    """Products are those of single vectors: nothing of a tile matters but the lanes."""
    real = "double" if plan.dtype is DType.F64 else "float"
    tile = choose_tile(plan.target.arch, plan.dtype, plan.key_width, plan.value_width)
    return Machine(
        arch=plan.target.arch,
        real=real,
        element=ELEMENT_TYPES[plan.dtype],
        lanes=tile.lanes,
        vectors=1,
        steps=1,
        block_n=1,
        micro_keys=1,
        avx512=plan.target.arch.startswith("avx512"),
        pairs=False,
        widened=False,
    )
