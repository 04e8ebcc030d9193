"""What the C++ template of a core needs to make rows of features: in what order, and how values are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attncc.emit.cpp_text import Printed
from attncc.ir.nodes import Variable
from attncc.ir.rewrite import walk
from attncc.ir.types import Kind
from attncc.plan.features import Features, FeatureStep, MadeRow, Part, Product, Read
from attncc.plan.sequential import Axis, Step
from attncc.plan.staged_inputs import Input


@dataclass(frozen=True, slots=True)
class Phase:
    """A product for all tokens of a chunk, if there is one; then steps and parts of rows, token by token.

    scalars  inputs that these steps read, of one number for a token
    parts    with the row that each is of, and how many channels its steps have
    """

    product: Product | None
    steps: tuple[Step | Read, ...]
    scalars: tuple[Input, ...]
    parts: tuple[tuple[MadeRow, Part, Axis, Axis | None], ...]


def phases_of(features: Features) -> list[Phase]:
    """All of it, in order: parts of rows come last."""
    groups: list[tuple[Product | None, list[Step | Read]]] = [(None, [])]
    for step in features.steps:
        if isinstance(step, Product):
            groups.append((step, []))
        else:
            groups[-1][1].append(step)
    parts = _parts(features)
    return [
        Phase(product, tuple(steps), tuple(_scalars(features, steps)), parts if number == len(groups) - 1 else ())
        for number, (product, steps) in enumerate(groups)
    ]


def _scalars(features: Features, steps: list[Step | Read]) -> list[Input]:
    nodes = (node for step in steps if isinstance(step, Step) for node in walk(step.value))
    read = {node.name for node in nodes if isinstance(node, Variable)}
    return [x for x in features.inputs if x.name in read]


def _parts(features: Features) -> tuple[tuple[MadeRow, Part, Axis, Axis | None], ...]:
    axes = {step.name: step.axes[0] for step in features.steps if step.axes}
    return tuple(
        (row, part, axes[part.inner], None if part.outer is None else axes[part.outer])
        for row in features.rows
        for part in row.parts
    )


def rows_read(features: Features) -> list[Input]:
    """The inputs that are read token by token: all but matrices."""
    matrices = {step.matrix for step in features.steps if isinstance(step, Product)}
    return [x for x in features.inputs if x.name not in matrices]


def feature_variables(features: Features) -> Mapping[str, Printed]:
    """How inputs and steps are read: those of channels are arrays of vectors."""
    read = {x.name: Printed(x.name, x.dtype.kind, wide=x.dtype.kind is Kind.INT) for x in features.inputs}
    return {**read, **{step.name: _variable(step) for step in features.steps}}


def _variable(step: FeatureStep) -> Printed:
    kind = step.kind if isinstance(step, Step) else Kind.FLOAT
    text = f"made.{step.name}[token]{'[i]' if step.axes else ''}"
    return Printed(text, kind, bool(step.axes), wide=kind is Kind.INT)
