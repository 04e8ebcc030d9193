"""Gradients of captured tensors, from what the kernels have added up.

A kernel gives the gradient of a part of the specification, one entry per head, query, key or distance. The way from
the tensor to the part (index map, and whatever is computed of it) is taken here, once per entry, by PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attncc.eager import Environment, torch_value
from attncc.ir.nodes import Expr, Load
from attncc.ir.rewrite import walk
from attncc.ir.types import DType
from attncc.passes.variance import variance
from attncc.plan.nodes import GROUP_SIZE, BackwardProgram
from attncc.runtime.arguments import Bound
from attncc.runtime.backward import Gradients

# The axes of what a kernel adds up, by the coordinate that each is along.
_AXES: dict[str, tuple[str, ...]] = {
    "head": ("b", "h"),
    "row": ("b", "h", "q"),
    "column": ("b", "h", "kv"),
    "diagonal": ("b", "h", "distance"),
}


def captured_gradients(
    program: BackwardProgram, bound: Bound, found: Gradients, total: Tensor | None, wanted: Sequence[str]
) -> dict[str, Tensor]:
    """The gradient of each captured tensor in `wanted`, in its type and shape."""
    inputs = _widened(bound, torch.float64 if program.specialization.dtype is DType.F64 else torch.float32)
    leaves = {name: inputs[name].detach().contiguous() for name in wanted}
    sums = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for part, axes, entries, heads in _parts(program, bound, inputs, found, total):
        if not axes:
            assert isinstance(part, Load)
            sums[part.tensor] += entries
            continue
        summed = [axis for axis, name in enumerate(axes) if name not in variance(part) | {"distance"}]
        if summed:
            entries = _sum(entries, summed)  # noqa: PLW2901 - the same entries, fewer axes
        env = _environment(axes, entries.shape, heads, bound, inputs)
        for name, gradient in _through(part, entries, env, leaves).items():
            sums[name] += gradient
    return {name: gradient.to(bound.tensors[name].dtype) for name, gradient in sums.items()}


def add_where_read(sums: Tensor, load: Load, entries: Tensor, coordinates: Mapping[str, Tensor], bound: Bound) -> None:
    """Adds the entry of each pair to the element of `sums`, contiguous, that `load` reads there. The coordinates
    broadcast to the shape of `entries`. The same in every run."""
    if sums.numel() == 0 or entries.numel() == 0:
        return
    read = {node.tensor for index in load.indices for node in walk(index) if isinstance(node, Load)}
    needed = bound._replace(tensors={name: bound.tensors[name] for name in read})
    env = _environment_at(coordinates, bound, _widened(needed, entries.dtype), entries.dtype)
    places = [torch_value(index, env).clamp(0, size - 1) for index, size in zip(load.indices, sums.shape, strict=True)]
    _add_at(sums, _flat(places, sums), entries.to(sums.dtype))


def _widened(bound: Bound, wide: torch.dtype) -> dict[str, Any]:
    """The inputs of the call: floats in the type that kernels compute in, ints with room for what comes of them."""
    types = {torch.bool: torch.bool, torch.int32: torch.int64, torch.int64: torch.int64}
    tensors = {name: x.to(types.get(x.dtype, wide)) for name, x in bound.tensors.items()}
    return {**bound.scalars, **tensors, GROUP_SIZE: bound.sizes.H // max(bound.sizes.HKV, 1)}


def _parts(
    program: BackwardProgram, bound: Bound, inputs: Mapping[str, Any], found: Gradients, total: Tensor | None
) -> Iterator[tuple[Expr, tuple[str, ...], Tensor, str]]:
    """Each part, the coordinates of the axes of its gradient (none where it is that of a tensor itself), the gradient,
    and whose heads it has."""
    for adjoint, entries in zip(program.backward.adjoints, found.adjoints, strict=True):
        yield adjoint.part, _AXES.get(adjoint.along, ()), entries, "H"
    for adjoint, entries in zip(program.row_adjoints, found.row_adjoints, strict=True):
        position = "q" if adjoint.rows.row == "q" else "kv"
        yield adjoint.part, ("b", "h", position, "d"), entries, adjoint.rows.heads
    if program.sink is not None:
        assert found.delta is not None
        assert total is not None
        env = _environment(_AXES["row"], found.delta.shape, "H", bound, inputs)
        # The share of the sink in each row's sum; a row that has no sum has no gradient, nor has an infinite sink.
        sink = torch_value(program.sink, env)
        share = torch.exp(sink - total).where((total != -torch.inf) & (sink != torch.inf), 0.0)
        yield program.sink, _AXES["row"], -share * found.delta, "H"


def _through(part: Expr, entries: Tensor, env: Environment, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of the tensors that `part` reads, from that of the part."""
    if entries.numel() == 0:
        return {}
    loaded = {node.tensor for node in walk(part) if isinstance(node, Load)}
    used = sorted(name for name in loaded & leaves.keys() if leaves[name].numel() > 0)
    if not used:
        return {}
    with torch.enable_grad():
        read = {name: leaves[name].detach().requires_grad_() for name in used}
        env = replace(env, inputs={**env.inputs, **read}, read=_read, active=entries != 0)
        value = torch_value(part, env).broadcast_to(entries.shape)
        # What stands in a condition alone has gradient 0.
        leaves_read = [read[name] for name in used]
        gradients = torch.autograd.grad(value, leaves_read, entries.to(value.dtype), materialize_grads=True)
    return dict(zip(used, gradients, strict=True))


