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

from attncc.ir.nodes import Apply, Constant, Element, Expr, Index, Load, Parameter, Reduce, RowName, Size, Variable
from attncc.ir.recurrence import Recurrence
from attncc.ir.rewrite import contains, has_free, kind_of, map_children, substitute
from attncc.ir.types import DType, Kind
from attncc.passes.simplify import simplify_expr
from attncc.passes.updates import UpdateForm
from attncc.plan.factors import take_factors_out
from attncc.plan.features import Features, MadeRow, is_made, plan_features
from attncc.plan.sequential import CHANNELS, Axis, Channel, Step
from attncc.plan.staged_inputs import Input, Inputs, NotStaged, Table, is_of_places

_ROWS: tuple[RowName, ...] = ("q", "k", "v")


@dataclass(frozen=True, slots=True)
class Staging:
    """What a core reads and how it makes its operands. A step of the name of an operand (`query`, `key_0`, `value_0`,
    `erase_0`, `log_decay`, `gate`, `bonus`) is that operand; `query_factor` is what the core multiplies each of its
    channels by, and so on. scalars: run-time scalars that steps read. features: rows that are made before any step, and
    inputs of that name. tables: what inputs may read beside tensors."""

    features: Features
    inputs: tuple[Input, ...]
    tables: tuple[Table, ...]
    scalars: tuple[tuple[str, Kind], ...]
    steps: tuple[Step, ...]

    @property
    def passed(self) -> tuple[Input, ...]:
        """The inputs that a call passes: those of features, and those that are no rows of them."""
        made = [row.row for row in self.features.rows]
        return (*self.features.inputs, *(x for x in self.inputs if x.name not in made))


def plan_staging(
    recurrence: Recurrence, form: UpdateForm, dtypes: Mapping[str, DType], head_dim_qk: int, head_dim_v: int
) -> Staging:
    """The staging of `form`. dtypes: of q, k, v and each captured tensor. Raises `NotStaged`."""
    if recurrence.bidirectional:
        raise NotStaged("outputs are read after all tokens")
    sizes: dict[Expr, Expr] = {Size("D"): Constant(head_dim_qk), Size("E"): Constant(head_dim_v)}
    parameters = {p.name: p for p in recurrence.tensors}
    key, value = _width(recurrence.key_width, sizes), head_dim_v + (recurrence.normalizer == "sum")
    made = _made(recurrence, sizes, key, value)
    features = plan_features(made, Inputs(parameters, dtypes, sizes, "r"))
    lowering = _Lowering(
        recurrence,
        Inputs(parameters, dtypes, sizes, "x"),
        {"d": Axis("d", key), "e": Axis("e", value)},
        {x.row: _made_input(x, dtypes) for x in features.rows},
    )
    for name, channel, expr in _operands(form):
        lowering.add(name, channel, expr)
    values = [step.value for step in (*lowering.steps, *features.steps) if isinstance(step, Step)]
    kinds = {p.name: p.kind for p in recurrence.scalars}
    used = [n for n in kinds if any(contains(value, lambda x, n=n: _reads_scalar(x, n)) for value in values)]
    inputs = (*lowering.made.values(), *lowering.inputs.inputs.values())
    rows = [x for x in inputs if x.axes]
    steps = take_factors_out(lowering.steps, [x.name for x in rows], [x.name for x in rows if x.dtype is dtypes["q"]])
    return Staging(
        features=features,
        inputs=inputs,
        tables=(*features.tables, *lowering.inputs.tables.values()),
        scalars=tuple((n, kinds[n]) for n in used),
        steps=steps,
    )


def _width(size: Expr, sizes: Mapping[Expr, Expr]) -> int:
    width = simplify_expr(substitute(size, sizes))
    assert isinstance(width, Constant)
    return int(width.value)


def _made(
    recurrence: Recurrence, sizes: Mapping[Expr, Expr], key: int, value: int
) -> Mapping[RowName, tuple[Expr, int]]:
    """The rows that are made before operands are, with their widths. What outputs are divided by is what the rows of v
    leave in one more channel, which is 1."""
    transforms: dict[RowName, Expr] = {"q": recurrence.q, "k": recurrence.k, "v": recurrence.v}
    widths: dict[RowName, int] = {"q": key, "k": key, "v": value}
    own: dict[RowName, Expr] = {"q": Size("D"), "k": Size("D"), "v": Size("E")}
    if recurrence.normalizer == "sum":
        given = Apply("lt", (Index("d"), Size("E")))
        transforms["v"] = Apply("where", (given, transforms["v"], Constant(1.0)))
    made: dict[RowName, tuple[Expr, int]] = {}
    for row in _ROWS:
        expr = simplify_expr(substitute(transforms[row], sizes))
        widened = _width(own[row], sizes) != widths[row]
        # Sums run over `d`, which is no channel of values.
        if widened or is_made(expr) or (row == "v" and contains(expr, lambda node: isinstance(node, Reduce))):
            made[row] = expr, widths[row]
    return made


def _made_input(made: MadeRow, dtypes: Mapping[str, DType]) -> Input:
    channel: Channel = "e" if made.row == "v" else "d"
    return Input(made.row, made.row, dtypes[made.row], (Axis(channel, made.width),), ("b", "h", "t", channel))


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
    inputs: Inputs
    channels: Mapping[Channel, Axis]
    made: Mapping[str, Input]
    steps: list[Step] = field(default_factory=list[Step])
    _known: dict[tuple[Expr, tuple[Axis, ...]], Variable] = field(
        default_factory=dict[tuple[Expr, tuple[Axis, ...]], Variable]
    )

    def add(self, name: str, channel: Channel | None, expr: Expr) -> None:
        """One operand."""
        expr = simplify_expr(substitute(expr, self.inputs.sizes))
        axes = () if channel is None else (self.channels[channel],)
        self.steps.append(Step(name, Kind.FLOAT, axes, self._lowered(expr, axes)))

    def _lowered(self, expr: Expr, axes: tuple[Axis, ...]) -> Expr:
        """`expr` in a loop over `axes`, of which there is one or none."""
        match expr:
            case Constant() | Parameter():
                return expr
            case _ if is_of_places(expr):
                return self.inputs.table(expr, axes)
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
        if name in self.made:
            return Variable(self.made[name].name, Kind.FLOAT)
        transform = {"q": self.recurrence.q, "k": self.recurrence.k, "v": self.recurrence.v}[name]
        transform = simplify_expr(substitute(transform, self.inputs.sizes))
        if channel == "e":  # Transforms run over `d`, whatever the row.
            transform = substitute(transform, {Index("d"): Index("e")})
        if isinstance(transform, Element):
            lowered = self._lowered(transform, (self.channels[channel],))
            assert isinstance(lowered, Variable)
            return lowered
        return self._once(transform, (self.channels[channel],))

    def _input(self, tensor: str, load: Load) -> Variable:
        axes = tuple(self.channels[channel] for channel in CHANNELS if Index(channel) in load.indices)
        if len(axes) > 1:
            raise NotStaged(f"`{tensor}` is a matrix")
        if any(self.inputs.extent(tensor, load.indices.index(Index(x.channel))) != x.size for x in axes):
            raise NotStaged(f"`{tensor}` has not as many channels as the state")
        return self.inputs.read(load, axes)

    def _reduced(self, expr: Reduce) -> Variable:
        if all(has_free(expr.body, channel) for channel in CHANNELS):
            raise NotStaged("rows are multiplied with matrices")
        over = self.channels[expr.over]
        if simplify_expr(substitute(expr.size, self.inputs.sizes)) != Constant(over.size):
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
