"""The operands of a sequential kernel, made of the inputs by PyTorch, all tokens at once; differentiable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor

from attncc.eager import Environment
from attncc.ir.nodes import Load, RowName
from attncc.plan.sequential import Operand, SequentialPlan
from attncc.runtime.arguments import TORCH_DTYPES
from attncc.runtime.channels import Channels
from attncc.runtime.recurrent_operands import Evaluator

_ROWS: tuple[RowName, ...] = ("q", "k", "v")


def prepare(
    plan: SequentialPlan, rows: Mapping[RowName, Tensor], inputs: Mapping[str, Any], sizes: Mapping[str, int]
) -> tuple[Tensor, ...]:
    """The operands of `plan`, in its order: (B, H, N, D, E), each axis 1 where nothing differs along it.

    rows: of q, k and v as the call has them, those that the plan reads. inputs: every captured tensor and scalar by
    name; sizes: those of the call and `q_offset`. A row or a captured tensor as it came is that tensor, not a copy.
    """
    source = _Source(Evaluator(plan.spec, rows, inputs, sizes))
    return tuple(source.operand(operand) for operand in plan.operands)


class _Source:
    """Where operands come from: rows as they are stored, or everything as wide as the state."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._stored = evaluator.env

    @cached_property
    def _wide(self) -> Environment:
        env = self._stored
        rows = {name: x.to(env.floating) for name, x in env.inputs.items() if name in _ROWS and isinstance(x, Tensor)}
        return replace(env, inputs={**env.inputs, **rows})

    def operand(self, operand: Operand) -> Tensor:
        source = operand.source
        is_row = isinstance(source, Load) and source.tensor in _ROWS
        env = self._stored if is_row else self._wide
        widths = [axis.size for axis in operand.axes]
        match [axis.channel for axis in operand.axes]:
            case ["d", "e"]:
                value = Channels(env, widths[1]).matrix(source, "d", "e", widths[0])
            case ["d"]:
                value = _four_axes(Channels(env, widths[0]).value(source))[..., None]
            case ["e"]:
                value = _four_axes(Channels(env, widths[0]).value(source))[..., None, :]
            case _:
                value = _four_axes(Channels(env, 1).value(source))[..., None]
        # What no tensor has any part in was made where PyTorch makes numbers.
        return value.to(env.indices["t"].device, TORCH_DTYPES[operand.dtype])


def _four_axes(x: Tensor) -> Tensor:
    return x.reshape((1,) * (4 - x.dim()) + x.shape)
