"""What a launch passes to a compiled kernel, and which variant it picks: seen without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attncc
from attncc.diagnostics import CallError
from attncc.emit.printers import printer_of
from attncc.emit.render import render
from attncc.ir.types import DType
from attncc.plan.build import plan_attention
from attncc.plan.nodes import Specialization, Target
from attncc.runtime.arguments import Sizes
from attncc.runtime.triton import (
    ForwardKernel,
    RowsKernel,
    TilesKernel,
    TritonKernel,
    compile_kernel,
    variant_of,
)
from attncc.runtime.triton_fields import Variant

SPECS = {
    "plain": "attention a(w: int, cap: float, late: bool):\n    score = cap * tanh(qk)\n    mask = causal and late\n",
    "bias": "attention a(bias: float[H, M, N]):\n    score = qk + bias[h, q_row, kv_idx]\n",
    "lists": "attention a(doc: i32[B, N]):\n    mask = doc[b, q_idx] == doc[b, kv_idx]\n",
    "none": "attention a():\n    weight = sigmoid(score)\n    k = l2norm(k)\n",
}
SCALARS = {"w": 3, "cap": 2.0, "late": True}


class Recorder:
    """Stands for a compiled kernel: keeps what it is launched with."""

    def __init__(self) -> None:
        self.grid: tuple[int, ...] = ()
        self.arguments: Sequence[Any] = ()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grid = grid

        def launch(*arguments: Any) -> None:
            self.arguments = arguments

        return launch


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, Variant], Recorder]:
    """What is compiled, by function and variant, instead of kernels."""
    recorders: dict[tuple[str, Variant], Recorder] = {}

    def compile_function(module: Any, function: Any, variant: Variant, device: torch.device) -> Recorder:
        recorders[function.label, variant] = module._compiled[function.label, variant] = Recorder()
        return recorders[function.label, variant]

    monkeypatch.setattr("attncc.runtime.triton.LoadedModule._compile", compile_function)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    return recorders


def kernels(spec: str, folder: Path, dtype: DType = DType.BF16, width: int = 64) -> list[TritonKernel]:
    attention = attncc.check(SPECS[spec])
    tensors = tuple((tensor.name, tensor.dtypes[-1]) for tensor in attention.tensors)
    program = plan_attention(attention, Specialization(dtype, width, width, tensors), Target("triton", "sm_90"))
    return [compile_kernel(plan, render(plan, printer_of(plan)), folder) for plan in program.kernels]


def fits(argument: Any, type_name: str) -> bool:
    match type_name:
        case "constexpr":
            return isinstance(argument, (int, bool))
        case "i1":
            return isinstance(argument, bool)
        case "i32" | "i64":
            return isinstance(argument, int)
        case "fp32" | "fp64":
            return isinstance(argument, float)
        case _:
            return isinstance(argument, Tensor)


@pytest.mark.parametrize("spec", SPECS)
def test_arguments_fit_the_signature(spec: str, tmp_path: Path, compiled: dict) -> None:
    sizes = Sizes(B=2, H=4, HKV=2, M=300, N=300, D=64, E=64)
    q, k, v, o = (torch.zeros(2, heads, 300, 64, dtype=torch.bfloat16) for heads in (4, 2, 2, 4))
    tensors = {"bias": torch.zeros(4, 300, 300, dtype=torch.float64), "doc": torch.zeros(2, 300, dtype=torch.int32)}
    functions = {}
    for kernel in kernels(spec, tmp_path):
        functions |= {function.label: function for function in kernel.module.functions}
        match kernel:
            case RowsKernel():
                kernel.launch(k, torch.zeros_like(k), sizes, 0, tensors, SCALARS)
            case TilesKernel():
                tables = kernel.launch(sizes, 0, tensors, SCALARS, q.device)
            case ForwardKernel():
                lse = None if kernel.plan.normalizer == "none" else torch.zeros(2, 4, 300)
                given = (tables,) if kernel.plan.blocks.summaries else ()
                kernel.launch(q, k, v, o, lse, sizes, 0, tensors, SCALARS, *given)
    assert compiled
    for (label, variant), recorder in compiled.items():
        function = functions[label]
        signature = function.signature(variant)
        assert tuple(signature) == function.parameters
        assert len(recorder.arguments) == len(signature), label
        for argument, (name, type_name) in zip(recorder.arguments, signature.items(), strict=True):
            assert fits(argument, type_name), (label, name, type_name, argument)
        named = dict(zip(signature, recorder.arguments, strict=True))
        assert all(named[name] == value for name, value in function.constexprs(variant).items()), label
        assert variant.aligned


def test_programs(tmp_path: Path, compiled: dict) -> None:
    (kernel,) = kernels("plain", tmp_path)
    assert isinstance(kernel, ForwardKernel)
    q = torch.zeros(3, 5, 700, 64, dtype=torch.bfloat16)
    lse = torch.zeros(3, 5, 700)
    kernel.launch(q, q, q, q, lse, Sizes(3, 5, 5, 700, 700, 64, 64), 0, {}, SCALARS)
    (recorder,) = compiled.values()
    assert recorder.grid == (3 * 5 * -(-700 // kernel.block_m), 1, 1)
    nothing = torch.zeros(0, 5, 700, 64, dtype=torch.bfloat16)
    recorder.grid = ()
    kernel.launch(nothing, q, q, nothing, lse, Sizes(0, 5, 5, 700, 700, 64, 64), 0, {}, SCALARS)
    assert recorder.grid == ()


def test_lengths_heads_and_scalars_compile_nothing(tmp_path: Path, compiled: dict) -> None:
    (kernel,) = kernels("plain", tmp_path)
    assert isinstance(kernel, ForwardKernel)
    for batch, heads, length, cap in ((1, 1, 1, 1.0), (2, 3, 100, 2.0), (1, 8, 1024, 30.0)):
        q = torch.zeros(batch, heads, length, 64, dtype=torch.bfloat16)
        sizes = Sizes(batch, heads, heads, length, length, 64, 64)
        kernel.launch(q, q, q, q, torch.zeros(batch, heads, length), sizes, 7, {}, {**SCALARS, "cap": cap})
    assert len(compiled) == 1


def test_variants() -> None:
    x = torch.zeros(2, 4, 100, 64, dtype=torch.bfloat16)
    usual = Variant(aligned=True, wide=False, packed=True, unit=())
    assert variant_of((x, x, x, x), (), (x, x)) == usual
    inside = torch.zeros(2, 100, 4, 64, dtype=torch.bfloat16).transpose(1, 2)
    assert variant_of((inside, inside, inside, inside), (), (inside, inside)) == Variant(True, False, False, ())
    assert variant_of((inside, x, x, inside), (), (x, x)) == usual
    odd = torch.zeros(2, 4, 100, 65, dtype=torch.bfloat16)
    assert variant_of((x, odd[..., :64], x, x), (), (odd[..., :64], x)) == Variant(False, False, False, ())
    assert not variant_of((x, x.flatten()[1:65].view(1, 1, 1, 64), x, x), ()).aligned
    far = torch.zeros(64, dtype=torch.bfloat16).as_strided((1, 1, 1, 64), (0, 0, 2**24, 1))
    assert variant_of((x, far, x, x), ()).wide
    captured = (torch.zeros(3, 5), torch.zeros(5, 3).T, torch.zeros(()))
    assert variant_of((x, x, x, x), captured).unit == (True, False)


def test_tensors_on_the_cpu_are_refused(tmp_path: Path) -> None:
    (kernel,) = kernels("plain", tmp_path)
    assert isinstance(kernel, ForwardKernel)
    q = torch.zeros(1, 1, 10, 64, dtype=torch.bfloat16)
    with pytest.raises(CallError, match="A0526"):
        kernel.launch(q, q, q, q, torch.zeros(1, 1, 10), Sizes(1, 1, 1, 10, 10, 64, 64), 0, {}, SCALARS)


def test_sections_of_heads_share_the_cache(tmp_path: Path, compiled: dict) -> None:
    """The more keys, the fewer heads take turns; never none, never more than there are."""
    (kernel,) = kernels("plain", tmp_path)
    assert isinstance(kernel, ForwardKernel)
    taken = []
    position = kernel.function.parameters.index("heads_per_section")
    for length in (16, 4096, 2**20):
        q = torch.zeros(1, dtype=torch.bfloat16).expand(2, 64, length, 64)
        sizes = Sizes(2, 64, 64, length, length, 64, 64)
        kernel.launch(q, q, q, q, torch.zeros(1), sizes, 0, {}, SCALARS)
        taken += [recorder.arguments[position] for recorder in compiled.values()][-1:]
    assert taken == [128, 32, 1]
