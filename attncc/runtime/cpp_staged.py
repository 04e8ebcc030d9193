"""Cores on the C++ target that make their operands themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attncc.emit.recurrent_cpp import core_fields, operand_fields, render_core
from attncc.emit.staging_cpp import staging_fields
from attncc.plan.recurrent import CorePlan
from attncc.plan.staging import Input
from attncc.runtime.cpp import CppKernel, kernel_of
from attncc.runtime.cpp_recurrent import pointer
from attncc.runtime.recurrent_arguments import BoundRecurrence


class StagedCppCore:
    """The shared library of a core whose plan has a staging."""

    def __init__(self, plan: CorePlan, kernel: CppKernel) -> None:
        assert plan.staging is not None
        self.plan = plan
        self._staging = plan.staging
        self._kernel = kernel
        # The kernel sets operands itself.
        self._operands = (0,) * sum(len(field.slots) for field in operand_fields(plan, "", ""))

    def run(
        self,
        rows: Mapping[str, Tensor],
        bound: BoundRecurrence,
        initial_state: Tensor | None,
        o: Tensor,
        final_state: Tensor | None,
    ) -> None:
        """Writes o (B, H, N, E) and the last state, contiguous. rows: q, k and v as they came."""
        sizes, offsets = bound.sizes, bound.offsets
        tensors = {**bound.tensors, **rows}
        views = [_readable(tensors[x.tensor], x) for x in self._staging.inputs]
        self._kernel.launch(
            [
                *self._operands,
                pointer(initial_state),
                o.data_ptr(),
                pointer(final_state),
                pointer(offsets),
                sizes.B,
                sizes.H,
                sizes.N,
                sizes.B if offsets is None else len(offsets) - 1,
                torch.get_num_threads(),
                *(
                    slot
                    for x, view in zip(self._staging.inputs, views, strict=True)
                    for slot in _slots(x, view, sizes.H)
                ),
                *(_number(bound.scalars[name]) for name, _ in self._staging.scalars),
            ]
        )


def compile_staged(plan: CorePlan, templates: Sequence[Path], folder: Path) -> StagedCppCore:
    """The core of `plan`, compiled into `folder` or found there; errors as `compile_core`."""
    source = render_core(plan, templates)
    fields = (*core_fields(plan), *staging_fields(plan))
    return StagedCppCore(plan, kernel_of(plan.name, plan.target, fields, source, folder))


def _readable(tensor: Tensor, x: Input) -> Tensor:
    """The part of a tensor that an input is, contiguous along its channels if it has any."""
    tensor = tensor.resolve_neg()
    for axis in reversed(range(len(x.places))):
        place = x.places[axis]
        if isinstance(place, int):
            tensor = tensor.select(axis, place)
    if not x.axes:
        return tensor
    axis = _coordinates(x).index(x.axes[0].channel)
    return tensor if tensor.stride(axis) == 1 or tensor.shape[axis] == 1 else tensor.contiguous()


def _slots(x: Input, view: Tensor, heads: int) -> Iterator[int]:
    """Its pointer, how many heads share one of its own, and its strides along b, h and t."""
    strides = dict(zip(_coordinates(x), view.stride(), strict=True))
    sizes = dict(zip(_coordinates(x), view.shape, strict=True))
    own = sizes.get("hkv", sizes.get("h", heads))
    yield view.data_ptr()
    yield heads // max(own, 1)
    yield strides.get("b", 0)
    yield strides.get("hkv", strides.get("h", 0))
    yield strides.get("t", 0)


def _coordinates(x: Input) -> list[str]:
    """Those along the axes of the tensor that are no numbers."""
    return [place for place in x.places if isinstance(place, str)]


def _number(value: Any) -> int | float:
    return float(value) if isinstance(value, float) else int(value)
