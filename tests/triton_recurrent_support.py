"""Recurrent cores for the interpreter: plans, operands drawn for them, and the error rule of what comes out."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from recurrent_core import core
from torch import Tensor
from torch.nn.functional import normalize, softplus

from attncc.error_rule import compare
from attncc.ir.types import DType
from attncc.plan.nodes import Target
from attncc.plan.recurrent import CorePlan, CoreUpdate
from attncc.runtime.arguments import TORCH_DTYPES
from attncc.runtime.recurrent_operands import Operands
from attncc.runtime.triton_recurrent import TritonCore, compile_core

WRITE, DELTA, ERASE = CoreUpdate(True, False), CoreUpdate(True, True), CoreUpdate(False, True)
UPDATES = {
    "nothing": (),
    "write": (WRITE,),
    "delta": (DELTA,),
    "erase and write": (ERASE, WRITE),
    "three": (DELTA, WRITE, DELTA),
}
FOLDER = Path(tempfile.mkdtemp(prefix="attncc-recurrent-"))


def plan_of(
    updates: str,
    side: str,
    *,
    before: bool = False,
    read: str = "post",
    dtype: DType = DType.F32,
    widths: tuple[int, int] = (16, 16),
    arch: str = "interpret",
) -> CorePlan:
    return CorePlan(
        "recurrent", "recurrent", Target("triton", arch), dtype, *widths, side, UPDATES[updates], before, read
    )  # type: ignore[arg-type]


@cache
def compiled(plan: CorePlan) -> TritonCore:
    return compile_core(plan, (), FOLDER)


def draw(
    plan: CorePlan,
    tokens: int,
    *,
    batch: int = 1,
    heads: int = 2,
    decay: float = 1.0,
    forget: float = 0.0,
    seed: int = 0,
) -> Operands:
    """Operands of unit keys. decay: how strong decays are; forget: the share of them that leave nothing. What is erased
    is along the key, or, as in RWKV-7, along another vector, so that the state stays bounded."""
    generator = torch.Generator().manual_seed(seed)
    stored = TORCH_DTYPES[plan.dtype]
    shape = (batch, heads, tokens)

    def rows(width: int) -> Tensor:
        return torch.randn(*shape, width, generator=generator, dtype=torch.float64)

    def erase(key: Tensor) -> Tensor:
        strength = torch.rand(*shape, 1, generator=generator, dtype=torch.float64) / len(plan.updates)
        return strength * (normalize(rows(plan.key_width), dim=-1) if plan.erases_before else key)

    keys = [normalize(rows(plan.key_width), dim=-1) for _ in plan.updates]
    values = [rows(plan.value_width) if update.value else None for update in plan.updates]
    erases = [erase(key) if update.erase else None for key, update in zip(keys, plan.updates, strict=True)]
    log_decay = None
    if plan.side != "none":
        width = {"scalar": 1, "key": plan.key_width, "value": plan.value_width}[plan.side]
        log_decay = -decay * softplus(rows(width) - 1)
        forgotten = torch.rand(log_decay.shape, generator=generator) < forget
        log_decay = log_decay.masked_fill(forgotten, -torch.inf).to(TORCH_DTYPES[plan.state_dtype])
        log_decay = log_decay[..., 0] if plan.side == "scalar" else log_decay
    return Operands(
        rows(plan.key_width).to(stored) / plan.key_width**0.5,
        tuple(key.to(stored) for key in keys),
        tuple(None if value is None else value.to(stored) for value in values),
        tuple(None if x is None else x.to(stored) for x in erases),
        log_decay,
    )


def draw_state(plan: CorePlan, sequences: int, heads: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (sequences, heads, plan.key_width, plan.value_width)
    return torch.randn(shape, generator=generator).to(TORCH_DTYPES[plan.state_dtype])


def plain(
    plan: CorePlan, operands: Operands, state: Tensor | None, offsets: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """The token loop as a person would write it: products in the type of the operands, the state in its own."""
    batch, heads, tokens, _ = operands.query.shape
    bounds = [0, tokens] if offsets is None else list(offsets)
    stored, wide = operands.query.dtype, TORCH_DTYPES[plan.state_dtype]
    shape = (batch * (len(bounds) - 1), heads, plan.key_width, plan.value_width)
    states = torch.zeros(shape, dtype=wide) if state is None else state
    outputs, last = [], []
    for i in range(len(bounds) - 1):
        own = states if offsets is None else states[i : i + 1]
        for t in range(bounds[i], bounds[i + 1]):
            own, o = _plain_token(plan, operands, own, t, stored)
            outputs.append(o)
        last.append(own)
    o = torch.stack(outputs, 2) if outputs else states.new_zeros(batch, heads, 0, plan.value_width).to(stored)
    return o, torch.cat(last, 0)


def _plain_token(
    plan: CorePlan, operands: Operands, state: Tensor, t: int, stored: torch.dtype
) -> tuple[Tensor, Tensor]:
    before = state
    if operands.log_decay is not None:
        factor = operands.log_decay[:, :, t].exp()
        axes = {"scalar": (..., None, None), "key": (..., None), "value": (..., None, slice(None))}
        state = state * factor[axes[plan.side]]
    read = (before if plan.erases_before else state).to(stored)
    for key, value, erase in zip(operands.keys, operands.values, operands.erases, strict=True):
        update = torch.zeros_like(read[..., 0, :]) if value is None else value[:, :, t]
        if erase is not None:
            update = update - torch.einsum("bhd,bhde->bhe", erase[:, :, t], read)
        state = state + (key[:, :, t, :, None] * update[..., None, :]).to(state.dtype)
    seen = (before if plan.read == "pre" else state).to(stored)
    return state, torch.einsum("bhd,bhde->bhe", operands.query[:, :, t], seen)


def check_forward(
    plan: CorePlan,
    operands: Operands,
    initial_state: Tensor | None = None,
    offsets: list[int] | None = None,
) -> None:
    """The outputs and the last state are as close to the oracle's as the error rule asks."""
    batch, heads, tokens, _ = operands.query.shape
    o = torch.full((batch, heads, tokens, plan.value_width), torch.nan, dtype=operands.query.dtype)
    sequences = batch if offsets is None else len(offsets) - 1
    last = torch.full_like(draw_state(plan, sequences, heads), torch.nan)
    given = None if offsets is None else torch.tensor(offsets)
    compiled(plan).forward(operands, initial_state, given, o, last)
    exact = core(plan, operands, initial_state, offsets)
    standard = plain(plan, operands, initial_state, offsets)
    for name, found, oracle, simple in zip(("o", "state"), (o, last), exact, standard, strict=True):
        message = compare(name, found, oracle, simple) if oracle.numel() else None
        assert message is None, f"{plan}: {message}"
