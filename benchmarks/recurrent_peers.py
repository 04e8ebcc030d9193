"""Recurrences in plain PyTorch, as one would write them for speed: in chunks, token by token, and one step.

All take operands: q (scaled), k, v of (B, H, N, ·); the log of the decay, (b, H, n) or (B, H, N, D), or None, where
b and n may be 1; beta (B, H, N) for the delta rule, or None without. States are f32.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Operands: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
Setting: TypeAlias = tuple[int, torch.dtype]


def operands(variant: str, q: Tensor, k: Tensor, v: Tensor, inputs: dict[str, Any]) -> Operands:
    """Those of an example."""
    scale = q.shape[-1] ** -0.5
    match variant:
        case "retnet":
            return q * scale, k, v, inputs["gamma"].log()[None, :, None], None
        case "mamba2":
            dt = inputs["dt"]
            return q, k, v * dt[..., None].to(v.dtype), inputs["A"][:, None] * dt, None
        case "gla":
            return q * scale, k, v, inputs["g"], None
        case "deltanet" | "gated_deltanet":
            return _l2norm(q) * scale, _l2norm(k), v, inputs.get("g"), inputs["beta"]
        case _:
            raise ValueError(variant)


def finished(variant: str, o: Tensor, v: Tensor, inputs: dict[str, Any]) -> Tensor:
    """What an example makes of the output of its recurrence."""
    return o + inputs["skip"][:, None, None].to(v.dtype) * v if variant == "mamba2" else o


def _l2norm(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * (wide.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, setting: Setting) -> Tensor:
    """o, in chunks of the setting's length, which divides N, and with products of matrices in its type.

    All chunks, heads and sequences are one batch; only the state passes from chunk to chunk in a loop. Gates by channel
    multiply queries and divide keys, which is quickest, and overflows where a chunk decays below 1e-38: other gates
    than those of the benchmark would need more work.
    """
    length, dtype = setting
    Q, K, V = (x.to(dtype).unflatten(2, (-1, length)) for x in (q, k, v))
    lower = torch.ones(length, length, dtype=torch.bool).tril()
    G = _sums(g, length)
    if g is not None and g.dim() == 4:
        inside = None
        entering, last = (Q * G.exp()).to(dtype), G[..., -1:, :].exp().mT
        leaving = (K * (G[..., -1:, :] - G).exp()).to(dtype)
        weights = (entering @ (K * (-G).exp()).to(dtype).mT).masked_fill_(~lower, 0)
    else:
        inside = (G[..., :, None] - G[..., None, :]).masked_fill_(~lower, -torch.inf).exp_()
        entering, last = (Q * G.exp()[..., None]).to(dtype), G[..., -1, None, None].exp()
        leaving = (K * (G[..., -1:] - G).exp()[..., None]).to(dtype)
        weights = ((Q @ K.mT) * inside).to(dtype)
    if beta is None:
        states = _states((leaving.mT @ V).float(), last)
    else:
        assert inside is not None
        beta = beta.unflatten(2, (-1, length))[..., None]
        V, states = _erased(K, V, G, beta, inside, leaving, last)
    o = weights @ V + entering @ states.to(dtype)
    return o.flatten(2, 3).to(q.dtype)


def _sums(g: Tensor | None, length: int) -> Tensor:
    """Of the log-decay from the beginning of a chunk to each of its tokens."""
    if g is None:
        return torch.zeros(1, 1, 1, length)
    if g.shape[2] == 1:  # the same at every token
        g = g[..., None].expand(*g.shape, length)
        return g.cumsum(-1)
    return g.unflatten(2, (-1, length)).cumsum(3)


def _states(writes: Tensor, last: Tensor) -> Tensor:
    """The state that enters each chunk, of what chunks write and how much of the state they keep."""
    state = torch.zeros_like(writes[:, :, 0])
    states: list[Tensor] = []
    for write, kept in zip(writes.unbind(2), last.expand(*writes.shape[:3], -1, -1).unbind(2), strict=True):
        states.append(state)
        state = torch.addcmul(write, state, kept)
    return torch.stack(states, 2)


def _erased(
    K: Tensor, V: Tensor, G: Tensor, beta: Tensor, inside: Tensor, leaving: Tensor, last: Tensor
) -> tuple[Tensor, Tensor]:
    """What tokens write after the delta rule, and the state that enters each chunk (the WY form)."""
    lower = ((K @ K.mT).float() * inside).mul_(beta).tril_(-1)
    known = torch.cat([V.float() * beta, K.float() * (beta * G.exp()[..., None])], -1)
    solved = torch.linalg.solve_triangular(lower, known, upper=False, unitriangular=True)
    chunks = (
        solved[..., : V.shape[-1]].to(K.dtype),
        solved[..., V.shape[-1] :].to(K.dtype),
        leaving.mT,
        last.expand(*K.shape[:3], 1, 1),
    )
    state = torch.zeros(K.shape[0] * K.shape[1], K.shape[-1], V.shape[-1])
    states: list[Tensor] = []
    writes: list[Tensor] = []
    for u, w, kept, factor in zip(*(x.flatten(0, 1).unbind(1) for x in chunks), strict=True):
        stored = state.to(K.dtype)
        states.append(stored)
        writes.append(torch.baddbmm(u, w, stored, alpha=-1))
        if K.dtype is torch.float32:
            state = torch.baddbmm(state * factor, kept, writes[-1])
        else:
            state = torch.addcmul(torch.bmm(kept, writes[-1]), state, factor)
    return torch.stack(writes, 1).unflatten(0, K.shape[:2]), torch.stack(states, 1).unflatten(0, K.shape[:2])


def quickest(function: Callable[[Setting], object], dtype: torch.dtype) -> Setting:
    """Of some chunk lengths, and for bf16 of products in f32 and in bf16, those with which `function` takes least."""
    seconds: dict[Setting, float] = {}
    for setting in itertools.product((32, 64, 128), {torch.float32, dtype}):
        for _ in range(2):
            start = time.thread_time()
            function(setting)
            taken = time.thread_time() - start
            seconds[setting] = min(taken, seconds.get(setting, taken))
    return min(seconds, key=seconds.__getitem__)


def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor) -> Tensor:
    """o (X, E) of one token for each of X states (X, D, E), which become what it leaves. f32."""
    if g is not None:
        state *= g.exp().view(len(state), -1, 1)
    if beta is not None:
        v = beta[:, None] * (v - torch.bmm(k[:, None], state)[:, 0])
    state.baddbmm_(k[:, :, None], v[:, None])
    return torch.bmm(q[:, None], state)[:, 0]


def token_loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None) -> Tensor:
    """o, a step for each token."""
    tokens = q.shape[2]
    rows = [x.float().flatten(0, 1).unbind(1) for x in (q, k, v)]
    decays: Any = [None] * tokens
    if g is not None:
        g = g.expand(*q.shape[:2], -1, *g.shape[3:]).flatten(0, 1)
        decays = g.unbind(1) if g.shape[1] == tokens else [g[:, 0]] * tokens
    betas: Any = [None] * tokens if beta is None else beta.flatten(0, 1).unbind(1)
    state = torch.zeros(len(rows[0][0]), q.shape[-1], v.shape[-1])
    outputs = [step(*at, state) for at in zip(*rows, decays, betas, strict=True)]
    return torch.stack(outputs, 1).unflatten(0, q.shape[:2]).to(q.dtype)
