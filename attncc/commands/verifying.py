"""`verify`: property tests on every backend."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from attncc.commands.common import device_of, load, returns_lse
from attncc.commands.output import progress
from attncc.ir.types import DType
from attncc.runtime.call import CompiledAttention
from attncc.runtime.cpp_toolchain import ARCHS, native_arch
from attncc.runtime.recurrent import RecurrentAttention
from attncc.runtime.targets import resolve
from attncc.verify import Report, snippet
from attncc.verify import verify as verify_target
from attncc.verify_recurrent import recurrent_snippet, verify_recurrent


def targets_at_hand() -> list[str]:
    """Everything that this machine can run a kernel on."""
    cpp = [f"cpp:{arch}" for arch in ARCHS[ARCHS.index(native_arch()) :]]
    return [*cpp, *(["triton"] if torch.cuda.is_available() else []), "triton:interpret"]


def verify(arguments: argparse.Namespace) -> int:
    """Each backend in turn: what was tried, and the smallest case that fails."""
    loaded = load(arguments.file, arguments.name, dict(arguments.set))
    dtypes = tuple(arguments.dtype or (dtype.value for dtype in (DType.F32, DType.BF16, DType.F16, DType.F64)))
    console = Console(highlight=False)
    failed = False
    for target in arguments.target or targets_at_hand():
        attn = loaded.built(target, arguments.templates)
        device = device_of(target, attn.templates)
        resolve(target, torch.device(device), attn.templates)  # A wrong name is no failure of the specification.
        with progress() as bar:
            task = bar.add_task(f"{loaded.attention.name} on {target}", total=arguments.examples)
            options: dict[str, Any] = {
                "dtypes": dtypes,
                "examples": arguments.examples,
                "longest": arguments.longest,
                "seed": arguments.seed,
                "scalars": loaded.scalars,
                "gradients": not arguments.forward_only,
                "tick": lambda: bar.advance(task),
            }
            if isinstance(attn, RecurrentAttention):
                report = verify_recurrent(attn.attention, target, _recurrent_on(device, attn), **options)
            else:
                report = verify_target(attn.attention, target, _pairwise_on(device, attn), **options)
        _print_report(console, report)
        if report.failure is not None:
            failed = True
            named = (loaded.path, loaded.name, loaded.constants, arguments.templates)
            program = (recurrent_snippet if isinstance(attn, RecurrentAttention) else snippet)(
                report.failure, *named, device=device
            )
            print(f"\n{report.failure.message}\n\nThe smallest case that fails, as a program:\n\n{program}")
    return 1 if failed else 0


def _pairwise_on(device: str, attn: CompiledAttention) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def kernel(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> tuple[Tensor, Tensor | None]:
        moved = _moved({"q": q, "k": k, "v": v, **keywords}, device)
        if not returns_lse(attn.attention):
            return attn(**moved).cpu(), None
        o, lse = attn(return_lse=True, **moved)
        return o.cpu(), lse.cpu()

    return kernel


def _recurrent_on(device: str, attn: RecurrentAttention) -> Callable[..., tuple[Tensor, Tensor]]:
    def kernel(**arguments: Any) -> tuple[Tensor, Tensor]:
        o, state = attn(return_state=True, **_moved(arguments, device))
        return o.cpu(), state.cpu()

    return kernel


def _moved(arguments: Mapping[str, Any], device: str) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}


def _print_report(console: Console, report: Report) -> None:
    tried = ", ".join(f"{count} {dtype}" for dtype, count in sorted(report.tried.items())) or "nothing"
    largest = " ".join(f"{name}={size}" for name, size in report.largest.items())
    verdict = "[bold red]FAILED[/]" if report.failure else "[green]ok[/]"
    console.print(f"{report.target:<18} {verdict}  {tried}; sizes up to {largest}", soft_wrap=True)
    for code, reason in report.refused.items():
        console.print(f"{'':<18} refused with {code}: {reason}", markup=False, soft_wrap=True)
