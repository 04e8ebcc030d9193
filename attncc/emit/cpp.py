"""The filters of the C++ templates: what a plan holds, as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from attncc.emit.cpp_expressions import PlanExpressions, called_functions
from attncc.emit.cpp_loads import TiledLoad
from attncc.emit.cpp_machine import (
    CLASSIFIED_KEYS,
    ELEMENT_TYPES,
    SCALAR_TYPES,
    argument_fields,
    machine_of,
    mangle,
    table_element,
    table_type,
)
from attncc.emit.cpp_plan import expressions_of, own_axes, varying_partials
from attncc.emit.cpp_text import Printed, tidy
from attncc.ir.nodes import Constant, Expr, Load, Variable
from attncc.ir.rewrite import children
from attncc.ir.text import to_text
from attncc.ir.types import Kind
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


class CppPrinter:
    """The filters of the C++ templates, for one plan."""

    extension = "cpp"

    def __init__(self, plan: KernelPlan) -> None:
        self.plan = plan
        self._cpp = PlanExpressions(plan)

    def filters(self) -> Mapping[str, Callable[..., object]]:
        return {
            "machine": machine_of,
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
            "row_levels": lambda _: self._cpp.row_levels,
            "table_element": table_element,
            "tiled_loads": lambda _: self._cpp.tiled,
            "tile_type": lambda tiled: self._lane_type(self._cpp.print_load(tiled.value)),
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

    def scalar(self, expr: Expr) -> str:
        """`expr`, which no query changes, as a scalar."""
        return self._cpp.print(expr).text

    def outer(self, expr: Expr) -> str:
        """`expr` of a level outside rows; there, a rows kernel computes in f64."""
        return self._cpp.outer(expr).text

    def range_end(self, expr: Expr) -> str:
        """An end of a range of keys, in 32 bits: where it may not fit, brought back to the nearest key."""
        printed = self._cpp.print(expr)
        return f"within({printed.text}, N)" if printed.wide else printed.text

    def reads_k_in_place(self, plan: ForwardPlan) -> bool:
        """Whether products read the keys where the call has them; a row must be a whole number of words."""
        machine = machine_of(plan)
        return not (machine.widened or (machine.pairs and plan.head_dim_qk % 2))

    def scalar_type(self, scalar: ScalarArgument) -> str:
        """The C++ type of a run-time scalar of the specification."""
        return "double" if self._cpp.row_levels and scalar.kind is Kind.FLOAT else SCALAR_TYPES[scalar.kind]

    def lanes(self, expr: Expr) -> str:
        """`expr` as a vector."""
        return self._cpp.to_lanes(self._cpp.print(expr)).text

    def staged(self, staged: Staged, indent: int = 8) -> str:
        """Statements that return `staged.value` in lanes."""
        return self._statements(staged.bindings, [staged.value], self.lanes(staged.value), indent)

    def staged_values(self, staged: StagedValues, indent: int = 8) -> str:
        """Statements that return those of `staged.values` that vary, the first one always, in lanes."""
        values = [staged.values[0], *(value for value in staged.values[1:] if not isinstance(value, Constant))]
        return self._statements(staged.bindings, values, f"{{{', '.join(map(self.lanes, values))}}}", indent)

    def tile_value(self, tiled: TiledLoad) -> str:
        """Statements that return a value of `tiled`."""
        value = tiled.staged.value
        assert isinstance(value, Load)
        return self._statements(tiled.staged.bindings, [value], self._cpp.print_load(value).text, indent=8)

    def _statements(self, bindings: Sequence[Binding], values: Sequence[Expr], result: str, indent: int) -> str:
        lines = [f"return {result};"]
        # What only loads of whole tiles need is computed there.
        needed = set[str]().union(*map(self._variables_of, values))
        for binding in reversed(bindings):
            if binding.name in needed:
                needed |= self._variables_of(binding.value)
                lines.append(
                    f"const {self.type_of(binding)} {mangle(binding.name)} = {self._cpp.print(binding.value).text};"
                )
        return f"\n{' ' * indent}".join(reversed(lines))

    def _variables_of(self, expr: Expr) -> set[str]:
        """The variables that the text of `expr` reads."""
        if isinstance(expr, Variable):
            return {expr.name}
        if any(expr == tiled.load for tiled in self._cpp.tiled):
            return set()
        return set[str]().union(*(self._variables_of(child) for child in children(expr)))

    def type_of(self, binding: Binding) -> str:
        """The C++ type of a binding."""
        printed = self._cpp.variables[binding.name]
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

    def plane_elements(self, _: KernelPlan) -> set[str]:
        """The C++ types of the elements of planes."""
        return {
            ELEMENT_TYPES[self._cpp.dtypes[tiled.load.tensor]] for tiled in self._cpp.tiled if tiled.axis is not None
        }

    def plane_row(self, plane: TiledLoad) -> str:
        """The address of element 0, along the keys, of the row of lane `i` of a plane."""
        indices = [self._cpp.print(index) for index in plane.value.indices]
        texts = [index.at_lane() for index in indices]
        assert plane.axis is not None
        texts[plane.axis] = "0"
        return f"{mangle(plane.load.tensor)}.address({', '.join(texts)})"

    def place_indices(self, adjoint: Adjoint) -> str:
        """The indices, for lane `i`, of the entry that a pair's adjoint adds to; of a plane, where its row begins."""
        assert adjoint.place is not None
        texts = [self._cpp.print(index).at_lane() for index in adjoint.place.indices]
        axis = self.place_axis(adjoint)
        return ", ".join("0" if number == axis else text for number, text in enumerate(texts))

    def place_axis(self, adjoint: Adjoint) -> int | None:
        """The axis of the tensor of a pair's adjoint along which keys lie; None where it is no plane."""
        assert self._cpp.definitions is not None
        return None if adjoint.place is None else self._cpp.definitions.key_axis(adjoint.place)

    def place_first(self, adjoint: Adjoint) -> str:
        """The index, along the keys, of the key `key` in a plane."""
        axis = self.place_axis(adjoint)
        assert adjoint.place is not None
        assert axis is not None
        return self._cpp.print(adjoint.place.indices[axis]).text

    def takes_addresses(self, plan: KernelPlan) -> bool:
        """Whether the kernel asks where the elements of tensors lie."""
        adjoints = plan.adjoints if isinstance(plan, BackwardPlan) else ()
        return bool(self.plane_elements(plan)) or any(adjoint.place is not None for adjoint in adjoints)

    def plane_first(self, plane: TiledLoad) -> str:
        """The index, along the keys, of the key `key`."""
        assert plane.axis is not None
        return self._cpp.print(plane.value.indices[plane.axis]).text

    def has_bands(self, _: KernelPlan) -> bool:
        """Whether a load of the kernel is a band."""
        return any(".band(" in self._cpp.print_load(load).text for load in self._cpp.all_loads())

    def tensor_type(self, tensor: TensorArgument) -> str:
        """The C++ type of a captured tensor."""
        field = next(f for f in argument_fields(self.plan) if f.captured and f.slots[0][0] == tensor.name)
        return field.declaration.rsplit(" ", 1)[0]

    def functions(self, plan: KernelPlan) -> list[str]:
        """The functions of the operator table that the kernel calls, those that others use first."""
        return called_functions(expressions_of(plan, self._cpp.row_levels))

    def element_types(self, plan: KernelPlan) -> set[str]:
        """The C++ types of the elements that the kernel reads and writes."""
        return {
            field.declaration.split("<")[1].split(",")[0].split(">")[0].removeprefix("const ")
            for field in argument_fields(plan)
            if "<" in field.declaration
        } | ({ELEMENT_TYPES[plan.stored]} if isinstance(plan, RowsPlan) else set())

    def loads_lanes(self, _: KernelPlan) -> bool:
        """Whether captured tensors are read at an index that differs between queries."""
        return any(self._cpp.print_load(load).lanes for load in self._cpp.all_loads())
