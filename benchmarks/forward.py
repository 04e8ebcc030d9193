"""Forward, B1 H8 N2048: six variants at D 64 and 128 in f32 and bf16, beside SDPA and FlexAttention.

    python benchmarks/forward.py [--threads 1] [--quick] [-o benchmarks/results/forward-cpu.json]

Ratios and shares of the machine's peak are what to read: contenders take turns in one process.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import attncc
from attncc.bench import Result, bench
from attncc.ir.types import DType
from attncc.peers import Call
from attncc.runtime.arguments import TORCH_DTYPES
from attncc.runtime.cpp_toolchain import find_compiler

ROOT = Path(__file__).parent.parent
HEADS, LENGTH = 8, 2048
DOCUMENTS = 256  # tokens each


def inputs_of(variant: str) -> dict[str, Any]:
    """Slopes as published; documents of 256 tokens; a window of 256."""
    slope = 2.0 ** (-8.0 * torch.arange(1, HEADS + 1, dtype=torch.float32) / HEADS)
    doc = (torch.arange(LENGTH, dtype=torch.int32) // DOCUMENTS)[None]
    return {"sliding_window": {"window": 256}, "alibi": {"slope": slope}, "document": {"doc": doc}}.get(variant, {})


# Peers that say something about a variant: SDPA for what it can do itself, FlexAttention for masks and scores.
GRID: dict[str, tuple[str, ...]] = {
    "full": ("sdpa", "flex"),
    "causal": ("sdpa", "flex"),
    "sliding_window": ("flex",),
    "document": ("flex",),
    "alibi": ("flex",),
    "softcap": ("flex",),
}


def measure(
    variant: str,
    width: int,
    dtype: str,
    heads: int = HEADS,
    *,
    against: Sequence[str],
    repeat: int,
    backward: bool = False,
) -> Result:
    """A variant beside the peers in `against`; backward: with the gradients of q, k and v."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, heads, LENGTH, width)
    q, k, v = (torch.randn(shape, generator=generator).to(TORCH_DTYPES[DType(dtype)]) for _ in range(3))
    for x in (q, k, v):
        x.requires_grad_(backward)
    inputs = inputs_of(variant)
    attn = attncc.build(ROOT / "examples" / f"{variant}.attn")
    return bench(
        attn.attention,
        lambda: attn(q, k, v, **inputs),
        Call(q, k, v, inputs),
        against=against,
        repeat=repeat,
        backward=backward,
        compiler=find_compiler().command[0],
    )


def summary(results: list[Result]) -> Table:
    table = Table(title=f"Forward, B1 H{HEADS} N{LENGTH}, {results[0].threads} threads: times faster than")
    for heading in ("", "type", "D", "ms", "SDPA", "Flex", "share of peak"):
        table.add_column(heading, justify="right" if heading else "left")
    for result in results:
        own = result.row("attncc")
        ratios = {row.name: f"{row.ratio:.2f}x" for row in result.rows if row.ratio is not None}
        table.add_row(
            result.attention, result.dtype, str(result.shape["D"]), f"{own.timing.median * 1e3:.2f}",
            ratios.get("sdpa", ""), ratios.get("flex", ""), f"{own.peak_share:.0%}",
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="of PyTorch; with 1, processor time is measured")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="D 64 only")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks/results/forward-cpu.json")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    grid = list(itertools.product(GRID, (64,) if arguments.quick else (64, 128), ("f32", "bf16")))
    results = [
        measure(variant, width, dtype, against=GRID[variant], repeat=arguments.repeat)
        for variant, width, dtype in track(grid, description="forward")
    ]
    Console(width=100).print(summary(results))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps([result.as_json() for result in results], indent=2) + "\n", encoding="utf-8")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
