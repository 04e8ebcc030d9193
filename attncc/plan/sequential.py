"""The plan of the sequential kernel: a recurrence without a normal form, as straight-line code for one token.

Before: statements, scalar expressions over d and e with products with the state as `Reduce`s in them.
After:  operands, which are made of the inputs for all tokens before the kernel runs, and steps. A step computes one
        value for each channel that it runs over, of operands, earlier steps and the state at these channels alone; a
        sum over channels is a step of its own. What varies with fewer channels than the expression around it is a step
        too, so that nothing is computed more often than it differs.

    S = tanh(S) + outer(k, v - k @ S)          x0[d] = k   x1[e] = v
                                               z0[e] = sum over d of x0 * S
                                               z1[e] = x1 - z0
                                               S[d, e] = tanh(S) + x0 * z1
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, assert_never

from attncc.diagnostics import BuildError
from attncc.ir.errors import IRError
from attncc.ir.nodes import Apply, Constant, Expr, Load, Reduce, Size, Variable
from attncc.ir.recurrence import Bind, Output, Recurrence, Statement, Update, map_expressions
from attncc.ir.rewrite import contains, has_free, kind_of, map_children, substitute
from attncc.ir.text import to_text
from attncc.ir.types import DType, Kind
from attncc.passes.simplify import simplify_expr
from attncc.plan.errors import StateInIndex
from attncc.plan.nodes import Target

Channel = Literal["d", "e"]
CHANNELS: tuple[Channel, ...] = ("d", "e")

STATE, OUTPUT = "S", "out"


@dataclass(frozen=True, slots=True)
class Axis:
    """A channel index and how many values it has."""

    channel: Channel
    size: int


@dataclass(frozen=True, slots=True)
class Operand:
    """What a kernel is given: `source`, one number for each of `axes`, in this order; for every token where it differs
    between tokens."""

    name: str
    kind: Kind
    dtype: DType
    axes: tuple[Axis, ...]
    source: Expr
    per_token: bool


@dataclass(frozen=True, slots=True)
class Step:
    """`name` becomes `value`, for each of `axes`; or the sum (maximum) of `value` over one more axis, if it has
    `over`. The state and the output are `S` and `out`; what else it names is new."""

    name: str
    kind: Kind
    axes: tuple[Axis, ...]
    value: Expr
    over: Axis | None = None
    op: Literal["sum", "max"] = "sum"


@dataclass(frozen=True, slots=True)
class SequentialPlan:
    """What a sequential kernel is compiled for; lengths, batch, heads and strides are not part of it.

    dtype        of the rows and of the output; the state and all that is computed are f32 (f64 beside f64)
    key_width    of the state, value_width too: with the column of weights, where outputs are divided by their sum
    operands     read at each token, or once per head
    steps        of a token, in order
    """

    kernel: Literal["sequential"]
    name: str
    spec: Recurrence
    target: Target
    dtype: DType
    key_width: int
    value_width: int
    operands: tuple[Operand, ...]
    steps: tuple[Step, ...]

    @property
    def state_dtype(self) -> DType:
        return DType.F64 if self.dtype is DType.F64 else DType.F32

    @property
    def stored(self) -> DType:
        """Of the output: that of the state where it has yet to be divided."""
        return self.dtype if self.spec.normalizer == "none" else self.state_dtype

    @property
    def writes(self) -> bool:
        """Whether tokens have an output."""
        return any(step.name == OUTPUT for step in self.steps)

    @property
    def axes(self) -> Mapping[str, tuple[Axis, ...]]:
        """Those of every variable."""
        state = (Axis("d", self.key_width), Axis("e", self.value_width))
        return {STATE: state, **{x.name: x.axes for x in (*self.operands, *self.steps)}}

    @property
    def couples_values(self) -> bool:
        """Whether a value channel of the state depends on others."""
        return any(step.over is not None and step.over.channel == "e" for step in self.steps)


def plan_sequential(
    recurrence: Recurrence, target: Target, dtype: DType, head_dim_qk: int, head_dim_v: int
) -> SequentialPlan:
    """The kernel that executes the statements of `recurrence`. head_dim_qk, head_dim_v: the widths of q (and k) and v.

    Raises BuildError where a tensor is read at a place that depends on the state.
    """
    sizes: dict[Expr, Expr] = {Size("D"): Constant(head_dim_qk), Size("E"): Constant(head_dim_v)}
    spec = map_expressions(recurrence, lambda expr: simplify_expr(substitute(expr, sizes)))
    keys = _constant(simplify_expr(substitute(recurrence.key_width, sizes)))
    values = head_dim_v + (recurrence.normalizer == "sum")
    planner = _Planner(dtype, {"d": Axis("d", keys), "e": Axis("e", values)})
    for statement in spec.statements:
        planner.add(statement)
    return SequentialPlan(
        kernel="sequential",
        name=f"{recurrence.name}_sequential",
        spec=replace(spec, key_width=Constant(keys)),
        target=target,
        dtype=dtype,
        key_width=keys,
        value_width=values,
        operands=tuple(planner.operands.values()),
        steps=tuple(planner.steps),
    )


@dataclass(slots=True)
class _Planner:
    """Collects operands and steps. channels: those of the state."""

    dtype: DType
    channels: Mapping[Channel, Axis]
    operands: dict[tuple[Expr, tuple[Axis, ...]], Operand] = field(
        default_factory=dict[tuple[Expr, tuple[Axis, ...]], Operand]
    )
    steps: list[Step] = field(default_factory=list[Step])
    # What names stand for; the steps that still hold, by what they compute.
    _bound: dict[str, Variable] = field(default_factory=dict[str, Variable])
    _known: dict[tuple[Expr, tuple[Axis, ...]], Variable] = field(
        default_factory=dict[tuple[Expr, tuple[Axis, ...]], Variable]
    )

    def add(self, statement: Statement) -> None:
        everything = self._axes(CHANNELS, self.channels)
        match statement:
            case Update(value=value):
                self.steps.append(Step(STATE, Kind.FLOAT, everything, self._lowered(value, everything)))
                self._known.clear()
            case Output(value=value):
                axes = (self.channels["e"],)
                self.steps.append(Step(OUTPUT, Kind.FLOAT, axes, self._lowered(value, axes)))
            case Bind(name=name, value=value):
                axes = self._free(value, self.channels)
                lowered = self._lowered(value, axes)
                if isinstance(lowered, Variable) and lowered.name != STATE:
                    self._bound[name] = lowered
                else:
                    self._bound[name] = self._step(kind_of(value), axes, lowered)
            case _:
                assert_never(statement)

    def _lowered(self, expr: Expr, axes: tuple[Axis, ...], *, within_choice: bool = False) -> Expr:
        """`expr` in a loop over `axes`: over constants and variables that vary with some of them."""
        if isinstance(expr, Constant):
            return expr
        channels: dict[Channel, Axis] = {axis.channel: axis for axis in axes}
        free = self._free(expr, channels)
        if self._is_operand(expr, free):
            return self._operand(expr, free)
        match expr:
            case Load(tensor=name) if name == STATE:
                return Variable(STATE, Kind.FLOAT)
            case Load(tensor=name) if name in self._bound:
                return self._bound[name]
            case Load(tensor=name, span=span):
                raise BuildError(StateInIndex(span, name))
            case Reduce():
                return self._reduced(expr, channels)
            case Apply(op="where", args=(condition, *branches)) if len(free) == len(axes):
                # What a choice leaves out stays within it: its derivative may be infinite.
                chosen = (self._lowered(branch, axes, within_choice=True) for branch in branches)
                return Apply("where", (self._lowered(condition, axes), *chosen), expr.span)
            case _ if len(free) < len(axes) and not within_choice:
                return self._once(expr, free)
            case _:
                return map_children(expr, lambda child: self._lowered(child, axes, within_choice=within_choice))

    def _reduced(self, expr: Reduce, channels: Mapping[Channel, Axis]) -> Variable:
        over = Axis(expr.over, _constant(expr.size))
        inner: dict[Channel, Axis] = {**channels, expr.over: over}
        axes = self._free(expr, channels)
        body = self._axes([c for c in CHANNELS if c == expr.over or inner.get(c) in axes], inner)
        if (expr, axes) not in self._known:
            value = self._lowered(expr.body, body)
            self._known[expr, axes] = self._step(Kind.FLOAT, axes, value, over, expr.op)
        return self._known[expr, axes]

    def _once(self, expr: Expr, axes: tuple[Axis, ...]) -> Variable:
        """What varies with `axes` alone, computed for these."""
        if (expr, axes) not in self._known:
            self._known[expr, axes] = self._step(kind_of(expr), axes, self._lowered(expr, axes))
        return self._known[expr, axes]

    def _step(
        self,
        kind: Kind,
        axes: tuple[Axis, ...],
        value: Expr,
        over: Axis | None = None,
        op: Literal["sum", "max"] = "sum",
    ) -> Variable:
        number = sum(step.name not in (STATE, OUTPUT) for step in self.steps)
        self.steps.append(Step(f"z{number}", kind, axes, value, over, op))
        return Variable(self.steps[-1].name, kind)

    def _operand(self, expr: Expr, axes: tuple[Axis, ...]) -> Variable:
        if (expr, axes) not in self.operands:
            kind = kind_of(expr)
            wide = DType.F64 if self.dtype is DType.F64 else DType.F32
            is_row = isinstance(expr, Load) and expr.tensor in ("q", "k", "v")
            dtype = self.dtype if is_row else {Kind.FLOAT: wide, Kind.INT: DType.I64, Kind.BOOL: DType.BOOL}[kind]
            name = f"x{len(self.operands)}"
            self.operands[expr, axes] = Operand(name, kind, dtype, axes, expr, has_free(expr, "t"))
        operand = self.operands[expr, axes]
        return Variable(operand.name, operand.kind)

    def _is_operand(self, expr: Expr, free: tuple[Axis, ...]) -> bool:
        """Whether `expr` can be computed beforehand, and should be: one number per token and pair of channels would be
        as much for every token as the state itself."""
        if contains(expr, self._is_state) or contains(expr, _mixes_channels):
            return False
        if len(free) < 2:
            return True
        plain = isinstance(expr, Load) or not has_free(expr, "t")
        return plain and not contains(expr, lambda node: isinstance(node, Reduce))

    def _is_state(self, node: Expr) -> bool:
        return isinstance(node, Load) and (node.tensor == STATE or node.tensor in self._bound)

    def _free(self, expr: Expr, channels: Mapping[Channel, Axis]) -> tuple[Axis, ...]:
        return self._axes([c for c in CHANNELS if has_free(expr, c)], channels)

    @staticmethod
    def _axes(of: list[Channel] | tuple[Channel, ...], channels: Mapping[Channel, Axis]) -> tuple[Axis, ...]:
        return tuple(channels[channel] for channel in of)


def _mixes_channels(node: Expr) -> bool:
    """Whether it is a sum of what varies with both channels."""
    return isinstance(node, Reduce) and all(has_free(node.body, channel) for channel in CHANNELS)


def _constant(size: Expr) -> int:
    if not isinstance(size, Constant) or type(size.value) is not int:
        raise IRError(f"no length at compile time: {to_text(size)}")
    return size.value
