"""How long a first call takes, with an empty cache and with a warm one, and a tiny call after that.

    python benchmarks/latency.py [-o benchmarks/results/latency-cpu.json]

Each sample runs in a process of its own in which PyTorch is imported already; cold ones have a new cache folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SPECS = ("causal", "sliding_window", "softcap", "document_causal")


def child(spec: str) -> None:
    """Prints seconds of `import attncc`, of `build` and the first call, and of a tiny call."""
    import time

    import torch

    q, k, v = (torch.randn(1, 1, 16, 64) for _ in range(3))
    inputs = {"document_causal": {"doc": torch.zeros(1, 16, dtype=torch.int32)}}.get(spec, {})
    torch.nn.functional.scaled_dot_product_attention(q, k, v)
    start = time.perf_counter()
    import attncc

    imported = time.perf_counter()
    attn = attncc.build(ROOT / "examples" / f"{spec}.attn")
    attn(q, k, v, **inputs)
    first = time.perf_counter()

    def per_call(function: object, repeat: int = 2000) -> float:
        assert callable(function)
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            for _ in range(repeat):
                function()
            times.append((time.perf_counter() - begin) / repeat)
        return min(times)

    def sdpa() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    print(json.dumps({
        "import": imported - start, "first_call": first - imported,
        "tiny_call": per_call(lambda: attn(q, k, v, **inputs)), "sdpa": per_call(sdpa),
    }))  # fmt: skip


def sample(spec: str, cache: str) -> dict[str, float]:
    environment = {**os.environ, "ATTNCC_CACHE": cache}
    command = [sys.executable, __file__, "--child", spec]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks/results/latency-cpu.json")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return
    rows = []
    for spec in SPECS:
        cold, warm = [], []
        for _ in range(arguments.repeat):
            with tempfile.TemporaryDirectory(prefix="attncc-cache-") as cache:
                cold.append(sample(spec, cache))
                warm.append(sample(spec, cache))
        row = {
            "spec": spec,
            "import": statistics.median(x["import"] for x in warm),
            "cold": statistics.median(x["first_call"] for x in cold),
            "warm": statistics.median(x["first_call"] for x in warm),
            "tiny_call": min(x["tiny_call"] for x in warm),
            "sdpa": min(x["sdpa"] for x in warm),
        }
        rows.append(row)
        print(
            f"{spec:<16} import {row['import'] * 1e3:4.0f} ms; build and first call {row['cold']:.2f} s cold, "
            f"{row['warm'] * 1e3:.1f} ms warm; a call at M = N = 16 {row['tiny_call'] * 1e6:.1f} us "
            f"(SDPA {row['sdpa'] * 1e6:.1f} us)"
        )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
