"""The C++ forward kernel where it branches: types, widths, lengths, layouts, masks, numbers out of the ordinary."""

from __future__ import annotations

import math

import pytest
import torch
from cpp_support import CAUSAL, KV, NATIVE_ARCHS, B, H, Q, attention, normal, op, run
from error_rule import check_kernel
from guarded import Guarded
from tiers import types
from torch import Tensor

from attncc.ir.nodes import Attention, Elementwise, Hole, Index, Load, Size, Softmax, Sum, TensorParameter
from attncc.ir.types import DType, Kind
from attncc.runtime.arguments import TORCH_DTYPES

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# Each combination is a compilation; the long tier takes all of them.
SLOW = pytest.mark.slow
DTYPES = types(F32, BF16)
ARCHS = pytest.mark.parametrize(
    "arch", [NATIVE_ARCHS[0], *(pytest.param(arch, marks=SLOW) for arch in NATIVE_ARCHS[1:])]
)
FLOATS = (DType.F16, DType.BF16, DType.F32, DType.F64)


def operands(
    dtype: torch.dtype = F32, B: int = 1, H: int = 2, HKV: int = 1, M: int = 37, N: int = 53, D: int = 16, E: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        normal(B, H, M, D, dtype=dtype, seed=1),
        normal(B, HKV, N, D, dtype=dtype, seed=2),
        normal(B, HKV, N, E, dtype=dtype, seed=3),
    )


def check(
    spec: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    arch: str | None = None,
    q_offset: int | None = None,
    **inputs: Tensor,
) -> None:
    o, lse = run(spec, q, k, v, inputs, q_offset, arch)
    check_kernel(o, lse, spec, q, k, v, inputs, q_offset)


WINDOW = attention(mask=op("and", CAUSAL, op("lt", op("sub", Q, KV), 20)))
BANDS = attention(mask=op("or", op("lt", KV, 5), op("lt", op("abs", op("sub", Q, KV)), 9)))
PLAIN, CAUSAL_ONLY = attention(), attention(mask=CAUSAL)


# --- sizes and layouts ----------------------------------------------------------------------------------------------


@pytest.mark.representative(5)
@ARCHS
@DTYPES
@pytest.mark.parametrize(("D", "E"), [(1, 1), (7, 3), (16, 24), (65, 17), (300, 260)])
def test_any_width(D: int, E: int, dtype: torch.dtype, arch: str) -> None:
    check(CAUSAL_ONLY, *operands(dtype, D=D, E=E), arch=arch)


@DTYPES
@pytest.mark.parametrize(("M", "N"), [(1, 1), (1, 700), (33, 256), (40, 257), (64, 9), (513, 7), (5, 0), (0, 5)])
@pytest.mark.parametrize("spec", [PLAIN, WINDOW, BANDS], ids=["plain", "window", "bands"])
def test_any_length(spec: Attention, M: int, N: int, dtype: torch.dtype) -> None:
    check(spec, *operands(dtype, M=M, N=N))


@DTYPES
@pytest.mark.parametrize("q_offset", [-40, -3, 0, 30, 10_000])
def test_queries_anywhere(q_offset: int, dtype: torch.dtype) -> None:
    check(WINDOW, *operands(dtype), q_offset=q_offset)


@DTYPES
@pytest.mark.parametrize(("H", "HKV"), [(1, 1), (6, 1), (6, 2), (6, 6)])
def test_query_heads_share_keys_and_values(H: int, HKV: int, dtype: torch.dtype) -> None:
    check(CAUSAL_ONLY, *operands(dtype, B=2, H=H, HKV=HKV))


@DTYPES
@pytest.mark.parametrize("D", [16, 15])
def test_rows_may_lie_anywhere(D: int, dtype: torch.dtype) -> None:
    q, k, v = operands(dtype, B=2, H=3, HKV=3, D=D)
    packed = torch.cat([x.transpose(1, 2).flatten(2) for x in (k, v)], dim=-1)  # (B, N, HKV * D + HKV * E)
    k2 = packed[..., : 3 * D].unflatten(2, (3, D)).transpose(1, 2)
    v2 = packed[..., 3 * D :].unflatten(2, (3, 16)).transpose(1, 2)
    q2 = q.transpose(1, 2).contiguous().transpose(1, 2)
    for x in (q2.flip(0), q2[:, :, ::2], q2[:, :1].expand(-1, 3, -1, -1)):
        check(CAUSAL_ONLY, x, k2, v2)
    o, lse = run(CAUSAL_ONLY, q, k, v)
    o2, lse2 = run(CAUSAL_ONLY, q2, k2, v2)
    assert torch.equal(o, o2)
    assert torch.equal(lse, lse2)


