"""Generated kernels compiled ahead of time, no GPU needed, and what they take: `resources/forward.json`.

A kernel that spills where the table says it did not fails the test, and so does one that takes another number of
registers with the version of Triton that the table was made with. `--update-golden` writes what was found.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
import triton

import attncc
from attncc.diagnostics import BuildError
from attncc.emit.printers import printer_of
from attncc.emit.render import render
from attncc.ir.types import DType
from attncc.plan.build import plan_attention
from attncc.plan.nodes import KernelPlan, Specialization, Target
from attncc.plan.triton_tiles import MACHINES, WITHOUT_F64, candidates
from attncc.runtime.triton_aot import Request, compile_ahead, compile_all, default_variant

TABLE = Path(__file__).parent / "resources" / "forward.json"
SPECS = {
    "full": "attention full():\n    score = qk\n",
    "causal": "attention causal():\n    mask = causal\n",
    "window": "attention window(window: int):\n    mask = causal and q_idx - kv_idx < window\n",
    "softcap": "attention softcap(cap: float):\n    score = cap * tanh(qk / cap)\n    mask = causal\n",
    "alibi": "attention alibi(slope: f32[H]):\n    score = qk - slope[h] * (q_idx - kv_idx)\n    mask = causal\n",
    "document": "attention document(doc: int[B, N]):\n    mask = doc[b, q_idx] == doc[b, kv_idx]\n",
    "dilated": "attention dilated(w: int):\n    mask = abs(q_idx - kv_idx) < w and (q_idx - kv_idx) % 2 == 0\n",
    "bias": "attention bias(bias: float[H, M, N]):\n    score = qk + bias[h, q_row, kv_idx]\n",
    "sink": "attention sink(s: f32[H]):\n    weight = softmax(score, sink=s[h])\n    mask = causal\n",
    "sigmoid": "attention sigmoids():\n    weight = sigmoid(score)\n    mask = causal\n",
    "rope": "attention ropes():\n    q = rope(q, q_idx)\n    k = l2norm(k)\n    mask = causal\n",
}


@dataclass(frozen=True)
class Case:
    spec: str
    dtype: DType
    width_qk: int
    width_v: int
    arch: str

    @property
    def label(self) -> str:
        return f"{self.spec} {self.dtype.value} {self.width_qk}x{self.width_v} {self.arch}"

    def allows(self, function: str, warning: str) -> bool:
        """Whether the assembler may say so of a function."""
        del function, warning
        return False

    def kernels(self) -> list[tuple[KernelPlan, str]]:
        attention = attncc.check(SPECS[self.spec])
        tensors = tuple((tensor.name, tensor.dtypes[0]) for tensor in attention.tensors)
        specialization = Specialization(self.dtype, self.width_qk, self.width_v, tensors)
        program = plan_attention(attention, specialization, Target("triton", self.arch))
        return [(plan, render(plan, printer_of(plan))) for plan in program.kernels]


BF16, F16, F32, F64 = DType.BF16, DType.F16, DType.F32, DType.F64
QUICK = [
    *(Case("causal", BF16, 64, 64, arch) for arch in MACHINES),
    *(Case(spec, BF16, 128, 128, "sm_90") for spec in ("full", "window", "softcap", "document")),
]
GRID = [
    *(Case(spec, BF16, width, width, arch) for spec in SPECS for width in (64, 128) for arch in MACHINES),
    *(Case("causal", BF16, qk, v, arch) for qk, v in ((1, 3), (72, 40), (256, 256), (576, 512)) for arch in MACHINES),
    *(Case("causal", dtype, w, w, arch) for dtype in (F16, F32) for w in (64, 128) for arch in MACHINES),
    *(Case("causal", F64, w, w, arch) for w in (64, 128) for arch in MACHINES if arch not in WITHOUT_F64),
    *(Case("rope", F32, 96, 96, arch) for arch in MACHINES),
]


def compare(cases: Sequence[Case], update: bool, path: Path = TABLE) -> None:
    """Compiles `cases` and compares what they take with the table at `path`."""
    kernels = [(case, plan, source) for case in cases for plan, source in case.kernels()]
    results = compile_all([Request(plan, source, case.arch) for case, plan, source in kernels])
    found: dict[str, dict[str, int]] = {}
    for (case, _, _), result in zip(kernels, results, strict=True):
        assert not isinstance(result, BuildError), f"{case.label}: {result}"
        for function, resources in result.items():
            warnings = [warning for warning in resources.warnings if not case.allows(function, warning)]
            assert not warnings, f"{case.label} {function}: {warnings}"
            found[f"{case.label} {function}"] = {k: v for k, v in asdict(resources).items() if k != "warnings"}
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"triton": "", "kernels": {}}
    if update:
        known = table["kernels"] if table["triton"] == triton.__version__ else {}
        table = {"triton": triton.__version__, "kernels": dict(sorted({**known, **found}.items()))}
        path.parent.mkdir(exist_ok=True)
        rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in table["kernels"].items())
        text = f'{{\n  "triton": {json.dumps(table["triton"])},\n  "kernels": {{\n{rows}\n  }}\n}}\n'
        path.write_text(text, encoding="utf-8")
    golden = table["kernels"]
    missing = sorted(found.keys() - golden.keys())
    assert not missing, f"not in the table: {missing}; run with --update-golden and read the difference"
    spilled = [name for name, row in found.items() if row["spilled"] and not golden[name]["spilled"]]
    assert not spilled, f"these spill, and did not: {spilled}"
    if table["triton"] == triton.__version__:
        assert found == {name: golden[name] for name in found}
    for name, row in found.items():
        arch = next(arch for arch in MACHINES if arch in name)
        assert row["shared"] <= MACHINES[arch].shared, name


def test_resources(request: pytest.FixtureRequest) -> None:
    compare(QUICK, request.config.getoption("--update-golden"))


@pytest.mark.slow
def test_resources_of_the_grid(request: pytest.FixtureRequest) -> None:
    compare(GRID, request.config.getoption("--update-golden"))


def test_half_precision_spills_next_to_nothing() -> None:
    """Up to D = 256, on any target: a few registers once, never one per step of a loop."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))["kernels"]
    half = {name: row for name, row in table.items() if (" bf16 " in name or " f16 " in name) and "576x512" not in name}
    assert len(half) > 100
    assert {name: row["spilled"] for name, row in half.items() if row["spilled"] > 64} == {}
    hopper = {name: row for name, row in half.items() if " sm_90 " in name and ("64x64" in name or "128x128" in name)}
    assert hopper and not any(row["spilled"] for row in hopper.values())


