"""IR expressions in C++: scalars, or vectors with one query per lane.

An expression that varies with the query prints as a vector (`floats`, `ints`, or `longs` where 32 bits may not hold
its value); everything else prints as a scalar and is broadcast where the two meet. Bools in lanes are masks of -1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import assert_never

from attncc.emit.cpp_loads import Definitions, TiledLoad, tiled_loads
from attncc.emit.cpp_machine import Reals, machine_of, mangle, with_uses
from attncc.emit.cpp_plan import expressions_of, levels_of
from attncc.emit.cpp_rows import RowLevels, split_levels
from attncc.emit.cpp_text import ATOM, BITS, COMPARISON, LEVELS, LOGIC, SUM, UNARY, Printed
from attncc.ir.errors import IRError
from attncc.ir.nodes import (
    Apply,
    Constant,
    Element,
    Expr,
    Hole,
    Index,
    Load,
    Parameter,
    Reduce,
    Size,
    Summary,
    Variable,
)
from attncc.ir.operators import OPERATORS
from attncc.ir.rewrite import kind_of, walk
from attncc.ir.types import DType, Kind
from attncc.passes.ranges import INT32, Range, int_range
from attncc.plan.nodes import BackwardPlan, Binding, ForwardPlan, KernelPlan, RowsPlan

_INFIX = re.compile(r"\(\{0\} (\S+) \{1\}\)")
_CALL = re.compile(r"([a-z0-9_]+)_\(.*\)")
_PREFIX = re.compile(r"\((\S)\{0\}\)")

# Spelt with C++'s own operators: for scalars, for masks.
LOGICAL = {"and": ("&&", "&"), "or": ("||", "|")}
# Functions that return 32 bits, whatever they take.
_NARROWING = ("to_int", "random_key")


def called_functions(exprs: Iterable[Expr]) -> list[str]:
    """The functions of the operator table that expressions call, those that others use first."""
    applied = (node for expr in exprs for node in walk(expr) if isinstance(node, Apply))
    spellings = (
        OPERATORS[node.op].spelling("cpp", kind_of(node.args[-1]))
        for node in applied
        if node.op not in LOGICAL and node.op != "not"
    )
    return with_uses(sorted({match[1] for spelling in spellings if (match := _CALL.fullmatch(spelling))}))


class Expressions:
    """Expressions as C++ text.

    machine      for whose vectors the text is
    dtypes       of captured tensors
    variables    how each is read
    row_levels   of a rows kernel: its bindings by loop
    definitions  of a kernel of pairs: what its variables stand for
    tiled        of a kernel of pairs: the loads that are read for a whole tile at once
    """

    def __init__(self, machine: Reals, dtypes: Mapping[str, DType]) -> None:
        self.machine = machine
        self.dtypes = dtypes
        self.variables: dict[str, Printed] = {}
        self.row_levels: RowLevels | None = None
        self.definitions: Definitions | None = None
        self.tiled: tuple[TiledLoad, ...] = ()
        self._in_lanes = False
        self._ranges: dict[str, Range] = {}
        # Within the outer levels of a rows kernel floats are f64, whatever the element type.
        self._outer = False

    def print(self, expr: Expr) -> Printed:
        match expr:
            case Constant(value=value):
                return self._constant(value)
            case Index(name=name):
                lanes = self._in_lanes and name in ("q_row", "q_idx")
                text = f"key.{name}" if self._in_lanes and name == "kv_idx" else name
                return Printed(text, Kind.INT, lanes)
            case Size(name=name):
                return Printed(name, Kind.INT)
            case Parameter(name=name, kind=kind):
                return self._as_real(Printed(mangle(name), kind, f64=self.row_levels is not None))
            case Variable(name=name):
                return self._as_outer(self._as_real(self.variables[name]))
            case Hole(name=name):
                return Printed(name, Kind.FLOAT, lanes=True)
            case Load():
                return self._as_outer(self._load(expr))
            case Apply(op="to_float", args=(arg,)) if self._outer:
                return Printed(f"double({self.print(arg).text})", Kind.FLOAT, f64=True)
            case Apply():
                return self._apply(expr)
            case Summary():
                return self._summary(expr)
            case Element(index=index, upstream=upstream):
                return Printed(f"value_of({'g' if upstream else 'x'}[{self.print(index).text}])", Kind.FLOAT)
            case Reduce():
                return self._reduce(expr)
            case _:
                assert_never(expr)

    def outer(self, expr: Expr) -> Printed:
        """`expr` of a level outside rows; there, a rows kernel computes in f64."""
        self._outer = self.row_levels is not None
        printed = self.print(expr)
        self._outer = False
        return printed

    def _constant(self, value: bool | int | float) -> Printed:
        if isinstance(value, bool):
            return Printed(str(value).lower(), Kind.BOOL)
        level = UNARY if value < 0 else ATOM
        if isinstance(value, int):
            wide = not Range(value, value).within(INT32)
            if value == INT32.lo:
                return Printed("(-2147483647 - 1)", Kind.INT)
            return Printed(f"{value}{'l' if wide else ''}", Kind.INT, wide=wide, level=level)
        if value in (float("inf"), float("-inf")):
            return Printed("INFINITY_" if value > 0 else "-INFINITY_", Kind.FLOAT, level=level)
        return Printed(repr(value) if self._outer else self.machine.literal(repr(value)), Kind.FLOAT, level=level)

    def _load(self, load: Load) -> Printed:
        printed = self.print_load(load)
        tiled = next((tiled for tiled in self.tiled if tiled.load == load), None)
        return printed if tiled is None else replace(printed, text=f"key.{tiled.name}")

    def print_load(self, load: Load) -> Printed:
        indices = [self.print(index) for index in load.indices]
        lanes = any(index.lanes for index in indices)
        band = lanes and self._is_band(load)
        text = f"{mangle(load.tensor)}{'.band' if band else ''}({', '.join(index.text for index in indices)})"
        wide = self.dtypes[load.tensor] is DType.I64 and not self._lanes_are_wide(lanes)
        return Printed(text, load.kind, lanes, wide)

    def _is_band(self, load: Load) -> bool:
        own_type = DType.F64 if self.machine.real == "double" else DType.F32
        return self.definitions is not None and self.dtypes[load.tensor] is own_type and self.definitions.is_band(load)

    def _summary(self, summary: Summary) -> Printed:
        raise IRError(f"{summary} is read by kernels that have tables")

    def _reduce(self, reduce: Reduce) -> Printed:
        body, size = self.print(reduce.body).text, self.print(reduce.size).text
        return Printed(f"{reduce.op}_over({size}, [&](int d) {{ return {body}; }})", Kind.FLOAT)

    def _apply(self, expr: Apply) -> Printed:
        args = [self.print(arg) for arg in expr.args]
        kind = kind_of(expr)
        lanes = any(arg.lanes for arg in args)
        if expr.op in LOGICAL or expr.op == "not":
            return self._logic(expr.op, args, lanes)
        wide = self._is_wide(expr, args)
        args = [self._as_wide(arg) if wide and not self._lanes_are_wide(arg.lanes) else arg for arg in args]
        spelling = OPERATORS[expr.op].spelling("cpp", args[-1].kind)
        if match := _PREFIX.fullmatch(spelling):
            return Printed(f"{match[1]}{args[0].within(UNARY)}", kind, lanes, wide, level=UNARY)
        if match := _INFIX.fullmatch(spelling):
            return self._infix(match[1], args, kind, lanes, wide)
        if lanes and args[0].kind is Kind.BOOL and len(args) == 1:  # a conversion: true is 1 there, not -1
            args = [replace(args[0], text=f"ones({args[0].text})")]
        # A function takes its arguments alike, but for the condition of a choice, which may stay scalar.
        if lanes:
            condition = args[:1] if len(args) == 3 and args[0].kind is Kind.BOOL else []
            args = [*condition, *(self.to_lanes(arg) for arg in args[len(condition) :])]
        text = spelling.format(*(arg.text for arg in args))
        wide_result = wide and kind is Kind.INT and expr.op not in _NARROWING
        return Printed(text, kind, lanes, wide_result)

    def _is_wide(self, expr: Apply, args: list[Printed]) -> bool:
        """Whether the arguments must be 64-bit: one is, or the result may not fit in fewer."""
        if any(arg.wide for arg in args):
            return True
        ints = kind_of(expr) is Kind.INT and any(arg.kind is Kind.INT for arg in args)
        return ints and not int_range(expr, self.dtypes, self._ranges).within(INT32)

    def _infix(self, operator: str, args: list[Printed], kind: Kind, lanes: bool, wide: bool) -> Printed:
        level = LEVELS.get(operator, BITS)
        if lanes and args[0].kind is Kind.BOOL:
            args = [self.to_lanes(arg) for arg in args]
        tight = level in (COMPARISON, BITS)
        left = args[0].within(SUM if tight else level)
        right = args[1].within(SUM if tight else level - 1)
        if level is BITS:
            left, right = (arg.within(UNARY) for arg in args)
        if kind is Kind.BOOL and lanes and wide and not self._lanes_are_wide(lanes):
            return Printed(f"narrow({left} {operator} {right})", kind, lanes)
        is_wide = wide and kind is Kind.INT and not self._lanes_are_wide(lanes)
        return Printed(f"{left} {operator} {right}", kind, lanes, is_wide, level=level)

    def _logic(self, op: str, args: list[Printed], lanes: bool) -> Printed:
        if lanes:
            args = [self.to_lanes(arg) for arg in args]
        if op == "not":
            return Printed(f"{'~' if lanes else '!'}{args[0].within(UNARY)}", Kind.BOOL, lanes, level=UNARY)
        operator = LOGICAL[op][lanes]
        tight = UNARY if lanes else COMPARISON
        parts = [arg.text if arg.joint == operator else arg.within(tight) for arg in args]
        return Printed(f" {operator} ".join(parts), Kind.BOOL, lanes, level=LOGIC, joint=operator)

    def _as_real(self, value: Printed) -> Printed:
        """A value of an outer level as the level at hand computes with it."""
        if value.kind is not Kind.FLOAT or not value.f64 or self._outer or self.machine.real == "double":
            return value
        return replace(value, text=f"real({value.text})", f64=False)

    def _as_outer(self, value: Printed) -> Printed:
        """A value of the type of the elements as the levels outside rows compute with it."""
        if value.kind is not Kind.FLOAT or value.f64 or not self._outer or self.machine.real == "double":
            return value
        return replace(value, text=f"double({value.text})", level=ATOM, f64=True)

    # --- widths and lanes -------------------------------------------------------------------------------------------

    def _lanes_are_wide(self, lanes: bool) -> bool:
        """Int lanes are as wide as float lanes: beside f64, all have 64 bits."""
        return lanes and self.machine.real == "double"

    def _as_wide(self, value: Printed) -> Printed:
        if value.kind is not Kind.INT or value.wide:
            return value
        return Printed(f"{'widen' if value.lanes else 'int64'}({value.text})", Kind.INT, value.lanes, wide=True)

    def to_lanes(self, value: Printed) -> Printed:
        if value.lanes:
            return value
        wide = value.wide and not self._lanes_are_wide(lanes=True)
        return Printed(f"splat({value.text})", value.kind, lanes=True, wide=wide)


class PlanExpressions(Expressions):
    """The expressions of one plan, whose bindings the variables are."""

    def __init__(self, plan: KernelPlan) -> None:
        super().__init__(machine_of(plan), {tensor.name: tensor.dtype for tensor in plan.tensors})
        self.plan = plan
        if isinstance(plan, RowsPlan):
            self.row_levels = split_levels(plan)
        if isinstance(plan, ForwardPlan | BackwardPlan):
            self._in_lanes = True
            self.definitions = Definitions(plan)
            self.tiled = tiled_loads(plan, self.dtypes)
        for bindings, level in levels_of(plan, self.row_levels):
            for binding in bindings:
                self._define(binding, level)
        for tiled in self.tiled:
            for binding in tiled.staged.bindings:
                self._define(binding, "pair")

    def all_loads(self) -> list[Load]:
        """Every load that the kernel's template prints."""
        exprs = expressions_of(self.plan, self.row_levels)
        return [node for expr in exprs for node in walk(expr) if isinstance(node, Load)]

    def _define(self, binding: Binding, level: str) -> None:
        """Notes how a binding is read: at the level of keys as a member of `key`, at that of elements as an array."""
        self._outer = self.row_levels is not None and level in ("call", "position", "element", "position_element")
        printed = self.print(binding.value)
        # What is computed per position and element is kept in the type of the elements.
        f64 = self._outer and binding.kind is Kind.FLOAT and level != "position_element"
        self._outer = False
        name = mangle(binding.name)
        text = {"key": f"key.{name}", "element": f"{name}[d]", "position_element": f"{name}[d]"}.get(level, name)
        self.variables[binding.name] = replace(printed, text=text, level=ATOM, f64=f64)
        if binding.kind is not Kind.FLOAT:
            self._ranges[binding.name] = int_range(binding.value, self.dtypes, self._ranges)

    def _summary(self, summary: Summary) -> Printed:
        assert not isinstance(self.plan, RowsPlan)
        position = self.plan.blocks.summaries.index(summary)
        where = "kv_lo, kv_hi" if summary.axis == "kv" else "q_lo - q_offset"
        text = f"summary_{position}.{'keys' if summary.axis == 'kv' else 'rows'}(b, h, {where})"
        kind = summary.load.kind
        if kind is Kind.BOOL:
            return Printed(f"bool({text})", kind)
        return Printed(text if kind is Kind.INT else f"real({text})", kind, wide=kind is Kind.INT)
