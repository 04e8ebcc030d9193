"""The oracle: evaluates the IR directly, in float64, untiled.

It shares nothing with planning and emission. Every expression is evaluated with plain torch operations over index
tensors that broadcast; every score and weight only at the pairs that the mask keeps, so that nothing at a masked pair
can reach a result or a gradient. Differentiable by torch autograd.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, assert_never

import torch
from torch import Tensor

from attncc.ir.errors import IRError
from attncc.ir.nodes import (
    Apply,
    Attention,
    Constant,
    Element,
    Elementwise,
    Expr,
    Hole,
    Index,
    Load,
    Parameter,
    Reduce,
    RowName,
    Size,
    Softmax,
    Sum,
    Summary,
    Variable,
)
from attncc.ir.operators import OPERATORS
from attncc.source import Span


class OutOfRange(IndexError):
    """A kept pair (or a row) reads outside a tensor.

    span    of the load in the specification, where known
    tensor  name of the tensor; q, k or v for an element of a row
    axis, index, size   index is not in [0, size) of that axis
    at      the coordinates of the read: b, h, and q_row, q_idx, kv_idx, d where they matter
    """

    def __init__(self, span: Span | None, tensor: str, axis: int, index: int, size: int, at: Mapping[str, int]) -> None:
        self.span, self.tensor, self.axis, self.index, self.size, self.at = span, tensor, axis, index, size, dict(at)
        place = ", ".join(f"{name} = {value}" for name, value in self.at.items())
        where = f"{span}: " if span is not None else ""
        super().__init__(f"{where}index {index} is outside axis {axis} of `{tensor}`, of size {size}, at {place}")


@dataclass(frozen=True, slots=True)
class Read:
    """A read outside its tensor, wherever `outside` is true: an error if such a place is kept in the end."""

    expr: Load | Element
    axis: int
    index: Tensor
    size: int
    outside: Tensor
    indices: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Scope:
    """Where an expression is evaluated: the value of everything that it may name.

    indices   int64 tensors that broadcast against each other
    inputs    float, int64 and bool tensors by name, scalars among them as 0-d tensors
    holes     the values of `qk`, `score`
    rows      for row transforms: the untransformed rows (R, width), read at `position` (R, 1)
    floating  the element type of floats that come from ints and literals
    row_dtype what transformed rows are rounded to
    reads     collects reads outside their tensors
    axes      where the places of `d` (and `e`) lie, counted from the last axis
    """

    indices: Mapping[str, Tensor]
    sizes: Mapping[str, int]
    inputs: Mapping[str, Tensor]
    reads: list[Read]
    holes: Mapping[str, Tensor]
    rows: Mapping[RowName, Tensor]
    position: Tensor | None = None
    floating: torch.dtype = torch.float64
    row_dtype: torch.dtype = torch.float64
    axes: Mapping[str, int] = field(default_factory=lambda: {"d": -2, "e": -1})


TRUE = torch.tensor(True)


def value(expr: Expr, scope: Scope, active: Tensor = TRUE) -> Tensor:
    """`expr` at every place of `scope`, in a shape that broadcasts to theirs.

    `active` tells the places whose value matters. `where`, `and` and `or` narrow it: what the choice leaves out is
    computed, from reads moved into their tensors, but is not an error and has no gradient.
    """
    match expr:
        case Constant(value=constant):
            return _scalar(constant, scope.floating)
        case Index(name=name):
            return scope.indices[name]
        case Size(name=name):
            return torch.tensor(scope.sizes[name])
        case Parameter(name=name):
            return scope.inputs[name]
        case Load(tensor=tensor, indices=indices):
            places = [value(index, scope, active) for index in indices]
            return _only(_read(expr, scope.inputs[tensor], places, scope, active), active)
        case Element(row=row, index=index):
            assert scope.position is not None, "elements stand in row transforms only"
            places = [scope.position, value(index, scope, active)]
            return _only(_read(expr, scope.rows[row], places, scope, active), active)
        case Reduce():
            return _only(_reduce(expr, scope, active), active)
        case Hole(name=name):
            return _only(scope.holes[name], active)
        case Apply(op="where", args=(condition, then, otherwise)):
            chosen = value(condition, scope, active)
            return torch.where(chosen, value(then, scope, active & chosen), value(otherwise, scope, active & ~chosen))
        case Apply(op="and", args=(left, right)):
            first = value(left, scope, active)
            return first & value(right, scope, active & first)
        case Apply(op="or", args=(left, right)):
            first = value(left, scope, active)
            return first | value(right, scope, active & ~first)
        case Apply(op=op, args=args):
            result = OPERATORS[op].torch(*(value(argument, scope, active) for argument in args))
            return result.to(scope.floating) if op == "to_float" else result
        case Variable() | Summary():
            raise IRError(f"{expr} belongs to a plan")
        case _:
            assert_never(expr)


def _only(x: Tensor, active: Tensor) -> Tensor:
    """`x`, whose gradient is that of the active places. At others it would be 0 times a derivative, infinite maybe."""
    return x if active is TRUE or not x.requires_grad else torch.where(active, x, x.detach())


def _scalar(constant: bool | float, floating: torch.dtype) -> Tensor:
    return torch.tensor(constant, dtype=floating) if isinstance(constant, float) else torch.tensor(constant)


def _read(expr: Load | Element, tensor: Tensor, places: list[Tensor], scope: Scope, active: Tensor) -> Tensor:
    """`tensor[places]`, each index moved into its axis; noting the active places where one had to be."""
    inside: list[Tensor] = []
    for axis, (index, size) in enumerate(zip(places, tensor.shape, strict=True)):
        outside = active & ((index < 0) | (index >= size))
        if outside.any():
            scope.reads.append(Read(expr, axis, index, size, outside, scope.indices))
        inside.append(index.clamp(0, max(size - 1, 0)))
    if tensor.numel() == 0:
        return torch.zeros(torch.broadcast_shapes(*(index.shape for index in inside)), dtype=tensor.dtype)
    return tensor[tuple(inside)]


def _reduce(expr: Reduce, scope: Scope, active: Tensor) -> Tensor:
    """The body over d (or e) along the axis of that index, which becomes 1. A maximum over nothing is -inf."""
    axis = scope.axes[expr.over]
    places = torch.arange(int(value(expr.size, scope))).reshape(-1, *[1] * (-axis - 1)).unsqueeze(0)
    active = active.any(axis, keepdim=True) if active.dim() >= -axis else active
    body = value(expr.body, replace(scope, indices={**scope.indices, expr.over: places}), active)
    body = body.broadcast_to(torch.broadcast_shapes(body.shape, places.shape))
    if expr.op == "sum":
        return body.sum(axis, keepdim=True)
    least = body.new_full((), -torch.inf).expand(*body.shape[:axis], 1, *body.shape[body.dim() + axis + 1 :])
    return torch.cat([body, least], axis).amax(axis, keepdim=True)


def check_reads(scope: Scope, kept: Tensor = TRUE) -> None:
    """Raise `OutOfRange` for the first read outside its tensor at a kept place."""
    for read in scope.reads:
        names = [name for name in ("b", "h", "t", "q_row", "q_idx", "kv_idx", "d", "e") if name in read.indices]
        wrong, index, *coordinates = torch.broadcast_tensors(
            read.outside & kept, read.index, *(read.indices[name] for name in names)
        )
        if not wrong.any():
            continue
        at = {name: int(c[wrong][0]) for name, c in zip(names, coordinates, strict=True)}
        match read.expr:
            case Load(tensor=name, span=span) | Element(row=name, span=span):
                raise OutOfRange(span, name, read.axis, int(index[wrong][0]), read.size, at)
    scope.reads.clear()


def evaluate(
    attention: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Tensor | bool | float],
    q_offset: int | None = None,
    *,
    rounded_rows: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The output and the log of the row's sum of weights, in float64.

    q (B, H, M, D), k (B, HKV, N, D), v (B, HKV, N, E) -> o (B, H, M, E), lse (B, H, M); lse is None where weights are
    not summed (`Elementwise`). `inputs`: captured tensors and scalars by name; scalars left out take their defaults.
    rounded_rows: transformed rows are rounded to the type of q, k and v, as kernels must store them; nothing else is.
    Raises `OutOfRange` for a read outside its tensor at a kept pair; what masked pairs read is never looked at.
    """
    # Index tensors are made where the operands are.
    with nullcontext() if q.device.type == "cpu" else q.device:
        return _evaluate(attention, q, k, v, inputs, q_offset, q.dtype if rounded_rows else torch.float64)