@pytest.mark.slow
@pytest.mark.parametrize("arch", MACHINES)
def test_every_candidate_compiles_and_fits(arch: str) -> None:
    requests = []
    for width in (64, 128):
        for plan, _ in Case("causal", BF16, width, width, arch).kernels():
            for tile in candidates(arch, BF16, width, width):
                tiled = replace(plan, tile=tile)  # type: ignore[call-arg]
                requests.append(Request(tiled, render(tiled, printer_of(tiled)), arch))
    for request, result in zip(requests, compile_all(requests), strict=True):
        assert not isinstance(result, BuildError), f"{request.plan.tile}: {result}"  # type: ignore[union-attr]
        assert all(resources.shared <= MACHINES[arch].shared for resources in result.values())


@pytest.mark.representative(2)
@pytest.mark.parametrize("name", ["aligned", "wide", "packed", "unit"])
def test_a_variant_that_takes_nothing_for_granted(name: str) -> None:
    plan, source = Case("bias", BF16, 64, 64, "sm_90").kernels()[-1]
    usual = default_variant(plan)
    changes = {"aligned": {"aligned": False}, "wide": {"wide": True}, "packed": {"packed": False}}
    unusual = replace(usual, **changes.get(name, {"unit": tuple(False for _ in usual.unit)}))
    (resources,) = compile_ahead(plan, source, "sm_90", variant=unusual).values()
    assert resources.products > 0


def test_artifacts(tmp_path: Path) -> None:
    ((plan, source),) = Case("causal", BF16, 64, 64, "gfx942").kernels()
    compile_ahead(plan, source, "gfx942", out=tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    stem = "causal_forward"
    assert names == {f"{stem}.py", *(f"{stem}.gfx942.{kind}" for kind in ("json", "hsaco", "amdgcn"))}
    assert (tmp_path / f"{stem}.py").read_text() == source
    described = json.loads((tmp_path / f"{stem}.gfx942.json").read_text())
    assert described["kernel"] == stem
    assert described["files"] == [f"{stem}.gfx942.hsaco", f"{stem}.gfx942.amdgcn"]
    assert [a["name"] for a in described["arguments"]][:5] == ["q", "k", "v", "o", "lse"]


def test_a_kernel_that_does_not_compile(tmp_path: Path) -> None:
    ((plan, source),) = Case("causal", BF16, 64, 64, "sm_90").kernels()
    broken = source.replace("tl.trans(k_tile)", "tl.transpose_all(k_tile)")
    good, bad, again = compile_all([Request(plan, text, "sm_90") for text in (source, broken, source)])
    assert isinstance(bad, BuildError) and "A0522" in str(bad) and "transpose_all" in str(bad)
    assert good == again and not isinstance(good, BuildError)


def test_a_compiler_that_dies_takes_one_kernel_with_it() -> None:
    ((plan, source),) = Case("causal", BF16, 64, 64, "sm_90").kernels()
    deadly = source.replace("import triton\n", "import os\n\nimport triton\n\nos.abort()\n", 1)
    good, bad, again = compile_all([Request(plan, text, "sm_90") for text in (source, deadly, source)])
    assert isinstance(bad, BuildError) and "status" in str(bad)
    assert good == again and not isinstance(good, BuildError)


@pytest.mark.parametrize("arch", WITHOUT_F64)
def test_f64_is_refused_where_triton_cannot(arch: str) -> None:
    ((plan, source),) = Case("causal", F64, 64, 64, arch).kernels()
    with pytest.raises(BuildError, match="A0527"):
        compile_ahead(plan, source, arch)


def test_an_unknown_target_is_refused() -> None:
    ((plan, source),) = Case("causal", BF16, 64, 64, "sm_90").kernels()
    with pytest.raises(BuildError, match="A0525"):
        compile_ahead(plan, source, "sm_70")


def test_no_gpu_is_needed() -> None:
    assert not torch.cuda.is_initialized()
