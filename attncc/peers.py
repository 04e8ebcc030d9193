"""What else computes a specification with PyTorch: the eager formula, scaled_dot_product_attention, FlexAttention."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attncc.eager import Environment, Input, eager, environment, torch_value, transform
from attncc.ir.nodes import Apply, Attention, Constant, Element, Expr, Hole, Index, Load, Softmax, identity_row
from attncc.ir.operators import OPERATORS
from attncc.ir.rewrite import contains, walk


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of a call."""

    q: Tensor
    k: Tensor
    v: Tensor
    inputs: Mapping[str, Input]
    q_offset: int | None = None

    def environment(self, attention: Attention) -> Environment:
        return environment(attention, self.q, self.k, self.v, self.inputs, self.q_offset)


@dataclass(frozen=True, slots=True)
class NotApplicable:
    """Why a peer cannot compute a specification."""

    reason: str


Peer = Callable[[], Tensor] | NotApplicable


def eager_formula(attention: Attention, call: Call) -> Peer:
    """The dense formula, line by line."""
    return lambda: eager(attention, call.q, call.k, call.v, call.inputs, call.q_offset)


def count_kept_pairs(attention: Attention, call: Call) -> int:
    """How many pairs the mask keeps, over all batches and heads; in memory for a slab of queries at a time."""
    batch, heads, rows, _ = call.q.shape
    keys = call.k.shape[2]
    env = _at_pairs(call.environment(attention))
    slab = max(1, 2**24 // max(keys, 1))
    total = 0
    for start in range(0, rows, slab):
        part = {name: env.indices[name][start : start + slab] for name in ("q_row", "q_idx")}
        kept = torch_value(attention.mask, replace(env, indices={**env.indices, **part}))
        shape = (batch, heads, min(slab, rows - start), keys)
        repeats = math.prod(shape) // max(kept.numel(), 1)
        total += int(kept.sum()) * repeats
    return total


def sdpa(attention: Attention, call: Call) -> Peer:
    """`scaled_dot_product_attention`: softmax of scaled products plus at most a mask or a bias, made beforehand."""
    if attention.normalizer != Softmax():
        return NotApplicable("it takes weights that are a plain softmax")
    if any(getattr(attention, row) != identity_row(row) for row in ("q", "k", "v")):
        return NotApplicable("it takes rows as they are")
    env = _at_pairs(call.environment(attention))
    scale = torch_value(attention.scale, env)
    if scale.numel() != 1:
        return NotApplicable("it takes one number as the scale")
    bias = _added_to_qk(attention.score)
    if bias is None:
        return NotApplicable("it takes scores that are products plus a bias")
    kept = torch_value(attention.mask, env)
    shape = (call.q.shape[2], call.k.shape[2])
    options: dict[str, Any] = {"scale": float(scale), "enable_gqa": call.q.shape[1] != call.k.shape[1]}
    if bias != Constant(0.0):
        added = torch_value(bias, env).to(call.q.dtype).masked_fill(~kept, -math.inf)
        options["attn_mask"] = added.expand(*added.shape[:-2], *shape).contiguous()
    elif shape[0] == shape[1] and torch.equal(kept.expand(*kept.shape[:-2], *shape).squeeze(), _lower(shape[0])):
        options["is_causal"] = True
    elif not kept.all():
        options["attn_mask"] = kept.expand(*kept.shape[:-2], *shape).contiguous()
    return lambda: torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v, **options)


