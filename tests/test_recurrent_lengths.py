"""Recurrences over any length: whole, in parts and token by token are the same, with their gradients; decays of every
size, up to 65,536 tokens."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent_formulas import FORMULAS
from test_recurrent_calls import FAMILIES, NARROW, problem
from tiers import by_tier, tiered
from torch import Tensor

import attncc
from attncc.error_rule import compare
from attncc.recurrent_eager import token_loop
from attncc.runtime.recurrent import RecurrentAttention
from attncc.runtime.recurrent_kernels import RecurrentKernels

F64 = torch.float64
LONGEST = 70
CAUSAL = [name for name in FORMULAS if name not in ("hedgehog", "performer")]  # these two compile for long: elsewhere


def at_tokens(attn: RecurrentAttention, inputs: dict[str, Any], tokens: slice) -> dict[str, Any]:
    """The inputs of some tokens."""
    along = {p.name: [str(axis) for axis in p.shape] for p in attn.attention.tensors}
    result = dict(inputs)
    for name, axes in along.items():
        for number, axis in enumerate(axes):
            if "'N'" in axis:
                result[name] = result[name].narrow(number, tokens.start, tokens.stop - tokens.start)
    return result


def run_in_parts(
    attn: RecurrentAttention, rows: list[Tensor], inputs: dict[str, Any], lengths: list[int]
) -> tuple[Tensor, Tensor]:
    outputs: list[Tensor] = []
    state: Tensor | None = None
    for start, end in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
        part = at_tokens(attn, inputs, slice(start, end))
        rows_of_part = (x[:, :, start:end] for x in rows)
        o, state = attn(*rows_of_part, initial_state=state, return_state=True, q_offset=start, **part)
        outputs.append(o)
    assert state is not None
    return torch.cat(outputs, 2), state


@pytest.mark.representative(2)
@pytest.mark.parametrize("name", tiered(FAMILIES.__contains__, CAUSAL))
@given(data=st.data())
@settings(max_examples=by_tier(6), deadline=None)
def test_whole_parts_and_steps_are_the_same(name: str, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    lengths = [*lengths[:-1], max(lengths[-1] - max(sum(lengths) - LONGEST, 0), 0)]
    tokens = sum(lengths)
    attn, *rows, inputs = problem(name, F64, tokens=tokens, widths=NARROW)
    assert not attn.attention.bidirectional
    leaves = [x.requires_grad_() for x in (*rows, *(y for y in inputs.values() if isinstance(y, Tensor)))]

    def with_gradients(o: Tensor, state: Tensor) -> list[Tensor]:
        weight = torch.linspace(0, 3, o.numel(), dtype=F64).reshape(o.shape).cos()
        total = (o * weight).sum() + state.square().sum() / 10
        gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        return [o, state, *gradients]

    whole = with_gradients(*attn(*rows, return_state=True, **inputs))
    parts = with_gradients(*run_in_parts(attn, rows, inputs, lengths))
    for a, b in zip(whole, parts, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-8)

    state = torch.zeros_like(whole[1])
    with torch.no_grad():
        steps = [
            attn.step(
                *(x[:, :, t : t + 1] for x in rows), state=state, q_offset=t, **at_tokens(attn, inputs, slice(t, t + 1))
            )
            for t in range(tokens)
        ]
    if steps:
        assert torch.allclose(torch.cat(steps, 2), whole[0], rtol=1e-8, atol=1e-8)
    assert torch.allclose(state, whole[1], rtol=1e-8, atol=1e-8)


def decays(shape: tuple[int, ...], kind: str) -> Tensor:
    """Logarithms: exactly 0, about 0, -20 each token, or all of these at random."""
    torch.manual_seed(1)
    sizes = {"none": [0.0], "slow": [-1e-4], "fast": [-20.0], "mixed": [0.0, -1e-4, -0.1, -3.0, -20.0]}[kind]
    return torch.tensor(sizes)[torch.randint(0, len(sizes), shape)]


LENGTHS = [2048, pytest.param(65_536, marks=pytest.mark.slow)]


@pytest.mark.representative(4)
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("kind", ["none", "slow", "fast", "mixed"])
@pytest.mark.parametrize("name", ["gated_deltanet", "gla", "kimi_delta", "rwkv7"])
def test_decays_of_every_size(name: str, kind: str, tokens: int) -> None:
    attn, q, k, v, inputs = problem(name, torch.float32, tokens=tokens, heads=1)
    rows = [x[:1] for x in (q, k, v)]
    inputs = {n: x[:1] for n, x in inputs.items()}
    decay = {"rwkv7": "w"}.get(name, "g")
    inputs[decay] = decays(tuple(inputs[decay].shape), kind)
    if name == "rwkv7":  # Its own erasures must not make the state grow where nothing else forgets.
        inputs["a"] = inputs["a"] / 4
    assert isinstance(attn.kernels, RecurrentKernels)
    found = attn(*rows, return_state=True, **inputs)
    wide = {n: x.double() for n, x in inputs.items()}
    form = attn.kernels.form
    # The token loop in f64 is as exact as the reference here, and a hundred times as fast.
    exact = token_loop(attn.attention, form, *(x.double() for x in rows), wide)
    plain = token_loop(attn.attention, form, *rows, inputs)
    for what, a, b, c in zip(("o", "state"), found, exact, plain, strict=True):
        assert a.isfinite().all()
        message = compare(what, a, b, c)
        assert message is None, message


def test_the_decay_of_one_is_exact() -> None:
    """A state with nothing to forget is a sum: nothing of the first token is lost after 10,000."""
    attn = attncc.build("attention a(g: float[B, H, N]):\n    recurrence:\n        S *= exp(g[b, h, t])\n"
                        "        S += outer(k, v)\n        out = q @ S\n")  # fmt: skip
    tokens = 10_000
    q = torch.ones(1, 1, tokens, 4)
    k = torch.zeros(1, 1, tokens, 4)
    k[:, :, 0] = 1.0
    v = torch.full((1, 1, tokens, 4), 0.7)
    o = attn(q, k, v, g=torch.zeros(1, 1, tokens))
    assert (o == o[:, :, :1]).all()
