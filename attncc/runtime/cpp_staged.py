"""Cores on the C++ target that make their operands themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attncc.emit.recurrent_cpp import core_fields, operand_fields, render_core
from attncc.emit.staging_cpp import staging_fields
from attncc.plan.recurrent import CorePlan
from attncc.plan.staged_inputs import Input
from attncc.runtime.cpp import CppKernel, kernel_of
from attncc.runtime.cpp_recurrent import pointer
from attncc.runtime.recurrent_arguments import BoundRecurrence
from attncc.runtime.tables import Tables


class StagedCppCore:
    """The shared library of a core whose plan has a staging."""

    def __init__(self, plan: CorePlan, kernel: CppKernel) -> None:
        assert plan.staging is not None
        self.plan = plan
        self._staging = plan.staging
        self._kernel = kernel
        self._tables = Tables(plan.staging.tables)
        self._readers = tuple(map(_Reader.of, plan.staging.passed))
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
        if self._staging.tables:
            tensors |= self._tables.of(bound, rows["q"])
        views = [reader.view(tensors[reader.tensor]) for reader in self._readers]
        slots: list[int] = []
        for reader, view in zip(self._readers, views, strict=True):
            slots += reader.slots(view, sizes.H)
        self._kernel.launch(
            [
                *self._operands,
                pointer(initial_state),
                o.data_ptr(),
                pointer(final_state),
                bound.exact_state,
                pointer(offsets),
                sizes.B,
                sizes.H,
                sizes.N,
                sizes.B if offsets is None else len(offsets) - 1,
                torch.get_num_threads(),
                *slots,
                *[_number(bound.scalars[name]) for name, _ in self._staging.scalars],
            ]
        )


def compile_staged(plan: CorePlan, templates: Sequence[Path], folder: Path) -> StagedCppCore:
    """The core of `plan`, compiled into `folder` or found there; errors as `compile_core`."""
    source = render_core(plan, templates)
    fields = (*core_fields(plan), *staging_fields(plan))
    return StagedCppCore(plan, kernel_of(plan.name, plan.target, fields, source, folder))


@dataclass(frozen=True, slots=True)
class _Reader:
    """How an input is read from its tensor.

    selected  axes of the tensor, last ones first, and the one place along each that is read
    channel   the axis of channels of what is left, likewise those of batch, heads and tokens, or the rows of a matrix;
              None where there is none
    """

    tensor: str
    selected: tuple[tuple[int, int], ...]
    channel: int | None
    batch: int | None
    head: int | None
    row: int | None

    @staticmethod
    def of(x: Input) -> _Reader:
        selected = tuple((axis, place) for axis, place in enumerate(x.places) if isinstance(place, int))
        left = {place: axis for axis, place in enumerate(p for p in x.places if isinstance(p, str))}
        channel = left[x.axes[0].channel] if x.axes else None
        head = left.get("hkv", left.get("h"))
        return _Reader(x.tensor, selected[::-1], channel, left.get("b"), head, left.get(x.rows or "t"))

    def view(self, tensor: Tensor) -> Tensor:
        """The part of the tensor that is read, contiguous along its channels if it has any."""
        if tensor.is_neg():
            tensor = tensor.resolve_neg()
        for axis, place in self.selected:
            tensor = tensor.select(axis, place)
        axis = self.channel
        if axis is None or tensor.stride(axis) == 1 or tensor.shape[axis] == 1:
            return tensor
        return tensor.movedim(axis, -1).contiguous().movedim(-1, axis)

    def slots(self, view: Tensor, heads: int) -> tuple[int, int, int, int, int]:
        """Its pointer, how many heads share one of its own, and its strides along batch, heads and rows."""
        strides = view.stride()
        return (
            view.data_ptr(),
            1 if self.head is None else heads // (view.shape[self.head] or 1),
            0 if self.batch is None else strides[self.batch],
            0 if self.head is None else strides[self.head],
            0 if self.row is None else strides[self.row],
        )


def _number(value: Any) -> int | float:
    return float(value) if isinstance(value, float) else int(value)
