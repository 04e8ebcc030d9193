"""Kernels of recurrences on Triton stay within the tensors they are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from guarded import Guarded
from torch import Tensor
from triton_recurrent_support import check_backward, check_forward, draw, draw_state, plan_of

from attncc.runtime.triton import LoadedModule
from attncc.runtime.triton_fields import Function


@pytest.mark.representative(8)
@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("tokens", [0, 3, 40])
@pytest.mark.parametrize("widths", [(1, 1), (1, 20), (20, 1), (5, 70)])
@pytest.mark.parametrize(
    ("updates", "side"),
    [("write", "none"), ("write", "value"), ("write", "key"), ("delta", "key"), ("three", "scalar")],
)
def test_nothing_beside_is_read_or_written(
    updates: str, side: str, widths: tuple[int, int], tokens: int, at_end: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of operands and of what kernels leave for one another: else the process ends."""
    run = LoadedModule.run

    def guarded_run(
        module: LoadedModule, function: Function, programs: int, arguments: Sequence[Any], *more: Any
    ) -> None:
        guarded = Guarded()
        own = [guarded.copy(x, at_end=at_end) if isinstance(x, Tensor) and x.numel() else x for x in arguments]
        run(module, function, programs, own, *more)
        for x, y in zip(arguments, own, strict=True):
            if x is not y:
                assert x.is_contiguous(), "strides are among the arguments"
                x.copy_(y)

    monkeypatch.setattr(LoadedModule, "run", guarded_run)
    plan = plan_of(updates, side, widths=widths)
    operands, state = draw(plan, tokens, heads=1), draw_state(plan, 1, 1)
    check_forward(plan, operands, state)
    check_backward(plan, operands, state)
