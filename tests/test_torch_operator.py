"""What PyTorch knows of the operators, and who gets one instead of memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiers import tiered
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch_support import CAUSAL, EVERYTHING, inputs, operands

import attncc
from attncc import CallError
from attncc.runtime.operator import variant_of

ATTEND = torch.ops.attncc.attend.default
BACKWARD = torch.ops.attncc.attend_backward.default
SPECS = {
    "softmax": "attention plain():\n    mask = causal\n",
    "sum": "attention summed():\n    weight = relu(score) ** 2\n    normalize = sum\n",
    "elementwise": "attention gated(width: int = 4):\n    weight = sigmoid(score)\n    mask = q_idx - kv_idx < width\n",
}


def arguments(attn: Any, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> tuple[Any, ...]:
    """Of the operator, with the defaults of scalars."""
    defaults = [p.default for p in attn.attention.scalars]
    exact = [int(x) for x in defaults if type(x) is not float]
    return (attn.recipe, q, k, v, list(tensors), exact, [x for x in defaults if type(x) is float], 0)


@pytest.mark.parametrize("learned", [(), ("q", "k", "v", "slope", "cap"), ("cap",)])
def test_opcheck_of_a_specification_with_every_kind_of_input(learned: tuple[str, ...]) -> None:
    q, k, v = operands(8)
    values = {"q": q, "k": k, "v": v, **inputs(8)}
    for name in learned:
        values[name].requires_grad_()
    torch.library.opcheck(ATTEND, arguments(EVERYTHING, *values.values()))


@pytest.mark.representative(2)
@pytest.mark.parametrize(
    ("name", "dtype"),
    tiered(
        lambda name, dtype: dtype == torch.float32 or name == "softmax",
        SPECS,
        (torch.float32, torch.bfloat16, torch.float64),
    ),
    ids=str,
)
def test_opcheck_of_every_normalizer(name: str, dtype: torch.dtype) -> None:
    attn = attncc.build(SPECS[name])
    q, k, v = operands(8, dtype=dtype)
    strided = v.transpose(1, 2).contiguous().transpose(1, 2)
    call = arguments(attn, q.requires_grad_(), k, strided)
    torch.library.opcheck(ATTEND, call)
    o, total = (x.detach() for x in ATTEND(*call))
    call = arguments(attn, q.detach(), k, strided)
    dtotal = None if name == "elementwise" else torch.ones_like(total)
    torch.library.opcheck(BACKWARD, (*call, o, total, torch.ones(()).to(dtype).expand(o.shape), dtotal, []))


def test_opcheck_of_gradients_of_captured_tensors() -> None:
    values = {**dict(zip("qkv", operands(8), strict=True)), **inputs(8)}
    call = arguments(EVERYTHING, *values.values())
    o, total = ATTEND(*call)
    torch.library.opcheck(BACKWARD, (*call, o, total, torch.ones_like(o), None, [True, False, False]))
    torch.library.opcheck(BACKWARD, (*call, o, total, torch.ones_like(o), None, [True, True, False]))


def test_arguments_of_an_operator_are_checked_before_a_kernel_reads_them() -> None:
    q, k, v = operands()
    with pytest.raises(CallError) as caught:
        ATTEND(CAUSAL.recipe, q, k[:, :, :3], v, [], [], [], 0)
    assert [d.code for d in caught.value.diagnostics] == ["A0603"]
    o, total = ATTEND(CAUSAL.recipe, q, k, v, [], [], [], 0)
    for wrong in ((o[:, :1], total, o[:, :1], None), (o, total[:, :1], o, None), (o, total, o, total[:, :, :1])):
        with pytest.raises(AssertionError):
            BACKWARD(CAUSAL.recipe, q, k, v, [], [], [], 0, *wrong, [])


# --- recipes --------------------------------------------------------------------------------------------------------


def test_a_recipe_builds_the_same_attention_in_another_process(tmp_path: Path) -> None:
    (tmp_path / "masks.attn").write_text("define near(n) = causal and q_idx - kv_idx < n\n")
    spec = tmp_path / "spec.attn"
    spec.write_text(
        'use "masks.attn"\nattention other():\n    mask = true\n'
        "attention near_by(reach: const int):\n    mask = near(reach)\n"
    )
    attn = attncc.build(spec, name="near_by", reach=np.int64(3), target="cpp:portable")
    q, k, v = operands()
    torch.save((attn.recipe, q, k, v, attn(q, k, v)), tmp_path / "call.pt")
    for path in tmp_path.glob("*.attn"):
        path.unlink()
    program = (
        "import sys, torch, attncc\n"
        "attncc.register_operators()\n"
        "recipe, q, k, v, o = torch.load(sys.argv[1])\n"
        "assert torch.equal(torch.ops.attncc.attend(recipe, q, k, v, [], [], [], 0)[0], o)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "call.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_operators_use_the_kernels_of_the_attention_that_calls_them() -> None:
    attn = attncc.build(SPECS["softmax"])
    q, k, v = operands()
    attn(q.requires_grad_(), k, v).sum().backward()
    assert variant_of(attn.recipe).kernels is attn.kernels
    assert len(attn.kernels.built) == 1


def test_an_attention_that_nobody_holds_is_built_again() -> None:
    attn = attncc.build("attention forgotten():\n    mask = q_idx - kv_idx < 5\n")
    recipe, (q, k, v) = attn.recipe, operands()
    exact = attn(q, k, v)
    del attn
    o, _ = ATTEND(recipe, q, k, v, [], [], [], 0)
    assert torch.equal(o, exact)


# --- who never gets memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn", [CAUSAL, EVERYTHING], ids=["causal", "everything"])
def test_fake_tensors(attn: Any) -> None:
    captured = inputs() if attn is EVERYTHING else {}
    q, k, v = operands(dtype=torch.bfloat16)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        o, lse = attn(*fakes, return_lse=True, **{name: mode.from_tensor(x) for name, x in captured.items()})
    real, real_lse = attn(q, k, v, return_lse=True, **captured)
    for fake, x in ((o, real), (lse, real_lse)):
        assert isinstance(fake, FakeTensor)
        assert (fake.shape, fake.dtype, fake.stride()) == (x.shape, x.dtype, x.stride())


@pytest.mark.parametrize("attn", [CAUSAL, EVERYTHING], ids=["causal", "everything"])
def test_meta_tensors(attn: Any) -> None:
    captured = inputs() if attn is EVERYTHING else {}
    values = {**dict(zip("qkv", operands(), strict=True)), **captured}
    meta = {name: x.to("meta") for name, x in values.items()}
    meta["q"].requires_grad_()
    o = attn(**meta)
    assert o.is_meta
    assert o.shape == (2, 4, 24, 16)
    o.sum().backward()
    assert meta["q"].grad.is_meta


def test_tensor_subclasses() -> None:
    q, k, v = operands()
    two = TwoTensor(q.clone(), 2 * q)
    o = CAUSAL(two, k, v)
    assert torch.equal(o.a, CAUSAL(q, k, v))
    assert torch.equal(o.b, CAUSAL(2 * q, k, v))

    class Named(Tensor):
        """Its elements lie in memory, and it sees every function of PyTorch."""

    named = q.as_subclass(Named)
    assert isinstance(CAUSAL(named, k, v), Named)
    torch.testing.assert_close(CAUSAL(named, k, v).as_subclass(Tensor), CAUSAL(q, k, v))


def test_parameters_are_plain_tensors() -> None:
    slope = torch.nn.Parameter(inputs()["slope"])
    with torch.no_grad():
        o = EVERYTHING(*operands(), **{**inputs(), "slope": slope})
    assert torch.equal(o, EVERYTHING(*operands(), **inputs()))


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_default_device_is_no_matter(device: str) -> None:
    q, k, v = operands()
    exact = CAUSAL(q, k, v)
    with torch.device(device):
        assert torch.equal(CAUSAL(q, k, v), exact)
        leaf = q.clone().requires_grad_()
        CAUSAL(leaf, k, v).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.device.type == "cpu"


@pytest.mark.parametrize(
    "call",
    [
        lambda q, k, v: torch.vmap(lambda q: CAUSAL(q, k, v, stats=("max",)))(q[None]),
        lambda q, k, v: CAUSAL(*(x.to("meta") for x in (q, k, v)), stats=("column_sums",)),
        lambda q, k, v: CAUSAL(TwoTensor(q, q), k, v, stats=("entropy",)),
    ],
    ids=["vmap", "meta", "subclass"],
)
def test_statistics_of_what_is_not_in_memory(call: Any) -> None:
    with pytest.raises(CallError) as caught:
        call(*operands())
    assert [d.code for d in caught.value.diagnostics] == ["A0618"]


def test_statistics_under_a_default_device() -> None:
    q, k, v = operands()
    with torch.device("meta"):
        _, found = CAUSAL(q, k, v, stats=("max", "entropy", "column_sums"))
    _, exact = CAUSAL(q, k, v, stats=("max", "entropy", "column_sums"))
    assert all(torch.equal(found[name], exact[name]) for name in exact)


def test_dispatch_modes_see_the_operators() -> None:
    seen: list[Any] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    q, k, v = operands()
    with Watch():
        CAUSAL(q, k, v)
        CAUSAL(q.clone().requires_grad_(), k, v).sum().backward()
    assert seen.count(ATTEND) == 2
    assert seen.count(BACKWARD) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traces_hold_the_operator() -> None:
    q, k, v = operands()
    traced = torch.jit.trace(CAUSAL.__call__, (q, k, v))
    assert torch.equal(traced(2 * q, k, v), CAUSAL(2 * q, k, v))
