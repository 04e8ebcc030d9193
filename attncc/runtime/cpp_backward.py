"""Backward passes on the C++ target: allocates what kernels write, packs their arguments, launches them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from attncc.emit.cpp_machine import CLASSIFIED_KEYS
from attncc.ir.blocks import BlockStructure
from attncc.passes.variance import variance
from attncc.plan.nodes import GROUP_SIZE, Adjoint, BackwardProgram, RowsPlan, TilesPlan
from attncc.runtime.arguments import TORCH_DTYPES, Bound, Sizes
from attncc.runtime.backward import Gradients, Results
from attncc.runtime.cpp import CppKernel, compile_kernel
from attncc.runtime.programs import contiguous

# Values of a kernel's own 8-byte slots by name.
Values = dict[str, int | float]


class CppBackward:
    """The shared libraries of a backward program."""

    def __init__(self, program: BackwardProgram, sources: Sequence[str], folder: Path) -> None:
        self._program = program
        plans = program.kernels
        kernels = [compile_kernel(plan, source, folder) for plan, source in zip(plans, sources, strict=True)]
        self._kernels = {plan.name: kernel for plan, kernel in zip(plans, kernels, strict=True)}

    def run(self, q: Tensor, k: Tensor, v: Tensor, bound: Bound, results: Results) -> Gradients:
        program, plan = self._program, self._program.backward
        call = _Call(bound, program.operand_heads)
        rows = {"q": contiguous(q), "k": contiguous(k), "v": contiguous(v)}
        seen: dict[str, Tensor] = dict(rows)
        for transform in program.rows:
            seen[transform.row] = self._rows(call, transform, rows[transform.row], None)

        keep: list[Tensor] = []  # what kernels read by pointer lives until they have run
        tables = {} if program.tiles is None else self._tables(call, program.tiles, keep)
        sizes = call.inner
        exact = torch.float64 if q.dtype is torch.float64 else torch.float32
        gradients = {
            "q": torch.empty((sizes.B, sizes.H, sizes.M, sizes.D), dtype=TORCH_DTYPES[plan.stored.q]),
            "k": torch.empty((sizes.B, sizes.HKV, sizes.N, sizes.D), dtype=TORCH_DTYPES[plan.stored.k]),
            "v": torch.empty((sizes.B, sizes.HKV, sizes.N, sizes.E), dtype=TORCH_DTYPES[plan.stored.v]),
        }
        values = call.values(inner=True) | tables
        for name, tensor in {"o": results.o, "d_o": results.do}.items():
            keep.append(contiguous(tensor))
            values |= _operand(name, keep[-1])
        for row in ("q", "k", "v"):
            values |= _operand(row, seen[row]) | _operand(f"d{row}", gradients[row])
        for name, tensor in {"total": results.total, "dtotal": results.dtotal}.items():
            keep.append(torch.empty(0) if tensor is None else tensor.to(exact).contiguous())
            values[name] = 0 if tensor is None else keep[-1].data_ptr()
        delta = torch.zeros((sizes.B, sizes.H, sizes.M), dtype=exact) if plan.writes_delta else None
        values["delta"] = 0 if delta is None else delta.data_ptr()
        adjoints = tuple(_adjoint_tensor(adjoint, call, exact) for adjoint in plan.adjoints)
        for number, (adjoint, tensor) in enumerate(zip(plan.adjoints, adjoints, strict=True)):
            values |= _places(f"adjoint_{number}", tensor, keep) if adjoint.along == "pair" else {}
            values.setdefault(f"adjoint_{number}", tensor.data_ptr())
        self._launch(call, plan.name, values)

        row_adjoints = tuple(
            self._rows(call, part.rows, rows[part.rows.row], gradients[part.rows.row]) for part in program.row_adjoints
        )
        for transposed in program.transposed:
            row = transposed.row
            gradients[row] = self._rows(call, transposed, rows[row], gradients[row])
        if program.operand_heads == "H":
            for row in ("k", "v"):
                groups = gradients[row].unflatten(1, (bound.sizes.HKV, bound.sizes.H // max(bound.sizes.HKV, 1)))
                gradients[row] = groups.sum(2).to(q.dtype)
        return Gradients(gradients["q"], gradients["k"], gradients["v"], adjoints, row_adjoints, delta)

    def _launch(self, call: _Call, name: str, own: Values) -> None:
        kernel: CppKernel = self._kernels[name]
        slots: list[int | float] = []
        for field in kernel.fields:
            names = [slot for slot, _ in field.slots]
            # The specification may use a name that the kernel uses too.
            slots += call.captured[names[0]] if field.captured else [own[slot] for slot in names]
        kernel.launch(slots)

    def _rows(self, call: _Call, plan: RowsPlan, x: Tensor, gradient: Tensor | None) -> Tensor:
        """What a rows kernel writes from the rows `x`, and from `gradient` where it reads one."""
        heads = call.sizes.H if plan.heads == "H" else call.sizes.HKV
        y = torch.empty((call.sizes.B, heads, x.shape[2], plan.width), dtype=TORCH_DTYPES[plan.stored])
        values = call.values(inner=False) | _operand("x", x) | {"y": y.data_ptr()}
        if gradient is not None:
            values["g"] = gradient.data_ptr()
        self._launch(call, plan.name, values)
        return y

    def _tables(self, call: _Call, plan: TilesPlan, keep: list[Tensor]) -> Values:
        """Fills the tables that `plan` describes; returns where they are."""
        sizes = call.inner
        tiles_q, parts_kv = -(-sizes.M // plan.tile.block_m), -(-sizes.N // CLASSIFIED_KEYS)
        values: Values = {"list_counted": 0}

        def allocate(name: str, batches: int, heads: int, entries: int) -> None:
            keep.append(torch.empty(max(batches * heads * entries, 1), dtype=torch.int64))
            values[name] = keep[-1].data_ptr()
            values[f"{name}_stride_b"] = 0 if batches == 1 else heads * entries
            values[f"{name}_stride_h"] = 0 if heads == 1 else entries

        for number, summary in enumerate(plan.blocks.summaries):
            varies = variance(summary.load)
            batches, heads = sizes.B if "b" in varies else 1, sizes.H if "h" in varies else 1
            allocate(f"summary_{number}", batches, heads, parts_kv if summary.axis == "kv" else tiles_q)
        if plan.blocks.strategy == "list":
            batches, heads = _list_heads(plan.blocks, sizes)
            allocate("list", batches, heads, tiles_q)
            del values["list"]
            offsets = torch.zeros(batches * heads * tiles_q + 1, dtype=torch.int64)
            keep.append(offsets)
            values |= {"list_offsets": offsets.data_ptr(), "list_entries": 0}
        self._launch(call, plan.name, call.values(inner=True) | values)
        if plan.blocks.strategy == "list":  # now their length is known
            keep.append(torch.empty(max(int(keep[-1][-1]), 1), dtype=torch.int32))
            values |= {"list_entries": keep[-1].data_ptr(), "list_counted": 1}
            self._launch(call, plan.name, call.values(inner=True) | values)
        return values


class _Call:
    """The arguments of a call as kernels take them. inner: as those see it that read k and v after their transforms,
    which may have written them once per query head. captured: the slots of each tensor and scalar of the
    specification."""

    def __init__(self, bound: Bound, operand_heads: str) -> None:
        self.bound = bound
        self.sizes = bound.sizes
        self.inner = bound.sizes._replace(HKV=bound.sizes.H) if operand_heads == "H" else bound.sizes
        scalars = bound.scalars | {GROUP_SIZE: self.sizes.H // max(self.sizes.HKV, 1)}
        self.captured: dict[str, list[int | float]] = {name: [value] for name, value in scalars.items()}
        self.captured |= {name: [*_tensor(name, tensor).values()] for name, tensor in bound.tensors.items()}

    def values(self, *, inner: bool) -> Values:
        sizes = self.inner if inner else self.sizes
        named = {name: getattr(sizes, name) for name in ("B", "H", "HKV", "M", "N")}
        return {**named, "q_offset": self.bound.q_offset, "num_threads": torch.get_num_threads()}


def _tensor(name: str, tensor: Tensor) -> Values:
    sizes = {f"{name}_size_{axis}": size for axis, size in enumerate(tensor.shape)}
    strides = {f"{name}_stride_{axis}": stride for axis, stride in enumerate(tensor.stride())}
    return {name: tensor.data_ptr(), **sizes, **strides}


def _operand(name: str, tensor: Tensor) -> Values:
    batch, head, row = tensor.stride()[:3]
    return {
        name: tensor.data_ptr(),
        f"{name}_stride_b": batch,
        f"{name}_stride_h": head,
        f"{name}_stride_row": row,
    }


def _adjoint_tensor(adjoint: Adjoint, call: _Call, dtype: torch.dtype) -> Tensor:
    sizes = call.sizes
    if adjoint.place is not None:
        return torch.zeros(call.bound.tensors[adjoint.place.tensor].shape, dtype=dtype)
    shapes = {
        "head": (),
        "row": (sizes.M,),
        "column": (sizes.N,),
        "diagonal": (max(sizes.M + sizes.N - 1, 0),),
    }
    return torch.zeros((sizes.B, sizes.H, *shapes[adjoint.along]), dtype=dtype)


def _places(name: str, tensor: Tensor, keep: list[Tensor]) -> Values:
    """A tensor whose entries a kernel adds to. Where it has none, what is added goes elsewhere."""
    if tensor.numel():
        return _tensor(name, tensor)
    keep.append(tensor.new_zeros([1] * tensor.dim()))
    return _tensor(name, keep[-1])


def _list_heads(blocks: BlockStructure, sizes: Sizes) -> tuple[int, int]:
    return sizes.B if blocks.per_batch else 1, sizes.H if blocks.per_head else 1
