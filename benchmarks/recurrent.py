"""Recurrences on this machine: chunked forward and backward, lengths, one step, two threads, softmax beside them.

    python benchmarks/recurrent.py [--threads 1] [--quick] [--only forward ...] [-o FILE]

B1 H8 N8192 at D 64 and 128, f32 and bf16, beside PyTorch's chunks at the best of some settings, its loop over tokens,
and SDPA. By default one thread's processor time is measured, which other work on the machine does not stretch. Times
are of whole calls. Shares of the peak are those of the compiled kernels; the peak is measured in turns with them, since
clocks vary. recurrent_cases.py says what is counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import recurrent_peers as peers
import recurrent_scaling as scaling
import torch
from recurrent_cases import DTYPES, ROOT, VARIANTS, Case, KernelTime, chunk_of, keep_memory, operations, with_gradients
from rich.console import Console
from rich.progress import track
from rich.table import Table

from attncc.bench import machine
from attncc.peak import current_peak, peak
from attncc.runtime.cpp_toolchain import find_compiler
from attncc.timing import alternate

HEADS, LENGTH = 8, 8192
BACKWARD = ("mamba2", "gla", "gated_deltanet")
CONTENDERS = {"chunked": "PyTorch, chunks", "token_loop": "PyTorch, tokens", "sdpa": "SDPA causal"}


def measure(
    variant: str, width: int, dtype: str, repeat: int, backward: bool, softmax: dict[Any, float]
) -> dict[str, Any]:
    """An example beside PyTorch's chunks, SDPA and, forward, its loop over tokens.

    softmax: what SDPA took, which is the same for all examples, and measured beside the first one.
    """
    case = Case.draw(variant, dtype, 1, HEADS, LENGTH, width, gradients=backward)

    def run(function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        return with_gradients(function, case.leaves) if backward else function

    setting = peers.quickest(lambda setting: run(lambda: case.chunked(setting))(), DTYPES[dtype])
    case.check(setting)
    own = KernelTime(run(case.call))
    functions: dict[str, Callable[[], object]] = {"attncc": own, "chunked": run(lambda: case.chunked(setting))}
    if not backward:
        functions["token_loop"] = case.token_loop
    same = width, dtype
    if same not in softmax:
        functions["sdpa"] = run(case.sdpa)
    compiler, rates = find_compiler().command[0], list[float]()
    functions["peak"] = lambda: rates.append(current_peak(DTYPES[dtype], compiler))
    seconds = {name: timing.median for name, timing in alternate(functions, repeat, warmup=1).items()}
    del seconds["peak"]
    if "sdpa" in seconds:
        softmax[same] = seconds["sdpa"]
    # Kernels that follow the forward one are of the backward pass.
    kernel = own.median(repeat, first=1 if backward else 0)
    count = operations(variant, backward, chunk_of(case, backward), width, width) * HEADS * LENGTH
    now = statistics.median(rates[-repeat:])
    total = seconds.pop("attncc")
    return {
        "attention": variant,
        "dtype": dtype,
        "D": width,
        "milliseconds": total * 1e3,
        "kernel_milliseconds": kernel * 1e3,
        "peak_share": count / kernel / now,
        "peak_gflops": now / 1e9,
        "best_peak_gflops": max(peak(DTYPES[dtype], compiler), *rates) / 1e9,
        "chunk": chunk_of(case, backward),
        "peer": {"chunk": setting[0], "products": str(setting[1]).removeprefix("torch.")},
        "ratios": {name: taken / total for name, taken in {**seconds, "sdpa": softmax[same]}.items()},
    }


def table(rows: list[dict[str, Any]], backward: bool) -> Table:
    what = "Forward and backward" if backward else "Forward"
    out = Table(title=f"{what}, B1 H{HEADS} N{LENGTH}: times faster than")
    names = [name for name in CONTENDERS if name in rows[0]["ratios"]]
    kernels = f"ms of {'the backward kernel' if backward else 'its kernel'}"
    for heading in ("", "type", "D", "ms", *(CONTENDERS[name] for name in names), kernels, "share of peak"):
        out.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        out.add_row(
            row["attention"], row["dtype"], str(row["D"]), f"{row['milliseconds']:.1f}",
            *(f"{row['ratios'][name]:.1f}x" for name in names),
            f"{row['kernel_milliseconds']:.1f}", f"{row['peak_share']:.0%}",
        )  # fmt: skip
    return out


def grid(backward: bool, quick: bool, repeat: int) -> list[dict[str, Any]]:
    variants = BACKWARD if backward else tuple(VARIANTS)
    cells = list(itertools.product(variants, (64,) if quick else (64, 128), DTYPES))
    name = "backward" if backward else "forward"
    softmax: dict[Any, float] = {}
    rows = [measure(*cell, repeat, backward, softmax) for cell in track(cells, description=name)]
    Console(width=110).print(table(rows, backward))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; with 1, processor time is measured")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="D 64 only, lengths up to 16,384")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/crossover.png")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks/results/recurrent-cpu.json")
    sections: dict[str, Callable[[argparse.Namespace], Any]] = {
        "forward": lambda given: grid(False, given.quick, given.repeat),
        "backward": lambda given: grid(True, given.quick, given.repeat),
        "lengths": lambda given: scaling.lengths(given.quick, given.repeat),
        "step": lambda given: scaling.steps(given.quick, given.repeat),
        "two_threads": lambda given: scaling.two_threads(given.repeat),
        "crossover": lambda given: scaling.crossover(given.quick, given.repeat, given.picture),
    }
    parser.add_argument("--only", nargs="+", choices=sections, default=tuple(sections), help="other figures stay")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_memory()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {}
    about = {"machine": machine(), "torch_version": torch.__version__, "threads": arguments.threads}
    results = {**about, **{name: kept[name] for name in sections if name in kept}}
    for name in arguments.only:
        results[name] = sections[name](arguments)
        # After each section: the later ones take minutes.
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
