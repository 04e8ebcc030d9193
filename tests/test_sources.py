"""Generated sources: the same in every process, and as they were when someone last looked at them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Golden

import attncc
from attncc.build import backward_sources_of
from attncc.emit.recurrent_backward_cpp import render_backward
from attncc.emit.recurrent_cpp import render_core
from attncc.ir.types import DType
from attncc.plan.nodes import Specialization, Target
from attncc.plan.recurrent import CorePlan, CoreUpdate, gradient_of
from attncc.runtime.arguments import DTYPES, preferred_dtype
from attncc.runtime.targets import parse

EXAMPLES = Path(__file__).parent.parent / "examples"
FOLDER = Path(__file__).parent / "sources"
CASES = [
    ("full", "cpp:avx512_bf16", torch.bfloat16),
    ("sliding_window", "cpp:avx2", torch.float32),
    ("softcap", "triton:sm_90", torch.bfloat16),
    ("document_causal", "cpp:avx512", torch.float32),
    ("document_causal", "triton:sm_90", torch.float16),
    ("rope", "cpp:avx512", torch.float32),
]

# Of backward passes, and the captured tensors whose gradients they give.
BACKWARD_CASES = [
    ("causal", "cpp:avx512_bf16", torch.bfloat16, ()),
    ("qk_norm", "cpp:avx2", torch.float32, ("q_gain",)),
    ("relative_bias", "cpp:avx512", torch.float32, ("bias",)),
]


def sources(example: str, target: str, dtype: torch.dtype) -> dict[str, str]:
    attn = attncc.build(EXAMPLES / f"{example}.attn", target=target)
    tensors = tuple((p.name, preferred_dtype(p)) for p in attn.attention.tensors)
    program, texts, launcher = attn.sources(Specialization(DTYPES[dtype], 64, 64, tensors), parse(target))
    return {plan.name: text for plan, text in zip(program.kernels, texts, strict=True)} | {"run": launcher}


@pytest.mark.parametrize(("example", "target", "dtype", "wanted"), BACKWARD_CASES)
def test_sources_of_backward_passes_are_as_recorded(
    example: str, target: str, dtype: torch.dtype, wanted: tuple[str, ...], golden: Golden
) -> None:
    attention = attncc.check(EXAMPLES / f"{example}.attn")
    tensors = tuple((p.name, preferred_dtype(p)) for p in attention.tensors)
    specialization = Specialization(DTYPES[dtype], 64, 64, tensors)
    program, texts = backward_sources_of(attention, specialization, parse(target), wanted)
    for plan, text in zip(program.kernels, texts, strict=True):
        golden(FOLDER / f"{example}-{target.replace(':', '-')}-{plan.name}.cpp.expected", text)


@pytest.mark.parametrize(("example", "target", "dtype"), CASES)
def test_sources_are_as_recorded(example: str, target: str, dtype: torch.dtype, golden: Golden) -> None:
    extension = {"cpp": "cpp", "triton": "py"}[target.split(":", maxsplit=1)[0]]
    for name, text in sources(example, target, dtype).items():
        suffix = "py" if name == "run" else extension
        golden(FOLDER / f"{example}-{target.replace(':', '-')}-{name}.{suffix}.expected", text)


# Of cores: a gated delta rule, and a decay by key channel read before the update.
CORES = [
    CorePlan(
        "recurrent",
        "gated_delta",
        Target("cpp", "avx512"),
        DType.F32,
        64,
        64,
        "scalar",
        (CoreUpdate(value=True, erase=True),),
        erases_before=False,
        read="post",
    ),
    CorePlan(
        "recurrent",
        "by_channel",
        Target("cpp", "avx512_bf16"),
        DType.BF16,
        64,
        48,
        "key",
        (CoreUpdate(value=True, erase=False),),
        erases_before=False,
        read="pre",
    ),
]


@pytest.mark.parametrize("plan", CORES, ids=lambda plan: plan.name)
def test_sources_of_cores_are_as_recorded(plan: CorePlan, golden: Golden) -> None:
    golden(FOLDER / f"{plan.name}-cpp-{plan.target.arch}-recurrent.cpp.expected", render_core(plan))
    gradients = render_backward(gradient_of(plan))
    golden(FOLDER / f"{plan.name}-cpp-{plan.target.arch}-recurrent_backward.cpp.expected", gradients)


def test_sources_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    program = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); from test_sources import CASES, sources\n"
        "print([sources(*case) for case in CASES])"
    )
    outputs: list[str] = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "ATTNCC_CACHE": str(tmp_path / seed)}
        command = [sys.executable, "-c", program, str(Path(__file__).parent)]
        outputs.append(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    assert outputs[0] == outputs[1]
