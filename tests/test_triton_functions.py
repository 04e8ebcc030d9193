"""Every operator as Triton spells it, interpreted, against its meaning in torch."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton_support import elementwise

from attncc.ir.operators import OPERATORS, Signature
from attncc.ir.types import Kind

FLOATS = [0.0, -0.0, 0.5, 1.0, -1.0, 1.5, 2.5, -2.5, 3.0, 1e-3, -1e-3, 0.11, -0.13, 20.0, -20.0, 7.3]
INTS = [0, 1, -1, 2, 3, -3, 7, -8, 63, 64, 65, 1000, -1000, 2**20, -(2**20), 12345]
DTYPES = {
    Kind.BOOL: (torch.bool,),
    Kind.INT: (torch.int32, torch.int64),
    Kind.FLOAT: (torch.float32, torch.float64),
}
OVERLOADS = [(op, overload) for op in OPERATORS.values() for overload in op.overloads]


def samples(kinds: tuple[Kind, ...]) -> list[list[float]]:
    """Every combination of the samples of each kind, padded to a power of two."""
    values = {Kind.BOOL: [False, True], Kind.INT: INTS, Kind.FLOAT: FLOATS}
    rows = list(itertools.product(*(values[kind] for kind in kinds)))
    rows += [rows[-1]] * ((1 << (len(rows) - 1).bit_length()) - len(rows))
    return [list(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize(
    ("op", "overload"), OVERLOADS, ids=[f"{op.name}-{'-'.join(k.value for k in o.arguments)}" for op, o in OVERLOADS]
)
@pytest.mark.parametrize("width", [0, 1], ids=["32", "64"])
def test_spelling(op: object, overload: Signature, width: int, tmp_path: Path) -> None:
    operator = OPERATORS[op.name]  # type: ignore[attr-defined]
    columns = samples(overload.arguments)
    if operator.name == "pow":  # The sign of a zero is lost.
        columns[0] = [x if x != 0 else 0.0 for x in columns[0]]
    arguments = [
        torch.tensor(column, dtype=DTYPES[kind][min(width, len(DTYPES[kind]) - 1)])
        for column, kind in zip(columns, overload.arguments, strict=True)
    ]
    wide = {torch.int32: torch.int64, torch.float32: torch.float64}
    expected = operator.torch(*(a.to(wide.get(a.dtype, a.dtype)) for a in arguments))
    out = {Kind.BOOL: torch.bool, Kind.INT: torch.int64, Kind.FLOAT: DTYPES[Kind.FLOAT][width]}[overload.result]
    names = [f"x{number}" for number in range(len(arguments))]
    spelling = operator.spelling("triton", overload.arguments[-1])
    found = elementwise(tmp_path, spelling.format(*names), arguments, out)
    if overload.result is not Kind.FLOAT:
        # What fits no 32-bit int is computed in 64 bits; the printer sees to that.
        keep = expected.abs() < 2**31 if expected.dtype == torch.int64 else torch.ones_like(expected, dtype=torch.bool)
        assert torch.equal(found[keep], expected[keep].to(out))
        return
    relative, absolute = tolerance(operator.name, width)
    same_nan = torch.equal(found.isnan(), expected.isnan())
    assert same_nan, (arguments, found, expected)
    torch.testing.assert_close(found, expected.to(out), rtol=relative, atol=absolute, equal_nan=True)


def tolerance(name: str, width: int) -> tuple[float, float]:
    if name == "pow":
        return ((3e-6, 0.0), (1e-14, 0.0))[width]
    return ((5e-7, 1e-7), (2e-15, 3e-16))[width]


def test_tanh_keeps_its_relative_precision_near_zero(tmp_path: Path) -> None:
    x = torch.logspace(-6, 0.5, 64, dtype=torch.float64)
    for dtype, bound in ((torch.float32, 4e-7), (torch.float64, 1e-15)):
        narrow = x.to(dtype)
        found = elementwise(tmp_path, "attn_tanh(x0)", [narrow], dtype).double()
        expected = narrow.double().tanh()
        assert ((found - expected).abs() / expected).max() < bound


def test_log1p_of_the_ends_of_its_domain(tmp_path: Path) -> None:
    x = torch.tensor([-1.0, math.inf, 1e-12, -1e-12, 0.0, math.nan, 1e30, -2.0])
    found = elementwise(tmp_path, "attn_log1p(x0)", [x], torch.float32)
    torch.testing.assert_close(found, x.log1p(), equal_nan=True, rtol=3e-7, atol=0)


def test_infinite_and_missing_numbers(tmp_path: Path) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    y = torch.tensor([1.0, 1.0, 1.0, math.nan])

    def of(expression: str, *arguments: Tensor) -> Tensor:
        return elementwise(tmp_path, expression, arguments, torch.float32)

    torch.testing.assert_close(of("attn_max(x0, x1)", x, y), torch.maximum(x, y), equal_nan=True)
    torch.testing.assert_close(of("attn_min(x0, x1)", x, y), torch.minimum(x, y), equal_nan=True)
    torch.testing.assert_close(of("attn_relu(x0)", x), x.relu(), equal_nan=True)
    torch.testing.assert_close(of("attn_sigmoid(x0)", x), x.sigmoid(), equal_nan=True)
    torch.testing.assert_close(of("attn_tanh(x0)", x), x.tanh(), equal_nan=True)
    torch.testing.assert_close(of("attn_softplus(x0)", x), torch.nn.functional.softplus(x), equal_nan=True)
    to_int = elementwise(tmp_path, "attn_to_int(x0)", [x], torch.int32)
    assert to_int.tolist() == [2**30, -(2**30), 0, 0]


def test_clamp(tmp_path: Path) -> None:
    index, size = torch.tensor([-5, 0, 3, 9], dtype=torch.int32), torch.tensor([4, 4, 4, 0], dtype=torch.int32)
    found = elementwise(tmp_path, "attn_clamp(x0, x1)", [index, size], torch.int32)
    assert found.tolist() == [0, 0, 3, 0]
