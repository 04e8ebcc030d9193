"""Calls of recurrences that once went wrong."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import attncc

LINEAR = "attention linear():\n    recurrence:\n        S += outer(k, v)\n        out = q @ S\n"
# The same with rows that PyTorch transforms, and one without a normal form.
OF_UNIT_KEYS = LINEAR.replace("    recurrence", "    k = l2norm(k)\n    recurrence")
BOUNDED = LINEAR.replace("S += outer(k, v)", "S = tanh(S) + outer(k, v)").replace(
    "    rec", "    k = l2norm(k)\n    rec"
)


def compare(attn: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tolerance: float = 1e-4, **inputs: Any):
    """Output and state of the kernel that makes its operands and of the one that PyTorch makes them for, against the
    statements in float64."""
    expected = attn.reference(q, k, v, return_state=True, **inputs)
    with torch.no_grad():
        made_by_kernel = attn(q, k, v, return_state=True, **inputs)
    made_by_pytorch = attn(q.clone().requires_grad_(), k, v, return_state=True, **inputs)
    for found in (made_by_kernel, made_by_pytorch):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def rows(
    tokens: int, heads: tuple[int, int, int] = (2, 2, 2), width: int = 4
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, tokens, width) for h in heads)
    return q, k, v


def test_an_int_given_at_run_time_meets_an_int_of_the_text() -> None:
    attn: Any = attncc.build("""
