"""`torch.compile`, `torch.export` and AOTInductor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch_support import CAUSAL, EVERYTHING, SPEC, assert_close, gradients, inputs, leaves, operands

import attncc

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _afresh() -> None:
    torch._dynamo.reset()


class Model(nn.Module):
    """Projections around an attention with every kind of input."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16)
        self.slope = nn.Parameter(inputs()["slope"])
        self.cap = nn.Parameter(inputs()["cap"])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, doc: Tensor, window: int = 9, rate: float = 1.0) -> Tensor:
        captured = {"slope": self.slope, "cap": self.cap, "doc": doc, "window": window, "rate": rate}
        o, lse = EVERYTHING(self.project(q), k, v, return_lse=True, **captured)
        return o.relu() * lse[..., None]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_forward_and_backward_without_a_break(backend: str) -> None:
    torch.manual_seed(0)
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    q, k, v = leaves(*operands())
    doc = inputs()["doc"]
    tensors = (q, k, v, *model.parameters())
    exact = torch.autograd.grad(model(q, k, v, doc).square().sum(), tensors)
    assert_close(torch.autograd.grad(compiled(q, k, v, doc).square().sum(), tensors), exact)


@pytest.mark.representative(1)
@pytest.mark.parametrize("normalize", ["", "    normalize = sum\n"])
def test_weights_of_ones_own(normalize: str) -> None:
    attn = attncc.build(f"attention gated():\n    weight = sigmoid(score)\n{normalize}    mask = causal\n")
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
    for x, y in zip(gradients(compiled, *operands()), gradients(attn, *operands()), strict=True):
        assert torch.equal(x, y)


def test_sizes_and_ints_vary_without_compiling_anything_again() -> None:
    attn = attncc.build(SPEC)
    counter = CompileCounterWithBackend("aot_eager")

    def call(q: Tensor, k: Tensor, v: Tensor, captured: dict[str, Tensor], window: int, q_offset: int) -> Tensor:
        return attn(q, k, v, window=window, q_offset=q_offset, **captured)

    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    compilations: list[int] = []
    for N, window in ((24, 9), (31, 4), (17, 12), (40, 5)):
        q, k, v = leaves(*operands(N))
        arguments = (q[:, :, : N - 3], k, v, inputs(N), window, 3)
        assert torch.equal(compiled(*arguments), call(*arguments))
        (found,) = torch.autograd.grad(compiled(*arguments).sum(), q)
        (exact,) = torch.autograd.grad(call(*arguments).sum(), q)
        assert torch.equal(found, exact)
        compilations.append(counter.frame_count)
    assert compilations == [compilations[0]] * 4
    assert len(attn.kernels.built) == 1
    assert len(attn.kernels._backward) == 1


def test_sizes_that_are_marked() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CAUSAL, fullgraph=True, backend=counter)
    for N in (24, 31, 17):
        q, k, v = operands(N)
        for x in (q, k, v):
            torch._dynamo.mark_dynamic(x, 2)
        assert torch.equal(compiled(q, k, v), CAUSAL(q, k, v))
    assert counter.frame_count == 1


def test_numbers_for_tensors_without_axes() -> None:
    compiled = torch.compile(EVERYTHING, fullgraph=True, backend="aot_eager")
    arguments = {**inputs(), "cap": 2.5, "rate": 0.5, "within": False}
    assert torch.equal(compiled(*operands(), **arguments), EVERYTHING(*operands(), **arguments))


def test_an_int_in_a_tensor() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, window: Tensor) -> Tensor:
        return EVERYTHING(q, k, v, window=window, **inputs())

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        for window in (torch.tensor(3), torch.tensor(7)):
            assert torch.equal(compiled(*operands(), window), call(*operands(), window))
        with pytest.raises(RuntimeError):
            compiled(*operands(), torch.tensor(2**40))


def test_without_gradients_and_in_inference_mode() -> None:
    compiled = torch.compile(CAUSAL, fullgraph=True, backend="aot_eager")
    q, k, v = operands()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(compiled(q, k, v), CAUSAL(q, k, v))


def test_autocast() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return CAUSAL(q, k, v)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    q, k, v = operands()
    assert compiled(q, k, v).dtype == torch.bfloat16
    assert torch.equal(compiled(q, k, v), call(q, k, v))
    compiled = torch.compile(CAUSAL, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(q, k, v), call(q, k, v))
    assert compiled(q, k, v).dtype == torch.float32


def test_checkpoints_and_transforms_within() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        checkpointed = torch.utils.checkpoint.checkpoint(CAUSAL, q, k, v, use_reentrant=False)
        mapped = torch.vmap(CAUSAL)(q[None], k[None], v[None])[0]
        return checkpointed + mapped

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for x, y in zip(gradients(compiled, *operands()), gradients(call, *operands()), strict=True):
        assert torch.equal(x, y)


