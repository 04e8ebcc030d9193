"""Hypothesis strategies for well-formed attentions and for calls that fit them.

    attentions()        random specifications: row transforms, scale, score, mask, weight, sink, captured inputs
    calls(attention)    sizes, tensors (strided too), scalars and q_offset for one
    cases()             both together
    masks()             bool expressions over coordinates and ints; with `tensors=False`, nothing else
    int_exprs(leaves), bool_exprs(ints, bools), scores(), …     expressions (`expr_strategies`)

Every captured tensor is read within its bounds at the pairs that the mask keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from expr_strategies import (
    DISTANCE,
    KV_IDX,
    Q_IDX,
    REACH,
    SCALES,
    H,
    bool_exprs,
    int_exprs,
    load,
    masks,
    normalizers,
    op,
    parameters_of,
    rows,
    scores,
)
from hypothesis import strategies as st
from torch import Tensor

from attncc.ir.nodes import Attention, Constant, Elementwise, Expr, Size, Softmax, Sum, identity_row
from attncc.ir.types import DType, Kind

__all__ = [
    "DISTANCE",
    "KV_IDX",
    "Q_IDX",
    "Call",
    "attentions",
    "bool_exprs",
    "calls",
    "cases",
    "int_exprs",
    "lengths",
    "masks",
    "op",
    "scores",
    "strided",
]


@st.composite
def attentions(draw: st.DrawFn, *, transforms: bool = True) -> Attention:
    """Well-formed attentions; `transforms=False` leaves the rows of q, k and v as they are."""
    q, k, v = (draw(rows(row)) if transforms else identity_row(row) for row in ("q", "k", "v"))
    scale, score = draw(st.sampled_from(SCALES)), draw(scores())
    mask = draw(st.one_of(st.just(Constant(True)), masks(), masks()))
    if draw(st.integers(0, 4)) == 0:
        # Read a table of distances that the mask alone keeps in bounds.
        score = op("add", score, load("relative", H, op("add", DISTANCE, Constant(REACH))))
        mask = op("and", mask, op("le", op("abs", DISTANCE), Constant(REACH)))
    normalizer = draw(normalizers())
    match normalizer:
        case Softmax(sink=sink):
            last = () if sink is None else (sink,)
        case Sum(weight=weight) | Elementwise(weight=weight):
            last = (weight,)
    parameters = parameters_of((q, k, v, scale, score, mask, *last))
    return Attention("drawn", "", parameters, q, k, v, scale, score, mask, normalizer)


@dataclass(frozen=True)
class Call:
    """Arguments of one call: `attn(q, k, v, q_offset=q_offset, **inputs)`."""

    q: Tensor
    k: Tensor
    v: Tensor
    inputs: dict[str, Tensor | bool | float]
    q_offset: int | None

    def __repr__(self) -> str:
        """Shapes and strides: the elements follow from the drawn seed."""

        def tensor(x: Tensor) -> str:
            return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}@{list(x.stride())}"

        shown = {name: tensor(x) if isinstance(x, Tensor) else x for name, x in self.inputs.items()}
        rows = ", ".join(f"{name}={tensor(x)}" for name, x in (("q", self.q), ("k", self.k), ("v", self.v)))
        return f"Call({rows}, q_offset={self.q_offset}, inputs={shown})"


_TORCH = {
    DType.BOOL: torch.bool,
    DType.I32: torch.int32,
    DType.I64: torch.int64,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.F32: torch.float32,
    DType.F64: torch.float64,
}
_WIDTHS = st.sampled_from((1, 2, 3, 4, 5, 7, 8, 16, 17, 24, 32, 33, 64))


def lengths(longest: int) -> st.SearchStrategy[int]:
    """Row counts: small ones, those about powers of two, and any up to `longest`; rarely 0."""
    near = tuple(n for n in (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 65, 127, 128, 129, 255, 257) if n <= longest)
    return st.one_of(st.sampled_from((*near, *near, 0)), st.integers(1, longest))


@st.composite
def strided(draw: st.DrawFn, x: Tensor, *, unit_last: bool = False) -> Tensor:
    """`x` with the same elements in another layout; `unit_last` keeps the last axis contiguous."""
    layout = draw(st.sampled_from(("contiguous", "contiguous", "permuted", "sliced", "last")))
    if x.dim() < 2 or (layout == "last" and unit_last):
        layout = "sliced"
    match layout:
        case "permuted":
            return x.transpose(-3 if x.dim() > 2 else -2, -2).contiguous().transpose(-3 if x.dim() > 2 else -2, -2)
        case "sliced":
            # Room around the elements, filled with what must never be read.
            poison = torch.nan if x.is_floating_point() else 1
            wide = x.new_full([n + 3 for n in x.shape], poison)
            inner = wide[tuple(slice(1, 1 + n) for n in x.shape)]
            return inner.copy_(x)
        case "last":
            return x.mT.contiguous().mT
        case _:
            return x.contiguous()


@st.composite
def calls(
    draw: st.DrawFn, attention: Attention, *, dtype: torch.dtype = torch.float32, longest: int = 80, widest: int = 64
) -> Call:
    """A call that fits `attention`: q, k and v of `dtype`, at most `longest` rows and `widest` elements in a row."""
    batch, heads_kv = draw(st.sampled_from((1, 1, 2, 3))), draw(st.sampled_from((1, 1, 2, 3)))
    heads = heads_kv * draw(st.sampled_from((1, 1, 2, 3)))
    rows, keys = draw(lengths(longest)), draw(lengths(longest))
    keys = rows if draw(st.integers(0, 2)) == 0 else keys
    widths = _WIDTHS.filter(lambda width: width <= widest)
    width_qk, width_v = draw(widths), draw(widths)
    sizes = {"B": batch, "H": heads, "HKV": heads_kv, "M": rows, "N": keys, "D": width_qk, "E": width_v}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def normal(*shape: int) -> Tensor:
        return draw(strided(torch.randn(*shape, generator=generator).to(dtype)))

    q = normal(batch, heads, rows, width_qk)
    k, v = normal(batch, heads_kv, keys, width_qk), normal(batch, heads_kv, keys, width_v)
    inputs: dict[str, Tensor | bool | float] = {}
    for tensor in attention.tensors:
        shape = [_size(size, sizes) for size in tensor.shape]
        element = _TORCH[draw(st.sampled_from(tensor.dtypes))]
        inputs[tensor.name] = draw(strided(_captured(tensor.name, shape, element, keys, generator)))
    for parameter in attention.scalars:
        if parameter.default is None or draw(st.booleans()):
            inputs[parameter.name] = draw(_scalar_values(parameter.kind))
    q_offset = draw(st.one_of(st.none(), st.none(), st.just(0), st.integers(-5, longest + 5)))
    return Call(q, k, v, inputs, q_offset)


def _size(expr: Expr, sizes: dict[str, int]) -> int:
    match expr:
        case Constant(value=value):
            return int(value)
        case Size(name=name):
            return sizes[name]
        case _:
            raise NotImplementedError(expr)


def _captured(name: str, shape: list[int], dtype: torch.dtype, keys: int, generator: torch.Generator) -> Tensor:
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.7
    if dtype.is_floating_point:
        return (torch.randint(-16, 17, shape, generator=generator) / 8).to(dtype)
    if name == "length":
        return torch.randint(0, keys + 2, shape, generator=generator).to(dtype)
    # Ids: a few documents, in order or shuffled.
    ids = torch.randint(0, 4, shape, generator=generator)
    return (ids.sort(-1).values if keys % 2 else ids).to(dtype)


def _scalar_values(kind: Kind) -> st.SearchStrategy[bool | float]:
    match kind:
        case Kind.BOOL:
            return st.booleans()
        case Kind.INT:
            return st.one_of(st.integers(0, 20), st.integers(-5, 100), st.sampled_from((2**31 - 1, -(2**31))))
        case Kind.FLOAT:
            return st.sampled_from((0.5, 1.0, 2.0, 5.0))


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    dtype: torch.dtype = torch.float32,
    longest: int = 80,
    widest: int = 64,
    transforms: bool = True,
) -> tuple[Attention, Call]:
    """An attention and a call of it."""
    attention = draw(attentions(transforms=transforms))
    return attention, draw(calls(attention, dtype=dtype, longest=longest, widest=widest))