@pytest.mark.representative(2)
@ARCHS
@DTYPES
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize(("N", "D", "E"), [(53, 16, 16), (8, 7, 5), (1, 1, 1), (259, 33, 64)])
def test_nothing_outside_the_tensors_is_read(
    N: int, D: int, E: int, at_end: bool, dtype: torch.dtype, arch: str
) -> None:
    guarded = Guarded()
    spec = attention(
        score=op("add", Hole("qk"), op("add", load("bias", H, Index("q_row"), KV), load("table", op("sub", Q, KV)))),
        mask=op(
            "and", load("allowed", Index("q_row"), KV, kind=Kind.BOOL), op("lt", load("doc", B, Q, kind=Kind.INT), 3)
        ),
        parameters=(
            TensorParameter("bias", FLOATS, (Size("H"), Size("M"), Size("N"))),
            TensorParameter("table", FLOATS, (Size("N"),)),
            TensorParameter("allowed", (DType.BOOL,), (Size("M"), Size("N"))),
            TensorParameter("doc", (DType.I32, DType.I64), (Size("B"), Size("N"))),
        ),
    )
    M = 11
    tensors = [
        *operands(dtype, M=M, N=N, D=D, E=E),
        normal(2, M, N, dtype=dtype),
        normal(N, dtype=dtype),
        normal(M, N) > 0,
        torch.arange(N)[None] // 4,
    ]
    q, k, v, bias, table, allowed, doc = (guarded.copy(x, at_end=at_end) for x in tensors)
    o, lse = run(spec, q, k, v, {"bias": bias, "table": table, "allowed": allowed, "doc": doc}, arch=arch)
    assert o.shape == (1, 2, M, E)
    assert lse is not None


def load(tensor: str, *indices: object, kind: Kind = Kind.FLOAT) -> Load:
    return Load(tensor, indices, kind)  # type: ignore[arg-type]


# --- what pairs may read --------------------------------------------------------------------------------------------


@pytest.mark.representative(2)
@ARCHS
@DTYPES
@pytest.mark.parametrize("element", FLOATS, ids=str)
def test_a_dense_bias(element: DType, dtype: torch.dtype, arch: str) -> None:
    spec = attention(
        score=op("add", Hole("qk"), load("bias", B, H, Index("q_row"), KV)),
        mask=CAUSAL,
        parameters=(TensorParameter("bias", FLOATS, (Size("B"), Size("H"), Size("M"), Size("N"))),),
    )
    q, k, v = operands(dtype, B=2)
    bias = normal(2, 2, 37, 53, dtype=TORCH_DTYPES[element])
    check(spec, q, k, v, arch=arch, bias=bias)
    check(spec, q, k, v, arch=arch, bias=bias.transpose(2, 3).contiguous().transpose(2, 3))
    check(spec, q, k, v, arch=arch, bias=bias[:1, :1].expand(2, 2, -1, -1))


@pytest.mark.representative(4)
@ARCHS
@DTYPES
@pytest.mark.parametrize("element", [torch.bool, torch.int32, torch.int64], ids=str)
def test_a_dense_mask(element: torch.dtype, dtype: torch.dtype, arch: str) -> None:
    kinds = {torch.bool: (DType.BOOL,), torch.int32: (DType.I32, DType.I64), torch.int64: (DType.I32, DType.I64)}
    pair = load("kept", Index("q_row"), KV, kind=Kind.BOOL if element == torch.bool else Kind.INT)
    spec = attention(
        mask=pair if element == torch.bool else op("gt", pair, 0),
        parameters=(TensorParameter("kept", kinds[element], (Size("M"), Size("N"))),),
    )
    check(spec, *operands(dtype), arch=arch, kept=(normal(37, 53) > 0).to(element))


@pytest.mark.representative(1)
@ARCHS
@DTYPES
def test_a_band_of_biases(dtype: torch.dtype, arch: str) -> None:
    distance = op("sub", op("add", op("sub", Q, KV), Size("N")), 1)
    shape = (Size("H"), op("sub", op("mul", 2, Size("N")), 1))
    spec = attention(
        score=op("add", Hole("qk"), load("table", H, distance)), parameters=(TensorParameter("table", FLOATS, shape),)
    )
    q, k, v = operands(dtype)
    table = normal(2, 105, dtype=F64 if dtype == F64 else F32)
    check(spec, q, k, v, arch=arch, table=table)
    check(spec, q, k, v, arch=arch, table=table.mT.contiguous().mT)


# --- normalizers ----------------------------------------------------------------------------------------------------


@ARCHS
@DTYPES
def test_sinks(dtype: torch.dtype, arch: str) -> None:
    spec = attention(
        mask=op("lt", KV, op("sub", Q, 20)),
        normalizer=Softmax(load("sinks", H)),
        parameters=(TensorParameter("sinks", FLOATS, (Size("H"),)),),
    )
    q, k, v = operands(dtype, H=3)
    check(spec, q, k, v, arch=arch, sinks=torch.tensor([0.7, -math.inf, 30.0]))