def test_dropout() -> None:
    attn = attncc.build("attention dropping():\n    mask = causal\n")

    def call(q: Tensor, k: Tensor, v: Tensor, seed: int) -> Tensor:
        return attn(q, k, v, dropout_p=0.5, seed=seed)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for seed in (1, 2, 2**40):
        found = gradients(lambda *operand, seed=seed: compiled(*operand, seed), *operands())
        for x, y in zip(found, gradients(lambda *operand, seed=seed: call(*operand, seed), *operands()), strict=True):
            assert torch.equal(x, y)


def test_a_seed_is_drawn_anew_in_every_run() -> None:
    attn = attncc.build("attention dropping():\n    mask = causal\n")
    compiled = torch.compile(lambda *x: attn(*x, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    q, k, v = operands()
    torch.manual_seed(0)
    found = [compiled(q, k, v) for _ in range(3)]
    torch.manual_seed(0)
    assert all(torch.equal(x, attn(q, k, v, dropout_p=0.5)) for x in found)
    assert not torch.equal(found[0], found[1])


def test_gradients_within() -> None:
    q, k, v = operands()
    gradient = torch.func.grad(lambda q: CAUSAL(q, k, v).square().sum())
    assert torch.equal(torch.compile(gradient, fullgraph=True, backend="aot_eager")(q), gradient(q))


def test_traced_gradients_in_inference_mode() -> None:
    captured = inputs()

    def loss(slope: Tensor, cap: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return EVERYTHING(q, k, v, slope=slope, cap=cap, doc=captured["doc"]).square().sum()

    gradient = torch.func.grad(loss, argnums=(0, 1))
    arguments = (captured["slope"], captured["cap"], *operands())
    traced = make_fx(gradient)(*arguments)
    with torch.inference_mode():
        found = traced(*(x.clone() for x in arguments))
    for x, y in zip(found, gradient(*arguments), strict=True):
        assert torch.equal(x, y)


def test_a_mistake_is_explained() -> None:
    q, k, v = operands()
    with pytest.raises(Exception, match=r"A0603|has size 3") as caught:
        torch.compile(CAUSAL, backend="aot_eager")(q, k[:, :, :3], v)
    assert caught.value is not None


# --- programs -------------------------------------------------------------------------------------------------------

_M, _N = torch.export.Dim("M", min=2, max=4096), torch.export.Dim("N", min=2, max=4096)
_SHAPES = ({2: _M}, {2: _N}, {2: _N}, {1: _N}, None, None)


def exported(strict: bool) -> Any:
    model = Model().eval()
    call = (*operands(), inputs()["doc"], 9, 1.0)
    return model, torch.export.export(model, call, dynamic_shapes=_SHAPES, strict=strict)


def in_another_process(program: str, folder: Path) -> None:
    """Runs a program that loads what it needs from `folder` and builds no attention itself."""
    prologue = "import sys, torch, attncc\nattncc.register_operators()\nfolder = sys.argv[1]\n"
    command = [sys.executable, "-c", prologue + program, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.representative(1)
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool, tmp_path: Path) -> None:
    model, program = exported(strict)
    torch.export.save(program, tmp_path / "program.pt2")
    calls = [(q[:, :, 5:], k, v, inputs(N)["doc"], 9, 1.0) for N in (24, 33) for q, k, v in [operands(N)]]
    torch.save([(call, model(*call)) for call in calls], tmp_path / "calls.pt")
    in_another_process(
        "model = torch.export.load(f'{folder}/program.pt2').module()\n"
        "for call, exact in torch.load(f'{folder}/calls.pt'):\n"
        "    assert torch.equal(model(*call), exact)\n",
        tmp_path,
    )


def test_an_exported_program_trains() -> None:
    model, program = exported(strict=False)
    again = program.module()
    call = (*operands(), inputs()["doc"], 9, 1.0)
    exact = torch.autograd.grad(model(*call).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(again(*call).square().sum(), list(again.parameters()))
    names = [name for name, _ in model.named_parameters()]
    by_name = dict(zip([name for name, _ in again.named_parameters()], found, strict=True))
    assert_close([by_name[name] for name in names], exact)


@pytest.mark.slow
def test_aot_inductor(tmp_path: Path) -> None:
    model, program = exported(strict=False)
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    # Code of AOTInductor, unlike our kernels, takes tensors of the strides that it was compiled for.
    tensors = [(q[:, :, 5:].contiguous(), k, v, inputs(N)["doc"]) for N in (24, 33) for q, k, v in [operands(N)]]
    calls = [(*call, 9, 1.0) for call in tensors]
    torch.save([(call, model(*call).detach()) for call in calls], tmp_path / "calls.pt")
    in_another_process(
        "model = torch._inductor.aoti_load_package(f'{folder}/model.pt2')\n"
        "for call, exact in torch.load(f'{folder}/calls.pt'):\n"
        "    torch.testing.assert_close(model(*call), exact)\n",
        tmp_path,
    )
