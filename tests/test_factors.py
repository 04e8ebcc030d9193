"""Rows times a number for each token, which cores read where they lie."""

from __future__ import annotations

import pytest
import torch
from test_staging import staging_of
from tiers import tiered
from torch import Tensor

import attncc
from attncc.error_rule import compare
from attncc.plan.staging import Staging
from attncc.recurrent_eager import plain_recurrence
from attncc.runtime.recurrent import RecurrentAttention

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

# Every operand has a factor: a sum of squares, an input, a quotient, a sign, an int.
SCALED = """
attention scaled(a: float[B, H, N], count: i32[B, H, N], g: float[B, H, N]):
    q = l2norm(q) * 0.5
    recurrence:
        S *= exp(g[b, h, t])
        S += outer(k / (1 + a[b, h, t]), a[b, h, t] * v - (-k * a[b, h, t] / 8) @ S)
        S += outer(-k, v * count[b, h, t])
        out = q @ S * a[b, h, t] + v * a[b, h, t]
"""
DELTA = """
attention delta(a: float[B, H, N], c: float[B, H, N]):
    recurrence:
        S += outer(k * c[b, h, t], a[b, h, t] * (v - k @ S))
        out = q * a[b, h, t] @ S
"""
PLAIN = """
attention plain(a: float[B, H, N], c: float[B, H, N]):
    recurrence:
        S += outer(k * c[b, h, t], v * a[b, h, t])
        out = q * a[b, h, t] @ S
"""


def factors_of(staging: Staging) -> set[str]:
    return {step.name.removesuffix("_factor") for step in staging.steps if step.name.endswith("_factor")}


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        ("linear", {"query"}),
        ("retnet", {"query"}),
        ("mamba2", {"value_0", "bonus"}),
        ("gated_deltanet", {"query", "key_0", "erase_0", "value_0"}),
        ("hgrn2", set[str]()),
    ],
)
def test_what_is_a_factor(name: str, factors: set[str]) -> None:
    staging = staging_of(name)
    assert factors_of(staging) == factors
    steps = {step.name: step for step in staging.steps}
    assert all(not step.axes for name, step in steps.items() if name.endswith("_factor"))
    assert not any(name.startswith("z") and step.axes for name, step in steps.items()), "no row is left for nothing"


