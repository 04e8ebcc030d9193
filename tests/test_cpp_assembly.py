"""What the compiler makes of the hot loops: every product kept in registers."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from cpp_support import CAUSAL, KV, H, Q, attention, op
from tiers import tiered

from attncc.emit.cpp import CppPrinter
from attncc.emit.render import render
from attncc.ir.nodes import Attention, Hole, Index, Load, Size, TensorParameter
from attncc.ir.types import DType, Kind
from attncc.plan.build import plan_attention
from attncc.plan.nodes import CppTile, Specialization, Target
from attncc.runtime.cpp_toolchain import find_compiler, flags

SLOPES = TensorParameter("slope", (DType.F32,), (Size("H"),))
BIAS = TensorParameter("bias", (DType.F32,), (Size("M"), Size("N")))
SPECS = {
    "causal": attention(mask=CAUSAL),
    "softcap": attention(score=op("mul", 50.0, op("tanh", op("div", Hole("qk"), 50.0)))),
    "alibi": attention(
        score=op("sub", Hole("qk"), op("mul", Load("slope", (H,), Kind.FLOAT), op("to_float", op("sub", Q, KV)))),
        parameters=(SLOPES,),
    ),
    "bias": attention(
        score=op("add", Hole("qk"), Load("bias", (Index("q_row"), KV), Kind.FLOAT)), mask=CAUSAL, parameters=(BIAS,)
    ),
}
PRODUCT = re.compile(r"\s(vdpbf16ps|vfmadd\d+p[sd])\s")


def loops(assembly: str) -> list[list[str]]:
    """The innermost loops: from a label to the first jump back to it, with no other label between."""
    lines = [line for line in assembly.splitlines() if not line.startswith("#")]
    label_at: dict[str, int] = {}
    found: list[list[str]] = []
    last_label = -1
    for i, line in enumerate(lines):
        if label := re.match(r"(\.L\w+):", line):
            label_at[label[1]] = last_label = i
        elif (jump := re.match(r"\s+j\w+\s+(\.L\w+)", line)) and label_at.get(jump[1]) == last_label:
            found.append(lines[last_label + 1 : i])
    return found


@pytest.mark.representative(4)
@pytest.mark.parametrize(
    ("name", "dtype", "arch"),
    tiered(
        lambda name, dtype, arch: name == "causal" or (dtype is DType.BF16 and arch == "avx512_bf16"),
        SPECS,
        (DType.F32, DType.BF16, DType.F64),
        ("avx512_bf16", "avx512", "avx2"),
    ),
    ids=str,
)
def test_the_loops_of_the_product_spill_nothing(name: str, dtype: DType, arch: str, tmp_path: Path) -> None:
    plan = plan_attention(SPECS[name], specialization(SPECS[name], dtype), Target("cpp", arch)).forward
    assert isinstance(plan.tile, CppTile)
    source, assembly = tmp_path / "kernel.cpp", tmp_path / "kernel.s"
    source.write_text(render(plan, CppPrinter(plan)), encoding="utf-8")
    options = [flag for flag in flags(arch) if flag != "-shared"]
    subprocess.run([*find_compiler().command, *options, "-S", str(source), "-o", str(assembly)], check=True)

    products = plan.tile.micro_keys * plan.tile.vectors
    # Beside its products, a step loads its words and does a little counting; longer loops are other ones.
    hot = [
        loop
        for loop in loops(assembly.read_text())
        if sum(bool(PRODUCT.search(line)) for line in loop) == products and len(loop) <= 3 * products
    ]
    # Scores and values, each for tiles with and without masked pairs.
    assert len(hot) >= 4
    for loop in hot:
        assert not any("%rsp" in line or "%rbp" in line for line in loop), "\n".join(loop)


def specialization(spec: Attention, dtype: DType) -> Specialization:
    return Specialization(dtype, 64, 64, tuple((tensor.name, DType.F32) for tensor in spec.tensors))
