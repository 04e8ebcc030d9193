"""Assertions by the error rule (`attncc.error_rule`), and the plain formula that sets its standard.

What the plain formula rounds, and where (eager PyTorch's own promotion does all of it):
  * q, k, v keep the input dtype: products accumulate inside matmul and come out rounded; so do row transforms
  * ints that become floats (positions) are f32, f64 for f64 inputs; literals and scalars promote nothing
  * captured floats are f32 (f64 for f64 inputs) whatever they are stored as, and promote: bias + bf16 scores are f32
    from there on
  * softmax is taken in the dtype of the scores (in f32 inside, as torch does) and its result rounded to the input dtype
    for the product with v
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from attncc.error_rule import compare
from attncc.ir.nodes import Attention, Elementwise, Expr, RowName, Softmax, Sum
from attncc.reference import Scope, evaluate, value


def check_kernel(
    out: Tensor,
    lse: Tensor | None,
    attention: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Tensor | bool | float],
    q_offset: int | None = None,
) -> None:
    """Assert that a kernel's `out` (and `lse`, if given) is what `attention` means, by the error rule."""
    q, k, v = (x.detach().cpu() for x in (q, k, v))
    inputs = {name: x.detach().cpu() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    reference = evaluate(attention, q, k, v, inputs, q_offset)
    rounded = evaluate(attention, q, k, v, inputs, q_offset, rounded_rows=True)
    assert_close(out, lse, reference, same_dtype_formula(attention, q, k, v, inputs, q_offset), rounded)


def assert_close(
    out: Tensor,
    lse: Tensor | None,
    reference64: tuple[Tensor, Tensor | None],
    *standards: tuple[Tensor, Tensor | None],
) -> None:
    """Assert the error rule for `out` and, where a kernel returned it, for `lse`.

    `reference64` and `standards` are (o, lse) of `attncc.reference.evaluate`, and of `same_dtype_formula` and of
    `evaluate` with rounded rows.
    """
    check_tensor("out", out, reference64[0], *(o for o, _ in standards))
    if lse is not None:
        plain = [x for _, x in standards if x is not None]
        assert reference64[1] is not None and plain, "this attention has no lse"
        check_tensor("lse", lse, reference64[1], *plain)


def check_tensor(name: str, found: Tensor, reference: Tensor, *plain: Tensor) -> None:
    """Assert that `found` is as close to `reference` as the rule asks, given the results of plain formulas."""
    message = compare(name, found.cpu(), reference, *plain)
    assert message is None, message


def same_dtype_formula(
    attention: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Tensor | bool | float],
    q_offset: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(o, lse) of the plain formula in the dtype of q, k and v, dense over all pairs, as eager PyTorch computes it."""
    batch, heads, rows, width = q.shape
    heads_kv, keys = k.shape[1:3]
    floating = torch.float64 if q.dtype == torch.float64 else torch.float32
    offset = keys - rows if q_offset is None else q_offset
    sizes = {"B": batch, "H": heads, "HKV": heads_kv, "M": rows, "N": keys, "D": width, "E": v.shape[3]}
    scalars = {p.name: p.default for p in attention.scalars if p.default is not None}
    captured = {name: _captured(x, floating) for name, x in {**scalars, **inputs}.items()}
    # Axes of every index tensor: batch, head, query, key. One value along an axis is an axis of one.
    b, h = torch.arange(batch).view(-1, 1, 1, 1), torch.arange(heads).view(1, -1, 1, 1)
    group = heads // heads_kv if heads_kv else 1
    q_row, kv_idx = torch.arange(rows).view(1, 1, -1, 1), torch.arange(keys).view(1, 1, 1, -1)
    head = {"b": b, "h": h, "hkv": h // group}
    scope = Scope(
        {**head, "q_row": q_row, "q_idx": q_row + offset, "kv_idx": kv_idx},
        {**sizes, "q_offset": offset},
        captured,
        reads=[],
        holes={},
        rows={},
        floating=floating,
    )
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    q = _transformed(attention.q, "q", q, scope, {"q_row": q_row, "q_idx": q_row + offset})
    k = _transformed(attention.k, "k", k, scope, {"kv_idx": kv_idx.mT})
    v = _transformed(attention.v, "v", v, scope, {"kv_idx": kv_idx.mT})

    qk = value(attention.scale, scope) * (q @ k.mT)
    pairs = qk.shape
    score = value(attention.score, replace(scope, holes={"qk": qk})).broadcast_to(pairs)
    kept = value(attention.mask, scope).broadcast_to(pairs)
    match attention.normalizer:
        case Softmax(sink=sink):
            last = torch.tensor(-torch.inf) if sink is None else value(sink, scope)
            last = last.broadcast_to(*pairs[:-1], 1).to(score.dtype)
            scores = torch.cat([score.masked_fill(~kept, -torch.inf), last], -1)
            probabilities = scores.softmax(-1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)
            return probabilities[..., :-1].to(v.dtype) @ v, scores.to(floating).logsumexp(-1)
        case Sum(weight=weight) | Elementwise(weight=weight):
            weights = value(weight, replace(scope, holes={"score": score})).broadcast_to(pairs)
            weights = weights.masked_fill(~kept, 0)
    if isinstance(attention.normalizer, Elementwise):
        return weights.to(v.dtype) @ v, None
    total = weights.sum(-1, keepdim=True)
    weights = (weights / total).masked_fill(total == 0, 0)
    return weights.to(v.dtype) @ v, total.squeeze(-1).to(floating).log()


def _captured(x: Tensor | bool | float, floating: torch.dtype) -> Tensor:
    """Floats in the dtype that the kernel computes in, ints as int64."""
    x = torch.tensor(x, dtype=floating if isinstance(x, float) else None) if not isinstance(x, Tensor) else x
    if x.dtype == torch.bool:
        return x
    return x.to(floating if x.is_floating_point() else torch.int64)


def _transformed(expr: Expr, row: RowName, x: Tensor, scope: Scope, positions: Mapping[str, Tensor]) -> Tensor:
    """Each row of `x` (B, H, rows, width) transformed, in its own dtype."""
    heads: list[Tensor] = []
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            at_head = {name: scope.indices[name].expand(*x.shape[:2], 1, 1)[b, h] for name in ("b", "h", "hkv")}
            at_rows = {name: index[0, 0] for name, index in positions.items()}
            indices = {**at_head, **at_rows, "d": torch.arange(x.shape[3])[None, :]}
            position = torch.arange(x.shape[2])[:, None]
            inner = replace(scope, indices=indices, rows={row: x[b, h]}, position=position, axes={"d": -1})
            heads.append(value(expr, inner).broadcast_to(x.shape[2:]).to(x.dtype))
    return torch.stack(heads).reshape(x.shape) if heads else x