attention example(flag: bool, n: int, c: float, m: bool[B, N], w: int[H], g: float[B, HKV, N]):
    recurrence:
        S *= exp(g[b, hkv, t])
        S += outer(k, where(m[b, t], v, c)) * where(flag, 1, n)
        out = q @ S + where(flag, n, w[h] // 2) * v
""")
    q, k, v = rows(20, (4, 2, 1))
    inputs: dict[str, Any] = {
        "m": torch.rand(2, 20) > 0.5,
        "w": torch.arange(4),
        "g": -torch.rand(2, 2, 20),
        "c": 0.3,
        "n": 3,
    }
    for flag in (False, True):
        compare(attn, q, k, v, flag=flag, **inputs)


@pytest.mark.parametrize("text", [LINEAR, BOUNDED])
def test_a_recurrence_that_has_run_is_copied_and_pickled(text: str) -> None:
    attn: Any = attncc.build(text)
    q, k, v = rows(5)
    expected = attn(q, k, v)
    for copied in (copy.deepcopy(attn), copy.deepcopy([attn])[0], pickle.loads(pickle.dumps(attn))):
        assert torch.equal(copied(q, k, v), expected)


def fake(attn: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    with FakeTensorMode() as mode:
        return attn(*(mode.from_tensor(x) for x in (q, k, v)))


def on_meta(attn: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return attn(q.to("meta"), k.to("meta"), v.to("meta"))


def step_on_meta(attn: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return attn.step(q.to("meta"), k.to("meta"), v.to("meta"), state=torch.zeros(2, 2, 4, 4, device="meta"))


def dual(attn: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    with forward_ad.dual_level():
        return attn(forward_ad.make_dual(q, k), k, v)


def mapped(attn: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return torch.vmap(attn)(q[None], k[None], v[None])


def by_functorch(attn: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return torch.func.grad(lambda q: attn(q, k, v).sum())(q)


@pytest.mark.parametrize("call", [fake, on_meta, step_on_meta, dual, mapped, by_functorch])
@pytest.mark.parametrize("text", [LINEAR, BOUNDED])
def test_what_has_no_memory_or_is_transformed_is_refused(call: Callable[..., Any], text: str) -> None:
    """Kernels wrote to address 0, and tangents were lost."""
    with pytest.raises(attncc.CallError, match="tensors in memory"):
        call(attncc.build(text), *rows(5))


@pytest.mark.parametrize("text", [OF_UNIT_KEYS, BOUNDED])
def test_second_derivatives_are_refused(text: str) -> None:
    """They lacked the part that goes through the kernel where the first gradient came from a sum."""
    attn: Any = attncc.build(text)
    q, k, v = (x.requires_grad_() for x in rows(5))
    for total in (attn(q, k, v).sum(), attn(q, k, v).square().sum()):
        found = torch.autograd.grad(total, (q, k), create_graph=True)
        with pytest.raises(attncc.CallError, match="no gradients in turn"):
            torch.autograd.grad(found[0].square().sum() + found[1].square().sum(), (q, k))


DECAYS = {
    "gamma: float[H]": "gamma[h]",
    "gamma: float[B, H, N]": "1 - gamma[b, h, t]",
    "gamma: float[B, H, N, D]": "gamma[b, h, t, :][:, None]",
    "gamma: float[B, H, N, E]": "(0.5 * gamma[b, h, t, :] * exp(-t))[None, :]",
    "gamma: float[H, D]": "where(gamma[h, :] < -0.5, k * gamma[h, :], 0.5)[:, None]",
    "gamma: float[H], n: int": "gamma[h] ** n",
    "gamma: float": "gamma",
}


@pytest.mark.representative(4)
@pytest.mark.parametrize("parameters", DECAYS)
@pytest.mark.parametrize("low", [-1.0, 0.0], ids=["negative", "zero"])
def test_a_decay_that_has_no_logarithm(parameters: str, low: float) -> None:
    """It became NaN where it was negative, and the gradient of one that is 0 was NaN."""
    attn: Any = attncc.build(f"""
attention decaying({parameters}):
    recurrence:
        S *= {DECAYS[parameters]}
        S += outer(k, v)
        out = q @ S
""")
    q, k, v = rows(18)
    sizes = {"B": 2, "H": 2, "N": 18, "D": 4, "E": 4}
    axes = parameters.partition("[")[2].partition("]")[0]
    gamma: Any = torch.rand([sizes[name] for name in axes.split(", ")]) if axes else low
    if axes:
        gamma.view(-1)[::3] = low
    inputs: dict[str, Any] = {"n": 2} if "n:" in parameters else {}
    compare(attn, q, k, v, gamma=gamma, **inputs)
    state, expected = torch.ones(2, 2, 4, 4), torch.ones(2, 2, 4, 4, dtype=torch.float64)
    attn.step(q, k, v, gamma=gamma, state=state, **inputs)
    _, expected = attn.reference(q, k, v, gamma=gamma, initial_state=expected, return_state=True, **inputs)
    torch.testing.assert_close(state.double(), expected, rtol=1e-4, atol=1e-4)
    if axes:
        gamma.requires_grad_()
        found, wanted = (
            torch.autograd.grad(f(q, k, v, gamma=gamma, **inputs).square().sum(), gamma)[0]
            for f in (attn, attn.reference)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_zero_to_the_power_of_zero_keeps_the_state() -> None:
    attn: Any = attncc.build(
        "attention f(x: float[H], n: int):\n    recurrence:\n        S *= x[h] ** n\n"
        "        S += outer(k, v)\n        out = q @ S\n"
    )
    compare(attn, *rows(5), x=torch.tensor([0.0, 2.0]), n=0)


@pytest.mark.representative(1)
@pytest.mark.parametrize("width", [16, 24])
def test_keys_of_what_is_erased_beside_keys_of_what_is_written(width: int) -> None:
    text = "attention a(g: float[B, H, N], x: float[B, H, N, D], y: float[B, H, N, D]):\n    recurrence:\n"
    text += "        S *= exp(g[b, h, t])\n        S -= outer(y[b, h, t, :], x[b, h, t, :] @ S)\n"
    q, k, v = rows(40, width=width)
    torch.manual_seed(1)
    x, y, g = torch.randn_like(q) / 10, torch.randn_like(q), -torch.rand(q.shape[:3])
    attn = attncc.build(text + "        S += outer(k, v)\n        out = q @ S\n")
    compare(attn, q / 4, k / 4, v, g=g, x=x, y=y)


def test_a_step_without_a_state_is_refused() -> None:
    attn: Any = attncc.build(LINEAR)
    with pytest.raises(attncc.CallError, match="`state` must be"):
        attn.step(*rows(1), state=None)


def test_a_step_names_its_state_as_it_was_given() -> None:
    attn: Any = attncc.build(LINEAR)
    q, k, v = rows(1)
    with pytest.raises(attncc.CallError, match="`state`") as found:
        attn.step(q, k, v, state=torch.zeros(*q.shape[:2], q.shape[3], v.shape[3] + 1))
    assert "initial_state" not in str(found.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_between_vectors_in_memory(dtype: torch.dtype) -> None:
    """Values that are read where the caller has them were taken to begin where a vector may; that ended the process."""
    q, k, v = (x.to(dtype) for x in rows(40, width=16))
    between = torch.empty(v.numel() + 1, dtype=dtype)[1:].view(v.shape).copy_(v)
    with torch.no_grad():
        attn: Any = attncc.build(LINEAR)
        assert torch.equal(attn(q, k, between), attn(q, k, v))


def test_offsets_that_lie_apart() -> None:
    """Kernels read what lay between them, and wrote outside of the output."""
    q, k, v = (x[:1] for x in rows(40))
    attn: Any = attncc.build(LINEAR)
    offsets = torch.tensor([0, 16, 16, 40])
    apart = torch.stack([offsets, torch.full_like(offsets, 7)], 1)[:, 0]
    compare(attn, q, k, v, cu_seqlens=apart)


@pytest.mark.parametrize("text", [LINEAR, BOUNDED])
def test_negations_that_pytorch_has_put_off(text: str) -> None:
    """States and gradients of outputs had the wrong sign."""
    attn: Any = attncc.build(text)
    q, k, v = rows(20)
    state = torch.randn(2, 2, 4, 4)
    negated = torch._neg_view(state)
    compare(attn, q, k, v, initial_state=negated)
    with pytest.raises(attncc.CallError, match="has put off"):
        attn.step(q, k, v, state=negated)
    q.requires_grad_()
    o, last = attn(q, k, v, return_state=True)
    d_o, d_last = torch.randn_like(o), torch.randn_like(last)
    wanted = torch.autograd.grad((o, last), q, (-d_o, -d_last), retain_graph=True)[0]
    found = torch.autograd.grad((o, last), q, (torch._neg_view(d_o), torch._neg_view(d_last)))[0]
    torch.testing.assert_close(found, wanted)


def test_writes_of_whole_panels_of_doubles() -> None:
    """The compiler took what scales them for a function without effect: nothing was ever written."""
    text = LINEAR.replace("linear()", "retention(gamma: float[H])").replace("S +=", "S *= gamma[h]\n        S +=")
    q, k, v = (x.double() for x in rows(40, width=8))
    compare(attncc.build(text, target="cpp:portable"), q, k, v, 1e-12, gamma=torch.tensor([0.5, 0.9]).double())


@pytest.mark.parametrize("tokens", [32, 40])
def test_a_state_that_grows_after_it_was_read(tokens: int) -> None:
    """Between two tokens it grew by more than a number holds, times nothing: that became NaN."""
    attn: Any = attncc.build("""
attention growing(g: float[B, H, N]):
    recurrence:
        out = q @ S
        S *= exp(g[b, h, t])
        S += outer(k, v)
""")
    q, k, v = rows(tokens)
    v[:, :, :32] = 0
    g = torch.zeros(2, 2, tokens)
    g[:, :, 30:32] = 48
    compare(attn, q, k, v, g=g)


@pytest.mark.parametrize("stroke", [-200, -1e5])
def test_what_follows_a_stroke_has_all_its_digits(stroke: float) -> None:
    """Decays of scores as products of two had no more digits than sums of logarithms leave behind the point."""
    text = LINEAR.replace("linear()", "gated(g: float[B, H, N])").replace("S +=", "S *= exp(g[b, h, t])\n        S +=")
    q, k, v = (x.double().abs() for x in rows(32))
    g = torch.full((2, 2, 32), -1e-3).double()
    g[:, :, 0] = stroke
    attn: Any = attncc.build(text)
    with torch.no_grad():
        found = attn(q, k, v, g=g)
    torch.testing.assert_close(found, attn.reference(q, k, v, g=g), rtol=3e-15, atol=0)


@pytest.mark.parametrize("decay", ["exp(g[b, h, t])", "exp(g[b, h, t] * n[b, h, t, :])[:, None]"])
@pytest.mark.parametrize("tokens", [32, 45])
def test_chunks_of_which_a_part_forgets(decay: str, tokens: int) -> None:
    """Such a part is taken token by token, the rest in halves of the chunk: with their own factors and gates."""
    attn: Any = attncc.build(f"""
attention example(g: float[B, H, N], n: float[B, H, N, D], beta: float[B, H, N]):
    k = l2norm(k)
    recurrence:
        S *= {decay}
        S += outer(k, beta[b, h, t] * (v - k @ S))
        out = (scale * q @ S) * sigmoid(v)
""")
    q, k, v = rows(tokens, width=8)
    g = -torch.rand(2, 2, tokens)
    g[:, 0, 11] = -torch.inf
    g[:, 1, tokens - 1] = -1e20
    n = torch.rand(2, 2, tokens, 8) + 0.1
    compare(attn, q, k, v, g=g, n=n, beta=torch.rand(2, 2, tokens))


@pytest.mark.parametrize(
    ("name", "advice"),
    [("return_lse", "no weights of pairs"), ("dropout_p", "no weights of pairs"), ("state", "initial_state=")],
)
def test_what_only_other_calls_take(name: str, advice: str) -> None:
    attn = attncc.build("attention linear():\n    recurrence:\n        S += outer(k, v)\n        out = q @ S\n")
    rows = [torch.zeros(1, 1, 3, 4)] * 3
    with pytest.raises(attncc.CallError, match=advice):
        attn(*rows, **{name: None})


@pytest.mark.parametrize("target", ["cpp", "triton:interpret"])
@pytest.mark.parametrize(
    ("tokens", "decay"),
    [
        (33, "gamma[h]"),
        (100, "gamma[h]"),
        (70, "sigmoid(k + gamma[h])[:, None]"),
        (70, "sigmoid(v + gamma[h])[None, :]"),
    ],
)
def test_states_of_bf16_rows_are_f32(tokens: int, decay: str, target: str) -> None:
    """What a decay multiplies was kept to 16 bits, or 8."""
    text = LINEAR.replace("linear()", "retention(gamma: float[H])").replace("S +=", f"S *= {decay}\n        S +=")
    attn: Any = attncc.build(text, target=target)
    q, k, v = (x.bfloat16() for x in rows(tokens))
    gamma = torch.tensor([0.9, 0.97])
    o, state = attn(q, k, v, gamma=gamma, return_state=True)
    _, exact = attn.reference(q, k, v, gamma=gamma, return_state=True)
    # Triton adds up decays of a chunk in f32, C++ in f64: the former has the 16 units of the rule.
    units = 4 if target == "cpp" else 16
    assert (state - exact).abs().max() < units * 2.0**-23 * exact.abs().max()
    without = attn(q, k, v, gamma=gamma)
    assert (o.float() - without.float()).abs().max() <= 2**-7 * o.float().abs().max()


@pytest.mark.parametrize(
    "decay", ["sigmoid(g[b, h, t, :]) ** (1 / 8)", "sqrt(sigmoid(g[b, h, t, :]))", "exp(g[b, h, t, :]) ** 0.125"]
)
@pytest.mark.parametrize("written", ["S += outer(k, v)\n        out = q @ S", "out = q @ S\n        S += outer(k, v)"])
def test_roots_of_gates_that_underflow_have_gradients(decay: str, written: str) -> None:
    """They went token by token, by a power of 0, whose slope is infinite; or into queries that read what is decayed and
    not yet written."""
    text = LINEAR.replace("linear()", "gated(g: float[B, H, N, D])").split("S +=")[0]
    attn: Any = attncc.build(f"{text}S *= ({decay})[:, None]\n        {written}\n")
    q, k, v = rows(40)
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(q.shape, generator=generator) - 3
    g[0, 0, 5] = -110
    found = torch.autograd.grad(attn(q, k, v, g=g.requires_grad_()).sum(), g)[0]
    wide = g.detach().double().requires_grad_()
    power = 0.5 if "sqrt" in decay else 0.125
    root = wide if decay.startswith("exp") else torch.nn.functional.logsigmoid(wide)
    state = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for t in range(q.shape[2]):
        kv = k[:, :, t, :, None].double() * v[:, :, t, None].double()
        decayed = state * (power * root[:, :, t]).exp()[..., None]
        state = decayed + kv
        total = total + (q[:, :, t, None].double() @ (decayed if written.startswith("out") else state)).sum()
    (expected,) = torch.autograd.grad(total, wide)
    assert found.isfinite().all()
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("place", ["b, t, h", "b, hkv, t", "b, h, 3"])
def test_a_tensor_read_along_another_axis(place: str) -> None:
    """A kernel that makes its operands looks for nothing: heads of another number were divided by, or read beyond."""
    text = LINEAR.replace("linear()", "example(a: float[B, H, N])").replace("S +=", f"S *= a[{place}]\n        S +=")
    attn: Any = attncc.build(text)
    q, k, v = rows(9, (4, 2, 2))
    a = torch.rand(2, 4, 9)
    found = attn(q, k, v, a=a)
    torch.testing.assert_close(found, attn(q, k, v, a=a.clone().requires_grad_()))


@pytest.mark.parametrize("tokens", [1, 8, 9, 40])
def test_a_state_that_nobody_asks_for(tokens: int) -> None:
    """It is not kept, not even of many sequences; outputs are the same."""
    attn: Any = attncc.build(OF_UNIT_KEYS)
    q, k, v = (x[:1] for x in rows(tokens))
    for offsets in (None, torch.arange(tokens + 1)):
        o, _ = attn(q, k, v, cu_seqlens=offsets, return_state=True)
        torch.testing.assert_close(attn(q, k, v, cu_seqlens=offsets), o)
