"""A backward program, executed without kernels: in float64, over all pairs at once, from the plan alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from attncc.ir.nodes import Apply, Constant, Element, Expr, Load, Variable
from attncc.ir.rewrite import map_children, substitute
from attncc.plan.nodes import GROUP_SIZE, BackwardPlan, BackwardProgram, Binding, RowsPlan
from attncc.reference import Scope, value
from attncc.runtime.arguments import Bound
from attncc.runtime.backward import Gradients, Results

F64 = torch.float64


class Interpreter:
    """A `CompiledBackward` for float64 operands."""

    def __init__(self, program: BackwardProgram) -> None:
        self.program = program

    def run(self, q: Tensor, k: Tensor, v: Tensor, bound: Bound, results: Results) -> Gradients:
        sizes, offset = bound.sizes, bound.q_offset
        group = sizes.H // sizes.HKV
        scope = Scope(
            {},
            {**sizes._asdict(), "q_offset": offset},
            {**{n: _wide(torch.as_tensor(x)) for n, x in bound.inputs.items()}, GROUP_SIZE: torch.tensor(group)},
            [],
            {},
            {},
            axes={"d": -1},
        )
        x = {"q": q, "k": k, "v": v}
        rows = {name: _per_query_head(rows, sizes.H) for name, rows in x.items()}
        for plan in self.program.rows:
            rows[plan.row] = self._each_head(rows[plan.row], plan, None, scope, offset)
        upstream = {name: torch.zeros_like(rows[name]) for name in rows}
        adjoints = [_zeros(adjoint.along, bound, adjoint.part) for adjoint in self.program.backward.adjoints]
        delta = (results.do * results.o).sum(-1)
        if results.dtotal is not None and self.program.backward.normalizer == "softmax":
            delta = delta - results.dtotal
        for b in range(sizes.B):
            for h in range(sizes.H):
                at_head = replace(scope, indices=_head(b, h, group))
                self._head(b, h, rows, upstream, adjoints, at_head, delta, results)
        gradients = dict(upstream)
        for plan in self.program.transposed:
            gradients[plan.row] = self._each_head(_per_query_head(x[plan.row], sizes.H), plan, upstream, scope, offset)
        parts = []
        for part in self.program.row_adjoints:
            row = part.rows.row
            entries = self._each_head(_per_query_head(x[row], sizes.H), part.rows, upstream, scope, offset)
            parts.append(entries if part.rows.heads == "H" else _summed(entries, sizes.HKV))
        return Gradients(
            gradients["q"],
            _summed(gradients["k"], sizes.HKV),
            _summed(gradients["v"], sizes.HKV),
            tuple(adjoints),
            tuple(parts),
            delta if self.program.backward.writes_delta else None,
        )

    def _each_head(
        self, x: Tensor, plan: RowsPlan, upstream: dict[str, Tensor] | None, scope: Scope, offset: int
    ) -> Tensor:
        levels = (plan.call, plan.position, plan.position_element, plan.row_values, plan.element.bindings)
        element = inlined(levels, [plan.element.value])[0]
        group = x.shape[1] // scope.sizes["HKV"]
        q_row = torch.arange(x.shape[2])
        positions = {"q_row": q_row, "q_idx": q_row + offset} if plan.row == "q" else {"kv_idx": q_row}
        out = torch.zeros(*x.shape[:3], plan.width, dtype=F64)
        for b in range(x.shape[0]):
            for h in range(x.shape[1]):
                at_head = replace(scope, indices=_head(b, h, group))
                both = x[b, h] if upstream is None else torch.cat([x[b, h], upstream[plan.row][b, h]], 1)
                indices = {name: index[:, None] for name, index in positions.items()}
                inner = replace(
                    at_head,
                    indices={**at_head.indices, **indices, "d": torch.arange(plan.width)[None, :]},
                    rows={plan.row: both},
                    position=torch.arange(len(both))[:, None],
                )
                out[b, h] = value(_side_by_side(element, plan.width), inner)
        return out

    def _head(
        self,
        b: int,
        h: int,
        rows: dict[str, Tensor],
        upstream: dict[str, Tensor],
        adjoints: list[Tensor],
        scope: Scope,
        delta: Tensor,
        results: Results,
    ) -> None:
        plan = self.program.backward
        q, k, v = rows["q"][b, h], rows["k"][b, h], rows["v"][b, h]
        q_row, kv_idx = torch.arange(len(q)), torch.arange(len(k))
        grid = {"q_row": q_row[:, None], "q_idx": q_row[:, None] + scope.sizes["q_offset"], "kv_idx": kv_idx[None, :]}
        everywhere = replace(scope, indices={**scope.indices, **grid})
        levels = (plan.call, plan.head, plan.row, plan.key)
        kept = torch.ones(len(q), len(k), dtype=torch.bool)
        if plan.mask is not None:
            (mask,) = inlined((*levels, plan.mask.bindings), [plan.mask.value])
            kept = value(mask, everywhere).broadcast_to(kept.shape)
        row, column = kept.nonzero(as_tuple=True)
        pair = {"q_row": q_row[row], "q_idx": grid["q_idx"][row, 0], "kv_idx": column}
        dot = (q[row] * k[column]).sum(-1)
        at_pairs = replace(scope, indices={**scope.indices, **pair}, holes={"dot": dot})
        exprs = inlined((*levels, plan.pair.bindings), [*plan.pair.values, plan.scale, plan.dot_factor])
        values = [value(expr, at_pairs).broadcast_to(row.shape) for expr in exprs]
        *parts, scale, factor = values
        f, by_dot, *by_parts = parts
        multiplier = torch.ones(())
        if plan.dropout is not None:
            (dropout,) = inlined((*levels, plan.dropout.bindings), [plan.dropout.value])
            multiplier = value(dropout, at_pairs)
        do = results.do[b, h][row]
        dp = multiplier * (do * v[column]).sum(-1)
        p, df = _weights(plan, f * scale if plan.fold_scale else f, dp, delta[b, h][row], b, h, row, results)
        ddot = df * by_dot * factor
        upstream["v"][b, h].index_add_(0, column, (multiplier * p)[:, None] * do)
        upstream["q"][b, h].index_add_(0, row, ddot[:, None] * k[column])
        upstream["k"][b, h].index_add_(0, column, ddot[:, None] * q[row])
        for adjoint, entries, partial in zip(plan.adjoints, adjoints, by_parts, strict=True):
            match adjoint.along:
                case "head":
                    entries[b, h] += (df * partial).sum()
                case "row":
                    entries[b, h].index_add_(0, row, df * partial)
                case "column":
                    entries[b, h].index_add_(0, column, df * partial)
                case "diagonal":
                    entries[b, h].index_add_(0, row - column + len(k) - 1, df * partial)
                case "pair":
                    assert adjoint.place is not None
                    (place,) = inlined(levels, [adjoint.place])
                    assert isinstance(place, Load)
                    indices = [value(index, at_pairs).broadcast_to(row.shape) for index in place.indices]
                    indices = [i.clamp(0, size - 1) for i, size in zip(indices, entries.shape, strict=True)]
                    entries.index_put_(tuple(indices), df * partial, accumulate=True)


def _weights(
    plan: BackwardPlan,
    f: Tensor,
    dp: Tensor,
    delta: Tensor,
    b: int,
    h: int,
    row: Tensor,
    results: Results,
) -> tuple[Tensor, Tensor]:
    """Weight and gradient of each pair's value."""
    if plan.normalizer == "none":
        return f, dp
    assert results.total is not None
    total = results.total[b, h][row]
    if plan.normalizer == "softmax":
        p = torch.exp(f - total).where(total > -torch.inf, 0.0)
        return p, p * (dp - delta)
    of_sum = 0.0 if results.dtotal is None else results.dtotal[b, h][row]
    nothing = total == 0
    return (f / total).where(~nothing, 0.0), ((dp - delta) / total + of_sum).where(~nothing, 0.0)


