"""How a core makes rows of features: transformed rows that are wider than those of a call, multiplied with matrices, or
that have a column of ones.

Before: a row as one expression over b, h, t and a channel.
After:  steps, over as many channels each as it has, and the parts of a row that they are.

    concat(x, outer(x, x) / sqrt(2))              f0[16] = row of q       f1[16] = f0 / sqrt(2)
                                                  part 0: f0              part 16: f1[i] * f0
    softmax(x @ W[h])                             f0[64] = row of q       f1[64] = f0 times W, for all tokens
                                                  f2 = max f1   f3[64] = exp(f1 - f2)   f4 = sum f3   f5[64] = f3 / f4

A core takes a few tokens at a time, so that each number of a matrix is read once for many of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from attncc.ir.nodes import Apply, Constant, Element, Expr, Index, Load, Parameter, Reduce, RowName, Variable
from attncc.ir.rewrite import contains, has_free, kind_of, map_children, substitute, swap_channels
from attncc.ir.types import Kind
from attncc.passes.simplify import simplify_expr
from attncc.passes.simplify_arithmetic import split
from attncc.plan.segments import D, Segment, factors, outer, segments
from attncc.plan.sequential import Axis, Step
from attncc.plan.staged_inputs import Input, Inputs, NotStaged, Table, is_of_places

# What takes no longer than reading its value again.
_CHEAP = ("add", "sub", "mul", "neg")


@dataclass(frozen=True, slots=True)
class Read:
    """A step: channels of an input, from `start` on."""

    name: str
    source: str
    start: int
    axes: tuple[Axis, ...]


@dataclass(frozen=True, slots=True)
class Product:
    """A step: the first `depth` channels of step `rows` times as many rows of a matrix, its columns from `start` on."""

    name: str
    rows: str
    matrix: str
    start: int
    depth: int
    axes: tuple[Axis, ...]


FeatureStep: TypeAlias = Step | Read | Product


@dataclass(frozen=True, slots=True)
class Part:
    """Channels of a row from `start` on: those of step `inner`; as often as step `outer` has channels, multiplied with
    each of them, where there is one."""

    start: int
    inner: str
    outer: str | None = None


@dataclass(frozen=True, slots=True)
class MadeRow:
    """A transformed row, `width` numbers of the type of rows."""

    row: RowName
    width: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Features:
    """The rows that a core makes of what a call brings."""

    inputs: tuple[Input, ...]
    tables: tuple[Table, ...]
    steps: tuple[FeatureStep, ...]
    rows: tuple[MadeRow, ...]


def is_made(transform: Expr) -> bool:
    """Whether a row of the same width has to be made before operands are."""
    return contains(transform, lambda node: _is_product(node) or _chooses(node))


def plan_features(rows: Mapping[RowName, tuple[Expr, int]], inputs: Inputs) -> Features:
    """Element `d` of each row, over `Element` and coordinates, with its width; sizes are constants. Raises
    `NotStaged`."""
    lowering = _Lowering(inputs)
    made = [MadeRow(row, width, lowering.parts(expr, width)) for row, (expr, width) in rows.items()]
    collected = tuple(inputs.inputs.values()), tuple(inputs.tables.values())
    return Features(*collected, tuple(lowering.steps), tuple(made))


def _is_product(node: Expr) -> bool:
    """Whether it is an element of a row times a matrix."""
    return isinstance(node, Reduce) and has_free(node.body, "d") and has_free(node.body, "e")


def _chooses(node: Expr) -> bool:
    """Whether it is an element that is not the channel's own."""
    return isinstance(node, Element) and node.index not in (D, Index("e"))


