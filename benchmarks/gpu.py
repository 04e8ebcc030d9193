"""On a machine with a GPU: the GPU tests, the best tile of each kernel, and the forward grid beside PyTorch.

    python benchmarks/gpu.py [--minutes 9] [--dry-run] [--skip-tests] [-o benchmarks/results/forward-gpu.json]

Stops before --minutes are over and goes on where it stopped: a cell that is in the output is not measured again.
--dry-run does everything but run on a device: it draws the inputs and compiles every kernel ahead of time for sm_90.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import attncc
from attncc.bench import bench, table
from attncc.emit.printers import printer_of
from attncc.emit.render import render
from attncc.ir.types import DType
from attncc.peers import Call
from attncc.plan.build import plan_attention
from attncc.plan.nodes import Program, Specialization, Target
from attncc.plan.triton_tiles import candidates
from attncc.runtime import cache
from attncc.runtime.arguments import DTYPES, TORCH_DTYPES, Signature
from attncc.runtime.programs import TritonProgram
from attncc.runtime.triton import arch_of
from attncc.runtime.triton_aot import compile_ahead
from attncc.timing import alternate

ROOT = Path(__file__).parent.parent
HEADS = 16
TOKENS = 16384  # batch x length of every cell
VARIANTS = ("full", "causal", "sliding_window", "alibi", "softcap", "document")
PEERS = {"full": ("sdpa", "flex"), "causal": ("sdpa", "flex")}

Cell = tuple[str, str, int, int]  # variant, element type, head dimension, length


def grid() -> list[Cell]:
    """What matters most comes first: time may run out."""
    cells = itertools.product((16384, 2048, 512), (128, 64), VARIANTS, ("bf16", "f16"))
    return sorted(((v, t, d, n) for n, d, v, t in cells), key=lambda cell: cell[1] == "f16")


def inputs_of(variant: str, batch: int, length: int, device: str) -> dict[str, Any]:
    """A window of 1024; slopes as published; documents of an eighth of the length."""
    slope = 2.0 ** (-8.0 * torch.arange(1, HEADS + 1, dtype=torch.float32, device=device) / HEADS)
    doc = (torch.arange(length, dtype=torch.int32, device=device) // max(length // 8, 1)).expand(batch, length)
    return {"sliding_window": {"window": 1024}, "alibi": {"slope": slope}, "document": {"doc": doc}}.get(variant, {})


def operands(cell: Cell, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    variant, dtype, width, length = cell
    batch = max(TOKENS // length, 1)
    shape = (batch, HEADS, length, width)
    q, k, v = (torch.randn(shape, dtype=TORCH_DTYPES[DType(dtype)], device=device) for _ in range(3))
    return q, k, v, inputs_of(variant, batch, length, device)


def programs(cell: Cell, inputs: dict[str, Any], arch: str) -> list[tuple[Program, tuple[str, ...]]]:
    """The kernels of a cell, once per tile worth measuring."""
    variant, dtype, width, _ = cell
    tensors = tuple((n, DTYPES[x.dtype]) for n, x in inputs.items() if isinstance(x, torch.Tensor))
    specialization = Specialization(DType(dtype), width, width, tensors)
    attention = attncc.check(ROOT / "examples" / f"{variant}.attn")
    program = plan_attention(attention, specialization, Target("triton", arch))
    result: list[tuple[Program, tuple[str, ...]]] = []
    for tile in candidates(arch, DType(dtype), width, width):
        kernels = tuple(k if k.kernel == "rows" else replace(k, tile=tile) for k in program.kernels)
        tiled = replace(program, kernels=kernels)
        result.append((tiled, tuple(render(k, printer_of(k)) for k in kernels)))
    return result


def tune(cell: Cell, arch: str, seconds: float) -> list[dict[str, Any]]:
    """Milliseconds of each tile, the fastest first; those that do not compile are left out with their reason."""
    q, k, v, inputs = operands(cell, "cuda")
    attn = attncc.build(ROOT / "examples" / f"{cell[0]}.attn")
    bound = Signature(attn.attention).bind(q, k, v, None, inputs)
    rows: list[dict[str, Any]] = []
    until = time.monotonic() + seconds
    for program, sources in programs(cell, inputs, arch):
        if time.monotonic() > until and rows:
            break
        row: dict[str, Any] = {"tile": str(program.forward.tile)}
        try:
            compiled = TritonProgram(program, sources, "", cache.folder())

            def run(compiled: TritonProgram = compiled) -> None:
                compiled.run(q, k, v, bound, return_lse=False)
                torch.cuda.synchronize()

            row["ms"] = alternate({"tile": run}, 5)["tile"].median * 1e3
        except attncc.AttnError as error:
            row["refused"] = str(error).splitlines()[0]
        rows.append(row)
    return sorted(rows, key=lambda row: row.get("ms", float("inf")))


def measure(cell: Cell) -> dict[str, Any]:
    """A cell beside its peers."""
    q, k, v, inputs = operands(cell, "cuda")
    attn = attncc.build(ROOT / "examples" / f"{cell[0]}.attn")
    against = PEERS.get(cell[0], ("flex",))
    with torch.no_grad():
        result = bench(
            attn.attention, lambda: attn(q, k, v, **inputs), Call(q, k, v, inputs), against=against, repeat=7
        )
    Console(width=110).print(table(result))
    return result.as_json()


def rehearse() -> None:
    """Everything that needs no device, for sm_90."""
    for cell in [(variant, "bf16", width, 512) for variant in VARIANTS for width in (64, 128)]:
        *_, inputs = operands(cell, "cpu")
        tiles = programs(cell, inputs, "sm_90")
        program, sources = tiles[0]
        for plan, source in zip(program.kernels, sources, strict=True):
            for function, resources in compile_ahead(plan, source, "sm_90").items():
                print(f"{cell[0]} D{cell[2]} {function}: {resources}")
        print(f"{cell[0]} D{cell[2]}: {len(tiles)} tiles to measure")
    print(f"{len(grid())} cells to measure")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks/results/forward-gpu.json")
    arguments = parser.parse_args()
    if arguments.dry_run:
        rehearse()
        return 0
    if not torch.cuda.is_available():
        print("there is no GPU here; --dry-run does what needs none", file=sys.stderr)
        return 1
    until = time.monotonic() + 60 * arguments.minutes
    done: dict[str, Any] = {"tests": None, "tiles": {}, "cells": {}}
    if arguments.output.exists():
        done = json.loads(arguments.output.read_text(encoding="utf-8"))

    def save() -> None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")

    done["machine"] = torch.cuda.get_device_name()
    done["torch"] = torch.__version__
    if not arguments.skip_tests and done["tests"] != "passed":
        # A third of the time, so that a test that hangs does not take it all.
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", str(ROOT / "tests")]
        try:
            status = subprocess.run(command, check=False, cwd=ROOT, timeout=20 * arguments.minutes).returncode
            done["tests"] = "passed" if status == 0 else f"pytest ended with {status}"
        except subprocess.TimeoutExpired:
            done["tests"] = "ran out of time"
        save()
    arch = arch_of(torch.device("cuda"))
    for cell in grid():
        key = " ".join(map(str, cell))
        if time.monotonic() > until:
            print(f"out of time; run it again to go on at {key}")
            break
        if key in done["cells"]:
            continue
        if cell[3] == TOKENS and cell[1] == "bf16":
            done["tiles"][key] = tune(cell, arch, 30.0)
        done["cells"][key] = measure(cell)
        save()
    print(f"wrote {arguments.output}")
    return 0 if done["tests"] in ("passed", None) else 1


if __name__ == "__main__":
    sys.exit(main())
