"""Expressions over tokens and channels by PyTorch operations, all tokens at once; differentiable.

`torch_value` (attncc.eager) knows one axis of channels. Here a sum may run over a second one: products with matrices,
such as those of feature maps, become matrix products and are never written out element by element.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attncc.eager import Environment, Input, torch_value
from attncc.ir.nodes import Apply, Constant, Element, Expr, Index, Load, Parameter, Reduce
from attncc.ir.rewrite import contains, has_free, kind_of, map_children, substitute, walk
from attncc.ir.types import Kind

_PLACES = {"b": 0, "h": 1, "hkv": 1, "t": 2, "d": 3, "e": 3}


@dataclass(frozen=True, slots=True)
class Channels:
    """Evaluates expressions with one free channel index, `d` or `e`, of `width` values: (B, H, N, width), each axis of
    which may be 1.

    env: coordinates b (B, 1, 1, 1), h and hkv (H, 1, 1), t (N, 1); rows (B, H, N, …).
    """

    env: Environment
    width: int
    _reduced: dict[str, Input] = field(default_factory=dict[str, Input])

    def value(self, expr: Expr) -> Tensor:
        """`expr` for every batch, head, token and channel."""
        channel = torch.arange(self.width, device=self.env.indices["t"].device)
        reads = self._without_sums(expr)
        views = dict(self._views(reads))
        names = {node: Parameter(f"view {number}", kind_of(node)) for number, node in enumerate(views)}
        given = {parameter.name: views[node] for node, parameter in names.items()}
        env = replace(
            self.env,
            indices={**self.env.indices, "d": channel, "e": channel},
            inputs={**self.env.inputs, **self._reduced, **given},
        )
        return torch_value(substitute(reads, dict[Expr, Expr](names)), env)

    def _without_sums(self, expr: Expr) -> Expr:
        """`expr` with a parameter in place of each sum and maximum and of each value of positions, which `_reduced`
        holds the value of."""
        if isinstance(expr, Reduce):
            value = self._reduce(expr)
        elif _is_of_positions(expr):
            value = self._of_positions(expr)
        else:
            return map_children(expr, self._without_sums)
        name = f"reduced {len(self._reduced)}"
        self._reduced[name] = value
        return Parameter(name, Kind.FLOAT)

    def _of_positions(self, expr: Expr) -> Tensor:
        """In f64: an angle at position 1,000,000 has no digits behind the point left in f32."""
        channel = torch.arange(self.width, device=self.env.indices["t"].device)
        indices = {**self.env.indices, "d": channel, "e": channel}
        env = replace(self.env, indices=indices, floating=torch.float64)
        return torch_value(expr, env).to(self.env.floating)

    def _reduce(self, expr: Reduce) -> Tensor:
        size = int(torch_value(expr.size, self.env))
        other = "e" if expr.over == "d" else "d"
        inner = Channels(self.env, size)
        if not has_free(expr.body, other):
            terms = inner.value(expr.body)
            terms = terms.expand(*terms.shape[:-1], size) if terms.dim() else terms.expand(size)
            return terms.sum(-1, keepdim=True) if expr.op == "sum" else terms.amax(-1, keepdim=True)
        assert expr.op == "sum", "only sums have matrices in them"
        vector = [factor for factor in _factors(expr.body) if not has_free(factor, other)]
        matrix = [factor for factor in _factors(expr.body) if has_free(factor, other)]
        rows = inner.value(_product(vector)) if vector else torch.ones((), dtype=self.env.floating)
        return _times(rows, self.matrix(_product(matrix), expr.over, other, size), size)

    def matrix(self, expr: Expr, over: str, other: str, size: int) -> Tensor:
        """`expr` over both channel indices: (B, H, N, size, width), each axis of which may be 1."""
        device = self.env.indices["t"].device
        indices = {name: index[..., None] for name, index in self.env.indices.items()}
        indices[over] = torch.arange(size, device=device)[:, None]
        indices[other] = torch.arange(self.width, device=device)
        rows = {name: x[..., None] for name, x in self.env.rows.items()}
        extents = {over: size, other: self.width}
        loads = [
            node
            for node in dict.fromkeys(walk(expr))
            if isinstance(node, Load) and _is_direct(node) and self._fits(node, extents)
        ]
        places = {**_PLACES, over: 3, other: 4}
        given = {f"view {number}": self._view(load, places) for number, load in enumerate(loads)}
        names: dict[Expr, Expr] = {load: Parameter(n, load.kind) for load, n in zip(loads, given, strict=True)}
        env = replace(self.env, indices=indices, rows=rows, inputs={**self.env.inputs, **given})
        result = torch_value(substitute(expr, names), env)
        return result[(None,) * (5 - result.dim())]

    def _views(self, expr: Expr) -> Iterator[tuple[Expr, Tensor]]:
        """What of `expr` is read without a gather: rows as they are, tensors whose axes are coordinates."""
        for node in dict.fromkeys(walk(expr)):
            if isinstance(node, Element) and isinstance(node.index, Index) and not node.upstream:
                if self.env.rows[node.row].shape[-1] == self.width:
                    yield node, self.env.rows[node.row]
            elif isinstance(node, Load) and _is_direct(node) and self._fits(node, {"d": self.width, "e": self.width}):
                yield node, self._view(node, _PLACES)

    def _fits(self, load: Load, channels: Mapping[str, int]) -> bool:
        """Whether each axis is as long as its coordinate: no part of it is read, nor more than there is."""
        tensor = self.env.inputs[load.tensor]
        assert isinstance(tensor, Tensor)
        sizes = {name: index.numel() for name, index in self.env.indices.items()} | dict(channels)
        return all(
            isinstance(index, Constant) or size == (sizes[index.name] if isinstance(index, Index) else 0)
            for index, size in zip(load.indices, tensor.shape, strict=True)
            if not (isinstance(index, Index) and index.name == "hkv")
        )

    def _view(self, load: Load, places: Mapping[str, int]) -> Tensor:
        """The tensor of a load with its axes where `places` says, and axes of size 1 between them."""
        tensor = self.env.inputs[load.tensor]
        assert isinstance(tensor, Tensor)
        found: list[int] = []
        for index in load.indices:
            axis = len(found)
            if isinstance(index, Constant):
                tensor = tensor.select(axis, int(index.value))
                continue
            assert isinstance(index, Index)
            if index.name == "hkv":
                tensor = tensor.index_select(axis, self.env.indices["hkv"].flatten())
            found.append(places[index.name])
        shape = [1] * (1 + max(places.values()))
        for place, size in zip(found, tensor.shape, strict=True):
            shape[place] = size
        return tensor.permute(sorted(range(len(found)), key=found.__getitem__)).reshape(shape)


def _is_of_positions(expr: Expr) -> bool:
    """Whether `expr` is a float computed of positions, channels and what no token changes, more than a number."""
    if not isinstance(expr, Apply) or kind_of(expr) is not Kind.FLOAT or not contains(expr, _is_position):
        return False
    return not contains(expr, lambda node: isinstance(node, Element | Reduce | Load))


def _is_position(node: Expr) -> bool:
    return node == Index("t")


def _times(rows: Tensor, matrix: Tensor, size: int) -> Tensor:
    """rows (B, H, N, size) times matrix (B, H, N, size, width): (B, H, N, width)."""
    rows = rows.expand(*rows.shape[:-1], size) if rows.dim() else rows.expand(1, 1, 1, size)
    matrix = matrix.expand(*matrix.shape[:3], size, matrix.shape[4]).to(rows.dtype)
    if matrix.shape[2] == 1:
        return rows @ matrix[:, :, 0]
    return (rows[..., None, :] @ matrix)[..., 0, :]


def _factors(expr: Expr) -> Iterator[Expr]:
    match expr:
        case Apply(op="mul", args=(a, b)):
            yield from _factors(a)
            yield from _factors(b)
        case _:
            yield expr


def _product(factors: list[Expr]) -> Expr:
    result = factors[0]
    for factor in factors[1:]:
        result = Apply("mul", (result, factor))
    return result


def _is_direct(load: Load) -> bool:
    """Whether every index is a coordinate of its own or a constant."""
    plain = all(isinstance(index, Index) or _is_place(index) for index in load.indices)
    names = [index.name for index in load.indices if isinstance(index, Index)]
    axes = ["h" if name == "hkv" else name for name in names]
    return plain and set(axes) <= _PLACES.keys() and len(set(axes)) == len(axes)


def _is_place(index: Expr) -> bool:
    return isinstance(index, Constant) and type(index.value) is int and index.value >= 0
