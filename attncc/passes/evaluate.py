"""Values of expressions over coordinates and tile corners, for one head, vectorised over pairs or tiles.

This serves pictures, explanations and tests of the analyses; kernels compute the same expressions themselves, and the
reference shares nothing with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from attncc.ir.nodes import (
    Apply,
    Constant,
    Element,
    Expr,
    Hole,
    Index,
    Load,
    Parameter,
    Reduce,
    Size,
    Summary,
    Variable,
)
from attncc.ir.operators import OPERATORS


@dataclass(frozen=True, slots=True)
class Scene:
    """One head of one call: all that is uniform within it.

    sizes   of the call, q_offset among them
    inputs  scalars and captured tensors by name
    head    the coordinates b, h and hkv
    """

    sizes: Mapping[str, int]
    inputs: Mapping[str, Tensor | bool | float]
    head: Mapping[str, int]

    @property
    def queries(self) -> Tensor:
        """Every q_idx (M,)"""
        return torch.arange(self.sizes["M"]) + self.sizes["q_offset"]

    @property
    def keys(self) -> Tensor:
        """Every kv_idx (N,)"""
        return torch.arange(self.sizes["N"])


def evaluate(expr: Expr, scene: Scene, coordinates: Mapping[str, Tensor]) -> Tensor:
    """The value of `expr` (bool, int64 or float64) in a shape that broadcasts to those of `coordinates`.

    coordinates: q_idx and kv_idx, or the corners of tiles. Reads outside a tensor are moved into it, as in a kernel;
    an empty tensor reads as 0.
    """
    match expr:
        case Constant(value=value):
            return _scalar(value)
        case Index(name="q_row"):
            return coordinates["q_idx"] - scene.sizes["q_offset"]
        case Index(name=name):
            return torch.tensor(scene.head[name]) if name in scene.head else coordinates[name]
        case Size(name=name):
            return torch.tensor(scene.sizes[name])
        case Parameter(name=name):
            return _scalar(scene.inputs[name])
        case Load(tensor=name, indices=indices):
            tensor = _scalar(scene.inputs[name])
            if tensor.numel() == 0:
                return torch.zeros((), dtype=tensor.dtype)
            places = [evaluate(index, scene, coordinates) for index in indices]
            return tensor[tuple(p.clamp(0, size - 1) for p, size in zip(places, tensor.shape, strict=True))]
        case Apply(op=op, args=args):
            return OPERATORS[op].torch(*(evaluate(arg, scene, coordinates) for arg in args))
        case Summary():
            return _summary(expr, scene, coordinates)
        case Element() | Reduce() | Hole() | Variable():
            raise ValueError(f"no part of a mask: {expr}")
        case _:
            assert_never(expr)


def _scalar(value: Tensor | bool | float) -> Tensor:
    """`value` as a bool, int64 or float64 tensor."""
    tensor = torch.as_tensor(value)
    if tensor.is_floating_point():
        return tensor.to(torch.float64) if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    return tensor if tensor.dtype is torch.bool else tensor.to(torch.int64)


def _summary(expr: Summary, scene: Scene, coordinates: Mapping[str, Tensor]) -> Tensor:
    """Each distinct tile of the axis once."""
    position, low, high = ("q_idx", "q_lo", "q_hi") if expr.axis == "q" else ("kv_idx", "kv_lo", "kv_hi")
    positions = scene.queries if expr.axis == "q" else scene.keys
    values = evaluate(expr.load, scene, {position: positions}).broadcast_to(positions.shape)
    lo, hi = torch.broadcast_tensors(coordinates[low], coordinates[high])
    tiles, which = torch.stack([lo.flatten(), hi.flatten()]).unique(dim=1, return_inverse=True)
    first = int(positions[0]) if len(positions) else 0
    results = [_extreme(expr.op, values[a - first : b - first + 1]) for a, b in tiles.T.tolist()]
    return torch.stack(results)[which].reshape(lo.shape) if results else values.new_zeros(lo.shape)


def _extreme(op: str, values: Tensor) -> Tensor:
    if values.dtype is torch.bool:
        return values.all() if op == "min" else values.any()
    return values.amin() if op == "min" else values.amax()
