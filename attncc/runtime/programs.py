"""Compiled programs: all kernels of one specialization behind one function.

    program.run(q, k, v, bound, return_total) -> (o, total or None)

total (B, H, M) is what each row of weights was divided by: its log, lse, for softmax, itself for `normalize = sum`.

`run` trusts its arguments (`attncc.runtime.arguments` has bound them); it only makes last axes contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from attncc.diagnostics import BuildError
from attncc.emit.errors import BrokenLauncher
from attncc.plan.nodes import GROUP_SIZE, Program
from attncc.runtime.arguments import Bound, Sizes
from attncc.runtime.cpp import compile_kernel as compile_cpp
from attncc.runtime.triton import NO_TABLES, ForwardKernel, RowsKernel, TilesKernel
from attncc.runtime.triton import compile_kernel as compile_triton

# o, total, and where the plan has them the greatest score and the entropy of each row.
Result = tuple[Tensor, Tensor | None, *tuple[Tensor, ...]]


class CompiledProgram(Protocol):
    """What every backend makes of a program."""

    def run(self, q: Tensor, k: Tensor, v: Tensor, bound: Bound, return_total: bool) -> Result: ...


def compile_program(program: Program, sources: Sequence[str], launcher: str, folder: Path) -> CompiledProgram:
    """Compiles the sources of a program, or finds them compiled in `folder`. Raises BuildError where that fails."""
    return {"cpp": CppProgram, "triton": TritonProgram}[program.target.backend](program, sources, launcher, folder)


class CppProgram:
    """Shared libraries, launched by the generated module that `launcher` is the source of."""

    def __init__(self, program: Program, sources: Sequence[str], launcher: str, folder: Path) -> None:
        kernels = [compile_cpp(plan, source, folder) for plan, source in zip(program.kernels, sources, strict=True)]
        self._launch = tuple(kernel.launch_packed for kernel in kernels)
        self._run = _run_of(launcher, f"{program.spec.name}_run")

    def run(self, q: Tensor, k: Tensor, v: Tensor, bound: Bound, return_total: bool) -> Result:
        q, k, v = contiguous(q), contiguous(k), contiguous(v)
        return self._run(self._launch, q, k, v, bound.inputs, bound.q_offset, return_total)


def _run_of(launcher: str, name: str) -> Callable[..., Result]:
    """The function `run` of a generated module. Raises BuildError where it has none."""
    module: dict[str, Any] = {}
    try:
        exec(compile(launcher, f"<{name}>", "exec"), module)  # noqa: S102 - a launcher from a template
    except Exception as error:
        raise BuildError(BrokenLauncher(None, name, f"{type(error).__name__}: {error}")) from error
    if not callable(module.get("run")):
        raise BuildError(BrokenLauncher(None, name, "it has no function `run`"))
    return module["run"]


class TritonProgram:
    """Generated Triton modules, launched directly."""

    def __init__(self, program: Program, sources: Sequence[str], launcher: str, folder: Path) -> None:
        del launcher  # That of a standalone file: within attncc kernels are launched with less overhead.
        self._program = program
        self._kernels = [compile_triton(p, s, folder) for p, s in zip(program.kernels, sources, strict=True)]

    def run(self, q: Tensor, k: Tensor, v: Tensor, bound: Bound, return_total: bool) -> Result:
        sizes, forward = bound.sizes, self._program.forward
        o = torch.empty((sizes.B, sizes.H, sizes.M, sizes.E), dtype=q.dtype, device=q.device)
        lse = None
        if forward.normalizer != "none":
            dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
            lse = torch.empty((sizes.B, sizes.H, sizes.M), dtype=dtype, device=q.device)
        statistics: tuple[Tensor, ...] = ()
        if forward.statistics:
            assert lse is not None
            statistics = torch.empty_like(lse), torch.empty_like(lse)
        if not o.numel():
            return o, lse if return_total else None, *statistics
        operands = {"q": contiguous(q), "k": contiguous(k), "v": contiguous(v)}
        tensors, scalars = bound.tensors, bound.scalars | {GROUP_SIZE: sizes.H // sizes.HKV}
        inner = sizes
        if self._program.operand_heads == "H":
            inner = Sizes(sizes.B, sizes.H, sizes.H, sizes.M, sizes.N, sizes.D, sizes.E)
        tables = NO_TABLES
        for kernel in self._kernels:
            match kernel:
                case RowsKernel(plan=plan):
                    x = operands[plan.row]
                    heads = sizes.H if plan.heads == "H" else sizes.HKV
                    out = torch.empty((sizes.B, heads, x.shape[2], plan.width), dtype=q.dtype, device=q.device)
                    kernel.launch(x, out, sizes, bound.q_offset, tensors, scalars)
                    operands[plan.row] = out
                case TilesKernel():
                    tables = kernel.launch(inner, bound.q_offset, tensors, scalars, q.device)
                case ForwardKernel():
                    kernel.launch(
                        operands["q"],
                        operands["k"],
                        operands["v"],
                        o,
                        lse,
                        inner,
                        bound.q_offset,
                        tensors,
                        scalars,
                        tables,
                        statistics,
                    )
        return o, lse if return_total else None, *statistics


def contiguous(x: Tensor) -> Tensor:
    """`x` with a contiguous last axis, and in memory what it says: itself, unless it has none or is a lazy negation."""
    if x.is_neg():
        x = x.resolve_neg()
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
