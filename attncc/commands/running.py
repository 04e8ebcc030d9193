"""`run`: one call."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from attncc.commands.common import call_arguments, device_of, load, returns_lse, save_tensors
from attncc.ir.types import DType
from attncc.runtime.arguments import TORCH_DTYPES
from attncc.runtime.recurrent import RecurrentAttention
from attncc.timing import Timing, alternate

# Pairs up to which the result is compared with the reference, and how many of them a token of a recurrence counts as.
_SMALL, _TOKEN = 2**22, 2**8
# Seconds and calls that a time is taken from, about.
_SECONDS, _CALLS = 0.5, 20


def run(arguments: argparse.Namespace) -> int:
    """One call: shapes, time, and the error against the reference where that is quick to compute."""
    loaded = load(arguments.file, arguments.name, dict(arguments.set))
    attn = loaded.built(arguments.target, arguments.templates)
    device = device_of(arguments.target, attn.templates)
    q, k, v, inputs = call_arguments(loaded, arguments, TORCH_DTYPES[DType(arguments.dtype)], device)
    results: dict[str, Tensor] = {}
    if isinstance(attn, RecurrentAttention):
        results["o"], results["state"] = attn(q, k, v, return_state=True, **inputs)
    elif returns_lse(loaded.attention):
        results["o"], results["lse"] = attn(q, k, v, return_lse=True, **inputs)
    else:
        results["o"] = attn(q, k, v, **inputs)
    for name, value in {"q": q, "k": k, "v": v, **inputs, **results}.items():
        _print(name, _describe(value))
    timing = _time(lambda: attn(q, k, v, **inputs), q.device)
    calls = f"{timing.samples} call{'s' if timing.samples > 1 else ''}"
    disturbed = "" if timing.undisturbed else ", disturbed by other work on the machine"
    _print("time", f"{1e3 * timing.median:.3f} ms, median of {calls}{disturbed}")
    # The reference of a recurrence takes one token after the other.
    size = q.shape[2] * _TOKEN if isinstance(attn, RecurrentAttention) else q.shape[2] * k.shape[2]
    if q.shape[0] * q.shape[1] * size <= _SMALL:
        exact = attn.reference(q, k, v, **inputs)
        o = results["o"]
        error = (o.double() - exact).abs().max().item() if o.numel() else 0.0
        _print("error", f"{error:.2e} at most, against the float64 reference")
    else:
        limit = f"{_SMALL // _TOKEN} tokens" if isinstance(attn, RecurrentAttention) else f"{_SMALL} pairs"
        _print("error", f"not computed above {limit}; `attncc verify` compares smaller calls")
    if arguments.output is not None:
        save_tensors(arguments.output, results)
    return 0


def _time(function: Callable[[], object], device: torch.device) -> Timing:
    """Of calls after the first one, which compiles."""

    def finished() -> None:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    start = time.perf_counter()
    finished()
    seconds = time.perf_counter() - start
    repeat = max(1, min(_CALLS, int(_SECONDS / max(seconds, 1e-9))))
    return alternate({"": finished}, repeat, warmup=0)[""]


def _print(name: str, text: str) -> None:
    print(f"{name:<10} {text}")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return str(value)
