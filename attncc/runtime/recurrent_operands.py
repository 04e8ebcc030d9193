"""The operands of a recurrent core: what each token has, made of the inputs by PyTorch, with gradients."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attncc.eager import Environment, torch_value
from attncc.ir.nodes import Element, Expr, Index, RowName
from attncc.ir.recurrence import Recurrence
from attncc.passes.updates import UpdateForm
from attncc.runtime.channels import Channels


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
    """What a call of a core needs, and what happens to its output: o = gate * output + bonus, where there are any.

    normalized: columns but the last are then divided by the last, and 0 where that is 0. value_width: columns of the
    core, that one included.
    """

    operands: Operands
    gate: Tensor | None
    bonus: Tensor | None

    normalized: bool
    value_width: int

    def finished(self, output: Tensor) -> Tensor:
        """The output of the whole recurrence, in the type of that of the core."""
        result = output if self.gate is None else output * self.gate
        result = result if self.bonus is None else result + self.bonus
        return (divided_by_sum(result) if self.normalized else result).to(output.dtype)


def divided_by_sum(o: Tensor) -> Tensor:
    """Columns but the last, divided by the last: the sum of weights. 0 where that is 0."""
    weighted, total = o[..., :-1], o[..., -1:]
    nothing = total == 0
    return torch.where(nothing, 0, weighted) / torch.where(nothing, 1, total)


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

    q (B, heads, N, D), k (B, heads, N, D), v (B, heads, N, E); inputs: tensors and scalars of the specification. Where
    the recurrence is bidirectional q, and so the query, may have another number of tokens.
    An operand that is a row or a captured tensor as it came is that tensor, not a copy.
    """
    sizes, given = _sizes(q, k, v, q_offset), _given(recurrence, inputs)
    rows: dict[RowName, Tensor] = {"q": q, "k": k, "v": v}
    if recurrence.bidirectional:
        of_query = Evaluator(recurrence, {"q": q}, given, sizes)
        of_tokens = Evaluator(recurrence, {"k": k, "v": v}, given, sizes)
    else:
        of_query = of_tokens = Evaluator(recurrence, rows, given, sizes)
    stored, wide, key, value = q.dtype, of_tokens.env.floating, of_tokens.key_width, of_tokens.value_width

    def vector(evaluator: Evaluator, expr: Expr | None, width: int, dtype: torch.dtype) -> Tensor | None:
        return None if expr is None else evaluator.vector(expr, width, dtype)

    decay: Tensor | None = None
    if form.log_decay is not None:
        width = {"scalar": 1, "key": key, "value": value}[form.side]
        decay = of_tokens.vector(form.log_decay, width, wide)
        decay = decay[..., 0] if form.side == "scalar" else decay
    return Prepared(
        Operands(
            query=of_query.vector(form.query, key, stored),
            keys=tuple(of_tokens.vector(update.key, key, stored) for update in form.updates),
            values=tuple(vector(of_tokens, update.value, value, stored) for update in form.updates),
            erases=tuple(vector(of_tokens, update.erase, key, stored) for update in form.updates),
            log_decay=decay,
        ),
        gate=vector(of_query, form.gate, value, wide),
        bonus=vector(of_query, form.bonus, value, wide),
        normalized=recurrence.normalizer == "sum",
        value_width=value,
    )


def evaluator_of(
    recurrence: Recurrence,
    rows: Mapping[RowName, Tensor],
    inputs: Mapping[str, Any],
    q_offset: int,
    read: AbstractSet[RowName],
) -> Evaluator:
    """What evaluates expressions that read only some of the rows q, k and v, as many of each."""
    sizes = _sizes(rows["q"], rows["k"], rows["v"], q_offset)
    some: dict[RowName, Tensor] = {name: x for name, x in rows.items() if name in read}
    return Evaluator(recurrence, some, _given(recurrence, inputs), sizes, like=rows["q"])


def _sizes(q: Tensor, k: Tensor, v: Tensor, q_offset: int) -> dict[str, int]:
    heads = max(x.shape[1] for x in (q, k, v))
    sizes = {"B": q.shape[0], "H": heads, "HKV": k.shape[1], "M": q.shape[2], "N": k.shape[2]}
    return sizes | {"D": q.shape[3], "E": v.shape[3], "q_offset": q_offset}


def _given(recurrence: Recurrence, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs, with the defaults of those that are left out."""
    return {p.name: p.default for p in recurrence.scalars if p.default is not None} | dict(inputs)


class Evaluator:
    """Evaluates expressions over b, h, t and one of d and e, all tokens at once."""

    def __init__(
        self,
        recurrence: Recurrence,
        rows: Mapping[RowName, Tensor],
        inputs: Mapping[str, Any],
        sizes: Mapping[str, int],
        like: Tensor | None = None,
    ) -> None:
        """rows: those of q, k and v that expressions read. like: where there are none, a tensor of as many tokens."""
        some = next(iter(rows.values())) if like is None else like
        device, wide = some.device, torch.promote_types(some.dtype, torch.float32)
        self.shape = (sizes["B"], sizes["H"], some.shape[2])
        h = torch.arange(sizes["H"], device=device).reshape(-1, 1, 1)
        coordinates = {
            "b": torch.arange(sizes["B"], device=device).reshape(-1, 1, 1, 1),
            "h": h,
            "hkv": h // max(sizes["H"] // max(sizes["HKV"], 1), 1),
            "t": torch.arange(some.shape[2], device=device).reshape(-1, 1),
            "d": torch.zeros((), dtype=torch.int64, device=device),
        }
        captured = {name: _widened(x, wide) for name, x in inputs.items()}
        self.env = Environment(coordinates, sizes, captured, {}, wide, {})
        self.key_width = int(torch_value(recurrence.key_width, self.env))
        self.value_width = sizes["E"] + (recurrence.normalizer == "sum")
        transforms = {"q": recurrence.q, "k": recurrence.k, "v": recurrence.v}
        widths = {"q": self.key_width, "k": self.key_width, "v": sizes["E"]}
        made: dict[str, Tensor] = {n: self._row(n, transforms[n], x, widths[n]) for n, x in rows.items()}
        if "v" in made and recurrence.normalizer == "sum":
            made["v"] = torch.cat([made["v"], made["v"].new_ones((*made["v"].shape[:3], 1))], 3)
        self.env = replace(self.env, inputs={**captured, **made})

    def vector(self, expr: Expr, width: int, dtype: torch.dtype) -> Tensor:
        """(B, H, N, width), of an expression over d or e."""
        return Channels(self.env, width).value(expr).to(dtype).expand(*self.shape, width)

    def _row(self, name: RowName, transform: Expr, x: Tensor, width: int) -> Tensor:
        """The transformed rows as each of the H heads reads them."""
        heads = self.shape[1]
        if x.shape[1] != heads:
            x = x.repeat_interleave(heads // x.shape[1], 1)
        if transform == Element(name, Index("d")):
            return x
        env = replace(self.env, rows={name: x.to(self.env.floating)})
        return Channels(env, width).value(transform).to(x.dtype).expand(*self.shape, width)


def _widened(x: Any, wide: torch.dtype) -> Any:
    """An input as operands are computed with it: floats in f32 at least, ints with room for what comes of them."""
    if not isinstance(x, Tensor) or x.dtype is torch.bool:
        return x
    return x.to(wide if x.is_floating_point() else torch.int64)
