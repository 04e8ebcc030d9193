"""Calls of recurrences on C++ kernels: every example by the error rule, whole, split, packed and stepped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recurrent_formulas import FORMULAS
from tiers import tiered
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import attncc
from attncc.diagnostics import CallError
from attncc.error_rule import compare
from attncc.recurrent_eager import token_loop
from attncc.recurrent_inputs import recurrent_tensors
from attncc.runtime.recurrent import RecurrentAttention
from attncc.runtime.recurrent_kernels import RecurrentKernels

EXAMPLES = Path(__file__).parent.parent / "examples" / "recurrent"
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# Examples whose inputs are no matter of chance: a length, say.
# Of what is computed in float64, for which few kernels are made.
NARROW = (8, 12)
SCALARS: dict[str, dict[str, Any]] = {"cosformer": {"length": 128}}


def problem(name: str, dtype: torch.dtype, tokens: int = 70, widths: tuple[int, int] = (16, 24), heads: int = 2):
    attn = attncc.build(EXAMPLES / f"{name}.attn")
    assert isinstance(attn, RecurrentAttention)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn((2, heads, tokens, w), generator=generator).to(dtype) for w in (widths[0], widths[0], widths[1])
    )
    inputs: dict[str, Any] = dict(SCALARS.get(name, {}))
    inputs |= recurrent_tensors(attn.attention, q, k, v, inputs, generator)
    return attn, q, k, v, inputs


def assert_right(
    attn: RecurrentAttention, q: Tensor, k: Tensor, v: Tensor, inputs: dict[str, Any], **arguments: Any
) -> tuple[Tensor, Tensor]:
    """Output and state by the error rule."""
    o, state = attn(q, k, v, return_state=True, **arguments, **inputs)
    exact = attn.reference(q, k, v, return_state=True, **arguments, **inputs)
    assert isinstance(attn.kernels, RecurrentKernels)
    offsets = arguments.pop("cu_seqlens", None)
    offsets = None if offsets is None else offsets.tolist()
    plain = token_loop(attn.attention, attn.kernels.form, q, k, v, inputs, offsets=offsets, **arguments)
    for what, found, oracle, formula in zip(("o", "state"), (o, state), exact, plain, strict=True):
        message = compare(what, found, oracle, formula)
        assert message is None, message
    assert o.dtype is q.dtype
    return o, state


# One per sort of decay and of update.
FAMILIES = {"linear", "gla", "mamba2", "gated_deltanet", "rwkv7"}


@pytest.mark.representative(6)
@pytest.mark.parametrize(
    ("name", "dtype"),
    tiered(lambda name, dtype: dtype == F32 or (dtype == BF16 and name in FAMILIES), FORMULAS, (F32, BF16, F16, F64)),
    ids=str,
)
def test_every_example(name: str, dtype: torch.dtype) -> None:
    assert_right(*problem(name, dtype))


@pytest.mark.representative(3)
@pytest.mark.parametrize("name", tiered(FAMILIES.__contains__, FORMULAS))
def test_a_sequence_may_be_split_and_resumed(name: str) -> None:
    attn, q, k, v, inputs = problem(name, F64, widths=NARROW)
    if attn.attention.bidirectional:
        pytest.skip("every query reads all tokens")
    whole, last = attn(q, k, v, return_state=True, **inputs)
    names = {p.name for p in attn.attention.tensors if "N" in str(p.shape)}
    outputs: list[Tensor] = []
    state = None
    for tokens in (slice(0, 33), slice(33, 34), slice(34, 34), slice(34, None)):
        part = {n: x[:, :, tokens] if n in names else x for n, x in inputs.items()}
        rows = (x[:, :, tokens] for x in (q, k, v))
        o, state = attn(*rows, initial_state=state, return_state=True, q_offset=tokens.start, **part)
        outputs.append(o)
    assert torch.allclose(torch.cat(outputs, 2), whole, rtol=1e-9, atol=1e-9)
    assert state is not None
    assert torch.allclose(state, last, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["retnet", "gated_deltanet", "gla", "rwkv7", "linear_attention"])
def test_steps_update_the_state_in_place(name: str) -> None:
    attn, q, k, v, inputs = problem(name, F64, tokens=5, widths=NARROW)
    whole, last = attn(q, k, v, return_state=True, **inputs)
    names = {p.name for p in attn.attention.tensors if "N" in str(p.shape)}
    state = torch.zeros_like(last)
    for t in range(5):
        part = {n: x[:, :, t : t + 1] if n in names else x for n, x in inputs.items()}
        o = attn.step(*(x[:, :, t : t + 1] for x in (q, k, v)), state=state, q_offset=t, **part)
        assert torch.allclose(o, whole[:, :, t : t + 1], rtol=1e-9, atol=1e-9)
    assert torch.allclose(state, last, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["retnet", "gated_deltanet", "gla", "rwkv6"])
def test_packed_sequences(name: str) -> None:
    attn, q, k, v, inputs = problem(name, F32)
    one = {n: x[:1] if x.dim() > 1 and x.shape[0] == 2 and x.dim() > 2 else x for n, x in inputs.items()}
    offsets = torch.tensor([0, 20, 20, 53, 70], dtype=torch.int32)
    _, state = assert_right(attn, q[:1], k[:1], v[:1], one, cu_seqlens=offsets)
    assert state.shape[0] == 4
    assert not state[1].any()
    given = torch.randn_like(state)
    assert_right(attn, q[:1], k[:1], v[:1], one, cu_seqlens=offsets, initial_state=given)


@pytest.mark.parametrize("heads", [(2, 2, 4), (4, 2, 2), (1, 2, 4)], ids=str)
def test_heads_are_shared_both_ways(heads: tuple[int, int, int]) -> None:
    attn = attncc.build(EXAMPLES / "retnet.attn")
    q, k, v = (torch.randn(2, h, 40, 16) for h in heads)
    assert_right(attn, q, k, v, {"gamma": torch.rand(max(heads)) * 0.5 + 0.5})


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 2, 0), (1, 0, 4)], ids=str)
def test_nothing_gives_nothing(shape: tuple[int, int, int]) -> None:
    attn = attncc.build(EXAMPLES / "gated_deltanet.attn")
    q, k, v = (torch.randn(*shape, 8) for _ in range(3))
    state = torch.randn(*shape[:2], 8, 8)
    o, last = attn(q, k, v, g=-torch.rand(shape), beta=torch.rand(shape), initial_state=state, return_state=True)
    assert o.shape == (*shape, 8)
    assert torch.equal(last, state)


@pytest.mark.representative(2)
@pytest.mark.parametrize("name", tiered((FAMILIES | {"gated_delta_product"}).__contains__, FORMULAS))
def test_gradients_of_every_example(name: str) -> None:
    attn, q, k, v, inputs = problem(name, F32, tokens=37)
    leaves = {n: x for n, x in inputs.items() if isinstance(x, Tensor)} | {"q": q, "k": k, "v": v}

    def gradients(run: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        given = {n: x.to(dtype).requires_grad_() for n, x in leaves.items()}
        rows = [given.pop(n) for n in "qkv"]
        o, state = run(*rows, **{**inputs, **given})
        found = dict(zip("qkv", rows, strict=True)) | given
        weight = torch.linspace(-1, 1, o.numel(), dtype=dtype).reshape(o.shape).cos()
        total = (o.to(dtype) * weight).sum() + state.to(dtype).square().sum() / 10
        results = torch.autograd.grad(total, list(found.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(found, results, strict=True))

    assert isinstance(attn.kernels, RecurrentKernels)
    form = attn.kernels.form
    exact = gradients(lambda *rows, **given: attn.reference(*rows, return_state=True, **given), F64)
    plain = gradients(lambda *rows, **given: token_loop(attn.attention, form, *rows, given), F32)
    found = gradients(lambda *rows, **given: attn(*rows, return_state=True, **given), F32)
    messages = [compare(f"d{n}", found[n], exact[n], plain[n]) for n in found]
    assert not any(messages), messages


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"cu_seqlens": torch.tensor([0, 3])}, "A0621"),
        ({"cu_seqlens": torch.tensor([1, 5])}, "A0621"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 5])}, "A0621"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, "A0621"),
        ({"cu_seqlens": [0, 5]}, "A0621"),
        ({"cu_seqlens": torch.tensor([[0, 5]])}, "A0621"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "A0622"),
        ({"initial_state": torch.zeros(2, 2, 8, 9)}, "A0603"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], code: str) -> None:
    attn = attncc.build(EXAMPLES / "linear.attn")
    q, k, v = (torch.randn(2 if code != "A0621" else 1, 2, 5, 8) for _ in range(3))
    with pytest.raises(CallError, match=code):
        attn(q, k, v, **change)


def misfits(x: Tensor) -> list[Any]:
    """What cannot stand in for `x`, one axis, type or layout at a time."""
    longer = [torch.cat([x, x.narrow(axis, 0, 1)], axis) for axis in range(x.dim())]
    return [*longer, x[0], x.int(), x.to("meta"), x.to_sparse(), x.numpy(), "x"]


def test_every_misfit_has_its_reason() -> None:
    attn = attncc.build(EXAMPLES / "gated_deltanet.attn")
    fitting = {name: torch.rand(3, 4, 5, 6) for name in "qkv"}
    fitting |= {"g": -torch.rand(3, 4, 5), "beta": torch.rand(3, 4, 5), "initial_state": torch.rand(3, 4, 6, 6)}
    attn(**fitting)
    wrong = [{name: x} for name, given in fitting.items() for x in misfits(given)]
    wrong += [{"q_offset": x} for x in (None, True, 0.5, 2**31, torch.zeros(2))] + [{"gamma": torch.rand(4)}]
    for change in wrong:
        with pytest.raises(CallError):
            attn(**{**fitting, **change})
    for name in ("g", "beta"):
        with pytest.raises(CallError, match=name):
            attn(**{n: x for n, x in fitting.items() if n != name})


@pytest.mark.parametrize(
    "state",
    [torch.zeros(1, 2, 8, 8, dtype=BF16), torch.zeros(1, 2, 8, 16)[..., ::2], torch.zeros(1, 2, 8, 8).requires_grad_()],
    ids=["type", "strides", "autograd"],
)
def test_a_state_that_cannot_be_written_to_is_refused(state: Tensor) -> None:
    attn = attncc.build(EXAMPLES / "linear.attn")
    with pytest.raises(CallError, match="A0623"):
        attn.step(*(torch.randn(1, 2, 1, 8) for _ in range(3)), state=state)


@pytest.mark.parametrize(
    ("name", "advice"),
    [("return_state", "becomes the state after it"), ("cu_seqlens", "make a call"), ("scale", "in the specification")],
)
def test_keywords_of_calls_are_refused_by_steps_with_advice(name: str, advice: str) -> None:
    attn = attncc.build(EXAMPLES / "linear.attn")
    with pytest.raises(CallError, match="A0608") as caught:
        attn.step(*(torch.randn(1, 2, 1, 8) for _ in range(3)), state=torch.zeros(1, 2, 8, 8), **{name: True})
    assert advice in str(caught.value)


def test_a_compiled_function_breaks_its_graph_at_a_call_and_nowhere_else() -> None:
    attn = attncc.build(EXAMPLES / "retnet.attn")
    gamma = torch.rand(2)

    def function(x: Tensor) -> Tensor:
        rows = torch.tanh(x)
        return attn(rows, rows, rows, gamma=gamma) * 2

    x = torch.randn(1, 2, 20, 8)
    torch.compiler.reset()
    counter = CompileCounter()
    assert torch.equal(torch.compile(function, backend=counter)(x), function(x))
    assert counter.frame_count == 2  # before the call, and after it


def test_queries_that_read_all_tokens_are_not_packed() -> None:
    attn = attncc.build("attention a():\n    feature = elu(x) + 1\n    normalize = sum\n")
    with pytest.raises(CallError, match="A0626"):
        attn(*(torch.randn(1, 2, 5, 8) for _ in range(3)), cu_seqlens=torch.tensor([0, 2, 5]))