def _evaluate(
    attention: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Tensor | bool | float],
    q_offset: int | None,
    row_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    batch, heads, rows, width_qk = q.shape
    heads_kv, keys = k.shape[1:3]
    offset = keys - rows if q_offset is None else q_offset
    sizes = {"B": batch, "H": heads, "HKV": heads_kv, "M": rows, "N": keys, "D": width_qk, "E": v.shape[3]}
    scalars = {p.name: p.default for p in attention.scalars if p.default is not None}
    captured = {name: widened(x) for name, x in {**scalars, **inputs}.items()}
    captured |= {p.name: captured[p.name].cumsum(p.summed) for p in attention.tensors if p.summed is not None}
    scope = Scope({}, {**sizes, "q_offset": offset}, captured, [], {}, {}, row_dtype=row_dtype)
    q, k, v = (widened(x) for x in (q, k, v))
    outputs: list[Tensor] = []
    sums: list[Tensor] = []
    for b in range(batch):
        for h in range(heads):
            hkv = h // (heads // heads_kv)
            at_head = {"b": torch.tensor(b), "h": torch.tensor(h), "hkv": torch.tensor(hkv)}
            o, lse = _head(attention, q[b, h], k[b, hkv], v[b, hkv], replace(scope, indices=at_head))
            outputs.append(o)
            sums.append(lse)
    shape = (batch, heads, rows)
    o = torch.stack(outputs).reshape(*shape, v.shape[3]) if outputs else q.new_zeros(*shape, v.shape[3])
    if isinstance(attention.normalizer, Elementwise):
        return o, None
    return o, torch.stack(sums).reshape(shape) if sums else q.new_zeros(shape)


