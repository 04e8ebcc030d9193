"""Backward passes on Triton: which kernel is launched with what, in which order.

transforms of rows ─▶ tables of tiles ─▶ delta ─▶ dk and dv, dq, sums along diagonals ─▶ through the transforms
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attncc.emit.triton_facts import block_rows, delta_rows, diagonal_block, longest_first
from attncc.ir.nodes import Load
from attncc.plan.nodes import GROUP_SIZE, Adjoint, BackwardPlan, BackwardProgram, RowsPlan, TilesPlan, TritonTile
from attncc.runtime.arguments import TORCH_DTYPES, Bound, Sizes
from attncc.runtime.backward import Gradients, Results
from attncc.runtime.captured import add_where_read
from attncc.runtime.triton import (
    NO_TABLES,
    LoadedModule,
    RowsKernel,
    Tables,
    TilesKernel,
    captured_arguments,
    size_arguments,
)
from attncc.runtime.triton_fields import ADJOINTS_OF, Function

# Bytes of what pairs add to elements that they have gathered, where it is kept apart before it is added up.
_APART_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Pairs:
    """What the kernels of pairs read: transformed rows, the gradient of o, and numbers of each query (B, H, M)."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    total: Tensor | None
    delta: Tensor | None
    sizes: Sizes
    bound: Bound

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v, self.do

    @property
    def wide(self) -> torch.dtype:
        """The type of sums."""
        return torch.float64 if self.q.dtype is torch.float64 else torch.float32


