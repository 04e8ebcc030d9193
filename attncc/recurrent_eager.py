"""A recurrence as the token loop that one would write by hand in eager PyTorch: operands in their type, an f32 state.
What is erased is a row like values are, in their type: a product of two of them.

It is what `verify` measures a kernel's error beside.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attncc.ir.recurrence import Recurrence
from attncc.passes.normal_form import NormalForm, normal_form
from attncc.passes.updates import UpdateForm, update_form
from attncc.runtime.recurrent_arguments import BoundRecurrence, sizes_of
from attncc.runtime.recurrent_operands import Operands, prepare
from attncc.runtime.sequential import SequentialKernels


def token_loop(
    recurrence: Recurrence,
    form: UpdateForm,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Any],
    initial_state: Tensor | None = None,
    q_offset: int = 0,
    offsets: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """o and the last state; arguments and results as those of the reference. Differentiable."""
    prepared = prepare(recurrence, form, q, k, v, inputs, q_offset)
    operands, wide = prepared.operands, torch.promote_types(q.dtype, torch.float32)
    batch, heads, tokens, width = operands.query.shape
    sequences = batch if offsets is None else len(offsets) - 1
    shape = (sequences, heads, width, prepared.value_width)
    state = q.new_zeros(shape, dtype=wide) if initial_state is None else initial_state.to(wide)
    if recurrence.bidirectional:
        for key, value in zip(operands.keys, operands.values, strict=True):
            assert value is not None
            state = state + key.to(wide).mT @ value.to(wide)
        return prepared.finished((operands.query.to(wide) @ state).to(q.dtype)), state
    outputs: list[Tensor] = []
    states: list[Tensor] = []
    ranges = [(0, tokens)] if offsets is None else list(itertools.pairwise(offsets))
    for number, (start, end) in enumerate(ranges):
        current = state if offsets is None else state[number : number + 1]
        for t in range(start, end):
            o, current = _token(form, operands, t, current)
            outputs.append(o)
        states.append(current)
    output = torch.stack(outputs, 2) if outputs else q.new_zeros((batch, heads, 0, prepared.value_width), dtype=wide)
    return prepared.finished(output.to(q.dtype)), torch.cat(states) if states else state


def plain_recurrence(
    recurrence: Recurrence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Any],
    initial_state: Tensor | None = None,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_loop` of its update form; of its statements where it has none."""
    form = normal_form(recurrence)
    if isinstance(form, NormalForm):
        places = None if offsets is None else offsets.tolist()
        return token_loop(recurrence, update_form(form), q, k, v, inputs, initial_state, 0, places)
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    defaults = {p.name: p.default for p in recurrence.scalars if p.default is not None}
    scalars = defaults | {name: x for name, x in inputs.items() if not isinstance(x, Tensor)}
    sizes = sizes_of({"q": q, "k": k, "v": v})
    bound = BoundRecurrence(sizes, 0, tensors, scalars, initial_state, offsets)
    return SequentialKernels(recurrence, None, (), interpreted=True).run(q, k, v, bound)


def _token(form: UpdateForm, operands: Operands, t: int, state: Tensor) -> tuple[Tensor, Tensor]:
    """The output (B, H, E) of a token and the state that it leaves."""
    before, state = state, state * _decay(form, operands.log_decay, t)
    read = before if form.before else state
    gains: list[Tensor] = []
    for key, value, erase in zip(operands.keys, operands.values, operands.erases, strict=True):
        u = None if value is None else value[:, :, t]
        if erase is not None:
            found = (erase[:, :, t, None, :] @ read.to(erase.dtype))[:, :, 0]
            u = -found if u is None else u - found
        assert u is not None
        gains.append(key[:, :, t, :, None].to(state.dtype) * u[:, :, None, :].to(state.dtype))
    for gain in gains:
        state = state + gain
    seen = before if form.read == "pre" else state
    return (operands.query[:, :, t, None, :].to(state.dtype) @ seen)[:, :, 0], state


def _decay(form: UpdateForm, log_decay: Tensor | None, t: int) -> Tensor | float:
    if log_decay is None:
        return 1.0
    factor = log_decay[:, :, t].exp()
    if form.side == "scalar":
        return factor[..., None, None]
    return factor[..., None] if form.side == "key" else factor[..., None, :]
