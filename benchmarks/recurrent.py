"""Recurrences on this machine: chunked forward and backward, lengths, one step, two threads, softmax beside them.

    python benchmarks/recurrent.py [--threads 1] [--quick] [--only forward ...] [-o FILE]

B1 H8 N8192 at D 64 and 128, f32 and bf16, beside PyTorch's chunks at the best of some settings, its loop over tokens,
and SDPA. By default one thread's processor time is measured, which other work on the machine does not stretch. Times
are of whole calls, in turn. Shares of the peak are those of the compiled kernels, in calls that had the core to
themselves: how quick its registers and caches are is measured before and after each. recurrent_cases.py says what is
counted. Tensors lie in large pages, and memory is kept, for all alike; recurrent_memory.py says how much quicker than
PyTorch's chunks kernels are without that.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch asks for it before its first tensor

import recurrent_memory as memory
import recurrent_peers as peers
import recurrent_scaling as scaling
import torch
from recurrent_cases import (
    DTYPES,
    HEADS,
    LENGTH,
    LIMIT,
    ROOT,
    VARIANTS,
    Best,
    Case,
    KernelTime,
    Sample,
    chunk_of,
    keep_memory,
    large_pages,
    operations,
    quietest_core,
    until_undisturbed,
    with_gradients,
)
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

from attncc.bench import machine
from attncc.timing import Timing, alternate

UNDISTURBED = 9  # calls that had the core to themselves
BACKWARD = ("mamba2", "gla", "gated_deltanet")
CONTENDERS = {"chunked": "PyTorch, chunks", "token_loop": "PyTorch, tokens", "sdpa": "SDPA causal"}


class Cell:
    """An example at a type and width beside PyTorch's chunks and, forward, its loop over tokens; and beside SDPA, which
    takes long: backward it is measured beside the first example only, since it takes the same for all."""

    def __init__(self, variant: str, width: int, dtype: str, backward: bool, softmax: bool) -> None:
        self.case = case = Case.draw(variant, dtype, 1, HEADS, LENGTH, width, gradients=backward)

        def run(function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
            return with_gradients(function, case.leaves) if backward else function

        setting = peers.quickest(lambda setting: run(lambda: case.chunked(setting))(), DTYPES[dtype])
        case.check(setting)
        self.about = {
            "attention": variant, "dtype": dtype, "D": width, "chunk": chunk_of(case, backward),
            "peer": {"chunk": setting[0], "products": str(setting[1]).removeprefix("torch.")},
        }  # fmt: skip
        self.operations = operations(variant, backward, chunk_of(case, backward), width, width) * HEADS * LENGTH
        # Kernels that follow the forward one are of the backward pass.
        self.own = KernelTime(run(case.call), DTYPES[dtype], first=1 if backward else 0)
        self.contenders: dict[str, Callable[[], object]] = {"chunked": run(lambda: case.chunked(setting))}
        if not backward:
            self.contenders["token_loop"] = case.token_loop
        if softmax:
            self.contenders["sdpa"] = run(case.sdpa)

    def row(self, others: dict[str, Timing], beside: list[Sample], best: Best) -> dict[str, Any]:
        """others: what contenders took. beside: calls in turn with them. best: speeds of the core."""
        total, least = statistics.median(x.call for x in beside), min(x.call for x in beside)
        alone = self.own.undisturbed(best)
        samples = alone or self.own.samples
        kernel, (peak, _) = statistics.median(x.kernels for x in samples), best[self.own.dtype]
        return self.about | {
            "milliseconds": total * 1e3,
            "undisturbed": len(alone),
            "kernel_milliseconds": kernel * 1e3,
            "peak_gflops": peak / 1e9,
            "peak_share": self.operations / kernel / peak,
            "ratios": {name: timing.median / total for name, timing in others.items()},
            "ratios_at_best": {name: timing.best / least for name, timing in others.items()},
        }


def table(rows: list[dict[str, Any]], backward: bool) -> Table:
    what = "Forward and backward" if backward else "Forward"
    out = Table(title=f"{what}, B1 H{HEADS} N{LENGTH}: times faster than")
    names = [name for name in CONTENDERS if name in rows[0]["ratios"]]
    kernels = f"ms of {'the backward kernel' if backward else 'its kernel'}"
    contenders = (CONTENDERS[name] for name in names)
    for heading in ("", "type", "D", "ms", *contenders, kernels, "share of peak"):
        out.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        out.add_row(
            row["attention"], row["dtype"], str(row["D"]), f"{row['milliseconds']:.1f}",
            *(f"{row['ratios'][name]:.1f}x" for name in names),
            f"{row['kernel_milliseconds']:.1f}", f"{row['peak_share']:.0%}",
        )  # fmt: skip
    return out


def grid(backward: bool, quick: bool, repeat: int) -> list[dict[str, Any]]:
    """All cells take their turns together, and each has the machine's good and bad minutes alike."""
    name, variants = ("backward", BACKWARD) if backward else ("forward", tuple(VARIANTS))
    drawn = list(itertools.product(variants, (64,) if quick else (64, 128), DTYPES))
    cells = [
        Cell(*drawn_cell, backward, softmax=not backward or drawn_cell[0] == variants[0])
        for drawn_cell in track(drawn, description=f"{name}: settings of PyTorch")
    ]
    turns: dict[str, Callable[[], object]] = {}
    for i, cell in enumerate(cells):
        for contender, function in cell.contenders.items():
            turns |= {f"{i} {contender}": function, f"{i} {contender}, own": cell.own}
    with Progress() as progress:
        task = progress.add_task(name, total=repeat * len(turns))
        timings = alternate(turns, repeat, warmup=1, tick=lambda _: progress.advance(task))
    beside = [cell.own.samples[-repeat * len(cell.contenders) :] for cell in cells]
    best = until_undisturbed([cell.own for cell in cells], UNDISTURBED, LIMIT, name)
    softmax = {drawn[i][1:]: timings[f"{i} sdpa"] for i, cell in enumerate(cells) if drawn[i][0] == variants[0]}
    rows = []
    for i, cell in enumerate(cells):
        others = {contender: timings[f"{i} {contender}"] for contender in cell.contenders}
        rows.append(cell.row({"sdpa": softmax[drawn[i][1:]], **others}, beside[i], best))
    Console(width=120).print(table(rows, backward))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; with 1, processor time is measured")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="D 64 only, lengths up to 16,384")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/crossover.png")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks/results/recurrent-cpu.json")
    sections: dict[str, Callable[[argparse.Namespace], Any]] = {
        "forward": lambda given: grid(False, given.quick, given.repeat),
        "backward": lambda given: grid(True, given.quick, given.repeat),
        "memory_as_it_comes": lambda given: memory.in_a_process_of_its_own(given.quick, given.repeat),
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
    results = {
        "machine": machine(), "torch_version": torch.__version__, "threads": arguments.threads,
        "large_pages": large_pages(), **{name: kept[name] for name in sections if name in kept},
    }  # fmt: skip
    for name in arguments.only:
        with contextlib.nullcontext() if name == "two_threads" else quietest_core():
            results[name] = sections[name](arguments)
        # After each section: the later ones take minutes.
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