def _read(tensor: Tensor, places: Sequence[Tensor]) -> Tensor:
    """An element of a tensor, with a gradient that is the same in every run."""
    return _Read.apply(tensor, _flat(places, tensor))


def _flat(places: Sequence[Tensor], tensor: Tensor) -> Tensor:
    """Indices of the flattened tensor."""
    flat = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for place, stride in zip(places, tensor.contiguous().stride(), strict=True):
        flat = flat + place * stride
    return flat


def _add_at(sums: Tensor, places: Tensor, values: Tensor) -> None:
    """sums.flatten()[places] += values, where places may come several times; the same in every run."""
    places, values, sums = places.expand(values.shape).flatten(), values.flatten(), sums.view(-1)
    # One after the other on a CPU, sorted on a GPU.
    if values.device.type == "cpu":
        sums.index_add_(0, places, values)
    else:
        sums.index_put_((places,), values, accumulate=True)


class _Read(torch.autograd.Function):
    """tensor.flatten()[places]. PyTorch's own gradient of it adds up in the order in which threads come by."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shape = tensor.shape
        return tensor.reshape(-1)[places]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override] - one gradient
        (places,) = ctx.saved_tensors
        result = torch.zeros(ctx.shape, dtype=gradient.dtype, device=gradient.device)
        _add_at(result, places, gradient)
        return result, None


def _sum(entries: Tensor, axes: list[int]) -> Tensor:
    """The sum along some axes, which stay. On a CPU in an order that does not depend on the number of threads."""
    if entries.device.type == "cpu":
        return torch.from_numpy(entries.numpy().sum(axis=tuple(axes), keepdims=True))
    return entries.sum(axes, keepdim=True)


def _environment(
    axes: Sequence[str], shape: torch.Size, heads: str, bound: Bound, inputs: Mapping[str, Any]
) -> Environment:
    """The coordinates along `axes`, each from 0 on; 0 where there is no such axis."""
    device = next(iter(bound.tensors.values())).device

    def along(name: str) -> Tensor:
        if name not in axes:
            return torch.zeros((), dtype=torch.int64, device=device)
        axis = axes.index(name)
        return torch.arange(shape[axis], device=device).reshape([-1 if i == axis else 1 for i in range(len(axes))])

    coordinates = {
        "b": along("b"),
        "h": along("h") if heads == "H" else along("h") * inputs[GROUP_SIZE],
        "q_row": along("distance") - (bound.sizes.N - 1) if "distance" in axes else along("q"),  # from key 0
        "kv_idx": along("kv"),
        "d": along("d"),
    }
    floating = next(x.dtype for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point())
    return _environment_at(coordinates, bound, inputs, floating)


def _environment_at(
    coordinates: Mapping[str, Tensor], bound: Bound, inputs: Mapping[str, Any], floating: torch.dtype
) -> Environment:
    """What follows from b, h, q_row and kv_idx (and d, in rows)."""
    head, row = coordinates["h"], coordinates["q_row"]
    indices = {**coordinates, "hkv": head // max(inputs[GROUP_SIZE], 1), "q_idx": row + bound.q_offset}
    return Environment(
        indices=indices,
        sizes={**bound.sizes._asdict(), "q_offset": bound.q_offset},
        inputs=inputs,
        holes={},
        floating=floating,
        rows={},
    )
