"""Gradients of a kernel beside those of the float64 reference and of the plain formula, by the error rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attncc.eager import eager
from attncc.error_rule import compare
from attncc.ir.nodes import Attention
from attncc.reference import evaluate

Attend = Callable[..., Tensor]
Gradients = dict[str, Tensor]


def compare_gradients(
    attention: Attention,
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Any],
    q_offset: int | None = None,
    seed: int = 0,
) -> str | None:
    """What is wrong with the gradients of q, k, v and every captured tensor of floats, or None."""
    wrong = wrong_gradient(attention, attend, q, k, v, inputs, q_offset, seed)
    return None if wrong is None else wrong[1]


def wrong_gradient(
    attention: Attention,
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Any],
    q_offset: int | None = None,
    seed: int = 0,
) -> tuple[str, str] | None:
    """The first tensor among q, k, v and the captured tensors of floats whose gradient is wrong, and what is wrong.

    attend: called as a compiled attention is, returning o. The gradient of o is drawn, in the type of o.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    leaves = _leaves(q, k, v, inputs, None)
    o = attend(leaves["q"], leaves["k"], leaves["v"], q_offset=q_offset, **_arguments(inputs, leaves))
    do = gradient_of_o(o, seed)
    found = _gradients(o, leaves, do)

    exact = _leaves(q, k, v, inputs, torch.float64)
    of_exact = _arguments(inputs, exact)
    oracle, _ = evaluate(attention, exact["q"], exact["k"], exact["v"], of_exact, q_offset)
    oracles = _gradients(oracle, exact, do.double())
    # What these are differences of: weights times the sizes of do and v, before anything cancels.
    sized = evaluate(attention, exact["q"], exact["k"], exact["v"].abs(), of_exact, q_offset)
    terms = _gradients(undivided(*sized), exact, do.double().abs())

    plain = _leaves(q, k, v, inputs, None)
    # Captured floats are widened before anything is computed of them, as in a kernel.
    widened = {name: x.to(wide) if name in plain else x for name, x in _arguments(inputs, plain).items()}
    formula = eager(attention, plain["q"], plain["k"], plain["v"], widened, q_offset)
    plains = _gradients(formula, plain, do)

    # Gradients that are more precise than rows have the rounding of transformed rows: decision 0006.
    finer = {name for name, x in found.items() if x.dtype.itemsize > q.dtype.itemsize}
    rounded: Gradients = {}
    if finer:
        of_rounded, _ = evaluate(
            attention,
            exact["q"].to(q.dtype),
            exact["k"].to(q.dtype),
            exact["v"].to(q.dtype),
            of_exact,
            q_offset,
            rounded_rows=True,
        )
        rounded = _gradients(of_rounded, exact, do.double())
    for name in found:
        standards = (plains[name], rounded[name]) if name in finer else (plains[name],)
        message = compare(f"d{name}", found[name], oracles[name], *standards, terms=terms[name])
        if message is not None:
            return name, message
    return None


def gradient_of_o(o: Tensor, seed: int) -> Tensor:
    """A gradient to begin with."""
    return torch.randn(o.shape, generator=torch.Generator().manual_seed(seed)).to(o)


def undivided(o: Tensor, lse: Tensor | None) -> Tensor:
    """`o`, as if what its rows are divided by were constant: its gradient is p dp where that of `o` is p (dp - delta),
    a difference that may be 0 of terms that are not."""
    if lse is None:
        return o
    some = lse.isfinite()
    return o * torch.exp(torch.where(some, lse - lse.detach(), 0.0))[..., None]


def _leaves(q: Tensor, k: Tensor, v: Tensor, inputs: Mapping[str, Any], dtype: torch.dtype | None) -> Gradients:
    """q, k, v and the captured tensors of floats, as leaves of a graph; in `dtype`, or each in its own."""
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
    operands = {"q": q, "k": k, "v": v, **tensors}
    return {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in operands.items()}


def _arguments(inputs: Mapping[str, Any], leaves: Gradients) -> dict[str, Any]:
    return {name: leaves.get(name, x) for name, x in inputs.items()}


def _gradients(o: Tensor, leaves: Gradients, do: Tensor) -> Gradients:
    """The gradient of each leaf; zeros where o does not depend on it."""
    if not o.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(o, tuple(leaves.values()), do, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))
