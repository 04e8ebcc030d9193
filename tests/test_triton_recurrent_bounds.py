"""Kernels of recurrences on Triton stay within the tensors they are given: each lies between numbers that are not to be
used, and that must stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_recurrent_support import check_backward, check_forward, draw, draw_state, plan_of

from attncc.runtime.triton import LoadedModule
from attncc.runtime.triton_fields import Function

BESIDE = 4096  # elements before and after


class Fenced:
    """A copy of a tensor between numbers that show where they are read: NaN, or what is no place."""

    def __init__(self, x: Tensor) -> None:
        size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        fill = float("nan") if x.is_floating_point() else 2**30
        self.x, self.memory = x, torch.full((BESIDE + size + BESIDE,), fill, dtype=x.dtype)
        self.view = self.memory.as_strided(x.shape, x.stride(), BESIDE)
        self.view.copy_(x)
        self.beside = torch.cat([self.memory[:BESIDE], self.memory[BESIDE + size :]])

    def take_back(self) -> bool:
        """Writes to the tensor what came to be; whether what lies beside is as it was."""
        self.x.copy_(self.view)
        beside = torch.cat([self.memory[:BESIDE], self.memory[len(self.memory) - BESIDE :]])
        return torch.equal(beside.view(torch.uint8), self.beside.view(torch.uint8))


@pytest.fixture
def fences(monkeypatch: pytest.MonkeyPatch) -> None:
    """All launches meanwhile are of fenced tensors."""
    run = LoadedModule.run

    def fenced_run(
        module: LoadedModule, function: Function, programs: int, arguments: Sequence[Any], *streams: Any
    ) -> None:
        fenced = [Fenced(x) if isinstance(x, Tensor) else x for x in arguments]
        run(module, function, programs, [x.view if isinstance(x, Fenced) else x for x in fenced], *streams)
        for name, x in zip(function.parameters, fenced, strict=True):
            assert not isinstance(x, Fenced) or x.take_back(), f"{function.name} writes beside {name}"

    monkeypatch.setattr(LoadedModule, "run", fenced_run)


@pytest.mark.representative(12)
@pytest.mark.usefixtures("fences")
@pytest.mark.parametrize("tokens", [0, 3, 40])
@pytest.mark.parametrize("widths", [(1, 1), (1, 20), (20, 1), (5, 70)])
@pytest.mark.parametrize(
    ("updates", "side"),
    [("write", "none"), ("write", "value"), ("write", "key"), ("delta", "key"), ("three", "scalar")],
)
def test_nothing_beside_is_read_or_written(updates: str, side: str, widths: tuple[int, int], tokens: int) -> None:
    plan = plan_of(updates, side, widths=widths)
    operands, state = draw(plan, tokens, heads=1), draw_state(plan, 1, 1)
    check_forward(plan, operands, state)
    check_backward(plan, operands, state)
