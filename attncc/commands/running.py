"""`run`, `verify` and `bench`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from attncc.bench import PEERS, Result, table
from attncc.bench import bench as compare
from attncc.commands.common import call_arguments, device_of, load, save_tensors
from attncc.commands.output import progress, say, write
from attncc.diagnostics import CallError
from attncc.errors import UnknownPeer
from attncc.ir.types import DType
from attncc.peers import Call
from attncc.runtime.arguments import TORCH_DTYPES
from attncc.runtime.cpp_toolchain import ARCHS, find_compiler, native_arch
from attncc.runtime.targets import resolve
from attncc.verify import Report, returns_lse, snippet
from attncc.verify import verify as verify_target

# Pairs up to which `run` compares with the reference unasked.
_SMALL = 2**22


def run(arguments: argparse.Namespace) -> int:
    """One call: shapes, time, and the error against the reference where that is quick to compute."""
    loaded = load(arguments.file, arguments.name, dict(arguments.set))
    attn = loaded.compiled(arguments.target, arguments.templates)
    device = device_of(arguments.target)
    q, k, v, inputs = call_arguments(loaded, arguments, TORCH_DTYPES[DType(arguments.dtype)], device)
    lse: Tensor | None = None
    if returns_lse(loaded.attention):
        o, lse = attn(q, k, v, return_lse=True, **inputs)
    else:
        o = attn(q, k, v, **inputs)
    for name, value in {"q": q, "k": k, "v": v, **inputs, "o": o, "lse": lse}.items():
        if value is not None:
            print(f"{name:<10} {_describe(value)}")
    milliseconds = [1e3 * seconds for seconds in _times(lambda: attn(q, k, v, **inputs), q.device)]
    print(f"{'time':<10} {sorted(milliseconds)[len(milliseconds) // 2]:.3f} ms, median of {len(milliseconds)} calls")
    if q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= _SMALL:
        exact = attn.reference(q, k, v, **inputs)
        error = (o.double() - exact).abs().max().item() if o.numel() else 0.0
        print(f"{'error':<10} {error:.2e} at most, against the float64 reference")
    if arguments.output is not None:
        save_tensors(arguments.output, {"o": o} if lse is None else {"o": o, "lse": lse})
    return 0


def _times(function: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of up to twenty calls, half a second in all."""
    seconds: list[float] = []
    while len(seconds) < 20 and sum(seconds) < 0.5:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return str(value)


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
        device = device_of(target)
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
                seed=arguments.seed, tick=lambda: bar.advance(task),
            )  # fmt: skip
        _print_report(console, report)
        if report.failure is not None:
            failed = True
            program = snippet(report.failure, loaded.path, loaded.name, loaded.constants)
            print(f"\n{report.failure.message}\n\nThe smallest case that fails, as a program:\n\n{program}")
    return 1 if failed else 0


def _print_report(console: Console, report: Report) -> None:
    tried = ", ".join(f"{count} {dtype}" for dtype, count in sorted(report.tried.items())) or "nothing"
    largest = " ".join(f"{name}={size}" for name, size in report.largest.items())
    verdict = "[bold red]FAILED[/]" if report.failure else "[green]ok[/]"
    console.print(f"{report.target:<18} {verdict}  {tried}; sizes up to {largest}", soft_wrap=True)
    for code, reason in report.refused.items():
        console.print(f"{'':<18} refused with {code}: {reason}", markup=False, soft_wrap=True)


def bench(arguments: argparse.Namespace) -> int:
    """A table per type, and all figures as JSON on request."""
    against = [name for name in arguments.against.split(",") if name]
    unknown = [name for name in against if name not in PEERS]
    if unknown:
        raise CallError(*(UnknownPeer(None, name, ", ".join(PEERS)) for name in unknown))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    loaded = load(arguments.file, arguments.name, dict(arguments.set))
    attn = loaded.compiled(arguments.target, arguments.templates)
    device = device_of(arguments.target)
    to_stdout = str(arguments.json) == "-"
    results: list[Result] = []
    for dtype in arguments.dtype or ("f32", "bf16"):
        q, k, v, inputs = call_arguments(loaded, arguments, TORCH_DTYPES[DType(dtype)], device)
        with progress() as bar:
            task = bar.add_task("", total=None)
            result = compare(
                loaded.attention,
                lambda: attn(q, k, v, **inputs),
                Call(q, k, v, inputs),
                against=against,
                repeat=arguments.repeat,
                compiler=find_compiler().command[0] if device == "cpu" else None,
                tick=lambda name: bar.update(task, description=f"{loaded.attention.name}, {dtype}: {name}"),
            )
        results.append(result)
        if not to_stdout:
            Console(width=None if sys.stdout.isatty() else 110).print(table(result))
    if arguments.json is not None:
        text = json.dumps([result.as_json() for result in results], indent=2) + "\n"
        if to_stdout:
            print(text, end="")
        else:
            write(arguments.json, text)
            say(f"wrote {arguments.json}")
    return 0
