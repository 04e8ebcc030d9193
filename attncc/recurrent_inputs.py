"""Inputs of a recurrence when nobody gave any: captured tensors with which its state does not explode."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attncc.inputs import captured_tensors
from attncc.ir.nodes import Load
from attncc.ir.recurrence import Recurrence
from attncc.ir.rewrite import walk
from attncc.passes.normal_form import NormalForm, normal_form
from attncc.passes.updates import UpdateForm, update_form
from attncc.runtime.arguments import Mismatch
from attncc.runtime.recurrent_arguments import agreed_sizes, sizes_of
from attncc.runtime.recurrent_operands import prepare

# What a tensor that a decay is made of may be instead of numbers about 1: rates below 0, gates within (0, 1).
_CANDIDATES: tuple[Callable[[Tensor], Tensor], ...] = (lambda x: x, lambda x: x / -8, lambda x: x / 2)


def recurrent_tensors(
    recurrence: Recurrence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scalars: Mapping[str, Any],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """A value for every captured tensor of a call with these operands and scalars. Those that a decay is made of are
    such that it is at most 1, where a sign or a factor makes it so. Raises ValueError where a tensor has no shape."""
    tensors = captured_tensors(recurrence, sizes_of({"q": q, "k": k, "v": v}), q.dtype, generator)
    form = normal_form(recurrence)
    if not isinstance(form, NormalForm) or form.side == "none":
        return tensors
    try:
        agreed_sizes(q, k, v, recurrence.bidirectional)
    except (Mismatch, ValueError):
        return tensors  # The call says what does not fit.
    updates = update_form(form)
    of_decay = sorted({node.tensor for node in walk(form.log_decay) if isinstance(node, Load)} & tensors.keys())
    for candidates in itertools.product(_CANDIDATES, repeat=len(of_decay)):
        tried = tensors | {name: make(tensors[name]) for name, make in zip(of_decay, candidates, strict=True)}
        if _forgets(recurrence, updates, q, k, v, {**tried, **scalars}):
            return tried
    return tensors


def _forgets(
    recurrence: Recurrence, form: UpdateForm, q: Tensor, k: Tensor, v: Tensor, inputs: Mapping[str, Any]
) -> bool:
    """Whether no decay is above 1, nor none."""
    log_decay = prepare(recurrence, form, q, k, v, inputs, q_offset=0).operands.log_decay
    return log_decay is not None and bool(((log_decay <= 0) & log_decay.isfinite()).all())
