"""Kernels of recurrences compiled ahead of time, and what they take: `resources/recurrent.json`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from test_triton_aot import Case, compare
from triton_recurrent_support import plan_of

from attncc.diagnostics import BuildError
from attncc.emit.recurrent_triton import render_core
from attncc.ir.types import DType
from attncc.plan.recurrent import CorePlan, gradient_of, with_exact_state
from attncc.plan.triton_tiles import MACHINES, WITHOUT_F64
from attncc.runtime.triton_aot import compile_ahead

TABLE = Path(__file__).parent / "resources" / "recurrent.json"
BF16, F32, F64 = DType.BF16, DType.F32, DType.F64
# Updates, the side that decays, whether erases read the state before the decay.
FORMS = {
    "retention": ("write", "scalar", False),
    "gla": ("write", "key", False),
    "gated_delta": ("delta", "scalar", False),
    "kda": ("delta", "key", False),
    "rwkv7": ("erase and write", "key", True),
}
EXACT = " with its state"  # after a form: of calls that return the state


@dataclass(frozen=True)
class CoreCase(Case):
    """A form of recurrences, forward and backward."""

    def kernels(self) -> list[tuple[CorePlan, str]]:  # type: ignore[override] - of cores
        plans = [self.plan(), gradient_of(self.plan())]
        return [(plan, render_core(plan, ())) for plan in plans]

    def plan(self) -> CorePlan:
        updates, side, before = FORMS[self.spec.removesuffix(EXACT)]
        widths = (self.width_qk, self.width_v)
        plan = plan_of(updates, side, before=before, dtype=self.dtype, widths=widths, arch=self.arch)
        return with_exact_state(plan) if self.spec.endswith(EXACT) else plan

    def allows(self, function: str, warning: str) -> bool:
        # C7519 tells of a synchronisation that ptxas adds where a factor of a product comes from registers.
        return "(C7519)" in warning


QUICK = [CoreCase("gated_delta", BF16, 64, 64, "sm_90")]
GRID = [
    *(
        CoreCase(form, dtype, w, w, arch)
        for form in FORMS
        for dtype in (BF16, F32)
        for w in (64, 128)
        for arch in MACHINES
    ),
    *(CoreCase("kda", BF16, 256, 256, arch) for arch in MACHINES),
    *(
        CoreCase(form + EXACT, BF16, w, w, arch)
        for form in ("retention", "gla")
        for w in (64, 128)
        for arch in MACHINES
    ),
]


def test_resources(request: pytest.FixtureRequest) -> None:
    compare(QUICK, request.config.getoption("--update-golden"), TABLE)


@pytest.mark.slow
def test_resources_of_the_grid(request: pytest.FixtureRequest) -> None:
    compare(GRID, request.config.getoption("--update-golden"), TABLE)


@pytest.mark.parametrize("case", GRID, ids=lambda case: case.label)
def test_nothing_spills_and_all_fits(case: CoreCase) -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))["kernels"]
    rows = {name: row for name, row in table.items() if name.startswith(f"{case.label} ")}
    assert len(rows) >= 9
    assert not {name: row["spilled"] for name, row in rows.items() if row["spilled"]}
    assert max(row["shared"] for row in rows.values()) <= MACHINES[case.arch].shared


@pytest.mark.parametrize("arch", WITHOUT_F64)
def test_f64_is_refused_where_triton_cannot(arch: str) -> None:
    plan = plan_of("delta", "key", dtype=F64, arch=arch)
    with pytest.raises(BuildError, match="A0527"):
        compile_ahead(plan, render_core(plan, ()), arch)


@pytest.mark.parametrize("kernel", ["recurrent", "recurrent_backward"])
def test_no_product_is_transposed(kernel: str) -> None:
    """As the left factor of another one, a transposed product gave wrong gradients on Hopper (Triton 3.4 to 3.7)."""
    for form in FORMS:
        plan = replace(CoreCase(form, BF16, 64, 64, "sm_90").plan(), kernel=kernel, name=kernel)
        products, transposes = set[str](), 0
        for line in render_core(plan, ()).splitlines():
            assigned = re.match(r" +(\w+) [-+*]?= (.*)", line)
            if assigned and re.search(r"\b(tl\.)?dot\(", assigned[2]):
                products.add(assigned[1])
            elif assigned and assigned[1] in products and " = " in line:
                products.discard(assigned[1])
            for transposed in re.findall(r"tl\.trans\((\w+)\)", line):
                assert transposed not in products, f"{form}: {line}"
                transposes += 1
        assert transposes
