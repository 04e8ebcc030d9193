"""`verify`: property tests on every backend."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from attncc.commands.common import device_of, load, returns_lse
from attncc.commands.output import progress
from attncc.ir.types import DType
from attncc.runtime.cpp_toolchain import ARCHS, native_arch
from attncc.runtime.targets import resolve
from attncc.verify import Report, snippet
from attncc.verify import verify as verify_target


def targets_at_hand() -> list[str]:
    """Everything that this machine can run a kernel on."""
    cpp = [f"cpp:{arch}" for arch in ARCHS[ARCHS.index(native_arch()) :]]
    return [*cpp, *(["triton"] if torch.cuda.is_available() else []), "triton:interpret"]


def verify(arguments: argparse.Namespace) -> int:
    """Each backend in turn: what was tried, and the smallest case that fails."""
    loaded = load(arguments.file, arguments.name, dict(arguments.set))
    attention = loaded.attention
    dtypes = tuple(arguments.dtype or (dtype.value for dtype in (DType.F32, DType.BF16, DType.F16, DType.F64)))
    console = Console(highlight=False)
    failed = False
    for target in arguments.target or targets_at_hand():
        attn = loaded.compiled(target, arguments.templates)
        device = device_of(target, attn.templates)
        resolve(target, torch.device(device), attn.templates)  # A wrong name is no failure of the specification.

        def kernel(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> tuple[Tensor, Tensor | None]:
            q, k, v = (x.to(device) for x in (q, k, v))
            moved: dict[str, Any] = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in keywords.items()}
            if not returns_lse(attention):
                return attn(q, k, v, **moved).cpu(), None
            o, lse = attn(q, k, v, return_lse=True, **moved)
            return o.cpu(), lse.cpu()

        with progress() as bar:
            task = bar.add_task(f"{attention.name} on {target}", total=arguments.examples)
            report = verify_target(
                attention, target, kernel, dtypes=dtypes, examples=arguments.examples, longest=arguments.longest,
                seed=arguments.seed, scalars=loaded.scalars, gradients=not arguments.forward_only,
                tick=lambda: bar.advance(task),
            )  # fmt: skip
        _print_report(console, report)
        if report.failure is not None:
            failed = True
            named = (loaded.path, loaded.name, loaded.constants, arguments.templates)
            program = snippet(report.failure, *named, device=device)
            print(f"\n{report.failure.message}\n\nThe smallest case that fails, as a program:\n\n{program}")
    return 1 if failed else 0


def _print_report(console: Console, report: Report) -> None:
    tried = ", ".join(f"{count} {dtype}" for dtype, count in sorted(report.tried.items())) or "nothing"
    largest = " ".join(f"{name}={size}" for name, size in report.largest.items())
    verdict = "[bold red]FAILED[/]" if report.failure else "[green]ok[/]"
    console.print(f"{report.target:<18} {verdict}  {tried}; sizes up to {largest}", soft_wrap=True)
    for code, reason in report.refused.items():
        console.print(f"{'':<18} refused with {code}: {reason}", markup=False, soft_wrap=True)
