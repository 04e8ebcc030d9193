"""Spells IR expressions in C++: scalars, or vectors with one query per lane.

An expression that varies with the query prints as a vector (`floats`, `ints`, or `longs` where 32 bits may not hold
its value); everything else prints as a scalar and is broadcast where the two meet. Bools in lanes are masks of -1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import assert_never

from attncc.emit.cpp_loads import Definitions, TiledLoad, tiled_loads
from attncc.emit.cpp_machine import (
    CLASSIFIED_KEYS,
    ELEMENT_TYPES,
    SCALAR_TYPES,
    argument_fields,
    machine_of,
    mangle,
    table_element,
    table_type,
    with_uses,
)
from attncc.emit.cpp_plan import expressions_of, levels_of, own_axes, varying_partials
from attncc.emit.cpp_rows import RowLevels, split_levels
from attncc.emit.cpp_text import ATOM, BITS, COMPARISON, LEVELS, LOGIC, SUM, UNARY, Printed, tidy
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
from attncc.ir.rewrite import children, kind_of, walk
from attncc.ir.text import to_text
from attncc.ir.types import DType, Kind
from attncc.passes.ranges import INT32, Range, int_range
from attncc.plan.nodes import (
    Adjoint,
    BackwardPlan,
    Binding,
    ForwardPlan,
    KernelPlan,
    RowsPlan,
    ScalarArgument,
    Staged,
    StagedValues,
    TensorArgument,
)

_INFIX = re.compile(r"\(\{0\} (\S+) \{1\}\)")
_PREFIX = re.compile(r"\((\S)\{0\}\)")
_CALL = re.compile(r"([a-z0-9_]+)_\(.*\)")

# Spelt with C++'s own operators: for scalars, for masks.
_LOGICAL = {"and": ("&&", "&"), "or": ("||", "|")}
# Functions that return 32 bits, whatever they take.
_NARROWING = ("to_int", "random_key")


class CppPrinter:
    """The filters of the C++ templates, for one plan."""

    extension = "cpp"

    def __init__(self, plan: KernelPlan) -> None:
        self.plan = plan
        self.machine = machine_of(plan)
        self._dtypes = {tensor.name: tensor.dtype for tensor in plan.tensors}
        self._in_lanes = isinstance(plan, ForwardPlan | BackwardPlan)
        self._variables: dict[str, Printed] = {}
        self._ranges: dict[str, Range] = {}
        # Within the outer levels of a rows kernel floats are f64, whatever the element type.
        self._outer = False
        self._row_levels: RowLevels | None = split_levels(plan) if isinstance(plan, RowsPlan) else None
        self._definitions = Definitions(plan) if isinstance(plan, ForwardPlan | BackwardPlan) else None
        self._tiled = tiled_loads(plan, self._dtypes) if isinstance(plan, ForwardPlan | BackwardPlan) else ()
        for bindings, level in self._levels():
            for binding in bindings:
                self._define(binding, level)
        for tiled in self._tiled:
            for binding in tiled.staged.bindings:
                self._define(binding, "pair")

    def filters(self) -> Mapping[str, Callable[..., object]]:
        return {
            "machine": lambda _: self.machine,
            "arguments": argument_fields,
            "functions": self.functions,
            "element_types": self.element_types,
            "loads_lanes": self.loads_lanes,
            "name": mangle,
            "type": self.type_of,
            "tensor_type": self.tensor_type,
            "scalar_type": self.scalar_type,
            "cpp": self.scalar,
            "outer": self.outer,
            "range_end": self.range_end,
            "lanes": self.lanes,
            "row_levels": lambda _: self._row_levels,
            "table_element": table_element,
            "tiled_loads": lambda _: self._tiled,
            "tile_type": lambda tiled: self._lane_type(self._print_load(tiled.value)),
            "tile_value": self.tile_value,
            "plane_elements": self.plane_elements,
            "plane_row": self.plane_row,
            "plane_first": self.plane_first,
            "has_bands": self.has_bands,
            "staged": self.staged,
            "staged_values": self.staged_values,
            "varying_partials": varying_partials,
            "place_axis": self.place_axis,
            "place_indices": self.place_indices,
            "place_first": self.place_first,
            "own_axes": own_axes,
            "takes_addresses": self.takes_addresses,
            "stored_type": lambda plan: ELEMENT_TYPES[plan.stored],
            "tidy": tidy,
            "classified_keys": lambda _: CLASSIFIED_KEYS,
            "table_type": table_type,
            "specification": lambda plan: to_text(plan.spec).splitlines(),
            "reads_k_in_place": self.reads_k_in_place,
        }

    # --- filters ----------------------------------------------------------------------------------------------------

    def scalar(self, expr: Expr) -> str:
        """`expr`, which no query changes, as a scalar."""
        return self._print(expr).text

    def outer(self, expr: Expr) -> str:
        """`expr` of a level outside rows; there, a rows kernel computes in f64."""
        self._outer = self._row_levels is not None
        text = self._print(expr).text
        self._outer = False
        return text

    def range_end(self, expr: Expr) -> str:
        """An end of a range of keys, in 32 bits: where it may not fit, brought back to the nearest key."""
        printed = self._print(expr)
        return f"within({printed.text}, N)" if printed.wide else printed.text

    def reads_k_in_place(self, plan: ForwardPlan) -> bool:
        """Whether products read the keys where the call has them; a row must be a whole number of words."""
        return not (self.machine.widened or (self.machine.pairs and plan.head_dim_qk % 2))

    def scalar_type(self, scalar: ScalarArgument) -> str:
        """The C++ type of a run-time scalar of the specification."""
        return "double" if self._row_levels and scalar.kind is Kind.FLOAT else SCALAR_TYPES[scalar.kind]

    def lanes(self, expr: Expr) -> str:
        """`expr` as a vector."""
        return self._to_lanes(self._print(expr)).text

    def staged(self, staged: Staged, indent: int = 8) -> str:
        """Statements that return `staged.value` in lanes."""
        return self._statements(staged.bindings, [staged.value], self.lanes(staged.value), indent)

    def staged_values(self, staged: StagedValues, indent: int = 8) -> str:
        """Statements that return those of `staged.values` that vary, the first one always, in lanes."""
        values = [staged.values[0], *(value for value in staged.values[1:] if not isinstance(value, Constant))]
        return self._statements(staged.bindings, values, f"{{{', '.join(map(self.lanes, values))}}}", indent)

    def tile_value(self, tiled: TiledLoad) -> str:
        """Statements that return a value of `tiled`."""
        assert isinstance(tiled.staged.value, Load)
        staged = tiled.staged
        return self._statements(staged.bindings, [staged.value], self._print_load(tiled.staged.value).text, indent=8)

    def _statements(self, bindings: Sequence[Binding], values: Sequence[Expr], result: str, indent: int) -> str:
        lines = [f"return {result};"]
        # What only loads of whole tiles need is computed there.
        needed = set[str]().union(*map(self._variables_of, values))
        for binding in reversed(bindings):
            if binding.name in needed:
                needed |= self._variables_of(binding.value)
                lines.append(
                    f"const {self.type_of(binding)} {mangle(binding.name)} = {self._print(binding.value).text};"
                )
        return f"\n{' ' * indent}".join(reversed(lines))

    def _variables_of(self, expr: Expr) -> set[str]:
        """The variables that the text of `expr` reads."""
        if isinstance(expr, Variable):
            return {expr.name}
        if any(expr == tiled.load for tiled in self._tiled):
            return set()
        return set[str]().union(*(self._variables_of(child) for child in children(expr)))

    def type_of(self, binding: Binding) -> str:
        """The C++ type of a binding."""
        printed = self._variables[binding.name]
        if printed.lanes:
            return self._lane_type(printed)
        if printed.f64:
            return "double"
        return "int64" if printed.wide else SCALAR_TYPES[printed.kind]

    @staticmethod
    def _lane_type(printed: Printed) -> str:
        if printed.kind is Kind.FLOAT:
            return "floats"
        return "longs" if printed.wide else "ints"

    def plane_elements(self, plan: KernelPlan) -> set[str]:
        """The C++ types of the elements of planes."""
        del plan
        return {ELEMENT_TYPES[self._dtypes[tiled.load.tensor]] for tiled in self._tiled if tiled.axis is not None}

    def plane_row(self, plane: TiledLoad) -> str:
        """The address of element 0, along the keys, of the row of lane `i` of a plane."""
        indices = [self._print(index) for index in plane.value.indices]
        texts = [index.at_lane() for index in indices]
        assert plane.axis is not None
        texts[plane.axis] = "0"
        return f"{mangle(plane.load.tensor)}.address({', '.join(texts)})"

    def place_indices(self, adjoint: Adjoint) -> str:
        """The indices, for lane `i`, of the entry that a pair's adjoint adds to; of a plane, where its row begins."""
        assert adjoint.place is not None
        texts = [self._print(index).at_lane() for index in adjoint.place.indices]
        axis = self.place_axis(adjoint)
        return ", ".join("0" if number == axis else text for number, text in enumerate(texts))

    def place_axis(self, adjoint: Adjoint) -> int | None:
        """The axis of the tensor of a pair's adjoint along which keys lie; None where it is no plane."""
        assert self._definitions is not None
        return None if adjoint.place is None else self._definitions.key_axis(adjoint.place)

    def place_first(self, adjoint: Adjoint) -> str:
        """The index, along the keys, of the key `key` in a plane."""
        axis = self.place_axis(adjoint)
        assert adjoint.place is not None
        assert axis is not None
        return self._print(adjoint.place.indices[axis]).text

    def takes_addresses(self, plan: KernelPlan) -> bool:
        """Whether the kernel asks where the elements of tensors lie."""
        adjoints = plan.adjoints if isinstance(plan, BackwardPlan) else ()
        return bool(self.plane_elements(plan)) or any(adjoint.place is not None for adjoint in adjoints)

    def plane_first(self, plane: TiledLoad) -> str:
        """The index, along the keys, of the key `key`."""
        assert plane.axis is not None
        return self._print(plane.value.indices[plane.axis]).text

    def has_bands(self, plan: KernelPlan) -> bool:
        """Whether a load of the kernel is a band."""
        return any(".band(" in self._print_load(load).text for load in self._all_loads(plan))

    def tensor_type(self, tensor: TensorArgument) -> str:
        """The C++ type of a captured tensor."""
        field = next(f for f in argument_fields(self.plan) if f.captured and f.slots[0][0] == tensor.name)
        return field.declaration.rsplit(" ", 1)[0]

    def functions(self, plan: KernelPlan) -> list[str]:
        """The functions of the operator table that the kernel calls, those that others use first."""
        names = {
            match[1]
            for expr in expressions_of(plan, self._row_levels)
            for node in walk(expr)
            if isinstance(node, Apply) and node.op not in _LOGICAL and node.op != "not"
            if (match := _CALL.fullmatch(OPERATORS[node.op].spelling("cpp", kind_of(node.args[-1]))))
        }
        return with_uses(list(names))

    def element_types(self, plan: KernelPlan) -> set[str]:
        """The C++ types of the elements that the kernel reads and writes."""
        return {
            field.declaration.split("<")[1].split(",")[0].split(">")[0].removeprefix("const ")
            for field in argument_fields(plan)
            if "<" in field.declaration
        } | ({ELEMENT_TYPES[plan.stored]} if isinstance(plan, RowsPlan) else set())

    def loads_lanes(self, plan: KernelPlan) -> bool:
        """Whether captured tensors are read at an index that differs between queries."""
        return any(self._print_load(load).lanes for load in self._all_loads(plan))

    def _all_loads(self, plan: KernelPlan) -> list[Load]:
        exprs = expressions_of(plan, self._row_levels)
        return [node for expr in exprs for node in walk(expr) if isinstance(node, Load)]

    # --- expressions ------------------------------------------------------------------------------------------------

    def _levels(self) -> list[tuple[tuple[Binding, ...], str]]:
        return levels_of(self.plan, self._row_levels)

    def _define(self, binding: Binding, level: str) -> None:
        """Notes how a binding is read: at the level of keys as a member of `key`, at that of elements as an array."""
        self._outer = self._row_levels is not None and level in ("call", "position", "element", "position_element")
        printed = self._print(binding.value)
        # What is computed per position and element is kept in the type of the elements.
        f64 = self._outer and binding.kind is Kind.FLOAT and level != "position_element"
        self._outer = False
        name = mangle(binding.name)
        text = {"key": f"key.{name}", "element": f"{name}[d]", "position_element": f"{name}[d]"}.get(level, name)
        self._variables[binding.name] = replace(printed, text=text, level=ATOM, f64=f64)
        if binding.kind is not Kind.FLOAT:
            self._ranges[binding.name] = int_range(binding.value, self._dtypes, self._ranges)

    def _print(self, expr: Expr) -> Printed:
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
                return self._as_real(Printed(mangle(name), kind, f64=self._row_levels is not None))
            case Variable(name=name):
                return self._as_outer(self._as_real(self._variables[name]))
            case Hole(name=name):
                return Printed(name, Kind.FLOAT, lanes=True)
            case Load():
                return self._as_outer(self._load(expr))
            case Apply(op="to_float", args=(arg,)) if self._outer:
                return Printed(f"double({self._print(arg).text})", Kind.FLOAT, f64=True)
            case Apply():
                return self._apply(expr)
            case Summary():
                return self._summary(expr)
            case Element(index=index, upstream=upstream):
                return Printed(f"value_of({'g' if upstream else 'x'}[{self._print(index).text}])", Kind.FLOAT)
            case Reduce():
                return self._reduce(expr)
            case _:
                assert_never(expr)

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
        printed = self._print_load(load)
        tiled = next((tiled for tiled in self._tiled if tiled.load == load), None)
        return printed if tiled is None else replace(printed, text=f"key.{tiled.name}")

    def _print_load(self, load: Load) -> Printed:
        indices = [self._print(index) for index in load.indices]
        lanes = any(index.lanes for index in indices)
        band = lanes and self._is_band(load)
        text = f"{mangle(load.tensor)}{'.band' if band else ''}({', '.join(index.text for index in indices)})"
        wide = self._dtypes[load.tensor] is DType.I64 and not self._lanes_are_wide(lanes)
        return Printed(text, load.kind, lanes, wide)

    def _is_band(self, load: Load) -> bool:
        own_type = DType.F64 if self.machine.real == "double" else DType.F32
        return (
            self._definitions is not None and self._dtypes[load.tensor] is own_type and self._definitions.is_band(load)
        )

    def _summary(self, summary: Summary) -> Printed:
        assert not isinstance(self.plan, RowsPlan)
        position = self.plan.blocks.summaries.index(summary)
        where = "kv_lo, kv_hi" if summary.axis == "kv" else "q_lo - q_offset"
        text = f"summary_{position}.{'keys' if summary.axis == 'kv' else 'rows'}(b, h, {where})"
        kind = summary.load.kind
        if kind is Kind.BOOL:
            return Printed(f"bool({text})", kind)
        return Printed(text if kind is Kind.INT else f"real({text})", kind, wide=kind is Kind.INT)

    def _reduce(self, reduce: Reduce) -> Printed:
        body, size = self._print(reduce.body).text, self._print(reduce.size).text
        return Printed(f"{reduce.op}_over({size}, [&](int d) {{ return {body}; }})", Kind.FLOAT)

    def _apply(self, expr: Apply) -> Printed:
        args = [self._print(arg) for arg in expr.args]
        kind = kind_of(expr)
        lanes = any(arg.lanes for arg in args)
        if expr.op in _LOGICAL or expr.op == "not":
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
            args = [*condition, *(self._to_lanes(arg) for arg in args[len(condition) :])]
        text = spelling.format(*(arg.text for arg in args))
        wide_result = wide and kind is Kind.INT and expr.op not in _NARROWING
        return Printed(text, kind, lanes, wide_result)

    def _is_wide(self, expr: Apply, args: list[Printed]) -> bool:
        """Whether the arguments must be 64-bit: one is, or the result may not fit in fewer."""
        if any(arg.wide for arg in args):
            return True
        ints = kind_of(expr) is Kind.INT and any(arg.kind is Kind.INT for arg in args)
        return ints and not int_range(expr, self._dtypes, self._ranges).within(INT32)

    def _infix(self, operator: str, args: list[Printed], kind: Kind, lanes: bool, wide: bool) -> Printed:
        level = LEVELS.get(operator, BITS)
        if lanes and args[0].kind is Kind.BOOL:
            args = [self._to_lanes(arg) for arg in args]
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
            args = [self._to_lanes(arg) for arg in args]
        if op == "not":
            return Printed(f"{'~' if lanes else '!'}{args[0].within(UNARY)}", Kind.BOOL, lanes, level=UNARY)
        operator = _LOGICAL[op][lanes]
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

    def _to_lanes(self, value: Printed) -> Printed:
        if value.lanes:
            return value
        wide = value.wide and not self._lanes_are_wide(lanes=True)
        return Printed(f"splat({value.text})", value.kind, lanes=True, wide=wide)
