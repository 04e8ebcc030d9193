"""The oracle of recurrences: the statements as they stand, token by token, in float64.

Expressions are evaluated as in `attncc.reference`, over four axes: batch, head, key channel, value channel.
Differentiable by torch autograd.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import assert_never

import torch
from torch import Tensor

from attncc.ir.nodes import Expr, RowName
from attncc.ir.recurrence import CHANNELS, Bind, Output, Recurrence, Statement, Update
from attncc.ir.rewrite import has_free
from attncc.reference import Scope, check_reads, transformed, value, widened

_AXES = {"d": -2, "e": -1}


def evaluate(
    recurrence: Recurrence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Tensor | bool | float],
    initial_state: Tensor | None = None,
    q_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """The output of every token and the state after the last one, in float64.

    q (B, heads, N, D), k (B, heads, N, D), v (B, heads, N, E) -> o (B, H, N, E), state (B, H, D, E), where H is the
    greatest of the three numbers of heads and each of them divides it. initial_state: (B, H, D, E), 0 if not given.
    q_offset: the position of the first token. Raises `OutOfRange` for a read outside a tensor.
    """
    # Index tensors are made where the operands are.
    with nullcontext() if q.device.type == "cpu" else q.device:
        scope = token_scope(recurrence, q, k, v, inputs, q_offset)
        sizes = scope.sizes
        shape = (sizes["B"], sizes["H"], sizes["D"], sizes["E"])
        state = torch.zeros(shape, dtype=torch.float64) if initial_state is None else initial_state.to(torch.float64)
        outputs: list[Tensor] = []
        for t in range(sizes["N"]):
            o, state = _token(recurrence.statements, at_token(scope, t), state)
            outputs.append(o)
        return torch.stack(outputs, 2) if outputs else state.new_zeros(*shape[:2], 0, shape[3]), state


def token_scope(
    recurrence: Recurrence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Tensor | bool | float],
    q_offset: int,
) -> Scope:
    """Where the statements are evaluated, but for the token: the transformed rows of every head among the inputs."""
    heads, heads_k = max(x.shape[1] for x in (q, k, v)), k.shape[1]
    sizes = {"B": q.shape[0], "H": heads, "HKV": heads_k, "N": q.shape[2], "D": q.shape[3], "E": v.shape[3]}
    scalars = {p.name: p.default for p in recurrence.scalars if p.default is not None}
    captured = {name: widened(x) for name, x in {**scalars, **inputs}.items()}
    scope = Scope({}, {**sizes, "q_offset": q_offset}, captured, [], {}, {})
    transforms: tuple[tuple[RowName, Expr, Tensor], ...] = (
        ("q", recurrence.q, q),
        ("k", recurrence.k, k),
        ("v", recurrence.v, v),
    )
    rows = {name: _rows(name, transform, widened(x), scope) for name, transform, x in transforms}
    h = torch.arange(heads)
    indices = {
        "b": torch.arange(sizes["B"]).reshape(-1, 1, 1, 1),
        "h": h.reshape(-1, 1, 1),
        "hkv": (h // (heads // heads_k if heads_k else 1)).reshape(-1, 1, 1),
        "d": torch.arange(sizes["D"]).reshape(-1, 1),
        "e": torch.arange(sizes["E"]),
    }
    return replace(scope, indices=indices, inputs={**captured, **rows}, axes=_AXES)


def _rows(name: RowName, transform: Expr, x: Tensor, scope: Scope) -> Tensor:
    """The transformed rows as each of the H heads reads them: (B, H, N, width)."""
    batch, heads = scope.sizes["B"], scope.sizes["H"]
    result: list[Tensor] = []
    for b in range(batch):
        for h in range(heads):
            at = {"b": b, "h": h, "hkv": h // (heads // scope.sizes["HKV"])}
            inner = replace(scope, indices={key: torch.tensor(index) for key, index in at.items()})
            row = x[b, h // (heads // x.shape[1])]
            result.append(transformed(transform, name, row, {"t": torch.arange(x.shape[2])}, inner))
    shape = (batch, heads, *x.shape[2:])
    return torch.stack(result).reshape(shape) if result else x.new_zeros(shape)


def at_token(scope: Scope, t: int) -> Scope:
    return replace(scope, indices={**scope.indices, "t": torch.tensor(t)}, reads=[])


def _token(statements: tuple[Statement, ...], scope: Scope, state: Tensor) -> tuple[Tensor, Tensor]:
    """The output (B, H, E) of one token, and the state after it."""
    output: Tensor | None = None
    batch, heads, width, width_v = state.shape
    for statement in statements:
        scope = replace(scope, inputs={**scope.inputs, "S": state})
        result = value(statement.value, scope)
        match statement:
            case Update():
                state = result.broadcast_to(state.shape)
            case Output():
                output = result.broadcast_to(batch, heads, 1, width_v).squeeze(2)
            case Bind(name=name):
                channels = {"d": width, "e": width_v}
                free = {index.name: has_free(statement.value, index.name) for index in CHANNELS}
                full = [size if free[index] else 1 for index, size in channels.items()]
                kept = [size for index, size in channels.items() if free[index]]
                bound = result.broadcast_to(batch, heads, *full).reshape(batch, heads, *kept)
                scope = replace(scope, inputs={**scope.inputs, name: bound})
            case _:
                assert_never(statement)
    check_reads(scope)
    assert output is not None, "a recurrence has an output"
    return output, state
