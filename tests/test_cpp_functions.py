"""Functions of the operator table in the lanes of the C++ kernels, against their meaning in float64.

With one key, k = v = 1, scale 1 and no normalizer, the output is the weight of the score q: the function itself.
"""

from __future__ import annotations

import math

import pytest
import torch
from cpp_support import NATIVE_ARCHS, H, attention, op, run
from tiers import tiered
from torch import Tensor

from attncc.ir.nodes import Apply, Constant, Elementwise, Expr, Hole
from attncc.ir.operators import OPERATORS
from attncc.ir.types import Kind

SCORE = Hole("score")
SPECIAL = torch.tensor([0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-30, -1e-30, 88.5, -88.5, 1e30, -1e30])
SWEEP = torch.cat([torch.linspace(-30, 30, 4001), torch.logspace(-6, 4, 500), -torch.logspace(-6, 4, 500)])

# Units in the last place of f32 by which a function in lanes may be off; those that call C's own library are closer.
ULPS = {"exp": 4, "exp2": 4, "log": 4, "log2": 4, "tanh": 8, "sigmoid": 6, "silu": 8, "gelu": 40, "pow": 2}
UNARY = sorted(
    name
    for name, operator in OPERATORS.items()
    if operator.arity == 1 and any(s.arguments == (Kind.FLOAT,) and s.result is Kind.FLOAT for s in operator.overloads)
)

_OWN = tuple(name for name in UNARY if name in ULPS)
_LIBRARY = tuple(name for name in UNARY if name not in ULPS)
GROUPS = (_OWN, _LIBRARY[:8], _LIBRARY[8:])  # a kernel each


def apply(weight: Expr, x: Tensor, arch: str) -> Tensor:
    """`weight` of each element of x as its score."""
    q = x.reshape(1, 1, -1, 1)
    one = torch.ones(1, 1, 1, 1, dtype=x.dtype)
    return run(attention(normalizer=Elementwise(weight), scale=1.0), q, one, one, arch=arch)[0].flatten()


def apply_each(names: tuple[str, ...], x: Tensor, arch: str) -> tuple[Tensor, ...]:
    """Each function of each element of x: a head has one of them, so that a kernel has several."""
    weight: Expr = op(names[0], SCORE)
    for head, name in enumerate(names[1:], start=1):
        weight = op("where", op("eq", H, head), op(name, SCORE), weight)
    q = x.reshape(1, 1, -1, 1).expand(1, len(names), -1, 1).contiguous()
    one = torch.ones(1, 1, 1, 1, dtype=x.dtype)
    return run(attention(normalizer=Elementwise(weight), scale=1.0), q, one, one, arch=arch)[0][0, ..., 0].unbind(0)


# Those between the widest and the narrowest have the vectors of the one, or the instructions of the other.
ENDS = {NATIVE_ARCHS[0], NATIVE_ARCHS[-1]}
ARCHS = pytest.mark.parametrize("arch", tiered(ENDS.__contains__, NATIVE_ARCHS))


@pytest.mark.parametrize(
    ("names", "arch"),
    tiered(lambda _, arch: arch == NATIVE_ARCHS[0], GROUPS, NATIVE_ARCHS),
    ids=str,
)
def test_a_function_in_f32_is_within_a_few_ulp(names: tuple[str, ...], arch: str) -> None:
    x = torch.cat([SWEEP, SPECIAL])
    for name, found in zip(names, apply_each(names, x, arch), strict=True):
        assert_within(found, OPERATORS[name].torch(x.double()), ULPS.get(name, 4), name)


@pytest.mark.representative(2)
@pytest.mark.parametrize("names", GROUPS, ids=str)
def test_a_function_in_f64_is_that_of_the_library(names: tuple[str, ...]) -> None:
    x = torch.cat([SWEEP, SPECIAL]).double()
    for name, found in zip(names, apply_each(names, x, NATIVE_ARCHS[0]), strict=True):
        torch.testing.assert_close(
            found,
            OPERATORS[name].torch(x),
            rtol=1e-14,
            atol=1e-15,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("arch", NATIVE_ARCHS)
def test_tanh_of_bf16_keeps_its_absolute_error_far_below_bf16s(arch: str) -> None:
    x = SWEEP.bfloat16()
    found, expected = apply(op("tanh", SCORE), x, arch).double(), torch.tanh(x.double())
    assert ((found - expected).abs() <= 2**-8 * expected.abs() + 3e-6).all()
    assert apply(op("tanh", SCORE), SPECIAL.bfloat16(), arch)[3:6].tolist()[:2] == [1.0, -1.0]


def test_exponentials_are_exact_at_whole_powers() -> None:
    x = torch.arange(-140.0, 128.0)
    torch.testing.assert_close(apply(op("exp2", SCORE), x, NATIVE_ARCHS[0]), torch.exp2(x), rtol=2e-7, atol=1e-45)
    assert apply(op("exp", SCORE), torch.zeros(1), NATIVE_ARCHS[0]).item() == 1.0


@ARCHS
def test_minimum_and_maximum_pass_a_nan_on(arch: str) -> None:
    for name in ("min", "max"):
        for weight in (op(name, SCORE, 0.5), op(name, op("add", 0.5, op("mul", SCORE, 0.0)), SCORE)):
            assert torch.equal(apply(weight, SPECIAL, arch).isnan(), _meaning(weight, SPECIAL.double()).isnan()), (
                f"{name} on {arch}"
            )


def _meaning(weight: Expr, x: Tensor) -> Tensor:
    """A weight over the score, by the operators' own meaning."""
    if weight == SCORE:
        return x
    if isinstance(weight, Constant):
        return torch.tensor(weight.value).double()
    assert isinstance(weight, Apply)
    return OPERATORS[weight.op].torch(*torch.broadcast_tensors(*(_meaning(arg, x) for arg in weight.args)))


def assert_within(found: Tensor, expected: Tensor, ulps: int, name: str) -> None:
    """`found`, in f32, is `expected` to some units in the last place; NaN and infinities are where they should be."""
    expected32 = expected.float()
    assert torch.equal(found.isnan(), expected32.isnan()), expected[found.isnan() != expected32.isnan()]
    finite = expected32.isfinite()
    assert torch.equal(found[~finite & ~expected32.isnan()], expected32[~finite & ~expected32.isnan()])
    # Reciprocals may flush what is near the end of the range; and gelu's meaning is itself off by 1e-16.
    spacing = torch.finfo(torch.float32).eps * expected[finite].abs().clamp(min=1e-9 if name == "gelu" else 1e-30)
    off = (found[finite].double() - expected[finite]).abs() / spacing
    worst = off.argmax()
    assert off[worst] <= ulps, f"{off[worst]:.1f} ulp off where it should be {expected[finite][worst]:.9g}"
