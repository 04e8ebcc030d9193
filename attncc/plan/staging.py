"""How a core makes its operands itself, of the inputs of a call, a few tokens at a time.

Before: the operands of a recurrence as expressions over b, h, t and one channel.
After:  inputs, which are read where they lie, and steps. A step computes one value for each channel of a token (or one
        for the token), of inputs and earlier steps; a sum over channels is a step of its own, and what several operands
        share is one step.

    q = l2norm(q), query = scale * q          x0[d] = row of q
                                              z0    = sum over d of x0 * x0
                                              query = 0.125 * x0 * rsqrt(z0 + 1e-6)

Operands that PyTorch made beforehand would be written to memory and read again, which takes as long as a core does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from attncc.ir.nodes import Constant, Element, Expr, Index, Load, Parameter, Reduce, RowName, Size, Variable
from attncc.ir.recurrence import Recurrence
from attncc.ir.rewrite import contains, has_free, kind_of, map_children, substitute
from attncc.ir.types import DType, Kind
from attncc.passes.simplify import simplify_expr
from attncc.passes.updates import UpdateForm
from attncc.plan.factors import take_factors_out
from attncc.plan.sequential import CHANNELS, Axis, Channel, Step

_ROWS: tuple[RowName, ...] = ("q", "k", "v")
_COORDINATES = ("b", "h", "hkv", "t", "d", "e")


@dataclass(frozen=True, slots=True)
class Input:
    """A row of q, k or v, or what a captured tensor has for a token: one number, or one for each channel of `axes`.

    places: for each axis of the tensor, the coordinate along it, or a number.
    """

    name: str
    tensor: str
    dtype: DType
    axes: tuple[Axis, ...]
    places: tuple[str | int, ...]

    @property
    def varies(self) -> bool:
        """Whether tokens have their own."""
        return "t" in self.places


@dataclass(frozen=True, slots=True)
class Staging:
    """What a core reads and how it makes its operands. A step of the name of an operand (`query`, `key_0`, `value_0`,
    `erase_0`, `log_decay`, `gate`, `bonus`) is that operand; `query_factor` is what the core multiplies each of its
    channels by, and so on. scalars: run-time scalars that steps read."""

    inputs: tuple[Input, ...]
    scalars: tuple[tuple[str, Kind], ...]
    steps: tuple[Step, ...]


class NotStaged(Exception):
    """A core cannot make these operands itself; says why."""


def plan_staging(
    recurrence: Recurrence, form: UpdateForm, dtypes: Mapping[str, DType], head_dim_qk: int, head_dim_v: int
) -> Staging:
    """The staging of `form`. dtypes: of q, k, v and each captured tensor. Raises `NotStaged`."""
    if recurrence.normalizer == "sum" or recurrence.bidirectional:
        raise NotStaged("outputs are divided by a sum, or read after all tokens")
    sizes: dict[Expr, Expr] = {Size("D"): Constant(head_dim_qk), Size("E"): Constant(head_dim_v)}
    width = simplify_expr(substitute(recurrence.key_width, sizes))
    if width != Constant(head_dim_qk):
        raise NotStaged("feature maps change the width of rows")
    lowering = _Lowering(recurrence, dtypes, {"d": Axis("d", head_dim_qk), "e": Axis("e", head_dim_v)}, sizes)
    for name, channel, expr in _operands(form):
        lowering.add(name, channel, expr)
    kinds = {p.name: p.kind for p in recurrence.scalars}
    used = [n for n in kinds if any(contains(s.value, lambda x, n=n: _reads_scalar(x, n)) for s in lowering.steps)]
    inputs = tuple(lowering.inputs.values())
    rows = [x for x in inputs if x.axes]
    steps = take_factors_out(lowering.steps, [x.name for x in rows], [x.name for x in rows if x.dtype is dtypes["q"]])
    return Staging(inputs, tuple((n, kinds[n]) for n in used), steps)


def _operands(form: UpdateForm) -> list[tuple[str, Channel | None, Expr]]:
    sides: dict[str, Channel] = {"key": "d", "value": "e"}
    by_key: list[tuple[str, Expr | None]] = [("query", form.query)]
    by_value: list[tuple[str, Expr | None]] = []
    for number, update in enumerate(form.updates):
        by_key += [(f"key_{number}", update.key), (f"erase_{number}", update.erase)]
        by_value += [(f"value_{number}", update.value)]
    by_value += [("gate", form.gate), ("bonus", form.bonus)]
    found: list[tuple[str, Channel | None, Expr | None]] = [
        *((name, "d", expr) for name, expr in by_key),
        *((name, "e", expr) for name, expr in by_value),
        ("log_decay", sides.get(form.side), form.log_decay),
    ]
    return [(name, channel, expr) for name, channel, expr in found if expr is not None]


def _reads_scalar(node: Expr, name: str) -> bool:
    return isinstance(node, Parameter) and node.name == name


@dataclass(slots=True)
class _Lowering:
    """Collects inputs and steps."""

    recurrence: Recurrence
    dtypes: Mapping[str, DType]
    channels: Mapping[Channel, Axis]
    sizes: Mapping[Expr, Expr]
    inputs: dict[tuple[str, tuple[str | int, ...]], Input] = field(
        default_factory=dict[tuple[str, tuple[str | int, ...]], Input]
    )
    steps: list[Step] = field(default_factory=list[Step])
    _known: dict[tuple[Expr, tuple[Axis, ...]], Variable] = field(
        default_factory=dict[tuple[Expr, tuple[Axis, ...]], Variable]
    )

    def add(self, name: str, channel: Channel | None, expr: Expr) -> None:
        """One operand."""
        expr = simplify_expr(substitute(expr, self.sizes))
        axes = () if channel is None else (self.channels[channel],)
        self.steps.append(Step(name, Kind.FLOAT, axes, self._lowered(expr, axes)))

    def _lowered(self, expr: Expr, axes: tuple[Axis, ...]) -> Expr:
        """`expr` in a loop over `axes`, of which there is one or none."""
        match expr:
            case Constant() | Parameter():
                return expr
            case Index(name="t"):
                raise NotStaged("rows depend on their positions")
            case Load(tensor=name) if name in _ROWS:
                return self._row(name, expr)
            case Load():
                return self._input(expr.tensor, expr)
            case Element(row=row, index=Index(name=channel)) if channel in CHANNELS:
                return self._input(row, Load(row, (Index("b"), Index("h"), Index("t"), Index(channel)), Kind.FLOAT))
            case Element():
                raise NotStaged("rows read elements in another order than their own")
            case Reduce():
                return self._reduced(expr)
            case _ if axes and not any(has_free(expr, axis.channel) for axis in axes):
                return self._once(expr, ())
            case _:
                return map_children(expr, lambda child: self._lowered(child, axes))

    def _row(self, name: str, load: Load) -> Variable:
        """An element of a transformed row."""
        channel: Channel = "e" if name == "v" else "d"
        if load.indices != (Index("b"), Index("h"), Index("t"), Index(channel)):
            raise NotStaged("rows read elements in another order than their own")
        transform = {"q": self.recurrence.q, "k": self.recurrence.k, "v": self.recurrence.v}[name]
        transform = simplify_expr(substitute(transform, self.sizes))
        if channel == "e":  # Transforms run over `d`, whatever the row.
            if contains(transform, lambda node: isinstance(node, Reduce)):
                raise NotStaged("values are transformed by sums over their elements")
            transform = substitute(transform, {Index("d"): Index("e")})
        if isinstance(transform, Element):
            lowered = self._lowered(transform, (self.channels[channel],))
            assert isinstance(lowered, Variable)
            return lowered
        return self._once(transform, (self.channels[channel],))

    def _input(self, tensor: str, load: Load) -> Variable:
        places: list[str | int] = []
        for index in load.indices:
            match index:
                case Index(name=name) if name in _COORDINATES and name not in places:
                    places.append(name)
                case Constant(value=int() as value) if value >= 0:
                    places.append(value)
                case _:
                    raise NotStaged(f"`{tensor}` is read at a place that is computed")
        axes = tuple(self.channels[channel] for channel in CHANNELS if channel in places)
        if len(axes) > 1:
            raise NotStaged(f"`{tensor}` is a matrix")
        key = (tensor, tuple(places))
        if key not in self.inputs:
            name = f"x{len(self.inputs)}"
            self.inputs[key] = Input(name, tensor, self.dtypes[tensor], axes, tuple(places))
        return Variable(self.inputs[key].name, load.kind)

    def _reduced(self, expr: Reduce) -> Variable:
        if all(has_free(expr.body, channel) for channel in CHANNELS):
            raise NotStaged("rows are multiplied with matrices")
        over = self.channels[expr.over]
        if simplify_expr(substitute(expr.size, self.sizes)) != Constant(over.size):
            raise NotStaged("a sum runs over a part of a row")
        if (expr, ()) not in self._known:
            value = self._lowered(expr.body, (over,))
            self._known[expr, ()] = self._step(Kind.FLOAT, (), value, over, expr)
        return self._known[expr, ()]

    def _once(self, expr: Expr, axes: tuple[Axis, ...]) -> Variable:
        if (expr, axes) not in self._known:
            self._known[expr, axes] = self._step(kind_of(expr), axes, self._lowered_below(expr, axes))
        return self._known[expr, axes]

    def _lowered_below(self, expr: Expr, axes: tuple[Axis, ...]) -> Expr:
        return map_children(expr, lambda child: self._lowered(child, axes))

    def _step(
        self, kind: Kind, axes: tuple[Axis, ...], value: Expr, over: Axis | None = None, reduce: Reduce | None = None
    ) -> Variable:
        name = f"z{sum(step.name.startswith('z') for step in self.steps)}"
        self.steps.append(Step(name, kind, axes, value, over, "sum" if reduce is None else reduce.op))
        return Variable(name, kind)