@ARCHS
@DTYPES
@pytest.mark.parametrize("sink", [math.inf, 3e38, -3e38])
def test_a_sink_without_bounds(sink: float, dtype: torch.dtype, arch: str) -> None:
    """All weight goes to one that is far above the scores, none to one far below: o is 0 or as without it."""
    spec = attention(
        mask=op("lt", KV, op("sub", Q, 20)),
        normalizer=Softmax(load("sinks", H)),
        parameters=(TensorParameter("sinks", FLOATS, (Size("H"),)),),
    )
    q, k, v = operands(dtype, H=3)
    check(spec, q, k, v, arch=arch, sinks=torch.full((3,), sink))


@pytest.mark.representative(2)
@ARCHS
@DTYPES
@pytest.mark.parametrize("kind", [Sum, Elementwise])
def test_weights_without_softmax(kind: type[Sum | Elementwise], dtype: torch.dtype, arch: str) -> None:
    weight = op("mul", op("relu", Hole("score")), op("relu", Hole("score")))
    check(attention(mask=op("lt", KV, op("sub", Q, 20)), normalizer=kind(weight)), *operands(dtype), arch=arch)


# --- numbers out of the ordinary ------------------------------------------------------------------------------------


@pytest.mark.representative(2)
@ARCHS
@DTYPES
@pytest.mark.parametrize("size", [30.0, 1e4])
def test_large_scores(size: float, dtype: torch.dtype, arch: str) -> None:
    q, k, v = operands(dtype, N=600)
    check(attention(scale=size / 16), q, k, v, arch=arch)


@pytest.mark.representative(1)
@DTYPES
def test_a_constant_beyond_the_range_of_the_type_is_infinite(dtype: torch.dtype) -> None:
    q, k, v = operands(dtype)
    o, lse = run(attention(score=op("mul", op("abs", Hole("qk")), 1e39)), q, k, v)
    assert lse is not None
    assert o.isfinite().all() if dtype == F64 else (o.isnan().all() and not lse.isfinite().any())
    bounded = attention(score=op("add", op("min", Hole("qk"), 1e39), 1e-50))
    check(bounded, q, k, v)


@pytest.mark.representative(1)
@ARCHS
@DTYPES
def test_rows_whose_scores_are_all_minus_infinity(dtype: torch.dtype, arch: str) -> None:
    spec = attention(score=op("where", op("gt", Q, 20), op("mul", Hole("qk"), 1.0), -math.inf))
    q, k, v = operands(dtype)
    o, lse = run(spec, q, k, v, arch=arch)
    assert lse is not None
    empty = torch.arange(37) + 16 <= 20
    assert (o[:, :, empty] == 0).all()
    assert (lse[:, :, empty] == -math.inf).all()
    check(spec, q, k, v, arch=arch)


@ARCHS
@DTYPES
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_what_is_masked_poisons_nothing(where: str, poison: float, dtype: torch.dtype, arch: str) -> None:
    q, k, v = operands(dtype, M=300, N=300, H=1)
    # Keys 100 to 105 are masked for every query, key 290 for all but the last ten.
    spec = attention(mask=op("and", CAUSAL, op("or", op("lt", KV, 100), op("gt", KV, 105))))
    clean, clean_lse = run(spec, q, k, v, arch=arch)
    x = {"q": q, "k": k, "v": v}[where]
    x[0, 0, 250 if where == "q" else 102, 3] = poison
    x[0, 0, 290, 5] = poison
    o, lse = run(spec, q, k, v, arch=arch)
    assert clean_lse is not None
    assert lse is not None
    hit = torch.zeros(300, dtype=torch.bool)
    hit[[250, 290] if where == "q" else slice(290, None)] = True
    torch.testing.assert_close(o[:, :, ~hit], clean[:, :, ~hit])
    torch.testing.assert_close(lse[:, :, ~hit], clean_lse[:, :, ~hit])
    assert o[:, :, hit].isfinite().all(dim=-1).logical_not().all() or (where == "k" and abs(poison) == math.inf)


@pytest.mark.representative(1)
@ARCHS
@DTYPES
def test_an_empty_row_is_zero_whatever_the_values(dtype: torch.dtype, arch: str) -> None:
    q, k, v = operands(dtype)
    v[...] = math.nan
    o, lse = run(attention(mask=op("lt", KV, op("sub", Q, 60))), q, k, v, arch=arch)
    assert (o == 0).all()
    assert lse is not None
    assert (lse == -math.inf).all()


def test_one_long_row_in_f32_is_as_accurate_as_the_rule_asks() -> None:
    check(PLAIN, *operands(H=1, M=2, N=16_384, D=64, E=64))


@DTYPES
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    q, k, v = operands(dtype, B=2, H=4, HKV=2, M=200, N=200)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(CAUSAL_ONLY, q, k, v)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.representative(2)
@pytest.mark.parametrize("element", FLOATS, ids=str)
def test_tables_of_any_element_type(element: DType) -> None:
    spec = attention(
        mask=op("gt", load("level", B, KV), 0.0),
        parameters=(TensorParameter("level", FLOATS, (Size("B"), Size("N"))),),
    )
    level = normal(1, 300, dtype=TORCH_DTYPES[element])
    level[:, 40:200] = -1.0
    level[:, 230] = math.nan
    check(spec, *operands(N=300), level=level)
