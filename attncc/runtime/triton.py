"""Generated Triton modules as kernels that launch: on a GPU, or interpreted on the CPU.

    kernel = compile_kernel(plan, source, folder)
    kernel.launch(…)                # ForwardKernel, RowsKernel or TilesKernel, by the kind of plan

Nothing is compiled before the first launch, and then once per `Variant` of the call's tensors; lengths, batch, heads
and scalars are arguments of the compiled function.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, assert_never

import torch
from torch import Tensor

from attncc.diagnostics import BuildError, CallError
from attncc.ir.nodes import Summary
from attncc.ir.types import DType
from attncc.passes.variance import variance
from attncc.plan.nodes import BackwardPlan, ForwardPlan, KernelPlan, RowsPlan, TilesPlan, TritonTile
from attncc.plan.recurrent import CorePlan
from attncc.plan.sequential import SequentialPlan
from attncc.plan.triton_tiles import MACHINES, WITHOUT_F64
from attncc.runtime.arguments import TORCH_DTYPES, Sizes
from attncc.runtime.cache import import_module, write_atomically
from attncc.runtime.triton_errors import (
    NoDevice,
    NoDoubles,
    NotATritonModule,
    NoTriton,
    TritonCompilationFailed,
    UnknownArch,
    WrongParameters,
)
from attncc.runtime.triton_fields import Function, Variant, functions_of, itemsize_of

# Bytes of keys and values that a section of heads may take of the second-level cache, where late queries go first.
_SECTION_BYTES = 32 << 20
# Python up to 3.12 counts the depth of syntax trees for all threads together: two that parse at once may fail.
_PARSING = threading.RLock()
# A tile of rows this far apart may span 2**31 elements.
_WIDE_STRIDE = 1 << 23

Captured: TypeAlias = Mapping[str, Tensor]
Scalars: TypeAlias = Mapping[str, bool | int | float]


@dataclass(frozen=True, slots=True)
class Table:
    """A tensor (batch or 1, heads or 1, tiles), contiguous, read at any batch and head."""

    values: Tensor

    @property
    def strides(self) -> tuple[int, int]:
        """Of batch and head, in elements; 0 along an axis of one."""
        batch, heads, tiles = self.values.shape
        return (heads * tiles if batch > 1 else 0, tiles if heads > 1 else 0)


@dataclass(frozen=True, slots=True)
class Tables:
    """What a tiles kernel fills and a forward kernel reads: the summaries in the order of the plan, and the lists, as
    counts per tile of queries in the form of a table, offsets (one more than there are counts) and entries."""

    summaries: tuple[Table, ...]
    list_counts: Table | None = None
    list_offsets: Tensor | None = None
    list_tiles: Tensor | None = None


NO_TABLES = Tables(())


class ForwardKernel:
    """Attention forward. `lse` is None where the plan's normalizer is `none`."""

    def __init__(self, plan: ForwardPlan, module: LoadedModule) -> None:
        if not isinstance(plan.tile, TritonTile):
            raise TypeError(f"{plan.name} has no tile of a Triton kernel")
        self.plan = plan
        self.module = module
        self.function = module.functions[0]
        self.block_m = plan.tile.block_m

    def launch(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor | None,
        sizes: Sizes,
        q_offset: int,
        tensors: Captured,
        scalars: Scalars,
        tables: Tables = NO_TABLES,
        statistics: Sequence[Tensor] = (),
    ) -> None:
        """Writes o (any strides, last axis contiguous) and lse (contiguous), and the greatest score and the entropy of
        each row where the plan has them. No size but N may be 0."""
        operands = (q, k, v, o)
        row = sizes.HKV * sizes.N * (sizes.D + sizes.E) * q.element_size() // max(sizes.HKV, 1)
        heads_per_section = max(1, _SECTION_BYTES // max(row, 1))
        arguments: list[Any] = [*operands] if lse is None else [*operands, lse, *statistics]
        for operand in operands:
            arguments += operand.stride()[:3]
        arguments += size_arguments(sizes, q_offset)
        arguments.append(min(heads_per_section, sizes.B * sizes.H))
        captured = [tensors[tensor.name] for tensor in self.plan.tensors]
        arguments += captured_arguments(captured)
        arguments += [scalars[scalar.name] for scalar in self.plan.scalars]
        for table in tables.summaries:
            arguments += (table.values, *table.strides)
        if tables.list_counts is not None:
            arguments += (tables.list_offsets, tables.list_tiles, *tables.list_counts.strides)
        programs = sizes.B * sizes.H * -(-sizes.M // self.block_m)
        self.module.run(self.function, programs, arguments, operands, captured, (k, v))


class RowsKernel:
    """Transformed rows of q, k or v."""

    def __init__(self, plan: RowsPlan, module: LoadedModule, block_rows: int) -> None:
        self.plan = plan
        self.module = module
        self.function = module.functions[0]
        self.block_rows = block_rows

    def launch(
        self,
        x: Tensor,
        out: Tensor,
        sizes: Sizes,
        q_offset: int,
        tensors: Captured,
        scalars: Scalars,
        upstream: Tensor | None = None,
    ) -> None:
        """Writes `out`, contiguous (B, H or HKV as the plan says, rows of x, width). `sizes` are those of the call.
        upstream: for plans that read it, a gradient of the same shape, contiguous."""
        rows = (x, out) if upstream is None else (x, upstream, out)
        arguments: list[Any] = [*rows, *x.stride()[:3], *size_arguments(sizes, q_offset)]
        captured = [tensors[tensor.name] for tensor in self.plan.tensors]
        arguments += captured_arguments(captured)
        arguments += [scalars[scalar.name] for scalar in self.plan.scalars]
        programs = out.shape[0] * out.shape[1] * -(-x.shape[2] // self.block_rows)
        self.module.run(self.function, programs, arguments, rows, captured)


class TilesKernel:
    """The tables of tiles that a forward kernel reads."""

    def __init__(self, plan: TilesPlan, module: LoadedModule) -> None:
        if not isinstance(plan.tile, TritonTile):
            raise TypeError(f"{plan.name} has no tile of a Triton kernel")
        self.plan = plan
        self.module = module
        self.tile = plan.tile
        self.summaries = plan.blocks.summaries
        self.per_mask = (plan.blocks.per_batch, plan.blocks.per_head)

    def launch(self, sizes: Sizes, q_offset: int, tensors: Captured, scalars: Scalars, device: torch.device) -> Tables:
        """Allocates and fills the tables. The lists take one synchronisation, for their length."""
        captured = [tensors[tensor.name] for tensor in self.plan.tensors]
        tail: list[Any] = [*captured_arguments(captured), *(scalars[scalar.name] for scalar in self.plan.scalars)]
        summaries: list[Table] = []
        for function, summary in zip(self.module.functions, self.summaries, strict=False):
            dtype = next(t.dtype for t in self.plan.tensors if t.name == summary.load.tensor)
            table = self._table(sizes, _varying(summary.load), summary, TORCH_DTYPES[dtype], device)
            heads = table.values.shape[1]
            self._run(function, table, [table.values, *size_arguments(sizes, q_offset), heads, *tail], captured)
            summaries.append(table)
        if self.plan.blocks.strategy != "list":
            return Tables(tuple(summaries))

        count, fill = self.module.functions[-2:]
        counts = self._table(sizes, self.per_mask, None, torch.int32, device)
        tail += [argument for table in summaries for argument in (table.values, *table.strides)]
        offsets = torch.zeros(counts.values.numel() + 1, dtype=torch.int32, device=device)
        nothing = torch.empty(1, dtype=torch.int32, device=device)
        common = [*size_arguments(sizes, q_offset), counts.values.shape[1], *tail]
        self._run(count, counts, [counts.values, offsets, nothing, *common, False], captured)
        torch.cumsum(counts.values.flatten(), 0, dtype=torch.int32, out=offsets[1:])
        entries = torch.empty(max(int(offsets[-1]), 1), dtype=torch.int32, device=device)
        self._run(fill, counts, [counts.values, offsets, entries, *common, True], captured)
        return Tables(tuple(summaries), counts, offsets, entries)

    def _table(
        self,
        sizes: Sizes,
        varying: tuple[bool, bool],
        summary: Summary | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Table:
        per_batch, per_head = varying
        by_key = summary is not None and summary.axis == "kv"
        tiles = -(-sizes.N // self.tile.block_n) if by_key else -(-sizes.M // self.tile.block_m)
        shape = (sizes.B if per_batch else 1, sizes.H if per_head else 1, tiles)
        return Table(torch.empty(shape, dtype=dtype, device=device))

    def _run(self, function: Function, table: Table, arguments: Sequence[Any], captured: Sequence[Tensor]) -> None:
        # One program per entry of the table.
        self.module.run(function, table.values.numel(), arguments, (table.values,), captured)


TritonKernel: TypeAlias = ForwardKernel | RowsKernel | TilesKernel


def compile_kernel(plan: KernelPlan, source: str, folder: Path) -> TritonKernel:
    """The kernel of `plan`, whose rendered source is stored in `folder` and imported from there."""
    from attncc.emit.triton_facts import block_rows

    module = LoadedModule(plan, source, folder)
    match plan:
        case ForwardPlan():
            return ForwardKernel(plan, module)
        case RowsPlan():
            return RowsKernel(plan, module, block_rows(plan))
        case TilesPlan():
            return TilesKernel(plan, module)
        case BackwardPlan():
            raise TypeError(f"{plan.name} is launched by attncc.runtime.triton_backward")
        case _:
            assert_never(plan)


class LoadedModule:
    """A generated module on disk and in memory, and what has been compiled of it."""

    def __init__(self, plan: KernelPlan | CorePlan | SequentialPlan, source: str, folder: Path) -> None:
        self.plan = plan
        self.functions = functions_of(plan)
        self.path = store(plan.name, source, folder)
        self.interpreted = plan.target.arch == "interpret"
        if not self.interpreted:
            check_target(plan, plan.target.arch)
        self._module = self._imported()
        self._compiled: dict[tuple[str, Variant], Any] = {}

    def run(
        self,
        function: Function,
        programs: int,
        arguments: Sequence[Any],
        operands: Iterable[Tensor],
        captured: Iterable[Tensor],
        streamed: Sequence[Tensor] = (),
    ) -> None:
        """Launches `programs` programs of `function` with `arguments`, in the order of its parameters. streamed: the
        operands that it reads tile by tile."""
        if programs == 0:
            return
        variant = variant_of(operands, captured, streamed)
        if self.interpreted:
            self._interpret(function, programs, arguments, variant)
            return
        compiled = self._compiled.get((function.label, variant))
        device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
        if compiled is None:
            compiled = self._compile(function, variant, device)
        if device.index == torch.cuda.current_device():
            compiled[(programs, 1, 1)](*arguments)
        else:
            with torch.cuda.device(device):
                compiled[(programs, 1, 1)](*arguments)

    def _imported(self) -> Any:
        try:
            with _PARSING:
                if self.interpreted:
                    from attncc.runtime.interpreter import InterpretedModule

                    module = InterpretedModule(self.path)
                    found = module.functions
                else:
                    module = import_module(self.path, self.path.stem)
                    found = vars(module)
        except Exception as error:
            if isinstance(error, ImportError) and (error.name or "").startswith("triton"):
                raise BuildError(NoTriton(None, str(error))) from error
            raise BuildError(NotATritonModule(None, self.plan.name, repr(error), str(self.path))) from error
        for function in self.functions:
            check_parameters(function, found.get(function.name))
        return module

    def _interpret(self, function: Function, programs: int, arguments: Sequence[Any], variant: Variant) -> None:
        from attncc.runtime.interpreter import typed

        types = function.signature(variant)
        values = {
            name: typed(argument, types[name]) for name, argument in zip(function.parameters, arguments, strict=True)
        }
        self._module.launch(function.name, programs, values)

    def _compile(self, function: Function, variant: Variant, device: torch.device) -> Any:
        import triton
        from triton.compiler import ASTSource

        if device.type == "cpu":
            raise CallError(NoDevice(None, str(device), self.plan.target.arch))
        names = function.parameters
        divisors = function.divisors(variant, itemsize_of(self.plan))
        source = ASTSource(
            getattr(self._module, function.name),
            function.signature(variant),
            function.constexprs(variant),
            {(names.index(name),): [["tt.divisibility", divisor]] for name, divisor in divisors.items()},
        )
        try:
            with torch.cuda.device(device):
                target = triton.runtime.driver.active.get_current_target()
                compiled = triton.compile(source, target=target, options=function.options)
                _ = compiled.run  # loads it, which fails where the device has too little shared memory
        except Exception as error:
            raise BuildError(TritonCompilationFailed(None, function.label, str(device), str(error))) from error
        self._compiled[function.label, variant] = compiled
        return compiled


def check_target(plan: KernelPlan | CorePlan | SequentialPlan, arch: str) -> None:
    """Raises BuildError where kernels of this plan cannot be compiled for `arch`."""
    if arch not in MACHINES:
        raise BuildError(UnknownArch(None, arch, ", ".join((*MACHINES, "interpret"))))
    products = isinstance(plan, ForwardPlan | BackwardPlan | CorePlan)
    if products and plan.dtype is DType.F64 and arch in WITHOUT_F64:
        raise BuildError(NoDoubles(None, plan.name, arch))


def variant_of(operands: Iterable[Tensor], captured: Iterable[Tensor], streamed: Sequence[Tensor] = ()) -> Variant:
    """What may be taken for granted about these tensors."""
    bits, widest = 0, 0
    for operand in operands:
        bits |= operand.data_ptr()
        if operand.dim() == 4:
            batch, head, row, _ = operand.stride()
            bits |= (batch | head | row) * operand.element_size()
            widest = max(widest, row)
    packed = len(streamed) > 0 and all(operand.stride(2) == operand.shape[3] for operand in streamed)
    unit = tuple(tensor.stride(-1) == 1 for tensor in captured if tensor.dim())
    return Variant(bits % 16 == 0, widest >= _WIDE_STRIDE, packed, unit)


def store(name: str, source: str, folder: Path) -> Path:
    """Writes a generated module under the key of its content, unless it is there whole."""
    content = source.encode()
    path = folder / f"{name}_{hashlib.sha256(content).hexdigest()[:16]}.py"
    try:
        if path.read_bytes() == content:
            return path
    except OSError:
        pass
    write_atomically(path, content)
    return path


def check_parameters(function: Function, found: Any) -> None:
    """Raises BuildError where a module's function is missing or takes other parameters than it is passed."""
    plain = getattr(found, "fn", found)
    code = getattr(plain, "__code__", None)
    names = () if code is None else code.co_varnames[: code.co_argcount]
    if names != function.parameters:
        expected, actual = ", ".join(function.parameters), ", ".join(names) or "nothing of that name"
        raise BuildError(WrongParameters(None, function.name, expected, actual))


def arch_of(device: torch.device) -> str:
    """The planned target nearest to a GPU: same or older generation."""
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def size_arguments(sizes: Sizes, q_offset: int) -> tuple[int, ...]:
    return (sizes.B, sizes.H, sizes.HKV, sizes.M, sizes.N, q_offset)


def captured_arguments(tensors: Iterable[Tensor]) -> list[Any]:
    arguments: list[Any] = []
    for tensor in tensors:
        # An axis of none is clamped to its first element, which has to be there.
        arguments.append(tensor if tensor.numel() else torch.zeros(1, dtype=tensor.dtype, device=tensor.device))
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            arguments += (size, stride)
    return arguments


def _varying(expr: Any) -> tuple[bool, bool]:
    """Whether a value varies with the batch, and with the head."""
    names = variance(expr)
    return "b" in names, "h" in names