def flex(attention: Attention, call: Call) -> Peer:
    """Compiled FlexAttention, with its score and mask functions written from the IR, and its block mask made before."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if attention.normalizer != Softmax():
        return NotApplicable("it takes weights that are a plain softmax")
    if call.q.dtype == torch.float64:
        return NotApplicable("it takes no float64")
    if 0 in (call.q.shape[2], call.k.shape[2]):
        return NotApplicable("it takes no empty sequences")
    batch, heads, rows, _ = call.q.shape
    keys = call.k.shape[2]
    env = call.environment(attention)
    writer = _FlexWriter(env, call.q.shape[1] // call.k.shape[1])
    score_text = writer.text(attention.score)
    block_mask = None
    if attention.mask != Constant(True):
        mask_mod = writer.function("mask_mod(b, h, q_row, kv_idx)", writer.text(attention.mask))
        by_batch, by_head = (contains(attention.mask, _names(name)) for name in ("b", "h"))
        block_mask = create_block_mask(
            mask_mod, batch if by_batch else None, heads if by_head else None, rows, keys, device=str(call.q.device)
        )
    # Its own scale where that is a number, else a factor within the score function.
    scale = torch_value(attention.scale, env)
    factor = None if scale.numel() == 1 else writer.text(attention.scale)
    own_scale = float(scale) if factor is None else 1.0
    score_mod = None
    if attention.score != Hole("qk") or factor is not None:
        body = score_text if factor is None else f"(lambda qk: {score_text})(qk * {factor})"
        score_mod = writer.function("score_mod(qk, b, h, q_row, kv_idx)", body)

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(
            q,
            k,
            v,
            score_mod=score_mod,
            block_mask=block_mask,
            scale=own_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    # The ninth function compiled in a process would run uncompiled, without a word that a caller could see.
    torch.compiler.reset()
    compiled = torch.compile(formula, fullgraph=True)
    if all(getattr(attention, row) == identity_row(row) for row in ("q", "k", "v")):
        return lambda: compiled(call.q, call.k, call.v)
    return lambda: compiled(*transform(attention, call.q, call.k, call.v, env))


def _at_pairs(env: Environment) -> Environment:
    """Positions of queries along the last but one axis."""
    columns = {name: env.indices[name][:, None] for name in ("q_row", "q_idx")}
    return replace(env, indices={**env.indices, **columns})


def _lower(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril()


def _names(name: str) -> Callable[[Expr], bool]:
    """Whether a node varies with batch (`b`) or with the head (`h`)."""
    indices = {"b": (Index("b"),), "h": (Index("h"), Index("hkv"))}[name]
    return lambda node: node in indices


def _added_to_qk(score: Expr) -> Expr | None:
    """`bias` where score = qk + bias and bias does not depend on qk; 0.0 for qk itself; None otherwise."""
    match score:
        case Hole(name="qk"):
            return Constant(0.0)
        case Apply(op="add", args=(Hole(name="qk"), bias)) | Apply(op="add", args=(bias, Hole(name="qk"))):
            pass
        case Apply(op="sub", args=(Hole(name="qk"), bias)):
            bias = Apply("neg", (bias,))
        case _:
            return None
    return None if contains(bias, lambda node: isinstance(node, Hole)) else bias


# Operators that Python spells for tensors and numbers alike; all others are functions of the operator table.
_PYTHON = {
    "neg": "(-{0})", "add": "({0} + {1})", "sub": "({0} - {1})", "mul": "({0} * {1})", "div": "({0} / {1})",
    "floordiv": "({0} // {1})", "mod": "({0} % {1})", "pow": "({0} ** {1})",
    "lt": "({0} < {1})", "le": "({0} <= {1})", "gt": "({0} > {1})", "ge": "({0} >= {1})",
    "eq": "({0} == {1})", "ne": "({0} != {1})", "and": "({0} & {1})", "or": "({0} | {1})",
    "bit_and": "({0} & {1})", "bit_or": "({0} | {1})", "bit_xor": "({0} ^ {1})", "shl": "({0} << {1})",
    "shr": "({0} >> {1})", "not": "torch.logical_not({0})", "where": "torch.where({0}, {1}, {2})",
    "min": "smaller({0}, {1})", "max": "greater({0}, {1})", "to_float": "{0}.to(floating)",
}  # fmt: skip


class _FlexWriter:
    """Writes expressions as the functions of (b, h, q_row, kv_idx) that FlexAttention traces.

    As text that is compiled, and not as a walk over the IR: tracing has to see plain tensor code.
    """

    def __init__(self, env: Environment, group: int) -> None:
        self._env = env
        self._group = group
        self._namespace: dict[str, Any] = {
            "torch": torch,
            "inf": math.inf,
            "floating": torch.float32,
            "smaller": _smaller,
            "greater": _greater,
        }

    def function(self, signature: str, body: str) -> Callable[..., Tensor]:
        name = signature.partition("(")[0]
        code = f"def {signature}:\n    q_idx = q_row + {self._env.sizes['q_offset']}\n    return {body}\n"
        exec(compile(code, f"<{name}>", "exec"), self._namespace)  # noqa: S102 - a formula of our own making
        return self._namespace[name]

    def text(self, expr: Expr) -> str:
        if not any(isinstance(node, Index | Hole | Load | Element) for node in walk(expr)):
            value = repr(torch_value(expr, self._env).item())
            # FlexAttention's functions return tensors: a mask of just `True` is written as one.
            return f"torch.tensor({value})" if value in ("True", "False") else value
        match expr:
            case Index(name="hkv"):
                return f"(h // {self._group})"
            case Index(name=name):
                return name
            case Hole():
                return "qk"
            case Load(tensor=name, indices=indices):
                tensor = self._env.leaf(self._env.inputs[name])
                self._namespace[f"t_{name}"] = tensor
                places = (self._place(i, size) for i, size in zip(indices, tensor.shape, strict=True))
                return f"t_{name}[{', '.join(places)}]" if indices else f"t_{name}"
            case Apply(op=op, args=args):
                arguments = [self.text(argument) for argument in args]
                if op in _PYTHON:
                    return _PYTHON[op].format(*arguments)
                self._namespace[f"f_{op}"] = OPERATORS[op].torch
                return f"f_{op}({', '.join(arguments)})"
            case _:
                raise NotImplementedError(f"FlexAttention has no {type(expr).__name__}")

    def _place(self, index: Expr, size: int) -> str:
        text = self.text(index)
        # Indices of the pair itself lie within their axis; others may not where the pair is masked.
        return text if isinstance(index, Index) or text.isdigit() else f"({text}).clamp(0, {size - 1})"


def _smaller(a: Tensor | float, b: Tensor | float) -> Tensor:
    if isinstance(a, Tensor):
        return torch.minimum(a, b) if isinstance(b, Tensor) else a.clamp(max=b)
    return _smaller(b, a)


def _greater(a: Tensor | float, b: Tensor | float) -> Tensor:
    if isinstance(a, Tensor):
        return torch.maximum(a, b) if isinstance(b, Tensor) else a.clamp(min=b)
    return _greater(b, a)