def inlined(levels: Iterable[Iterable[Binding]], exprs: list[Expr]) -> list[Expr]:
    """`exprs` with every variable written out. Raises KeyError for one that is used before it is bound."""
    values: dict[Expr, Expr] = {}
    for bindings in levels:
        for binding in bindings:
            values[Variable(binding.name, binding.kind)] = substitute(binding.value, values)
    return [substitute(expr, values) for expr in exprs]


def _side_by_side(element: Expr, width: int) -> Expr:
    """`element` over rows that hold the upstream gradient after the row itself."""

    def shift(expr: Expr) -> Expr:
        if isinstance(expr, Element):
            index = shift(expr.index)
            return Element(expr.row, Apply("add", (index, Constant(width))) if expr.upstream else index)
        return map_children(expr, shift)

    return shift(element)


def _head(b: int, h: int, group: int) -> dict[str, Tensor]:
    return {"b": torch.tensor(b), "h": torch.tensor(h), "hkv": torch.tensor(h // group)}


def _wide(x: Tensor) -> Tensor:
    if x.dtype == torch.bool:
        return x
    return x.to(F64 if x.is_floating_point() else torch.int64)


def _per_query_head(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


def _summed(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(1, (heads, x.shape[1] // heads)).sum(2)


def _zeros(along: str, bound: Bound, part: Expr) -> Tensor:
    sizes = bound.sizes
    if along == "pair":
        assert isinstance(part, Load)
        return torch.zeros(bound.tensors[part.tensor].shape, dtype=F64)
    last = {"head": (), "row": (sizes.M,), "column": (sizes.N,), "diagonal": (max(sizes.M + sizes.N - 1, 0),)}[along]
    return torch.zeros(sizes.B, sizes.H, *last, dtype=F64)