class TritonBackward:
    """The kernels of one backward program."""

    def __init__(self, program: BackwardProgram, sources: Sequence[str], folder: Path) -> None:
        modules = {
            plan.name: LoadedModule(plan, source, folder) for plan, source in zip(program.kernels, sources, strict=True)
        }

        def rows(plan: RowsPlan) -> RowsKernel:
            return RowsKernel(plan, modules[plan.name], block_rows(plan))

        def tiles(plan: TilesPlan | None) -> TilesKernel | None:
            return None if plan is None else TilesKernel(plan, modules[plan.name])

        self._program = program
        self._rows = [rows(plan) for plan in program.rows]
        self._transposed = [rows(plan) for plan in program.transposed]
        self._row_adjoints = [rows(adjoint.rows) for adjoint in program.row_adjoints]
        self._tiles, self._key_tiles = tiles(program.tiles), tiles(program.key_tiles)
        self._kernels = BackwardKernels(program.backward, modules[program.backward.name])

    def run(self, q: Tensor, k: Tensor, v: Tensor, bound: Bound, results: Results) -> Gradients:
        sizes, program = bound.sizes, self._program
        bound = bound._replace(scalars=bound.scalars | {GROUP_SIZE: sizes.H // max(sizes.HKV, 1)})
        inner = sizes._replace(HKV=sizes.H) if program.operand_heads == "H" else sizes
        given = {"q": _contiguous(q), "k": _contiguous(k), "v": _contiguous(v)}
        rows = dict(given)
        for kernel in self._rows:
            rows[kernel.plan.row] = _launch_rows(kernel, given, bound)
        tables = _tables(self._tiles, inner, bound, q.device)
        key_tables = _tables(self._key_tiles, inner, bound, q.device)
        total = None if results.total is None else results.total.contiguous()
        do = _contiguous(results.do)
        delta = self._kernels.delta(_contiguous(results.o), do, total, results.dtotal)
        pairs = Pairs(rows["q"], rows["k"], rows["v"], do, total, delta, inner, bound)
        dk, dv, columns = self._kernels.dkdv(pairs, key_tables)
        dq, others = self._kernels.dq(pairs, tables)
        sums = columns | others | self._kernels.diagonals(pairs)

        gradients = {"q": dq, "k": dk, "v": dv}
        row_adjoints = [_launch_rows(kernel, given, bound, gradients[kernel.plan.row]) for kernel in self._row_adjoints]
        for kernel in self._transposed:
            gradients[kernel.plan.row] = _launch_rows(kernel, given, bound, gradients[kernel.plan.row])
        if program.operand_heads == "H":
            group = (sizes.B, sizes.HKV, sizes.H // max(sizes.HKV, 1))
            gradients |= {x: gradients[x].unflatten(1, group[1:]).sum(2).to(q.dtype) for x in ("k", "v")}
        return Gradients(
            gradients["q"],
            gradients["k"],
            gradients["v"],
            tuple(sums[number] for number in range(len(program.backward.adjoints))),
            tuple(row_adjoints),
            delta if program.backward.writes_delta else None,
        )


class BackwardKernels:
    """The functions of the module of a `BackwardPlan`."""

    def __init__(self, plan: BackwardPlan, module: LoadedModule) -> None:
        if not isinstance(plan.tile, TritonTile) or not isinstance(plan.key_tile, TritonTile):
            raise TypeError(f"{plan.name} has no tiles of Triton kernels")
        self.plan = plan
        self.module = module
        self.block_m, self.block_n = plan.tile.block_m, plan.key_tile.block_n
        self._gathered = {
            number: adjoint.part
            for number, adjoint in enumerate(plan.adjoints)
            if adjoint.along == "pair" and isinstance(adjoint.part, Load)
        }
        self.functions = {function.label.removeprefix(f"{plan.name}_"): function for function in module.functions}

    def delta(self, o: Tensor, do: Tensor, total: Tensor | None, dtotal: Tensor | None) -> Tensor | None:
        """One number of each query that the gradients of all its pairs share; None where nothing is divided."""
        if total is None:
            return None
        delta = torch.empty_like(total)
        given = delta if dtotal is None else dtotal.contiguous()
        arguments = [o, do, total, given, delta, *o.stride()[:3], *do.stride()[:3], *total.shape, dtotal is not None]
        function = self.functions["delta" if dtotal is None else "delta[DTOTAL]"]
        programs = total.shape[0] * total.shape[1] * -(-total.shape[2] // delta_rows(self.plan))
        self.module.run(function, programs, arguments, (o, do), (), (do,))
        return delta

    def dkdv(self, pairs: Pairs, tables: Tables) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """dk and dv of the transformed rows, and the adjoints along columns by their number."""
        sizes = pairs.sizes
        dk, dv = (
            _empty(pairs.q, sizes.B, sizes.HKV, sizes.N, width, dtype=TORCH_DTYPES[dtype])
            for width, dtype in ((sizes.D, self.plan.stored.k), (sizes.E, self.plan.stored.v))
        )
        sums = {
            number: _empty(pairs.q, sizes.B, sizes.H, sizes.N, dtype=pairs.wide) for number, _ in self._adjoints("dkdv")
        }
        programs = sizes.B * sizes.HKV * -(-sizes.N // self.block_n)
        self._run_twice("dkdv", programs, pairs, (dk, dv), [*sums.values()], _table_arguments(tables))
        return dk, dv, sums

    def dq(self, pairs: Pairs, tables: Tables) -> tuple[Tensor, dict[int, Tensor]]:
        """dq of the transformed rows, and the adjoints of heads, rows and pairs by their number."""
        sizes = pairs.sizes
        dq = _empty(pairs.q, sizes.B, sizes.H, sizes.M, sizes.D, dtype=TORCH_DTYPES[self.plan.stored.q])
        sums: dict[int, Tensor] = {}
        for number, _ in self._adjoints("dq"):
            if number in self._gathered:
                read = pairs.bound.tensors[self._gathered[number].tensor]
                sums[number] = torch.zeros(read.shape, dtype=pairs.wide, device=read.device)
            else:
                sums[number] = _empty(pairs.q, sizes.B, sizes.H, sizes.M, dtype=pairs.wide)
        programs = sizes.B * sizes.H * -(-sizes.M // self.block_m)
        table_arguments = [*_table_arguments(tables), *_list_arguments(tables)]
        if self._gathered and torch.are_deterministic_algorithms_enabled():
            self._dq_sorted(programs, pairs, dq, sums, table_arguments)
        else:
            self._run_twice("dq", programs, pairs, (dq,), self._dq_sums(sums), table_arguments)
        heads = {number for number, adjoint in self._adjoints("dq") if adjoint.along == "head"}
        return dq, {number: _sum_of_rows(x) if number in heads else x for number, x in sums.items()}

    def _dq_sorted(
        self, programs: int, pairs: Pairs, dq: Tensor, sums: Mapping[int, Tensor], tables: Sequence[Any]
    ) -> None:
        """`dq` in chunks of programs that keep apart what each pair adds to the elements that it has gathered. It is
        added to them here, in an order that is the same in every run; one after the other, and so in float64."""
        outputs = self._outputs(programs, pairs, (dq,))
        shape = (self.block_m, pairs.sizes.N)
        bytes_of_program = len(self._gathered) * math.prod(shape) * pairs.wide.itemsize
        exact = {number: sums[number].double() for number in self._gathered}
        step = max(_APART_BYTES // max(bytes_of_program, 1), 1)
        for first in range(0, programs, step):
            count = min(step, programs - first)
            apart = {number: pairs.q.new_zeros(count, *shape, dtype=pairs.wide) for number in self._gathered}
            self._visit("dq[SORTED]", count, pairs, outputs, self._dq_sums(sums, apart, first), tables)
            coordinates = self._coordinates(range(first, first + count), pairs)
            for number, load in self._gathered.items():
                add_where_read(exact[number], load, apart[number], coordinates, pairs.bound)
        for number, total in exact.items():
            sums[number].copy_(total)
        if self.plan.mask is not None:
            self._visit("dq[STRANGE]", programs, pairs, outputs, self._dq_sums(sums), tables)

    def _dq_sums(
        self, sums: Mapping[int, Tensor], apart: Mapping[int, Tensor] | None = None, first_program: int = 0
    ) -> list[Any]:
        """The arguments of `dq` that it adds to, and where it gathers, which program of all is the launch's first."""
        arguments: list[Any] = []
        for number, x in sums.items():
            arguments.append((apart or {}).get(number, x if x.numel() else x.new_zeros(1)))
            arguments += x.stride() if number in self._gathered else ()
        return [*arguments, first_program] if self._gathered else arguments

    def _coordinates(self, programs: range, pairs: Pairs) -> dict[str, Tensor]:
        """Those of the pairs of some programs of `dq`: (programs, BLOCK_M, N). Rows past the last one repeat it."""
        sizes, device = pairs.sizes, pairs.q.device
        tiles = -(-sizes.M // self.block_m)
        program = torch.arange(programs.start, programs.stop, device=device)[:, None, None]
        tile = tiles - 1 - program % tiles if longest_first(self.plan.blocks) else program % tiles
        row = tile * self.block_m + torch.arange(self.block_m, device=device)[:, None]
        return {
            "b": program // tiles // sizes.H,
            "h": program // tiles % sizes.H,
            "q_row": row.clamp(max=sizes.M - 1),
            "kv_idx": torch.arange(sizes.N, device=device),
        }

    def diagonals(self, pairs: Pairs) -> dict[int, Tensor]:
        """The adjoints along diagonals by their number."""
        sizes, block = pairs.sizes, diagonal_block(self.plan)
        tiles_m, tiles_n = -(-sizes.M // block), -(-sizes.N // block)
        count = tiles_m + tiles_n - 1 if tiles_m and tiles_n else 0
        sums = {
            number: _empty(pairs.q, sizes.B, sizes.H, count, 2, block, dtype=pairs.wide)
            for number, _ in self._adjoints("diagonals")
        }
        if sums:
            arguments = self._arguments(pairs, (), [*sums.values()], [])
            self._run(self.functions["diagonals"], sizes.B * sizes.H * count, arguments, pairs, ())
        return {number: _distances(x, sizes, tiles_n * block) for number, x in sums.items()}

    def _adjoints(self, function: str) -> list[tuple[int, Adjoint]]:
        along = ADJOINTS_OF[function]
        return [(number, adjoint) for number, adjoint in enumerate(self.plan.adjoints) if adjoint.along in along]

    def _run_twice(
        self,
        name: str,
        programs: int,
        pairs: Pairs,
        outputs: Sequence[Tensor],
        sums: Sequence[Any],
        tables: Sequence[Any],
    ) -> None:
        """Where there is a mask, the second launch visits the programs again that met infinite or missing values."""
        outputs = self._outputs(programs, pairs, outputs)
        self._visit(name, programs, pairs, outputs, sums, tables)
        if self.plan.mask is not None:
            self._visit(f"{name}[STRANGE]", programs, pairs, outputs, sums, tables)

    def _outputs(self, programs: int, pairs: Pairs, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """What a kernel of two visits writes: where there is a mask, also which programs to visit again."""
        if self.plan.mask is None:
            return outputs
        return (*outputs, torch.empty(programs, dtype=torch.int32, device=pairs.q.device))

    def _visit(
        self,
        label: str,
        programs: int,
        pairs: Pairs,
        outputs: Sequence[Tensor],
        sums: Sequence[Any],
        tables: Sequence[Any],
    ) -> None:
        function = self.functions[label]
        constants = [value for _, value in function.constants]
        arguments = [*self._arguments(pairs, outputs, sums, tables), *constants]
        self._run(function, programs, arguments, pairs, outputs)

    def _arguments(
        self, pairs: Pairs, outputs: Sequence[Tensor], sums: Sequence[Any], tables: Sequence[Any]
    ) -> list[Any]:
        of_rows = [] if pairs.total is None else [pairs.total, pairs.delta]
        strides = [stride for operand in pairs.operands for stride in operand.stride()[:3]]
        captured = [pairs.bound.tensors[tensor.name] for tensor in self.plan.tensors]
        scalars = [pairs.bound.scalars[scalar.name] for scalar in self.plan.scalars]
        sizes = size_arguments(pairs.sizes, pairs.bound.q_offset)
        tail = [*strides, *sizes, *captured_arguments(captured), *scalars, *tables]
        return [*pairs.operands, *of_rows, *outputs, *sums, *tail]

    def _run(
        self, function: Function, programs: int, arguments: Sequence[Any], pairs: Pairs, outputs: Sequence[Tensor]
    ) -> None:
        captured = [pairs.bound.tensors[tensor.name] for tensor in self.plan.tensors]
        self.module.run(function, programs, arguments, (*pairs.operands, *outputs), captured, pairs.operands)


def _launch_rows(
    kernel: RowsKernel, given: Mapping[str, Tensor], bound: Bound, upstream: Tensor | None = None
) -> Tensor:
    """Rows of a call transformed, or a gradient through that."""
    plan, sizes, x = kernel.plan, bound.sizes, given[kernel.plan.row]
    heads = sizes.H if plan.heads == "H" else sizes.HKV
    out = _empty(x, sizes.B, heads, x.shape[2], plan.width, dtype=TORCH_DTYPES[plan.stored])
    kernel.launch(x, out, sizes, bound.q_offset, bound.tensors, bound.scalars, upstream)
    return out


def _tables(kernel: TilesKernel | None, sizes: Sizes, bound: Bound, device: torch.device) -> Tables:
    if kernel is None:
        return NO_TABLES
    return kernel.launch(sizes, bound.q_offset, bound.tensors, bound.scalars, device)


def _table_arguments(tables: Tables) -> list[Any]:
    return [argument for table in tables.summaries for argument in (table.values, *table.strides)]


def _list_arguments(tables: Tables) -> list[Any]:
    if tables.list_counts is None:
        return []
    return [tables.list_offsets, tables.list_tiles, *tables.list_counts.strides]


def _distances(partial: Tensor, sizes: Sizes, keys: int) -> Tensor:
    """Sums by q_row - kv_idx, from those of the diagonals of tiles, of which neighbours overlap."""
    batch, heads, count, _, block = partial.shape
    sums = partial.new_zeros(batch, heads, count + 1, block)
    sums[:, :, :-1] += partial[:, :, :, 0]
    sums[:, :, 1:] += partial[:, :, :, 1]
    first = keys - (sizes.N - 1)
    length = max(sizes.M + sizes.N - 1, 0)
    if not count:
        return partial.new_zeros(batch, heads, length)
    return sums.flatten(2)[:, :, first : first + length].contiguous()


def _sum_of_rows(x: Tensor) -> Tensor:
    """The sum along the last axis; on a CPU in an order that does not depend on the number of threads."""
    if x.device.type == "cpu":
        return torch.from_numpy(x.numpy().sum(-1))
    return x.sum(-1)


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def _contiguous(x: Tensor) -> Tensor:
    """`x` with a contiguous last axis, and in memory what it says."""
    x = x.resolve_neg()
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
