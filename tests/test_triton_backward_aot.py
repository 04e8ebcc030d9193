"""Generated kernels of backward passes compiled ahead of time, and what they take: `resources/backward.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_triton_aot import SPECS, Case, compare

import attncc
from attncc.emit.printers import printer_of
from attncc.emit.render import render
from attncc.ir.types import DType
from attncc.plan.backward import plan_backward
from attncc.plan.nodes import KernelPlan, Specialization, Target

TABLE = Path(__file__).parent / "resources" / "backward.json"
BF16, F16, F32, F64 = DType.BF16, DType.F16, DType.F32, DType.F64


@dataclass(frozen=True)
class BackwardCase(Case):
    """The kernels of a backward pass, all floats that are captured wanted."""

    def kernels(self) -> list[tuple[KernelPlan, str]]:
        attention = attncc.check(SPECS[self.spec])
        tensors = tuple((tensor.name, tensor.dtypes[0]) for tensor in attention.tensors)
        specialization = Specialization(self.dtype, self.width_qk, self.width_v, tensors)
        wanted = frozenset(name for name, dtype in tensors if dtype in (BF16, F16, F32, F64))
        program = plan_backward(attention, specialization, Target("triton", self.arch), wanted)
        return [(plan, render(plan, printer_of(plan))) for plan in program.kernels]

    def allows(self, function: str, warning: str) -> bool:
        # The second visit is for programs that met NaN or infinities, and need not be fast. C7519 tells of a
        # synchronisation that ptxas adds where a factor of a product comes from registers; nothing is serialised.
        return "[STRANGE]" in function or "(C7519)" in warning


QUICK = [
    BackwardCase("causal", BF16, 64, 64, "sm_90"),
    BackwardCase("alibi", BF16, 64, 64, "gfx942"),
]
NAMED = ("full", "causal", "window", "softcap", "alibi", "rope")
GRID = [
    BackwardCase(spec, BF16, width, width, arch)
    for arch in ("sm_90", "sm_80", "sm_100", "gfx942")
    for width in (64, 128)
    for spec in ("full", "causal", "softcap", "alibi", "rope")
]


def test_resources(request: pytest.FixtureRequest) -> None:
    compare(QUICK, request.config.getoption("--update-golden"), TABLE)


@pytest.mark.slow
def test_resources_of_the_grid(request: pytest.FixtureRequest) -> None:
    compare(GRID, request.config.getoption("--update-golden"), TABLE)


def test_nothing_spills_on_hopper() -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))["kernels"]
    rows = {
        name: row["spilled"]
        for name, row in table.items()
        if " sm_90 " in name and (" bf16 " in name or " f16 " in name) and ("64x64" in name or "128x128" in name)
        if name.split()[0] in NAMED and "[STRANGE]" not in name
    }
    assert len(rows) >= 10 * 4  # of each specification at each width: dkdv, dq and two forms of delta
    assert not any(rows.values()), rows