def widened(x: Tensor | bool | float) -> Tensor:
    """`x` as float64, int64 or bool."""
    if not isinstance(x, Tensor):
        return _scalar(x, torch.float64)
    if x.dtype == torch.bool:
        return x
    return x.to(torch.float64 if x.is_floating_point() else torch.int64)


def _head(attention: Attention, q: Tensor, k: Tensor, v: Tensor, scope: Scope) -> tuple[Tensor, Tensor]:
    """o (M, E) and lse (M,) of one query head; q (M, D), k (N, D), v (N, E)."""
    q_row, kv_idx = torch.arange(len(q)), torch.arange(len(k))
    q_idx = q_row + scope.sizes["q_offset"]
    grid = {"q_row": q_row[:, None], "q_idx": q_idx[:, None], "kv_idx": kv_idx[None, :]}
    everywhere = replace(scope, indices={**scope.indices, **grid}, reads=[])
    kept = value(attention.mask, everywhere).broadcast_to(len(q), len(k))
    check_reads(everywhere, kept)
    queries, keys = kept.any(1), kept.any(0)
    q = transformed(attention.q, "q", q, {"q_row": q_row, "q_idx": q_idx}, scope, queries)
    k = transformed(attention.k, "k", k, {"kv_idx": kv_idx}, scope, keys)
    v = transformed(attention.v, "v", v, {"kv_idx": kv_idx}, scope, keys)

    # From here on one axis: the kept pairs. A masked pair is not there to be computed.
    row, column = kept.nonzero(as_tuple=True)
    pair = {**scope.indices, "q_row": q_row[row], "q_idx": q_idx[row], "kv_idx": column}
    at_pairs = replace(scope, indices=pair, reads=[])
    weight, lse = _weights(attention, q, k, kept, at_pairs)
    nothing = lse == -torch.inf
    if lse.requires_grad and nothing.any():
        # Rows without a sum have no gradient, where 0 times that of a score might be none.
        weight, lse = _weights(attention, q, k, kept, at_pairs, ~nothing)
    if attention.dropout is not None:
        weight = weight * value(attention.dropout, at_pairs)
    check_reads(at_pairs)
    return _WeightedSum.apply(weight, v, row, column, len(q)), lse


def _weights(
    attention: Attention, q: Tensor, k: Tensor, kept: Tensor, scope: Scope, live: Tensor = TRUE
) -> tuple[Tensor, Tensor]:
    """The weights of the kept pairs, and lse (M,). Rows not `live` have no gradient."""
    row, column = kept.nonzero(as_tuple=True)
    active = live if live is TRUE else live[row]
    qk = value(attention.scale, scope, active) * _dots(q, k, row, column, active)
    score = value(attention.score, replace(scope, holes={"qk": qk}), active).broadcast_to(row.shape)
    at_scores = replace(scope, holes={"score": score})
    match attention.normalizer:
        case Softmax(sink=sink):
            q_row = torch.arange(len(q))
            at_rows = {"q_row": q_row, "q_idx": q_row + scope.sizes["q_offset"]}
            extra = -torch.inf if sink is None else _at_rows(sink, at_rows, scope, live)
            p, total, lse = _softmax(score, row, column, kept.shape, extra)
            return p[row, column] / total[row], lse
        case Sum(weight=weight):
            weights = value(weight, at_scores, active).broadcast_to(row.shape)
            total = torch.zeros(len(q), dtype=weights.dtype).index_add(0, row, weights)
            nothing = total == 0
            total = torch.where(nothing, 1, total)
            lse = torch.where(nothing, -torch.inf, total.log())
            # A sum of 0 gives 0, even where the weights that cancel in it are not.
            return torch.where(nothing[row], 0, weights) / total[row], lse
        case Elementwise(weight=weight):
            weights = value(weight, at_scores, active).broadcast_to(row.shape)
            return weights, torch.zeros(len(q), dtype=weights.dtype)
        case _:
            assert_never(attention.normalizer)


