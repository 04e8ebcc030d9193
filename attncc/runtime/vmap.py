"""`torch.vmap` of the operators: the mapped axis becomes part of the batch where the attention leaves batches apart, or
else each slice is computed by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from attncc.ir.nodes import Attention, Elementwise, Expr, Index, Load, Size
from attncc.ir.rewrite import children, clauses

# Where the mapped axis of an argument is: None where it has none, a list for a list.
Axes: TypeAlias = Any
Operator: TypeAlias = Callable[..., Sequence[Tensor]]


def batch_axes(attention: Attention) -> dict[str, int | None] | None:
    """The axis of each captured tensor that is as long as the batch, and read at `b`. None where the batch is used for
    anything else: then calls of several batches are not one call of all of them."""
    axes: dict[str, int | None] = {}
    for parameter in attention.tensors:
        along = [i for i, size in enumerate(parameter.shape) if size == Size("B")]
        if len(along) > 1 or not all(size == Size("B") or _knows_no_batch(size, {}) for size in parameter.shape):
            return None
        axes[parameter.name] = along[0] if along else None
    return axes if all(_knows_no_batch(expr, axes) for _, expr in clauses(attention)) else None


def _knows_no_batch(expr: Expr, axes: Mapping[str, int | None]) -> bool:
    """Whether `expr` has no use of the batch but to read captured tensors along `axes`."""
    match expr:
        case Index(name="b") | Size(name="B"):
            return False
        case Load(tensor=tensor, indices=indices):
            at_batch = axes[tensor]
            others = [index for axis, index in enumerate(indices) if axis != at_batch]
            return (at_batch is None or indices[at_batch] == Index("b")) and all(
                _knows_no_batch(index, axes) for index in others
            )
        case _:
            return all(_knows_no_batch(child, axes) for child in children(expr))


def attend(operator: Operator, attention: Attention, count: int, axes: Axes, *arguments: Any) -> Any:
    """The results of `operator` (`attend`) for `count` slices of `arguments` along `axes`, and where their mapped axis
    is."""
    spec, q, k, v, tensors, *numbers = arguments
    folded = _folded_tensors(attention, count, tensors, axes[4])
    if folded is None:
        o, total = _each(operator, count, axes, arguments)
        return (o, total), (0, 0)
    operands = [_fold(x, axis, count) for x, axis in zip((q, k, v), axes[1:4], strict=True)]
    o, total = operator(spec, *operands, folded, *numbers)
    if isinstance(attention.normalizer, Elementwise):
        return (_unfold(o, count), total), (0, None)
    return (_unfold(o, count), _unfold(total, count)), (0, 0)


def attend_backward(operator: Operator, attention: Attention, count: int, axes: Axes, *arguments: Any) -> Any:
    """Likewise of `attend_backward`."""
    spec, q, k, v, tensors, *numbers, o, total, do, dtotal, wanted = arguments
    folded = _folded_tensors(attention, count, tensors, axes[4])
    along = batch_axes(attention) or {}
    places = [along.get(p.name) for p, is_wanted in zip(attention.tensors, wanted, strict=True) if is_wanted]
    # Slices that share a captured tensor have gradients of it of their own, where kernels would give the sum.
    if folded is None or None in places:
        found = _each(operator, count, axes, arguments)
        return found, [0] * len(found)
    if isinstance(attention.normalizer, Elementwise):
        total, dtotal = total.new_empty(0), None
    else:
        total, dtotal = _fold(total, axes[-4], count), None if dtotal is None else _fold(dtotal, axes[-2], count)
    q, k, v, o, do = (
        _fold(x, axis, count) for x, axis in zip((q, k, v, o, do), (*axes[1:4], axes[-5], axes[-3]), strict=True)
    )
    found = operator(spec, q, k, v, folded, *numbers, o, total, do, dtotal, wanted)
    found_at = [0, 0, 0, *(place for place in places if place is not None)]
    return [_unfold(x, count, place) for x, place in zip(found, found_at, strict=True)], found_at


def _folded_tensors(attention: Attention, count: int, tensors: Sequence[Tensor], axes: Axes) -> list[Tensor] | None:
    """The captured tensors of all slices as one call takes them. None where one call cannot."""
    along = batch_axes(attention)
    if along is None:
        return None
    folded: list[Tensor] = []
    for parameter, tensor, axis in zip(attention.tensors, tensors, axes, strict=True):
        place = along[parameter.name]
        if place is None and axis is not None:
            return None
        folded.append(tensor if place is None else _fold(tensor, axis, count, place))
    return folded


def _fold(x: Tensor, axis: int | None, count: int, place: int = 0) -> Tensor:
    """`x`, mapped along `axis`, with that axis and the batch, which is at `place` within a slice, as one axis."""
    x = x.unsqueeze(0).expand(count, *x.shape) if axis is None else x.movedim(axis, 0)
    return x.movedim(0, place).flatten(place, place + 1)


def _unfold(x: Tensor, count: int, place: int = 0) -> Tensor:
    """The slices of what `_fold` has made one, along an axis at `place`."""
    return x.unflatten(place, (count, x.shape[place] // count))


def _each(operator: Operator, count: int, axes: Axes, arguments: Sequence[Any]) -> list[Tensor]:
    """The results for each slice by itself, stacked."""
    results = [operator(*_slice(list(arguments), list(axes), i)) for i in range(count)]
    return [torch.stack(slices) for slices in zip(*results, strict=True)]


def _slice(argument: Any, axis: Axes, i: int) -> Any:
    if isinstance(argument, list):
        return [_slice(x, at, i) for x, at in zip(argument, axis, strict=True)]
    return argument if axis is None else argument.select(axis, i)
