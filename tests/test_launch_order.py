"""The kernels of a backward program are listed in the order in which they are launched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import attncc
from attncc.plan.nodes import BackwardProgram
from attncc.runtime import kernels
from attncc.runtime.backward import CompiledBackward, compile_backward
from attncc.runtime.cpp_backward import CppBackward
from attncc.runtime.triton import LoadedModule

EVERYTHING = """
attention everything(gain: float[H], doc: int[B, N]):
    q    = rmsnorm(q) * gain[h]
    k    = rmsnorm(k)
    mask = causal and doc[b, q_idx] == doc[b, kv_idx]
"""


@pytest.mark.parametrize("target", ["cpp", "triton:interpret"])
def test_kernels_are_listed_as_they_are_launched(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[str] = []
    launched: list[str] = []
    launch, run = CppBackward._launch, LoadedModule.run

    def compiled(program: BackwardProgram, sources: Any, folder: Path) -> CompiledBackward:
        listed.extend(plan.name for plan in program.kernels)
        return compile_backward(program, sources, folder)

    def launch_in_cpp(self: CppBackward, call: Any, name: str, own: Any) -> None:
        launched.append(name)
        launch(self, call, name, own)

    def run_in_triton(self: LoadedModule, *arguments: Any, **keywords: Any) -> None:
        launched.append(self.plan.name)
        run(self, *arguments, **keywords)

    q, k, v = torch.randn(3, 1, 2, 40, 16)
    o = attncc.build(EVERYTHING, target=target)(
        q.requires_grad_(),
        k,
        v,
        gain=torch.ones(2, requires_grad=True),
        doc=torch.zeros(1, 40, dtype=torch.int64),
    )
    monkeypatch.setattr(kernels, "compile_backward", compiled)
    monkeypatch.setattr(CppBackward, "_launch", launch_in_cpp)
    monkeypatch.setattr(LoadedModule, "run", run_in_triton)
    o.sum().backward()
    assert len(listed) >= 7
    assert list(dict.fromkeys(launched)) == listed