@dataclass(slots=True)
class _Lowering:
    """Collects steps."""

    inputs: Inputs
    steps: list[FeatureStep] = field(default_factory=list[FeatureStep])
    _known: dict[tuple[Expr, int], Variable] = field(default_factory=dict[tuple[Expr, int], Variable])
    # How often expressions occur in loops over so many channels.
    _uses: Counter[tuple[Expr, int]] = field(default_factory=Counter[tuple[Expr, int]])

    def parts(self, row: Expr, width: int) -> tuple[Part, ...]:
        """Those of a row."""
        found = [(segment.start, _loops(segment)) for segment in segments(row, width)]
        for _, loops in found:
            for loop in loops:
                self._count(*loop)
        return tuple(Part(start, *(self._once(*loop).name for loop in loops)) for start, loops in found)

    def _count(self, expr: Expr, size: int) -> None:
        self._uses[expr, size] += 1
        if isinstance(expr, Reduce) and not _is_product(expr):
            for segment in segments(expr.body, _constant(expr.size)):
                self._count(segment.value, segment.width)
        elif isinstance(expr, Apply):
            for child in expr.args:
                self._count(child, size)

    def _once(self, expr: Expr, size: int) -> Variable:
        """`expr` as a step, for each of `size` channels; 0: for a token."""
        if (expr, size) not in self._known:
            if isinstance(expr, Apply) and not is_of_places(expr) and (not size or has_free(expr, "d")):
                uses = self._uses[expr, size]
                value = map_children(expr, lambda child: self._lowered(child, size, uses))
            else:
                value = self._lowered(expr, size)
            if isinstance(value, Variable) and self._axes_of(value) == _axes(size):
                return value
            self._known[expr, size] = self._step(Step(self._name(), kind_of(expr), _axes(size), value))
        return self._known[expr, size]

    def _lowered(self, expr: Expr, size: int, uses: int = 1) -> Expr:
        """`expr` in a loop over `size` channels, within something that occurs `uses` times; size 0: no channels."""
        axes = _axes(size)
        match expr:
            case Constant() | Parameter():
                return expr
            case Element(row=row, index=index):
                return self._element(Load(row, (Index("b"), Index("h"), Index("t"), index), Kind.FLOAT), size)
            case Load():
                return self._element(expr, size)
            case Reduce() if _is_product(expr):
                return self._product(expr, size)
            case Reduce():
                return self._reduced(expr)
            case _ if is_of_places(expr):
                return self.inputs.table(expr, axes) if not has_free(expr, "d") else self._read(expr, size)
            case Apply() if size and not has_free(expr, "d"):
                return self._once(expr, 0)
            case Apply(op=op) if size and self._uses[expr, size] > uses and kind_of(expr) is Kind.FLOAT:
                if op not in _CHEAP:
                    return self._once(expr, size)
            case _:
                pass
        return map_children(expr, lambda child: self._lowered(child, size, uses))

    def _element(self, load: Load, size: int) -> Variable:
        """An element of a row or a captured tensor."""
        if not any(has_free(index, "d") for index in load.indices):
            return self.inputs.read(load, ())
        indices, start = self._from_start(load, size)
        return self._read_from(self.inputs.read(replace(load, indices=indices), _axes(size)), start, size, load)

    def _from_start(self, load: Load, size: int) -> tuple[tuple[Expr, ...], int]:
        """The indices with `d` alone where they have `d` plus a number, and that number."""
        indices: list[Expr] = []
        start = 0
        for axis, index in enumerate(load.indices):
            rest, constant = split(index)
            if rest != D:
                indices.append(index)
                continue
            extent = self.inputs.extent(load.tensor, axis)
            if constant < 0 or extent is None or constant + size > extent:
                raise NotStaged(f"`{load.tensor}` is read outside")
            indices.append(D)
            start = constant
        return tuple(indices), start

    def _read(self, expr: Expr, size: int) -> Variable:
        """A table of channels."""
        return self._read_from(self.inputs.table(expr, _axes(size)), 0, size, expr)

    def _read_from(self, source: Variable, start: int, size: int, expr: Expr) -> Variable:
        if (expr, size) not in self._known:
            self._known[expr, size] = self._step(Read(self._name(), source.name, start, _axes(size)))
        return self._known[expr, size]

    def _product(self, expr: Reduce, size: int) -> Variable:
        """A row times a matrix."""
        if expr.op != "sum" or expr.over != "e" or not size:
            raise NotStaged("rows are combined with matrices by more than products")
        if (expr, size) not in self._known:
            matrix = [factor for factor, _ in factors(expr.body) if has_free(factor, "d")]
            row = substitute(expr.body, dict.fromkeys(matrix, Constant(1.0)))
            if len(matrix) != 1 or not isinstance(matrix[0], Load) or has_free(row, "d"):
                raise NotStaged("rows are multiplied with matrices that are computed")
            depth = _constant(expr.size)
            name, start = self._matrix(matrix[0], depth, size)
            rows = self._once(simplify_expr(swap_channels(row)), depth)
            product = Product(self._name(), rows.name, name, start, depth, _axes(size))
            self._known[expr, size] = self._step(product)
        return self._known[expr, size]

    def _matrix(self, load: Load, depth: int, size: int) -> tuple[str, int]:
        """The input that a matrix is, the same for all tokens of a head, and its first column."""
        if any(has_free(index, "t") for index in load.indices) or Index("e") not in load.indices:
            raise NotStaged(f"`{load.tensor}` is a matrix of each token")
        extent = self.inputs.extent(load.tensor, load.indices.index(Index("e")))
        if extent is None or extent < depth:
            raise NotStaged(f"`{load.tensor}` is read outside")
        indices, start = self._from_start(load, size)
        return self.inputs.read(replace(load, indices=indices), _axes(size)).name, start

    def _reduced(self, expr: Reduce) -> Expr:
        """A sum, or the greatest, over the channels of a row: of each of its segments."""
        if expr.over == "e":
            swapped = swap_channels(expr)
            assert isinstance(swapped, Reduce)
            return self._reduced(swapped)
        if (expr, 0) in self._known:
            return self._known[expr, 0]
        found: list[Expr] = []
        for segment in segments(expr.body, _constant(expr.size)):
            if outer(segment.value) is not None:
                raise NotStaged("a sum runs over an outer product")
            axis = Axis("d", segment.width)
            value = self._lowered(segment.value, segment.width)
            found.append(self._step(Step(self._name(), Kind.FLOAT, (), value, axis, expr.op)))
        total = found[0]
        for other in found[1:]:
            total = Apply("add" if expr.op == "sum" else "max", (total, other))
        if not isinstance(total, Variable):
            total = self._step(Step(self._name(), Kind.FLOAT, (), total))
        self._known[expr, 0] = total
        return total

    def _step(self, step: FeatureStep) -> Variable:
        self.steps.append(step)
        return Variable(step.name, step.kind if isinstance(step, Step) else Kind.FLOAT)

    def _name(self) -> str:
        return f"f{len(self.steps)}"

    def _axes_of(self, value: Variable) -> tuple[Axis, ...] | None:
        """Those of a step; None of an input."""
        return next((step.axes for step in self.steps if step.name == value.name), None)


def _loops(segment: Segment) -> tuple[tuple[Expr, int], ...]:
    """What a segment is, over so many channels; the inner and the outer factor of a product."""
    product = outer(segment.value)
    if product is None:
        return ((segment.value, segment.width),)
    if segment.width % product.width:
        raise NotStaged("an outer product ends within a row of it")
    return (product.right, product.width), (product.left, segment.width // product.width)


def _axes(size: int) -> tuple[Axis, ...]:
    return (Axis("d", size),) if size else ()


def _constant(size: Expr) -> int:
    if not isinstance(size, Constant) or type(size.value) is not int:
        raise NotStaged("a sum has no length that is known beforehand")
    return size.value
