"""Recurrences beside PyTorch's chunks, with memory as PyTorch has it unless told otherwise.

Every large tensor is then new to the system, which clears its pages of 4 KiB one by one: that is part of what a form
in many steps costs. recurrent.py, which keeps memory and asks for large pages, runs this in a process of its own:

    python benchmarks/recurrent_memory.py [--quick] [--repeat 7] > rows.json
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
from typing import Any

import recurrent_peers as peers
import torch
from recurrent_cases import DTYPES, HEADS, LENGTH, VARIANTS, Case
from rich.console import Console
from rich.progress import track
from rich.table import Table

from attncc.timing import alternate


def measured(quick: bool, repeat: int) -> list[dict[str, Any]]:
    """A row for every example, width and type."""
    rows: list[dict[str, Any]] = []
    cells = list(itertools.product(VARIANTS, (64,) if quick else (64, 128), DTYPES))
    for variant, width, dtype in track(cells, description="memory as it comes", console=Console(stderr=True)):
        case = Case.draw(variant, dtype, 1, HEADS, LENGTH, width)
        setting = peers.quickest(case.chunked, DTYPES[dtype])
        case.check(setting)
        contenders = {"attncc": case.call, "chunked": functools.partial(case.chunked, setting)}
        timings = alternate(contenders, repeat, warmup=1)
        rows.append({
            "attention": variant, "dtype": dtype, "D": width,
            "peer": {"chunk": setting[0], "products": str(setting[1]).removeprefix("torch.")},
            "milliseconds": timings["attncc"].median * 1e3,
            "ratio": timings["chunked"].median / timings["attncc"].median,
        })  # fmt: skip
    return rows


def in_a_process_of_its_own(quick: bool, repeat: int) -> list[dict[str, Any]]:
    """`measured` where nobody has set how memory is had."""
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    command = [sys.executable, __file__, "--repeat", str(repeat), *(["--quick"] if quick else [])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    rows = json.loads(done.stdout)
    out = Table("", "type", "D", "ms", "chunked PyTorch", title="Forward, memory as it comes: times faster than")
    for row in rows:
        out.add_row(row["attention"], row["dtype"], str(row["D"]), f"{row['milliseconds']:.1f}", f"{row['ratio']:.1f}x")
    Console(width=80).print(out)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="D 64 only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    json.dump(measured(arguments.quick, arguments.repeat), sys.stdout)
