"""The sequential kernel in Triton: its source, how channels are divided among programs, and what a launch passes.

A value over d is a vector, one over e another; one over both is a matrix, d along its first axis. Axes are as long as
the next power of two, and what lies past their ends takes no part in sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from attncc.diagnostics import BuildError
from attncc.emit.render import fill
from attncc.emit.triton import FLOAT_NAMES
from attncc.emit.triton_expressions import PRODUCT, Expressions
from attncc.emit.triton_facts import Axis as Place
from attncc.emit.triton_text import docstring, functions, tidy
from attncc.ir.nodes import Constant, Variable
from attncc.ir.rewrite import walk
from attncc.ir.text import to_text
from attncc.ir.types import DType, Kind
from attncc.plan.errors import StateTooLarge
from attncc.plan.sequential import STATE, Axis, Operand, SequentialPlan, Step
from attncc.plan.triton_tiles import power_of_two

# Bytes of the state in the registers of a warp: 16 of each thread, which leaves room for several values as large. Where
# value channels do not depend on each other a program is one warp, with no other to wait for at each token.
_WARP_BYTES = 32 * 16 * 4
# Beyond twice as many for 16 warps, which have 128 registers a thread, most of the state would lie in memory.
_MOST_WARPS = 16
_MOST_BYTES = _MOST_WARPS * _WARP_BYTES * 2


@dataclass(frozen=True, slots=True)
class SequentialLayout:
    """key_padded, value_padded: channels, up to a power of two; value_block: value channels of a program."""

    key_padded: int
    value_padded: int
    value_block: int
    num_warps: int

    @property
    def blocks(self) -> int:
        """Programs that share a head."""
        return self.value_padded // self.value_block


def layout_of(plan: SequentialPlan) -> SequentialLayout:
    """Raises BuildError where no program can hold what it must."""
    keys, values = power_of_two(plan.key_width), power_of_two(plan.value_width)
    of_channel = keys * plan.state_dtype.bytes
    block = values if plan.couples_values else min(values, max(_WARP_BYTES // of_channel, 1))
    if of_channel * block > _MOST_BYTES:
        raise BuildError(
            StateTooLarge(None, plan.spec.name, plan.key_width, plan.value_width, str(plan.target), _MOST_BYTES)
        )
    return SequentialLayout(keys, values, block, min(max(of_channel * block // _WARP_BYTES, 1), _MOST_WARPS))


def source_of(plan: SequentialPlan, templates: Sequence[Path] = ()) -> str:
    """The source of the kernel. Raises BuildError where its template cannot be rendered, or where it would need more
    memory than a program has."""
    return fill("sequential.py.jinja", plan, plan.name, plan.target, SequentialTritonPrinter(plan).filters(), templates)


def stride_names(operand: Operand) -> tuple[str, ...]:
    """The strides of an operand that a kernel takes: those of axes along which it may differ."""
    axes = ("b", "h", *("t" if operand.per_token else ""), *(axis.channel for axis in operand.axes))
    return tuple(f"{operand.name}_stride_{axis}" for axis in axes)


class SequentialTritonPrinter:
    """The filters of the template."""

    def __init__(self, plan: SequentialPlan) -> None:
        self.layout = layout_of(plan)
        self._plan = plan
        self._triton = Expressions(double=plan.dtype is DType.F64)
        self._axes = plan.axes
        kinds = {STATE: Kind.FLOAT, **{x.name: x.kind for x in (*plan.operands, *plan.steps)}}
        self._triton.axes = {name: _place(axes) for name, axes in self._axes.items()}
        self._triton.wide = {name for name, kind in kinds.items() if kind is Kind.INT}

    def filters(self) -> Mapping[str, Callable[..., object]]:
        return {
            "layout": lambda _: self.layout,
            "header": self._header,
            "functions": functions,
            "tidy": tidy,
            "strides": stride_names,
            "compute_dtype": lambda dtype: "tl.float64" if dtype is DType.F64 else "tl.float32",
            "triton_dtype": lambda dtype: f"tl.{FLOAT_NAMES[dtype]}",
            "address": self._address,
            "inside": self._inside,
            "widened": lambda operand: ".to(FLOAT)" if operand.kind is Kind.FLOAT else "",
            "further_axes": self._further_axes,
            "offsets": self._offsets,
            "power_of_two": power_of_two,
            "value": self._value,
            "meaning": lambda operand: to_text(operand.source),
        }

    def _header(self, plan: SequentialPlan) -> str:
        what = f"a recurrence token by token, {plan.dtype.value}, a state of {plan.key_width} x {plan.value_width}"
        return docstring(plan.name, what, plan.target, plan.spec)

    # --- axes -------------------------------------------------------------------------------------------------------

    def _offsets(self, axis: Axis) -> str:
        """The name of the vector of the places along an axis."""
        own = self._plan.key_width if axis.channel == "d" else self._plan.value_width
        return f"offs_{axis.channel}" + (str(axis.size) if axis.size != own else "")

    def _further_axes(self, plan: SequentialPlan) -> list[Axis]:
        """The axes of values beside those of the state."""
        state = self._axes[STATE]
        every = [axis for axes in self._axes.values() for axis in axes]
        every += [step.over for step in plan.steps if step.over is not None]
        return [axis for axis in dict.fromkeys(every) if axis not in state]

    def _address(self, operand: Operand) -> str:
        """Where the elements of an operand lie, beyond those of its batch and head."""
        terms = [operand.name + "_head"]
        terms += [f"t * {operand.name}_stride_t"] if operand.per_token else []
        for axis in operand.axes:
            place = self._turned(self._offsets(axis), axis, operand.axes)
            terms.append(f"{place} * {operand.name}_stride_{axis.channel}")
        return " + ".join(terms)

    def _inside(self, axes: Sequence[Axis]) -> str:
        """Which places along `axes` exist; nothing where all do."""
        conditions = [self._turned(f"({self._offsets(a)} < {a.size})", a, axes) for a in axes if self._is_padded(a)]
        return " & ".join(conditions)

    def _is_padded(self, axis: Axis) -> bool:
        return power_of_two(axis.size) != axis.size

    @staticmethod
    def _turned(vector: str, axis: Axis, axes: Sequence[Axis]) -> str:
        if len(axes) < 2:
            return vector
        return vector + ("[:, None]" if axis.channel == "d" else "[None, :]")

    # --- values -----------------------------------------------------------------------------------------------------

    def _value(self, step: Step) -> str:
        """What a step computes, as large as its axes say."""
        over = () if step.over is None else (step.over,)
        axes = sorted((*step.axes, *over), key=lambda axis: axis.channel)
        text = self._triton.print(step.value, matrix=len(axes) == 2)
        varying = {axis for node in walk(step.value) if isinstance(node, Variable) for axis in self._axes[node.name]}
        whole = text.source
        if not axes and isinstance(step.value, Constant):
            whole = f"tl.full((), {text.source}, FLOAT)"
        elif not varying.issuperset(axes):
            lengths = ", ".join(self._length(axis) for axis in axes)
            whole = f"tl.zeros([{lengths}], FLOAT) + {text.at(PRODUCT)}"
        if step.over is None:
            return whole
        if self._is_padded(step.over):
            inside = self._turned(f"({self._offsets(step.over)} < {step.over.size})", step.over, axes)
            neutral = "0.0" if step.op == "sum" else 'float("-inf")'
            whole = f"tl.where({inside}, {whole}, {neutral})"
        return f"tl.{step.op}({whole}, {axes.index(step.over)})"

    def _length(self, axis: Axis) -> str:
        if axis in self._axes[STATE]:
            return "KEY_PADDED" if axis.channel == "d" else "VALUE_BLOCK"
        return str(power_of_two(axis.size))


def _place(axes: tuple[Axis, ...]) -> Place:
    match [axis.channel for axis in axes]:
        case ["d", "e"]:
            return Place.BOTH
        case ["d"]:
            return Place.FIRST
        case ["e"]:
            return Place.SECOND
        case _:
            return Place.NONE
