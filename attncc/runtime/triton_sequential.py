"""Sequential kernels on Triton."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attncc.emit.sequential_triton import layout_of, source_of, stride_names
from attncc.ir.types import DType
from attncc.plan.sequential import Operand, SequentialPlan
from attncc.runtime.arguments import TORCH_DTYPES
from attncc.runtime.triton import LoadedModule
from attncc.runtime.triton_fields import TYPES, Field, Function


class TritonSequential:
    """The module of a sequential kernel."""

    def __init__(self, plan: SequentialPlan, module: LoadedModule) -> None:
        self._plan = plan
        self._blocks = layout_of(plan).blocks
        self._module = module
        self._whole, self._packed = module.functions

    def forward(
        self,
        operands: Sequence[Tensor],
        initial_state: Tensor | None,
        offsets: Tensor | None,
        o: Tensor,
        final_state: Tensor | None,
    ) -> None:
        plan, (batch, heads, tokens, _) = self._plan, o.shape
        sequences = batch if offsets is None else len(offsets) - 1
        shape = (sequences, heads, plan.key_width, plan.value_width)
        dtype = TORCH_DTYPES[plan.state_dtype]
        initial_state = o.new_zeros(shape, dtype=dtype) if initial_state is None else initial_state
        final_state = torch.empty_like(initial_state) if final_state is None else final_state
        arguments: list[Any] = []
        for operand, x in zip(plan.operands, operands, strict=True):
            arguments += [x.resolve_neg(), *_strides(operand, x)]
        # Where nothing is packed no offsets are read.
        arguments += [o, initial_state, final_state, o if offsets is None else offsets]
        function = self._whole if offsets is None else self._packed
        arguments += [heads, tokens, *(value for _, value in function.constants)]
        self._module.run(function, sequences * heads * self._blocks, arguments, (), ())


def compile_kernel(plan: SequentialPlan, templates: Sequence[Path], folder: Path) -> TritonSequential:
    """The kernel of `plan`, whose rendered source is stored in `folder` and imported from there. Raises BuildError
    where no program can hold its state."""
    return TritonSequential(plan, LoadedModule(plan, source_of(plan, templates), folder))


def sequential_functions(plan: SequentialPlan) -> tuple[Function, ...]:
    """The function of the module that `plan` renders to: for sequences of their own, and for packed ones."""
    state = "*fp64" if plan.state_dtype is DType.F64 else "*fp32"
    fields = [field for operand in plan.operands for field in _fields(operand)]
    fields += [Field("o", f"*{TYPES[plan.stored]}"), Field("initial_state", state), Field("final_state", state)]
    fields += [Field("offsets", "*i64"), Field("H", "i32"), Field("N", "i32")]
    warps = layout_of(plan).num_warps
    return tuple(
        Function(plan.name, tuple(fields), (("PACKED", packed),), num_warps=warps, num_stages=1)
        for packed in (False, True)
    )


def _fields(operand: Operand) -> list[Field]:
    return [
        Field(f"{operand.name}_data", f"*{TYPES[operand.dtype]}"),
        *(Field(name, "i64") for name in stride_names(operand)),
    ]


def _strides(operand: Operand, x: Tensor) -> list[int]:
    """The strides that `stride_names` names. Along an axis of one everything is the same."""
    by_axis = dict(zip("bhtde", zip(x.shape, x.stride(), strict=True), strict=True))
    sizes_and_strides = (by_axis[name[-1]] for name in stride_names(operand))
    return [0 if size == 1 else stride for size, stride in sizes_and_strides]
