"""Recurrent cores for the interpreter: plans, operands drawn for them, and the error rule of what comes out."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from hypothesis import strategies as st
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
CASES = [
    (updates, side, before, read)
    for updates, side, (before, read) in itertools.product(
        UPDATES,
        ("none", "scalar", "key", "value"),
        ((False, "post"), (True, "pre"), (True, "post"), (False, "pre")),
    )
    if not (side == "value" and any(update.erase for update in UPDATES[updates]))
]
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
    o = torch.full((*operands.query.shape[:3], plan.value_width), torch.nan, dtype=operands.query.dtype)
    last = torch.full_like(draw_state(plan, _sequences(operands, offsets), operands.query.shape[1]), torch.nan)
    given = None if offsets is None else torch.tensor(offsets)
    compiled(plan).forward(operands, initial_state, given, o, last)
    exact = core(plan, operands, initial_state, offsets)
    standard = plain(plan, operands, initial_state, offsets)
    for name, found, oracle, simple in zip(("o", "state"), (o, last), exact, standard, strict=True):
        message = compare(name, found, oracle, simple) if oracle.numel() else None
        assert message is None, f"{plan}: {message}"


def check_backward(
    plan: CorePlan,
    operands: Operands,
    initial_state: Tensor | None = None,
    offsets: list[int] | None = None,
) -> None:
    """The gradient of each operand and of the initial state, against those of the oracle, by the error rule."""
    sequences, heads = _sequences(operands, offsets), operands.query.shape[1]
    state = torch.zeros_like(draw_state(plan, sequences, heads)) if initial_state is None else initial_state
    generator = torch.Generator().manual_seed(2)
    shape = (*operands.query.shape[:3], plan.value_width)
    d_o = torch.randn(shape, generator=generator).to(operands.query.dtype)
    d_last = torch.randn(state.shape, generator=generator).to(state.dtype)
    places = None if offsets is None else torch.tensor(offsets)
    found, d_state = compiled(plan).backward(operands, initial_state, places, d_o, d_last)
    exact = _gradients(core, plan, operands, state, offsets, d_o, d_last)
    standard = _gradients(plain, plan, operands, state, offsets, d_o, d_last)
    of_decays = len(operands.tensors) - 1
    for number, x in enumerate([*found.tensors, d_state]):
        if x is not None and x.numel():
            oracle, standards, terms = exact[number].double(), [standard[number]], None
            if number == of_decays:
                terms = _terms(operands, exact)
                if plan.dtype is not plan.state_dtype:
                    standards.append(oracle + _errors_of_decays(plan, operands, state, offsets, d_o, d_last))
            message = compare(f"gradient {number}", x, oracle, *standards, terms=terms)
            assert message is None, f"{plan}: {message}"


def _terms(operands: Operands, gradients: Sequence[Tensor]) -> Tensor:
    """What the gradients of log decays are differences of: sums of products of rows with their gradients."""
    *rows, log_decay = operands.tensors
    sums = [(x * dx).abs().sum(-1).max() for x, dx in zip(rows, gradients, strict=False) if x is not None]
    assert log_decay is not None
    return torch.stack(sums).max().expand(log_decay.shape)


def _errors_of_decays(
    plan: CorePlan, operands: Operands, state: Tensor, offsets: list[int] | None, d_o: Tensor, d_last: Tensor
) -> Tensor:
    """How far the plain formula is off in gradients of log decays at most, where rows and states have other signs. Such
    a gradient may be one number, or one that others are small beside: there the formula is now and then exact by luck,
    and units in the last place of f32 are nothing to sums of numbers with 8 bits."""
    count, (batch, heads, tokens, _) = 16, operands.query.shape
    generator = torch.Generator().manual_seed(3)

    def signed(x: Tensor, signs: Tensor | None = None) -> Tensor:
        many = x.repeat_interleave(count, 1)
        return many * (torch.randint(0, 2, many.shape, generator=generator) * 2 - 1 if signs is None else signs)

    # All along key channels have the same: of a key, as much is erased as was.
    by_key = signed(torch.ones(batch, heads, tokens, plan.key_width, dtype=operands.query.dtype))
    assert operands.log_decay is not None
    many = Operands(
        signed(operands.query, by_key),
        tuple(signed(x, by_key) for x in operands.keys),
        tuple(x if x is None else signed(x) for x in operands.values),
        tuple(x if x is None else signed(x, by_key) for x in operands.erases),
        operands.log_decay.repeat_interleave(count, 1),
    )
    given = signed(state), offsets, signed(d_o), signed(d_last)
    exact, standard = (_gradients(function, plan, many, *given)[-2] for function in (core, plain))
    return (standard - exact).abs().unflatten(1, (heads, count)).amax(2)


def _gradients(
    function: Callable[..., tuple[Tensor, Tensor]],
    plan: CorePlan,
    operands: Operands,
    state: Tensor,
    offsets: list[int] | None,
    d_o: Tensor,
    d_last: Tensor,
) -> list[Tensor]:
    """Those of all operands and the state, in their order; an empty tensor for an operand that is not there."""
    wide = function is core
    given = [
        x if x is None else (x.double() if wide else x).detach().requires_grad_() for x in (*operands.tensors, state)
    ]
    o, last = function(plan, Operands.of(tuple(given[:-1])), given[-1], offsets)
    there = [x for x in given if x is not None]
    # Without tokens o depends on nothing.
    results = [(x, d.to(x.dtype)) for x, d in ((o, d_o), (last, d_last)) if x.requires_grad]
    outputs, upstream = zip(*results, strict=True)
    gradients = iter(torch.autograd.grad(outputs, there, upstream, allow_unused=True, materialize_grads=True))
    return [torch.empty(0) if x is None else next(gradients) for x in given]


def _sequences(operands: Operands, offsets: list[int] | None) -> int:
    return operands.query.shape[0] if offsets is None else len(offsets) - 1


@st.composite
def calls(
    draw_from: st.DrawFn,
    cases: Sequence[tuple[str, str, bool, str]],
    most: int = 70,
    dtypes: Sequence[DType] = (DType.F32, DType.F32, DType.BF16, DType.F64),
) -> tuple[CorePlan, Operands, Tensor | None, list[int] | None]:
    """A plan, and operands, state and offsets for it."""
    updates, side, before, read = draw_from(st.sampled_from(cases))
    dtype = draw_from(st.sampled_from(dtypes))
    # A state of a few numbers may be small by luck, which is no standard for sums of numbers with 8 bits.
    width = st.integers(12 if dtype is DType.BF16 else 1, 24)
    plan = plan_of(updates, side, before=before, read=read, dtype=dtype, widths=draw_from(st.tuples(width, width)))
    batch, tokens = draw_from(st.integers(1, 2)), draw_from(st.integers(0, most))
    offsets = None
    if batch == 1 and draw_from(st.booleans()):
        offsets = [0, *sorted(draw_from(st.lists(st.integers(0, tokens), max_size=3))), tokens]
    decay, forget = draw_from(st.sampled_from([(0.05, 0.0), (1.0, 0.0), (10.0, 0.1), (40.0, 0.0)]))
    seed = draw_from(st.integers(0, 99))
    operands = draw(plan, tokens, batch=batch, heads=1, decay=decay, forget=forget, seed=seed)
    state = draw_state(plan, _sequences(operands, offsets), 1) if draw_from(st.booleans()) else None
    return plan, operands, state, offsets
