"""The generated launcher of the C++ target: what it launches, and that lists of live tiles are whole either way."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cpp_support import bind, normal
from error_rule import check_kernel
from torch import Tensor

from attncc.build import check, sources_of
from attncc.ir.nodes import Attention
from attncc.plan.nodes import Specialization, Target
from attncc.runtime import cache
from attncc.runtime.arguments import DTYPES
from attncc.runtime.cpp_toolchain import native_arch
from attncc.runtime.programs import CppProgram

EXAMPLES = Path(__file__).parent.parent / "examples"


class Recorded:
    """The program of `spec` for these inputs, with a note of each launch."""

    def __init__(self, spec: Attention, width: int, **inputs: Tensor) -> None:
        tensors = tuple((p.name, DTYPES[inputs[p.name].dtype]) for p in spec.tensors)
        specialization = Specialization(DTYPES[torch.float32], width, width, tensors)
        plan, texts, launcher = sources_of(spec, specialization, Target("cpp", native_arch()))
        self.spec, self.inputs, self.launched = spec, inputs, list[str]()
        self.program = CppProgram(plan, texts, launcher, cache.folder())
        launches = zip(plan.kernels, self.program._launch, strict=True)
        self.program._launch = tuple(self._noting(kernel.kernel, launch) for kernel, launch in launches)

    def _noting(self, name: str, launch: Callable[[bytes], None]) -> Callable[[bytes], None]:
        def launch_noted(block: bytes) -> None:
            self.launched.append(name)
            launch(block)

        return launch_noted

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> list[str]:
        """Runs it, checks what it gives by the error rule, and tells what was launched, in order."""
        o, lse = self.program.run(q, k, v, bind(self.spec, q, k, v, self.inputs, None), return_total=True)
        check_kernel(o, lse, self.spec, q, k, v, self.inputs)
        return self.launched


@pytest.mark.parametrize("name", ["document", "document_causal"])
def test_a_tiny_call_launches_every_kernel_once(name: str) -> None:
    doc = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3]], dtype=torch.int32)
    program = Recorded(check(EXAMPLES / f"{name}.attn"), 8, doc=doc)
    assert program.check(*(normal(1, 1, 16, 8, seed=seed) for seed in (1, 2, 3))) == ["tiles", "forward"]


@pytest.mark.representative(3)
@pytest.mark.parametrize("room", [0, 1 << 20], ids=["counted first", "at once"])
@pytest.mark.parametrize("axes", ["N", "B, N", "H, N", "B, H, N"])
def test_lists_and_tables_for_all_or_per_batch_or_per_head(axes: str, room: int) -> None:
    index = {"N": "", "B, N": "b, ", "H, N": "h, ", "B, H, N": "b, h, "}[axes]
    spec = check(
        f"attention packed(doc: int[{axes}], start: float[{axes}]):\n"
        f"    mask = doc[{index}q_idx] == doc[{index}kv_idx] and start[{index}kv_idx] <= q_idx\n"
    )
    shape = [{"B": 2, "H": 3, "N": 700}[axis] for axis in axes.split(", ")]
    doc = (normal(*shape, seed=4) > 2).cumsum(-1)
    program = Recorded(spec, 8, doc=doc, start=normal(*shape, seed=5) * 100)
    program.program._run.__globals__["ENTRIES_AT_ONCE"] = room
    q, k, v = normal(2, 3, 200, 8, seed=1), normal(2, 3, 700, 8, seed=2), normal(2, 3, 700, 8, seed=3)
    assert program.check(q, k, v) == (["tiles", "forward"] if room else ["tiles", "tiles", "forward"])


FORKS = """
import os
import torch
import attncc

torch.set_num_threads(2)
attn = attncc.build("attention plain():\\n    mask = causal\\n", target="cpp")
q, k, v = (torch.randn(1, 2, 200, 8) for _ in range(3))
o = attn(q, k, v)
child = os.fork()
if child == 0:
    again = attncc.build("attention other():\\n    mask = kv_idx <= q_idx\\n", target="cpp")
    os._exit(0 if torch.equal(attn(q, k, v), o) and torch.equal(again(q, k, v), o) else 1)
_, status = os.waitpid(child, 0)
assert torch.equal(attn(q, k, v), o)
raise SystemExit(os.waitstatus_to_exitcode(status))
"""


def test_a_child_forked_after_a_call_can_call() -> None:
    """The threads of the OpenMP runtime stay behind; who waits for them waits for ever."""
    assert subprocess.run([sys.executable, "-c", FORKS], timeout=120, check=False).returncode == 0