def draw(dtype: torch.dtype, tokens: int = 53, width: int = 32) -> tuple[list[Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    wide = F64 if dtype is F64 else F32
    rows = [torch.randn(2, 4, tokens, width, generator=generator).to(dtype) for _ in range(3)]
    a, c = (torch.rand(2, 4, tokens, generator=generator).to(wide) for _ in range(2))
    return rows, {"a": a, "c": c}


def check(attn: RecurrentAttention, rows: list[Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """o, as close to the reference as the error rule asks, whether or not anyone sees the state, which is too."""
    with torch.no_grad():
        o, state = attn(*rows, return_state=True, **inputs)
        alone = attn(*rows, **inputs)
    exact = attn.reference(*rows, return_state=True, **inputs)
    plain = plain_recurrence(attn.attention, *rows, inputs)
    for name, found, oracle, formula in zip(
        ("o", "o alone", "state"), (o, alone, state), (exact[0], *exact), (plain[0], *plain), strict=True
    ):
        message = compare(name, found, oracle, formula)
        assert message is None, message
    return o


QUICK = {(F32, 32), (BF16, 20), (BF16, 32), (F16, 5), (F64, 20)}


@pytest.mark.representative(2)
@pytest.mark.parametrize(
    ("dtype", "width"), tiered(lambda *case: case in QUICK, (F32, BF16, F16, F64), (32, 20, 5)), ids=str
)
def test_every_operand_has_one(dtype: torch.dtype, width: int) -> None:
    rows, inputs = draw(dtype, width=width)
    generator = torch.Generator().manual_seed(1)
    count = torch.randint(0, 3, inputs["a"].shape, generator=generator, dtype=torch.int32)
    g = -torch.rand(inputs["a"].shape, generator=generator).to(inputs["a"].dtype)
    check(attncc.build(SCALED), rows, {"a": inputs["a"] / 4, "count": count, "g": g})


@pytest.mark.representative(2)
@pytest.mark.parametrize("source", [DELTA, PLAIN], ids=["delta", "plain"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_rows_that_are_a_page_apart(dtype: torch.dtype, source: str) -> None:
    """Rows that would push each other out of the cache are copied; nothing else changes."""
    rows, inputs = draw(dtype)
    rows = [row / 4 for row in rows]
    paged = []
    for row in rows:
        memory = torch.full((2, 4, 53, 4096 // row.element_size()), torch.nan, dtype=dtype)
        memory[..., :32] = row
        paged.append(memory[..., :32])
    attn = attncc.build(source)
    assert torch.equal(check(attn, rows, inputs), check(attn, paged, inputs))


@pytest.mark.parametrize("source", [DELTA, PLAIN], ids=["delta", "plain"])
@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_rows_whose_products_leave_the_range_of_numbers(source: str, size: float) -> None:
    """k and q are out of all proportion, their factors put them right: k q without them is infinite, or 0."""
    (q, k, v), inputs = draw(F32)
    a, c = inputs["a"] / size, inputs["c"] / size
    attn = attncc.build(source.replace("v * a[b, h, t]", "v").replace("a[b, h, t] * (v", "(v"))
    rows = [q * size / 8, k * size / 8 if source is PLAIN else k / 8, v]
    check(attn, rows, {"a": a, "c": c if source is PLAIN else inputs["c"]})


@pytest.mark.parametrize("source", [DELTA, PLAIN], ids=["delta", "plain"])
def test_a_factor_that_is_no_number(source: str) -> None:
    rows, inputs = draw(F32)
    rows = [row / 4 for row in rows]
    attn = attncc.build(source)
    with torch.no_grad():
        whole = attn(*rows, **inputs)
    inputs["a"][1, 2, 30] = torch.nan
    with torch.no_grad():
        o = attn(*rows, **inputs)
    assert o[1, 2, 30:].isnan().all()
    others = torch.ones_like(o, dtype=torch.bool)
    others[1, 2, 30:] = False
    assert torch.allclose(o[others], whole[others], rtol=1e-4, atol=1e-5)


def test_other_types_than_that_of_the_rows_are_made_by_steps() -> None:
    """A row of f32 beside bf16 is no operand as it lies."""
    source = """
attention other(gain: float[H], u: float[H, D]):
    recurrence:
        S += outer(u[h] * gain[h], v)
        out = q @ S
"""
    rows, _ = draw(BF16)
    attn = attncc.build(source)
    check(attn, rows, {"gain": torch.rand(4), "u": torch.randn(4, 32)})


BY_CHANNEL = """
attention by_channel(a: float[B, H, N], g: float[B, H, N, D]):
    recurrence:
        S *= exp(g[b, h, t, :])[:, None]
        S += outer(k * a[b, h, t], a[b, h, t] * (v - k @ S))
        out = q * a[b, h, t] @ S
"""
VALUE_ALONE = """
attention value_alone(a: float[B, H, N]):
    recurrence:
        S += outer(k, a[b, h, t] * v - k @ S)
        out = q @ S
"""


@pytest.mark.representative(2)
@pytest.mark.parametrize("width", [32, 20])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_decays_of_key_channels(dtype: torch.dtype, width: int) -> None:
    rows, inputs = draw(dtype, width=width)
    generator = torch.Generator().manual_seed(2)
    g = -torch.rand(*rows[0].shape, generator=generator)
    g[0, 1, 20:30] *= 40  # too far apart for products
    check(attncc.build(BY_CHANNEL), [row / 4 for row in rows], {"a": inputs["a"], "g": g})


@pytest.mark.representative(1)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_value_alone_has_one(dtype: torch.dtype) -> None:
    rows, inputs = draw(dtype)
    check(attncc.build(VALUE_ALONE), [rows[0], rows[1] / 8, rows[2]], {"a": inputs["a"]})
