"""The gradient of a sequential kernel: by PyTorch, token by token.

The forward pass keeps nothing but its operands. The backward pass has the kernel run again, for the state of every
~sqrt(N)-th token; from the last of these stretches to the first it runs the steps of the plan in PyTorch's own
operations, with autograd. So it holds 2 sqrt(N) states at a time instead of N.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from attncc.ir.errors import IRError
from attncc.ir.nodes import Apply, Constant, Expr, Variable
from attncc.ir.operators import OPERATORS
from attncc.plan.sequential import OUTPUT, STATE, Axis, SequentialPlan, Step
from attncc.runtime.arguments import TORCH_DTYPES
from attncc.runtime.sequential_kernel import CompiledSequential

# Where d and e lie: values of a token are (B, H, D, E), each axis 1 where nothing differs along it.
_AXES = {"d": -2, "e": -1}


class Gradients(NamedTuple):
    """Of each operand, None for those that are no floats, and of the state before the first token."""

    operands: tuple[Tensor | None, ...]
    state: Tensor


def gradients(
    plan: SequentialPlan,
    kernel: CompiledSequential,
    operands: Sequence[Tensor],
    state: Tensor,
    offsets: Tensor | None,
    d_o: Tensor,
    d_last: Tensor,
) -> Gradients:
    """From those of o (B, H, N, E) and of the last state, both as wide as the state. Arguments as for a kernel."""
    if offsets is None:
        return _of_sequence(plan, kernel, operands, state, d_o, d_last)
    totals = [torch.zeros_like(x) if x.is_floating_point() else None for x in operands]
    d_states: list[Tensor] = []
    for i, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        one = slice(i, i + 1)
        parts = [_tokens(x, start, end) for x in operands]
        found = _of_sequence(plan, kernel, parts, state[one], d_o[:, :, start:end], d_last[one])
        _add_all(totals, found.operands, start, end)
        d_states.append(found.state)
    return Gradients(tuple(totals), torch.cat(d_states) if d_states else d_last)


class Interpreted:
    """A sequential kernel that is none: the steps of a plan by PyTorch."""

    def __init__(self, plan: SequentialPlan) -> None:
        self._plan = plan

    def forward(
        self,
        operands: Sequence[Tensor],
        initial_state: Tensor | None,
        offsets: Tensor | None,
        o: Tensor,
        final_state: Tensor | None,
    ) -> None:
        """As that of a compiled kernel, which always has both states."""
        assert initial_state is not None
        assert final_state is not None
        places = [0, o.shape[2]] if offsets is None else offsets.tolist()
        for i, (start, end) in enumerate(itertools.pairwise(places)):
            one = slice(None) if offsets is None else slice(i, i + 1)
            parts = [_tokens(x, start, end) for x in operands]
            o[:, :, start:end], final_state[one] = _stretch(self._plan, parts, initial_state[one], end - start)


def _of_sequence(
    plan: SequentialPlan,
    kernel: CompiledSequential,
    operands: Sequence[Tensor],
    state: Tensor,
    d_o: Tensor,
    d_last: Tensor,
) -> Gradients:
    count = d_o.shape[2]
    length = max(math.isqrt(count), 1)
    starts = range(0, count, length)
    states = [state] if starts else []
    o = state.new_empty((*state.shape[:2], length, state.shape[3]), dtype=TORCH_DTYPES[plan.stored])
    for start in starts[:-1]:
        states.append(torch.empty_like(state))
        kernel.forward([_tokens(x, start, start + length) for x in operands], states[-2], None, o, states[-1])
    totals = [torch.zeros_like(x) if x.is_floating_point() else None for x in operands]
    d_state = d_last
    for start, before in zip(reversed(starts), reversed(states), strict=True):
        end = min(start + length, count)
        leaves = [_leaf(_tokens(x, start, end)) for x in (*operands, before)]
        with torch.enable_grad():
            o, after = _stretch(plan, leaves[:-1], leaves[-1], end - start)
        # Where tokens have no output, nothing is part of it.
        results = ((o, d_o[:, :, start:end]), (after, d_state)) if plan.writes else ((after, d_state),)
        found = torch.autograd.grad(
            [result for result, _ in results],
            [leaf for leaf in leaves if leaf.requires_grad],
            [gradient for _, gradient in results],
            allow_unused=True,
            materialize_grads=True,
        )
        given = iter(found)
        of_leaves = [next(given) if leaf.requires_grad else None for leaf in leaves]
        _add_all(totals, of_leaves[:-1], start, end)
        d_state = found[-1]
    return Gradients(tuple(totals), d_state)


def _tokens(x: Tensor, start: int, end: int) -> Tensor:
    """The part of an operand that belongs to some tokens; all of it where it is the same for every token. A state,
    which has four axes, is that."""
    return x[:, :, start:end] if x.dim() == 5 and x.shape[2] > 1 else x


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.is_floating_point())


def _add_all(totals: Sequence[Tensor | None], found: Sequence[Tensor | None], start: int, end: int) -> None:
    for total, gradient in zip(totals, found, strict=True):
        if total is not None and gradient is not None:
            _tokens(total, start, end).add_(gradient)


def _stretch(plan: SequentialPlan, operands: Sequence[Tensor], state: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """o (B, H, count, E) of some tokens and the state after them, by PyTorch."""
    names = [operand.name for operand in plan.operands]
    # Taken apart at once: each of `count` slices would have a gradient as large as the operand.
    tokens = [x.unbind(2) if x.shape[2] != 1 else (x[:, :, 0],) * count for x in operands]
    outputs: list[Tensor] = []
    for t in range(count):
        o, state = _token(plan, {name: x[t] for name, x in zip(names, tokens, strict=True)}, state)
        outputs += [o] if plan.writes else []
    empty = state.new_zeros((*state.shape[:2], count, plan.value_width))
    return torch.stack(outputs, 2) if outputs else empty, state


def _token(plan: SequentialPlan, operands: Mapping[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """The output (B, H, E) and the state after one token."""
    values = {name: x.to(state.dtype) if x.is_floating_point() else x for name, x in operands.items()}
    values[STATE] = state
    for step in plan.steps:
        value = _step(step, values, TORCH_DTYPES[plan.state_dtype])
        values[step.name] = value.expand(state.shape) if step.name == STATE else value
    state = values[STATE]
    o = values.get(OUTPUT, state[:, :, :1])
    return o.expand(*state.shape[:2], 1, state.shape[3]).squeeze(2), state


def _step(step: Step, values: Mapping[str, Tensor], wide: torch.dtype) -> Tensor:
    match step:
        case Step(value=Apply(op="mul", args=(Variable(name=a), Variable(name=b))), op="sum", over=Axis() as over):
            if all(values[name].shape[_AXES[over.channel]] == over.size for name in (a, b)):
                return _product(values[a], values[b], over)
        case _:
            pass
    value = _value(step.value, values, wide, active=None)
    value = value.reshape((1,) * (4 - value.dim()) + value.shape)
    if step.over is None:
        return value
    axis = _AXES[step.over.channel]
    shape = list(value.shape)
    shape[axis] = step.over.size
    value = value.expand(shape)
    return value.sum(axis, keepdim=True) if step.op == "sum" else value.amax(axis, keepdim=True)


def _product(a: Tensor, b: Tensor, over: Axis) -> Tensor:
    """The sum of a * b over a channel, as a product of matrices: what is as large as the state is not written out."""
    if over.channel == "e":
        return _product(a.mT, b.mT, replace(over, channel="d")).mT
    if b.shape[-1] == 1:
        a, b = b, a
    # Of two vectors, or a vector and a matrix.
    return a.mT @ b if a.shape[-1] == 1 else (a * b).sum(-2, keepdim=True)


def _value(expr: Expr, values: Mapping[str, Tensor], wide: torch.dtype, active: Tensor | None) -> Tensor:
    """active: the places whose value matters. What a choice leaves out has no gradient: it would be 0 times a
    derivative that may be infinite."""
    match expr:
        case Constant(value=value):
            return torch.tensor(value, dtype=wide if isinstance(value, float) else None)
        case Variable(name=name):
            x = values[name]
            return x if active is None or not x.requires_grad else torch.where(active, x, x.detach())
        case Apply(op="where", args=(condition, then, otherwise)):
            chosen = _value(condition, values, wide, active)
            of_then = chosen if active is None else active & chosen
            of_otherwise = ~chosen if active is None else active & ~chosen
            return torch.where(
                chosen, _value(then, values, wide, of_then), _value(otherwise, values, wide, of_otherwise)
            )
        case Apply(op=op, args=args):
            result = OPERATORS[op].torch(*(_value(arg, values, wide, active) for arg in args))
            return result.to(wide) if op == "to_float" else result
        case _:
            raise IRError(f"{expr} is no part of a step")
