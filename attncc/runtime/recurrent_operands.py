"""The operands of a recurrent core: what each token has, made of the inputs by PyTorch, with gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attncc.eager import Environment, torch_value
from attncc.ir.nodes import Constant, Element, Expr, Index, Load, Parameter, RowName
from attncc.ir.recurrence import Recurrence
from attncc.ir.rewrite import substitute, walk
from attncc.passes.updates import UpdateForm


@dataclass(frozen=True, slots=True)
class Operands:
    """Tensors (B, H, N, D) or, for values, (B, H, N, E); one key, value and erase for each update, None where it has
    none. log_decay: (B, H, N), (B, H, N, D) or (B, H, N, E); None where nothing decays."""

    query: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor | None, ...]
    erases: tuple[Tensor | None, ...]
    log_decay: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, in the order of the fields."""
        return (self.query, *self.keys, *self.values, *self.erases, self.log_decay)

    @staticmethod
    def of(tensors: tuple[Any, ...]) -> Operands:
        """The inverse of `tensors`."""
        updates = (len(tensors) - 2) // 3
        keys, values, erases = (tensors[1 + i * updates : 1 + (i + 1) * updates] for i in range(3))
        return Operands(tensors[0], keys, values, erases, tensors[-1])


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a call of a core needs, and what happens to its output: o = gate * output + bonus, where there are any."""

    operands: Operands
    gate: Tensor | None
    bonus: Tensor | None

    def finished(self, output: Tensor) -> Tensor:
        """The output of the whole recurrence, in the type of that of the core."""
        result = output if self.gate is None else output * self.gate
        return (result if self.bonus is None else result + self.bonus).to(output.dtype)


def prepare(
    recurrence: Recurrence,
    form: UpdateForm,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Any],
    q_offset: int,
) -> Prepared:
    """The operands in the type of q, the decay in f32 (f64 beside f64); differentiable.

    q (B, heads, N, D), k (B, heads, N, D), v (B, heads, N, E); inputs: tensors and scalars of the specification.
    An operand that is a row or a captured tensor as it came is that tensor, not a copy.
    """
    evaluator = _Evaluator(recurrence, q, k, v, inputs, q_offset)
    stored, wide = q.dtype, evaluator.env.floating
    key, value = q.shape[3], v.shape[3]

    def vector(expr: Expr | None, width: int, dtype: torch.dtype) -> Tensor | None:
        return None if expr is None else evaluator.vector(expr, width, dtype)

    decay: Tensor | None = None
    if form.log_decay is not None:
        width = {"scalar": 1, "key": key, "value": value}[form.side]
        decay = evaluator.vector(form.log_decay, width, wide)
        decay = decay[..., 0] if form.side == "scalar" else decay
    return Prepared(
        Operands(
            query=evaluator.vector(form.query, key, stored),
            keys=tuple(evaluator.vector(update.key, key, stored) for update in form.updates),
            values=tuple(vector(update.value, value, stored) for update in form.updates),
            erases=tuple(vector(update.erase, key, stored) for update in form.updates),
            log_decay=decay,
        ),
        gate=vector(form.gate, value, wide),
        bonus=vector(form.bonus, value, wide),
    )


class _Evaluator:
    """Evaluates expressions over b, h, t and one of d and e, all tokens at once."""

    def __init__(
        self, recurrence: Recurrence, q: Tensor, k: Tensor, v: Tensor, inputs: Mapping[str, Any], q_offset: int
    ) -> None:
        heads, device = max(x.shape[1] for x in (q, k, v)), q.device
        self.shape = (q.shape[0], heads, q.shape[2])
        wide = torch.promote_types(q.dtype, torch.float32)
        h = torch.arange(heads, device=device).reshape(-1, 1, 1)
        coordinates = {
            "b": torch.arange(self.shape[0], device=device).reshape(-1, 1, 1, 1),
            "h": h,
            "hkv": h // max(heads // max(k.shape[1], 1), 1),
            "t": torch.arange(self.shape[2], device=device).reshape(-1, 1),
            "d": torch.arange(q.shape[3], device=device),
            "e": torch.arange(v.shape[3], device=device),
        }
        sizes = {
            "B": self.shape[0],
            "H": heads,
            "HKV": k.shape[1],
            "N": self.shape[2],
            "D": q.shape[3],
            "E": v.shape[3],
        }
        given = {p.name: p.default for p in recurrence.scalars if p.default is not None}
        captured = {name: _widened(x, wide) for name, x in {**given, **inputs}.items()}
        self.env = Environment(coordinates, {**sizes, "q_offset": q_offset}, captured, {}, wide, {})
        transforms: tuple[tuple[RowName, Expr, Tensor], ...] = (
            ("q", recurrence.q, q),
            ("k", recurrence.k, k),
            ("v", recurrence.v, v),
        )
        rows = {name: self._row(name, transform, x) for name, transform, x in transforms}
        self.env = replace(self.env, inputs={**captured, **rows})

    def vector(self, expr: Expr, width: int, dtype: torch.dtype) -> Tensor:
        """(B, H, N, width)"""
        loads = list(_direct_loads(expr))
        names = {load: f"{load.tensor}, view {number}" for number, load in enumerate(loads)}
        views = {name: self._view(load) for load, name in names.items()}
        read = substitute(expr, {load: Parameter(name, load.kind) for load, name in names.items()})
        result = torch_value(read, replace(self.env, inputs={**self.env.inputs, **views}))
        return result.to(dtype).expand(*self.shape, width)

    def _row(self, name: RowName, transform: Expr, x: Tensor) -> Tensor:
        """The transformed rows as each of the H heads reads them."""
        heads = self.shape[1]
        if x.shape[1] != heads:
            x = x.repeat_interleave(heads // x.shape[1], 1)
        if transform == Element(name, Index("d")):
            return x
        wide = x.to(self.env.floating)
        indices = {**self.env.indices, "d": torch.arange(x.shape[3], device=x.device)}
        value = torch_value(transform, replace(self.env, indices=indices, rows={name: wide}))
        return value.to(x.dtype).expand(x.shape)

    def _view(self, load: Load) -> Tensor:
        """The elements of a load that `_direct_loads` has found, without a gather: axes b, h, t and channel, or 1."""
        tensor = self.env.inputs[load.tensor]
        assert isinstance(tensor, Tensor)
        places: list[int] = []
        axis = 0
        for index in load.indices:
            if isinstance(index, Constant):
                tensor = tensor.select(axis, int(index.value))
                continue
            assert isinstance(index, Index)
            if index.name == "hkv":
                tensor = tensor.repeat_interleave(self.shape[1] // tensor.shape[axis], axis)
            places.append(_AXIS[index.name])
            axis += 1
        shape = [1, 1, 1, 1]
        for place, size in zip(places, tensor.shape, strict=True):
            shape[place] = size
        return tensor.permute(sorted(range(len(places)), key=places.__getitem__)).reshape(shape)


_AXIS = {"b": 0, "h": 1, "hkv": 1, "t": 2, "d": 3, "e": 3}


def _direct_loads(expr: Expr) -> Iterator[Load]:
    """The loads whose every index is a coordinate of its own or a constant."""
    for node in dict.fromkeys(walk(expr)):
        if isinstance(node, Load):
            axes = [_AXIS[index.name] for index in node.indices if isinstance(index, Index)]
            plain = all(isinstance(index, Index) or _is_place(index) for index in node.indices)
            if plain and len(set(axes)) == len(axes):
                yield node


def _is_place(index: Expr) -> bool:
    return isinstance(index, Constant) and type(index.value) is int and index.value >= 0


def _widened(x: Any, wide: torch.dtype) -> Any:
    """An input as operands are computed with it: floats in f32 at least, ints with room for what comes of them."""
    if not isinstance(x, Tensor) or x.dtype is torch.bool:
        return x
    return x.to(wide if x.is_floating_point() else torch.int64)
