"""A step of training takes memory linear in the length, with one head too, where a head's queries are shared out."""

from __future__ import annotations

import subprocess
import sys

STEP = """
from pathlib import Path
import torch
import attncc

attn = attncc.build("attention local():\\n    mask = causal and q_idx - kv_idx < 256\\n")

def peak():  # not ru_maxrss, which begins at that of the parent process
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

def step(length):
    q, k, v = (torch.randn(1, 1, length, 32, requires_grad=True) for _ in range(3))
    before = peak()
    attn(q, k, v).sum().backward()
    return peak() - before

step(256)  # compiles
print(step(30_000))
"""


def test_memory_is_some_times_that_of_the_operands() -> None:
    run = subprocess.run([sys.executable, "-c", STEP], check=True, capture_output=True, text=True)
    operand = 30_000 * 32 * 4
    # o, do, dq, dk, dv, k and v as the kernel reads them, and sums of dk and dv: ten operands and a little.
    assert operand < int(run.stdout) < 16 * operand
