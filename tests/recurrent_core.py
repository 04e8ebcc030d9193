"""A recurrent core token by token in float64: what kernels of it are compared with. Differentiable."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from attncc.plan.recurrent import CorePlan
from attncc.runtime.recurrent_operands import Operands


def core(
    plan: CorePlan, operands: Operands, initial_state: Tensor | None = None, offsets: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    """o (B, H, N, E) and the state after the last token, (B, H, D, E); of each of the sequences between `offsets`,
    which lie one after the other along N where B is 1: (sequences, H, D, E)."""
    if offsets is not None:
        parts = []
        for i, (start, end) in enumerate(itertools.pairwise(offsets)):
            part = Operands.of(tuple(x if x is None else x[:, :, start:end] for x in operands.tensors))
            parts.append(core(plan, part, None if initial_state is None else initial_state[i : i + 1]))
        return torch.cat([o for o, _ in parts], 2), torch.cat([state for _, state in parts], 0)
    wide = Operands.of(tuple(x if x is None else x.to(torch.float64) for x in operands.tensors))
    batch, heads, tokens, width = wide.query.shape
    shape = (batch, heads, width, plan.value_width)
    state = torch.zeros(shape, dtype=torch.float64) if initial_state is None else initial_state.to(torch.float64)
    outputs: list[Tensor] = []
    for t in range(tokens):
        before, state = state, state * _decay(plan, wide.log_decay, t)
        read = before if plan.erases_before else state
        gains = []
        for key, value, erase in zip(wide.keys, wide.values, wide.erases, strict=True):
            u = 0.0 if value is None else value[:, :, t]
            u = u if erase is None else u - torch.einsum("bhd,bhde->bhe", erase[:, :, t], read)
            gains.append(key[:, :, t, :, None] * torch.as_tensor(u)[:, :, None, :])
        state = state + sum(gains) if gains else state
        outputs.append(torch.einsum("bhd,bhde->bhe", wide.query[:, :, t], before if plan.read == "pre" else state))
    o = torch.stack(outputs, 2) if outputs else state.new_zeros(batch, heads, 0, plan.value_width)
    return o, state


def _decay(plan: CorePlan, log_decay: Tensor | None, t: int) -> Tensor:
    if log_decay is None:
        return torch.ones((), dtype=torch.float64)
    at_token = log_decay[:, :, t].exp()
    return {
        "scalar": lambda: at_token[..., None, None],
        "key": lambda: at_token[..., None],
        "value": lambda: at_token[..., None, :],
    }[plan.side]()