def transformed(
    expr: Expr, row: RowName, x: Tensor, at: Mapping[str, Tensor], scope: Scope, used: Tensor = TRUE, width: int = 0
) -> Tensor:
    """Each row of `x` (R, D) transformed by `expr`, the value of element d: (R, width), D if that is 0. Rows not `used`
    have no gradient."""
    # Three axes: row, d, e.
    shape = (len(x), width or x.shape[1])
    indices = {**{name: i[:, None, None] for name, i in at.items()}, "d": torch.arange(shape[1])[None, :, None]}
    inner = replace(
        scope,
        indices={**scope.indices, **indices},
        rows={row: x},
        position=torch.arange(len(x))[:, None, None],
        reads=[],
    )
    result = value(expr, inner)
    check_reads(inner)
    if result.requires_grad and not used.all():
        result = value(expr, replace(inner, reads=[]), used[:, None, None])
    return result.to(scope.row_dtype).to(x.dtype).broadcast_to(*shape, 1).squeeze(2)


def _at_rows(expr: Expr, positions: Mapping[str, Tensor], scope: Scope, active: Tensor) -> Tensor:
    """`expr` at every query row."""
    head = {name: scope.indices[name] for name in ("b", "h", "hkv")}
    inner = replace(scope, indices={**head, **positions}, reads=[])
    result = value(expr, inner, active)
    check_reads(inner)
    return result


def _dots(q: Tensor, k: Tensor, row: Tensor, column: Tensor, active: Tensor) -> Tensor:
    """dot(q[row], k[column]) of each pair."""
    if q.isfinite().all() and k.isfinite().all():
        return (q @ k.T)[row, column]
    # A matrix product would mix rows in the backward pass, as 0 * inf.
    active = active if active is TRUE else active[:, None]
    return (_only(q[row], active) * _only(k[column], active)).sum(-1)


class _WeightedSum(torch.autograd.Function):
    """Per row, the sum of weight * v[column] over its pairs. A masked pair's weight is absent, not 0: what stands in v
    or in the gradient there is not multiplied by it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, v: Tensor, row: Tensor, column: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(weight, v, row, column)
        return _sums(weight, v, row, column, rows)

    @staticmethod
    def backward(  # type: ignore[override] - one result, one gradient
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None]:
        weight, v, row, column = ctx.saved_tensors
        by_weight = _dots(gradient, v, row, column, TRUE)
        return by_weight, _sums(weight, gradient, column, row, len(v)), None, None, None


def _sums(weight: Tensor, x: Tensor, into: Tensor, of: Tensor, size: int) -> Tensor:
    """Row `into` of the result gains weight * x[of]."""
    if x.isfinite().all():
        return torch.zeros(size, len(x), dtype=weight.dtype).index_put((into, of), weight) @ x
    return torch.zeros(size, x.shape[1], dtype=weight.dtype).index_add(0, into, weight[:, None] * x[of])


def _softmax(
    score: Tensor, row: Tensor, column: Tensor, shape: torch.Size, extra: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """exp(score - m) as a matrix, the rows' sums (1 where there is nothing to sum) and lse; m is the row's maximum.

    `extra` is one more score per row, that of no key: the sink, or -inf. It also gives every row a maximum. A sink of
    +inf is the limit of ever greater ones: it takes all weight.
    """
    dense = torch.full(shape, -torch.inf, dtype=score.dtype).index_put((row, column), score)
    last = torch.as_tensor(extra, dtype=score.dtype).broadcast_to(shape[0])[:, None]
    m = torch.cat([dense, last], 1).detach().amax(1, keepdim=True)
    m = torch.where(m == -torch.inf, 0, m)
    p = torch.exp(torch.cat([dense - m, torch.where(last == torch.inf, 0, last - m)], 1))
    total = p.sum(1)
    nothing = total == 0
    total = torch.where(nothing, 1, total)
    return p[:, :-1], total, torch.where(nothing, -torch.inf, m.squeeze(1) + total.log())
