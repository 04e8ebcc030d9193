"""A causal window of 1024 over N = 65,536 and N = 1,048,576 tokens: time and memory are linear in N.

    python benchmarks/long.py [-o benchmarks/results/long-cpu.json]

Each length runs in a process of its own, whose peak of resident memory is read before and after the call.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LENGTHS = (65_536, 1_048_576)
WINDOW, WIDTH = 1024, 64


def child(length: int, dtype: str) -> None:
    """Prints seconds of one call, bytes of q, k, v and o, and how far the call raised the peak of resident memory."""
    import resource
    import time

    import torch

    import attncc

    attn = attncc.build(ROOT / "examples/sliding_window.attn")
    kind = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
    small = [torch.randn(1, 1, 4096, WIDTH, dtype=kind) for _ in range(3)]
    attn(*small, window=WINDOW)  # compiles, and starts the threads
    q, k, v = (torch.randn(1, 1, length, WIDTH, dtype=kind) for _ in range(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    o = attn(q, k, v, window=WINDOW)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        attn(q, k, v, window=WINDOW)
        seconds.append(time.perf_counter() - start)
    tensors = 4 * q.numel() * q.element_size()
    # The last queries see the last keys: a check that the far end is computed too.
    tail = attn.reference(q[:, :, -2:], k[:, :, -2 * WINDOW :], v[:, :, -2 * WINDOW :], window=WINDOW)
    error = (o[:, :, -2:].double() - tail).abs().max().item()
    print(json.dumps({
        "length": length, "dtype": dtype, "seconds": min(seconds), "tensors": tensors, "added": after - before,
        "output": o.numel() * o.element_size(), "error": error, "threads": torch.get_num_threads(),
    }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks/results/long-cpu.json")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.dtype)
        return
    rows = []
    for length in LENGTHS:
        command = [sys.executable, __file__, "--child", str(length), "--dtype", arguments.dtype]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        row = rows[-1]
        print(
            f"N = {length:>9,}: {row['seconds']:.3f} s; q, k, v, o {row['tensors'] / 2**20:.0f} MiB; "
            f"the call added {row['added'] / 2**20:.0f} MiB, of which o is {row['output'] / 2**20:.0f} MiB; "
            f"error at the end {row['error']:.1e}"
        )
    growth = LENGTHS[1] / LENGTHS[0]
    ratio = rows[1]["seconds"] / rows[0]["seconds"]
    print(f"{growth:.0f} times the tokens took {ratio:.1f} times as long, {ratio / growth:.2f} of linear")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"rows": rows, "time_over_linear": ratio / growth}, indent=2)
    arguments.output.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
