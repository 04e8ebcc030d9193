"""A specification as the dense PyTorch formula that one would write by hand, in the type of its operands.

It is what people run today: `verify` measures a kernel's error beside its error, `bench` a kernel's time beside its
time. It holds scores for every pair, in memory quadratic in the length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias, assert_never

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
    identity_row,
)
from attncc.ir.operators import OPERATORS

Input: TypeAlias = Tensor | bool | int | float


@dataclass(frozen=True, slots=True)
class Environment:
    """What the leaves of an expression stand for. All tensors broadcast against (B, H, rows, columns).

    floating: the type of floats made of ints; literals adapt to what they are combined with.
    rows: in row transforms, the tensors whose elements are read, (B, H, rows, width).
    read: an element of a captured tensor at indices that lie within it.
    active: the places that captured tensors have gradients of; all where it is None. What `where` leaves out is none:
    0 times its derivative, which may be infinite, would be NaN.
    """

    indices: Mapping[str, Tensor]
    sizes: Mapping[str, int]
    inputs: Mapping[str, Input]
    holes: Mapping[str, Tensor]
    floating: torch.dtype
    rows: Mapping[RowName, Tensor]
    read: Callable[[Tensor, list[Tensor]], Tensor] = lambda tensor, places: tensor[tuple(places)]
    active: Tensor | None = None

    def leaf(self, value: Input) -> Tensor:
        """A scalar as a tensor that does not widen what it is combined with."""
        if isinstance(value, Tensor):
            return value
        return torch.tensor(value, dtype=self.floating) if isinstance(value, float) else torch.tensor(value)


def torch_value(expr: Expr, env: Environment) -> Tensor:
    """The expression by plain PyTorch operations; also under `vmap` and `torch.compile`."""
    match expr:
        case Constant(value=value):
            return env.leaf(value)
        case Index(name=name):
            return env.indices[name]
        case Size(name=name):
            return torch.tensor(env.sizes[name])
        case Parameter(name=name):
            return env.leaf(env.inputs[name])
        case Hole(name=name):
            return env.holes[name]
        case Load(tensor=name, indices=indices):
            tensor = env.leaf(env.inputs[name])
            # What a masked pair reads is not used, but has to lie within the tensor.
            places = [torch_value(i, env).clamp(0, size - 1) for i, size in zip(indices, tensor.shape, strict=True)]
            if 0 in tensor.shape:
                return tensor.new_zeros(torch.broadcast_shapes(*(place.shape for place in places)))
            element = env.read(tensor, places)
            return element if env.active is None else torch.where(env.active, element, element.detach())
        case Element(row=row, index=Index(name="d")) if env.indices["d"].numel() == env.rows[row].shape[-1]:
            return env.rows[row]
        case Element(row=row, index=index):
            return _element(env.rows[row], torch_value(index, env))
        case Reduce(op=op, body=body, size=size):
            d = torch.arange(int(torch_value(size, env)), device=env.indices["b"].device)
            active = None if env.active is None else env.active.any(-1, keepdim=True)
            terms = torch_value(body, replace(env, indices={**env.indices, "d": d}, active=active))
            terms = terms.broadcast_to(*terms.shape[:-1], len(d)) if terms.dim() else terms.broadcast_to(len(d))
            return terms.sum(-1, keepdim=True) if op == "sum" else terms.amax(-1, keepdim=True)
        case Apply(op="to_float", args=(argument,)):
            return torch_value(argument, env).to(env.floating)
        case Apply(op="where", args=(condition, then, otherwise)) if env.active is not None:
            chosen = torch_value(condition, env)
            of_then, of_otherwise = (replace(env, active=env.active & x) for x in (chosen, ~chosen))
            return torch.where(chosen, torch_value(then, of_then), torch_value(otherwise, of_otherwise))
        case Apply(op=op, args=args):
            return OPERATORS[op].torch(*(torch_value(argument, env) for argument in args))
        case Variable() | Summary():
            raise IRError(f"{expr} belongs to a plan")
        case _:
            assert_never(expr)


def _element(rows: Tensor, index: Tensor) -> Tensor:
    """rows[..., index], where the index may vary with anything."""
    index = index.clamp(0, rows.shape[-1] - 1)
    if index.dim() <= 1:
        return rows[..., index]
    shape = torch.broadcast_shapes(rows.shape[:-1], index.shape[:-1])
    return rows.expand(*shape, -1).gather(-1, index.expand(*shape, -1))


def eager(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, inputs: Mapping[str, Input], q_offset: int | None = None
) -> Tensor:
    """o (B, H, M, E) of the dense formula; arguments as at a call. `inputs` holds every scalar without a default."""
    env = environment(attention, q, k, v, inputs, q_offset)
    q, k, v = transform(attention, q, k, v, env)
    indices = {**env.indices, "q_row": env.indices["q_row"][:, None], "q_idx": env.indices["q_idx"][:, None]}
    env = replace(env, indices=indices)
    kept = torch_value(attention.mask, env)
    dot = q @ k.mT
    qk = torch_value(attention.scale, env).to(dot.dtype) * dot
    score = torch_value(attention.score, replace(env, holes={"qk": qk}))
    match attention.normalizer:
        case Softmax(sink=sink):
            score = score.masked_fill(~kept, -torch.inf)
            nothing = ~kept.any(-1, keepdim=True)
            if sink is None and nothing.any():
                score = score.masked_fill(nothing, 0.0)  # or such a row would be NaN, and its gradient too
            if sink is not None:
                extra = torch_value(sink, env).to(score.dtype).expand(*score.shape[:-1], 1)
                score = torch.cat([score, extra], -1)
            weight = torch.softmax(score, -1)
            if sink is not None:
                weight = weight[..., :-1]
            if nothing.any():
                weight = weight.masked_fill(~kept, 0.0)
        case Elementwise(weight=expr):
            weight = torch_value(expr, replace(env, holes={"score": score})).masked_fill(~kept, 0.0)
        case Sum(weight=expr):
            weight = torch_value(expr, replace(env, holes={"score": score})).masked_fill(~kept, 0.0)
            total = weight.sum(-1, keepdim=True)
            weight = torch.where(total == 0, 0.0, weight / total)
        case _:
            assert_never(attention.normalizer)
    if attention.dropout is not None:
        weight = weight * torch_value(attention.dropout, env)
    return weight.to(v.dtype) @ v


def running_sums(attention: Attention, inputs: Mapping[str, Input]) -> dict[str, Tensor]:
    """The running sums that loads read, by the names of the tensors that they are sums of: added up in f64, kept in f32
    (f64 of f64). Differentiable."""
    result: dict[str, Tensor] = {}
    for parameter in attention.tensors:
        tensor = inputs[parameter.name]
        if parameter.summed is not None and isinstance(tensor, Tensor):
            wide = torch.promote_types(tensor.dtype, torch.float32)
            result[parameter.name] = tensor.cumsum(parameter.summed, dtype=torch.float64).to(wide)
    return result


def environment(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, inputs: Mapping[str, Input], q_offset: int | None = None
) -> Environment:
    """The environment of a call: `b` (B, 1, 1, 1), `h` and `hkv` (H, 1, 1), positions (M,) and (N,)."""
    batch, heads, rows, width_qk = q.shape
    heads_kv, keys = k.shape[1:3]
    offset = keys - rows if q_offset is None else q_offset
    device = q.device
    h = torch.arange(heads, device=device)[:, None, None]
    q_row = torch.arange(rows, device=device)
    return Environment(
        indices={
            "b": torch.arange(batch, device=device)[:, None, None, None],
            "h": h,
            "hkv": h // max(heads // max(heads_kv, 1), 1),
            "q_row": q_row,
            "q_idx": q_row + offset,
            "kv_idx": torch.arange(keys, device=device),
        },
        sizes={
            "B": batch,
            "H": heads,
            "HKV": heads_kv,
            "M": rows,
            "N": keys,
            "D": width_qk,
            "E": v.shape[3],
            "q_offset": offset,
        },
        inputs={
            **{p.name: p.default for p in attention.scalars if p.default is not None},
            **inputs,
            **running_sums(attention, inputs),
        },
        holes={},
        # Where a bf16 formula mixes in positions or f32 tensors, PyTorch computes in f32 from there on.
        floating=torch.promote_types(q.dtype, torch.float32),
        rows={},
    )


def transform(attention: Attention, q: Tensor, k: Tensor, v: Tensor, env: Environment) -> tuple[Tensor, Tensor, Tensor]:
    """The transformed rows, with keys and values repeated for every query head."""
    if k.shape[1] != q.shape[1]:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return (
        _transform_rows(attention.q, "q", q, env),
        _transform_rows(attention.k, "k", k, env),
        _transform_rows(attention.v, "v", v, env),
    )


def _transform_rows(expr: Expr, row: RowName, x: Tensor, env: Environment) -> Tensor:
    if expr == identity_row(row):
        return x
    indices = {name: index[:, None] if index.dim() == 1 else index for name, index in env.indices.items()}
    indices["d"] = torch.arange(x.shape[-1], device=x.device)
    result = torch_value(expr, replace(env, indices=indices, rows={row: x}))
    return result.to(x.dtype).broadcast_to(x.shape)
