"""Forward and backward, B1 H8 N2048: five variants at D 64 and 128 in f32 and bf16, beside SDPA; memory at N 16,384.

    python benchmarks/backward.py [--threads 1] [--quick] [-o benchmarks/results/backward-cpu.json]

FlexAttention has no backward pass on a CPU: where SDPA cannot express a variant, the eager formula is what is left.
Ratios and shares of the machine's peak are what to read: contenders take turns in one process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

import torch
from forward import HEADS, LENGTH, ROOT, measure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import attncc
from attncc.bench import Result

GRID: dict[str, tuple[str, ...]] = {
    "full": ("sdpa",),
    "causal": ("sdpa",),
    "sliding_window": ("sdpa",),
    "alibi": ("sdpa",),
    "softcap": ("eager",),
}
LONG = (4096, 16_384)  # lengths at which memory is measured


def peak_of_memory() -> int:
    """Bytes. Not `ru_maxrss`, which begins at that of the parent process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def memory(length: int) -> None:
    """Prints bytes of q, k, v, their gradients, o and its gradient, and how far a step raised the peak of memory."""
    attn = attncc.build(ROOT / "examples/causal.attn")

    def step(n: int) -> int:
        q, k, v = (torch.randn(1, HEADS, n, 64, requires_grad=True) for _ in range(3))
        before = peak_of_memory()
        attn(q, k, v).sum().backward()
        return peak_of_memory() - before

    step(256)  # compiles, and starts the threads
    print(json.dumps({"length": length, "added": step(length), "operand": HEADS * length * 64 * 4}))


def memories() -> list[dict[str, int]]:
    """Each length in a process of its own, whose peak of resident memory is read before and after a step."""
    rows = []
    for length in LONG:
        command = [sys.executable, __file__, "--memory", str(length)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return rows


def summary(results: list[Result]) -> Table:
    table = Table(title=f"Forward and backward, B1 N{LENGTH}, {results[0].threads} threads: times faster than")
    for heading in ("", "H", "type", "D", "ms", "SDPA", "eager", "share of peak"):
        table.add_column(heading, justify="right" if heading else "left")
    for result in results:
        own = result.row("attncc")
        ratios = {row.name: f"{row.ratio:.2f}x" for row in result.rows if row.ratio is not None}
        table.add_row(
            result.attention, str(result.shape["H"]), result.dtype, str(result.shape["D"]),
            f"{own.timing.median * 1e3:.2f}", ratios.get("sdpa", ""), ratios.get("eager", ""), f"{own.peak_share:.0%}",
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help="of PyTorch; with 1, processor time is measured")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="D 64 only")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks/results/backward-cpu.json")
    arguments = parser.parse_args()
    if arguments.memory:
        memory(arguments.memory)
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    grid = list(itertools.product(GRID, (64,) if arguments.quick else (64, 128), ("f32", "bf16"), (HEADS,)))
    # One head keeps every core busy too.
    grid += [("causal", 64, dtype, 1) for dtype in ("f32", "bf16")]
    results = [
        measure(variant, width, dtype, heads, against=GRID[variant], repeat=arguments.repeat, backward=True)
        for variant, width, dtype, heads in track(grid, description="backward")
    ]
    Console(width=100).print(summary(results))
    rows = memories()
    for row in rows:
        print(
            f"N = {row['length']:>6,}: a step adds {row['added'] / 2**20:.0f} MiB, where q has "
            f"{row['operand'] / 2**20:.0f} MiB"
        )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"times": [result.as_json() for result in results], "memory": rows}, indent=2)
    arguments.output.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
