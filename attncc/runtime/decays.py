"""Whether the decays of a call have logarithms, which chunked kernels add up.

A decay that is written as an exponential always has one. One that is a parameter (`S *= gamma[h]`) may be below 0. It
may also be 0: its logarithm is -inf and the state right, but no gradient finds its way back from there.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attncc.ir.nodes import Apply, Constant, Element, Expr, Index, Load, Parameter, RowName, Size
from attncc.ir.recurrence import Recurrence
from attncc.ir.rewrite import contains, has_free, walk
from attncc.passes.normal_form import Logged, logged
from attncc.passes.simplify import simplify_expr
from attncc.runtime.arguments import Bound
from attncc.runtime.recurrent_arguments import BoundRecurrence
from attncc.runtime.recurrent_operands import Evaluator, evaluator_of

_ROWS: tuple[RowName, ...] = ("q", "k", "v")
_MOST_KNOWN = 256


@dataclass(frozen=True, slots=True)
class Decays:
    """The decays of a recurrence, as far as logarithms are taken of them.

    read: the captured tensors and rows that they are made of
    known: what was found for decays that are made of none, and the same at every token
    """

    recurrence: Recurrence
    logged: tuple[Logged, ...]
    read: frozenset[str]
    known: dict[object, bool] = field(default_factory=dict[object, bool], compare=False)

    @staticmethod
    def of(recurrence: Recurrence, decay: Expr) -> Decays:
        found = [replace(x, value=simplify_expr(x.value), used=simplify_expr(x.used)) for x in logged(decay)]
        return Decays(recurrence, tuple(found), frozenset(name for x in found for name in _tensors_of(x.value)))

    def have_logarithms(self, q: Tensor, k: Tensor, v: Tensor, bound: Bound | BoundRecurrence) -> bool:
        """Whether kernels may take them, and autograd the gradients of those that it follows. Waits for the device."""
        rows: dict[RowName, Tensor] = {"q": q, "k": k, "v": v}
        if self.read or any(contains(x.value, moves) for x in self.logged):
            return all(self._has(x, rows, bound, _is_followed(x, rows, bound)) for x in self.logged)
        key = bound.sizes, tuple(bound.scalars.items())
        found = self.known.get(key)
        if found is None:
            found = all(self._has(x, rows, bound, followed=False) for x in self.logged)
            if len(self.known) >= _MOST_KNOWN:
                self.known.clear()
            self.known[key] = found
        return found

    def are_followed(self, q: Tensor, k: Tensor, v: Tensor, bound: Bound | BoundRecurrence) -> bool:
        """Whether there are gradients of any of them."""
        return torch.is_grad_enabled() and any(
            x.requires_grad for name, x in (("q", q), ("k", k), ("v", v), *bound.tensors.items()) if name in self.read
        )

    def _has(self, x: Logged, rows: dict[RowName, Tensor], bound: Bound | BoundRecurrence, followed: bool) -> bool:
        # The gradient of `where` is 0 times that of what is not used, and so NaN where that is infinite.
        expr = x.value if followed else x.used
        value = _whole(expr, bound)
        if value is None:
            names = _tensors_of(expr)
            read: set[RowName] = {name for name in _ROWS if name in names}
            with torch.no_grad():
                evaluator = evaluator_of(self.recurrence, rows, bound.inputs, bound.q_offset, read)
                value = evaluator.vector(expr, _width(expr, evaluator), evaluator.env.floating)
        fits = value > 0 if followed or x.base else value >= 0
        return bool(fits.all()) if isinstance(fits, Tensor) else fits


def moves(node: Expr) -> bool:
    """Whether it is something else at another token, or in another call alike."""
    return node in (Index("t"), Size("q_offset"))


def _whole(value: Expr, bound: Bound | BoundRecurrence) -> Tensor | float | None:
    """The tensor that `value` is an element of, or its difference from 1: no need to find out which elements."""
    match value:
        case Load(tensor=name) if name in bound.tensors:
            return bound.tensors[name]
        case Apply(op="sub", args=(Constant(value=1.0), Load(tensor=name))) if name in bound.tensors:
            return 1 - bound.tensors[name]
        case Parameter(name=name):
            return bound.scalars[name]
        case _:
            return None


def _is_followed(x: Logged, rows: dict[RowName, Tensor], bound: Bound | BoundRecurrence) -> bool:
    if not torch.is_grad_enabled():
        return False
    tensors: dict[str, Tensor] = {**bound.tensors, **rows}
    return any(tensors[name].requires_grad for name in _tensors_of(x.value))


def _tensors_of(value: Expr) -> set[str]:
    """The captured tensors and rows that it reads."""
    nodes = list(walk(value))
    return {x.tensor for x in nodes if isinstance(x, Load)} | {x.row for x in nodes if isinstance(x, Element)}


def _width(value: Expr, evaluator: Evaluator) -> int:
    if has_free(value, "d"):
        return evaluator.key_width
    return evaluator.value_width if has_free(value, "e") else 1
