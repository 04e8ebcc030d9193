"""The oracle of recurrences: the statements as they stand, token by token, in float64.

Expressions are evaluated as in `attncc.reference`, over four axes: batch, head, key channel, value channel.
Differentiable by torch autograd.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import assert_never

import torch
from torch import Tensor

from attncc.ir.nodes import Expr, RowName
from attncc.ir.recurrence import CHANNELS, Bind, Output, Recurrence, Statement, Update
from attncc.ir.rewrite import has_free
from attncc.reference import Scope, check_reads, transformed, value, widened


def evaluate(
    recurrence: Recurrence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Tensor | bool | float],
    initial_state: Tensor | None = None,
    q_offset: int = 0,
    offsets: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The output of every token and the state after the last one, in float64.

    q (B, heads, N, D), k (B, heads, N, D), v (B, heads, N, E) -> o (B, H, N, E), state (B, H, key_width, E), where H is
    the greatest of the three numbers of heads and each of them divides it; q (B, heads, M, D) and o (B, H, M, E) where
    the recurrence is bidirectional. initial_state: as the state, 0 if not given. Where outputs are divided by a sum the
    state has E + 1 columns, the last one of which is that of the sum. q_offset: the position of the first token (of the
    first query, where bidirectional). offsets: where each sequence begins that is packed along N, and the end of the
    last; B is 1 then, and states are (sequences, H, key_width, E). Raises `OutOfRange` for a read outside a tensor.
    """
    # Index tensors are made where the operands are.
    with nullcontext() if q.device.type == "cpu" else q.device:
        scope = token_scope(recurrence, q, k, v, inputs, q_offset)
        sizes, width = scope.sizes, scope.inputs["k"].shape[3]
        columns = scope.inputs["v"].shape[3]
        shape = (sizes["B"] if offsets is None else len(offsets) - 1, sizes["H"], width, columns)
        state = torch.zeros(shape, dtype=torch.float64) if initial_state is None else initial_state.to(torch.float64)
        outputs: list[Tensor] = []
        if offsets is None:
            for statements, count in _passes(recurrence, sizes):
                state = _run(statements, scope, range(count), state, outputs)
        else:
            ranges = [range(start, end) for start, end in itertools.pairwise(offsets)]
            states = [
                _run(recurrence.statements, scope, tokens, state[i : i + 1], outputs) for i, tokens in enumerate(ranges)
            ]
            state = torch.cat([state[:0], *states])
        o = torch.stack(outputs, 2) if outputs else state.new_zeros(sizes["B"], sizes["H"], 0, columns)
        return _normalized(o) if recurrence.normalizer == "sum" else o, state


def _run(
    statements: tuple[Statement, ...], scope: Scope, tokens: range, state: Tensor, outputs: list[Tensor]
) -> Tensor:
    """The state after some tokens; their outputs go to the end of `outputs`."""
    for t in tokens:
        o, state = _token(statements, at_token(scope, t), state)
        outputs += [] if o is None else [o]
    return state


def _passes(recurrence: Recurrence, sizes: Mapping[str, int]) -> list[tuple[tuple[Statement, ...], int]]:
    """Statements and for how many tokens, one after the other."""
    if not recurrence.bidirectional:
        return [(recurrence.statements, sizes["N"])]
    updates = tuple(s for s in recurrence.statements if not isinstance(s, Output))
    outputs = tuple(s for s in recurrence.statements if isinstance(s, Output))
    return [(updates, sizes["N"]), (outputs, sizes["M"])]


def _normalized(o: Tensor) -> Tensor:
    """Columns but the last, divided by the last; 0 where that is 0."""
    weighted, total = o[..., :-1], o[..., -1:]
    nothing = total == 0
    return torch.where(nothing, 0, weighted) / torch.where(nothing, 1, total)


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
    sizes = {"B": q.shape[0], "H": heads, "HKV": heads_k, "M": q.shape[2], "N": k.shape[2]}
    sizes |= {"D": q.shape[3], "E": v.shape[3]}
    scalars = {p.name: p.default for p in recurrence.scalars if p.default is not None}
    captured = {name: widened(x) for name, x in {**scalars, **inputs}.items()}
    scope = Scope({}, {**sizes, "q_offset": q_offset}, captured, [], {}, {})
    width = int(value(recurrence.key_width, scope))
    transforms: tuple[tuple[RowName, Expr, Tensor, int], ...] = (
        ("q", recurrence.q, q, width),
        ("k", recurrence.k, k, width),
        ("v", recurrence.v, v, v.shape[3]),
    )
    rows = {name: _rows(name, transform, widened(x), scope, width) for name, transform, x, width in transforms}
    if recurrence.normalizer == "sum":
        rows["v"] = torch.cat([rows["v"], rows["v"].new_ones(*rows["v"].shape[:3], 1)], 3)
    h = torch.arange(heads)
    indices = {
        "b": torch.arange(sizes["B"]).reshape(-1, 1, 1, 1),
        "h": h.reshape(-1, 1, 1),
        "hkv": (h // (heads // heads_k if heads_k else 1)).reshape(-1, 1, 1),
        "d": torch.arange(width).reshape(-1, 1),
        "e": torch.arange(rows["v"].shape[3]),
    }
    return replace(scope, indices=indices, inputs={**captured, **rows})


def _rows(name: RowName, transform: Expr, x: Tensor, scope: Scope, width: int) -> Tensor:
    """The transformed rows as each of the H heads reads them: (B, H, N, width)."""
    batch, heads = scope.sizes["B"], scope.sizes["H"]
    result: list[Tensor] = []
    for b in range(batch):
        for h in range(heads):
            at = {"b": b, "h": h, "hkv": h // (heads // scope.sizes["HKV"])}
            inner = replace(scope, indices={key: torch.tensor(index) for key, index in at.items()})
            row = x[b, h // (heads // x.shape[1])]
            result.append(transformed(transform, name, row, {"t": torch.arange(x.shape[2])}, inner, width=width))
    shape = (batch, heads, x.shape[2], width)
    return torch.stack(result).reshape(shape) if result else x.new_zeros(shape)


def at_token(scope: Scope, t: int) -> Scope:
    return replace(scope, indices={**scope.indices, "t": torch.tensor(t)}, reads=[])


def _token(statements: tuple[Statement, ...], scope: Scope, state: Tensor) -> tuple[Tensor | None, Tensor]:
    """The output (B, H, E) of one token, if there is any, and the state after it."""
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
    return output, state
