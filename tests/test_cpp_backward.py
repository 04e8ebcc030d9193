"""The C++ backward kernel: gradients of every example and of whatever makes it branch, by the error rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cpp_support import CAUSAL, KV, NATIVE_ARCHS, QK, B, H, Q, attention, normal, op, run_backward
from error_rule import same_dtype_formula
from formulas import VARIANTS, Problem, Sizes
from gradients import Formula, assert_gradients, gradients
from test_cpp_kernels import Guarded
from test_examples import FAMILIES, SHAPES, path_of
from tiers import tiered, types
from torch import Tensor

from attncc.build import check
from attncc.ir.nodes import Attention, Elementwise, Expr, Hole, Index, Load, Size, Softmax, Sum, TensorParameter
from attncc.ir.types import DType, Kind
from attncc.reference import evaluate

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# Each combination is a compilation; the long tier takes all of them.
SLOW = pytest.mark.slow
DTYPES = types(F32, BF16)
ARCHS = pytest.mark.parametrize(
    "arch", [NATIVE_ARCHS[0], *(pytest.param(arch, marks=SLOW) for arch in NATIVE_ARCHS[1:])]
)
FLOATS = (DType.F16, DType.BF16, DType.F32, DType.F64)
SCORE = Hole("score")


def nudged(x: Any, seed: int) -> Any:
    """A tensor of float64 one unit in the last place off, at random: in float64 the plain formula is the oracle itself,
    and how far this moves its result tells how exact a float64 formula can be."""
    if not isinstance(x, Tensor) or x.dtype != F64:
        return x
    steps = torch.randint(-1, 2, x.shape, generator=torch.Generator().manual_seed(seed)).double()
    return x * (1 + torch.finfo(F64).eps * steps)


def check_spec(
    spec: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    arch: str | None = None,
    q_offset: int | None = None,
    do: Tensor | None = None,
    **inputs: Tensor,
) -> dict[str, Tensor]:
    arguments = {"q": q, "k": k, "v": v, **inputs}

    def formula(evaluated: Callable[..., tuple[Tensor, Tensor | None]]) -> Formula:
        def applied(given: Any) -> tuple[Tensor, Tensor | None]:
            rest = {name: x for name, x in given.items() if name not in ("q", "k", "v")}
            return evaluated(spec, given["q"], given["k"], given["v"], rest, q_offset)

        return applied

    do = normal(*q.shape[:3], v.shape[3], dtype=q.dtype, seed=7) if do is None else do
    dlse = None if isinstance(spec.normalizer, Elementwise) else normal(*q.shape[:3], dtype=wide(q.dtype), seed=8)
    found = run_backward(spec, q, k, v, do, dlse, inputs, q_offset, arch)
    oracle = gradients(formula(evaluate), arguments, do, dlse)
    near = {name: nudged(x, seed) for seed, (name, x) in enumerate(arguments.items())}
    assert_gradients(found, oracle, gradients(formula(same_dtype_formula), near, do, dlse))
    return found


def wide(dtype: torch.dtype) -> torch.dtype:
    return F64 if dtype == F64 else F32


def operands(
    dtype: torch.dtype = F32, B: int = 1, H: int = 2, HKV: int = 1, M: int = 37, N: int = 53, D: int = 16, E: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        normal(B, H, M, D, dtype=dtype, seed=1),
        normal(B, HKV, N, D, dtype=dtype, seed=2),
        normal(B, HKV, N, E, dtype=dtype, seed=3),
    )


WINDOW = attention(mask=op("and", CAUSAL, op("lt", op("sub", Q, KV), 20)))
BANDS = attention(mask=op("or", op("lt", KV, 5), op("lt", op("abs", op("sub", Q, KV)), 9)))
PLAIN, CAUSAL_ONLY = attention(), attention(mask=CAUSAL)


# --- examples -------------------------------------------------------------------------------------------------------


def check_example(name: str, dtype: torch.dtype, sizes: Sizes, arch: str) -> None:
    variant = VARIANTS[name]
    problem = variant.problem(sizes, dtype)

    def formula(dtype: torch.dtype | None) -> Formula:
        def applied(given: Any) -> tuple[Tensor, Tensor | None]:
            inputs = {key: x for key, x in given.items() if key not in ("q", "k", "v")}
            moved = Problem(given["q"], given["k"], given["v"], inputs, problem.constants)
            return variant.evaluate(moved, dtype)

        return applied

    q, k, v, inputs = problem.q, problem.k, problem.v, dict(problem.inputs)
    arguments = {"q": q, "k": k, "v": v, **inputs}
    o, lse = variant.evaluate(problem)
    do = normal(*o.shape, dtype=dtype, seed=7)
    dlse = None if lse is None else normal(*lse.shape, dtype=wide(dtype), seed=8)
    found = run_backward(check(path_of(name), **problem.constants), q, k, v, do, dlse, inputs, arch=arch)
    near = {name: nudged(x, seed) for seed, (name, x) in enumerate(arguments.items())}
    assert_gradients(found, gradients(formula(F64), arguments, do, dlse), gradients(formula(None), near, do, dlse))


@pytest.mark.representative(2)
@pytest.mark.parametrize("name", tiered(FAMILIES.__contains__, VARIANTS))
@pytest.mark.parametrize("dtype", [F32, pytest.param(BF16, marks=SLOW), pytest.param(F64, marks=SLOW)], ids=str)
def test_examples(name: str, dtype: torch.dtype) -> None:
    check_example(name, dtype, Sizes(), NATIVE_ARCHS[0])


@SLOW
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", ["square", "wide"])
def test_examples_of_other_sizes(name: str, dtype: torch.dtype, shape: str) -> None:
    check_example(name, dtype, SHAPES[shape], NATIVE_ARCHS[0])


@SLOW
@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("arch", NATIVE_ARCHS)
def test_examples_on_every_machine(name: str, dtype: torch.dtype, arch: str) -> None:
    check_example(name, dtype, Sizes(), arch)


# --- sizes and layouts ----------------------------------------------------------------------------------------------


QUICK_WIDTHS = {F32: [(1, 1), (7, 3), (16, 24), (65, 17)], BF16: [(7, 3), (65, 17)]}


@pytest.mark.representative(2)
@ARCHS
@pytest.mark.parametrize(
    ("widths", "dtype"),
    tiered(
        lambda widths, dtype: widths in QUICK_WIDTHS.get(dtype, []),
        [(1, 1), (7, 3), (16, 24), (65, 17), (300, 260)],
        (F32, BF16, F64, F16),
    ),
    ids=str,
)
def test_any_width(widths: tuple[int, int], dtype: torch.dtype, arch: str) -> None:
    D, E = widths
    check_spec(CAUSAL_ONLY, *operands(dtype, D=D, E=E), arch=arch)


MASKS = {"plain": PLAIN, "window": WINDOW, "bands": BANDS}


@pytest.mark.representative(12)
@pytest.mark.parametrize(("M", "N"), [(1, 1), (1, 700), (33, 256), (40, 257), (64, 9), (513, 7), (5, 0), (0, 5)])
@pytest.mark.parametrize(
    ("mask", "dtype"),
    tiered(lambda _, dtype: dtype == F32, MASKS, (F32, BF16, F64, F16)),
    ids=str,
)
def test_any_length(mask: str, M: int, N: int, dtype: torch.dtype) -> None:
    check_spec(MASKS[mask], *operands(dtype, M=M, N=N))


@pytest.mark.parametrize(("batch", "heads"), [(0, 2), (2, 0)])
def test_nothing_to_do(batch: int, heads: int) -> None:
    q, k, v = operands(B=batch, H=heads, HKV=heads)
    found = run_backward(PLAIN, q, k, v, torch.zeros(batch, heads, 37, 16))
    assert [x.shape for x in found.values()] == [q.shape, k.shape, v.shape]


@types(F32)
@pytest.mark.parametrize("q_offset", [-40, -3, 0, 30, 10_000])
def test_queries_anywhere(q_offset: int, dtype: torch.dtype) -> None:
    check_spec(WINDOW, *operands(dtype), q_offset=q_offset)


@types(F32)
@pytest.mark.parametrize(("H", "HKV"), [(1, 1), (6, 1), (6, 2), (6, 6)])
def test_query_heads_share_keys_and_values(H: int, HKV: int, dtype: torch.dtype) -> None:
    check_spec(CAUSAL_ONLY, *operands(dtype, B=2, H=H, HKV=HKV))


@DTYPES
def test_long_rows_and_several_parts(dtype: torch.dtype) -> None:
    check_spec(CAUSAL_ONLY, *operands(dtype, H=1, M=1100, N=1300))


def test_rows_may_lie_anywhere() -> None:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in operands(B=2, H=3, HKV=3))
    do = normal(2, 3, 16, 37, seed=7).mT
    found = check_spec(CAUSAL_ONLY, q, k, v, do=do)
    again = check_spec(CAUSAL_ONLY, q.contiguous(), k.contiguous(), v.contiguous(), do=do.contiguous())
    assert all(torch.equal(found[name], again[name]) for name in found)
    check_spec(CAUSAL_ONLY, q.flip(0), k, v, do=do[:, :1, :1].expand(2, 3, 37, 16))


@types(BF16)
@pytest.mark.parametrize("at_end", [True, False])
def test_nothing_outside_the_tensors_is_read(at_end: bool, dtype: torch.dtype) -> None:
    guarded = Guarded()
    q, k, v = operands(dtype, D=15, E=7)
    do = normal(1, 2, 37, 7, dtype=dtype, seed=7)
    expected = run_backward(CAUSAL_ONLY, q, k, v, do)
    found = run_backward(CAUSAL_ONLY, *(guarded.copy(x, at_end=at_end) for x in (q, k, v, do)))
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(("heads", "length"), [(1, 1500), (4, 300)])
def test_results_do_not_depend_on_threads(heads: int, length: int) -> None:
    names = ("gain", "column", "table", "plane")
    score: Expr = QK
    for name in names:
        score = op("add", score, load(name, *PLACES[name]))
    spec = attention(score, CAUSAL, parameters=tuple(TensorParameter(n, FLOATS, SHAPES_OF[n]) for n in names))
    q, k, v = operands(BF16, H=heads, M=length, N=length)
    do = normal(1, heads, length, 16, dtype=BF16)
    inputs = {name: captured(name, F32, 1, heads, length, length) for name in names}
    threads = torch.get_num_threads()
    results: list[dict[str, Tensor]] = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run_backward(spec, q, k, v, do, None, inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


# --- weights --------------------------------------------------------------------------------------------------------


NORMALIZERS = {
    "elementwise": Elementwise(op("sigmoid", SCORE)),
    "sum": Sum(op("exp", op("mul", SCORE, 0.5))),
    "sink": Softmax(op("to_float", H)),
}


@pytest.mark.representative(1)
@pytest.mark.parametrize(
    ("name", "dtype"),
    tiered(lambda name, dtype: dtype == F32 or (dtype == BF16 and name == "sum"), NORMALIZERS, (F32, BF16, F64, F16)),
    ids=str,
)
def test_other_weights(name: str, dtype: torch.dtype) -> None:
    check_spec(attention(normalizer=NORMALIZERS[name], mask=CAUSAL), *operands(dtype, M=150, N=140))


@pytest.mark.representative(1)
@DTYPES
def test_derivatives_that_vary(dtype: torch.dtype) -> None:
    spec = attention(op("mul", op("tanh", QK), 3.0), CAUSAL)
    check_spec(spec, *operands(dtype, M=150, N=140))


# --- captured tensors -----------------------------------------------------------------------------------------------


def load(name: str, *indices: Expr, kind: Kind = Kind.FLOAT) -> Load:
    return Load(name, indices, kind)


SHAPES_OF = {
    "gain": (Size("H"),),
    "row": (Size("B"), Size("M")),
    "column": (Size("H"), Size("N")),
    "table": (Size("H"), op("add", Size("M"), Size("N"))),
    "plane": (Size("H"), Size("M"), Size("N")),
    "shared": (Size("N"),),
}
ROW = Index("q_row")
PLACES: dict[str, tuple[Expr, ...]] = {
    "gain": (H,),
    "row": (B, ROW),
    "column": (H, KV),
    "table": (H, op("add", op("sub", ROW, KV), Size("N"))),
    "plane": (H, ROW, KV),
    "shared": (op("mod", op("add", ROW, op("mul", KV, KV)), Size("N")),),
}


def captured(name: str, dtype: torch.dtype, B: int, H: int, M: int, N: int) -> Tensor:
    sizes = {"gain": (H,), "row": (B, M), "column": (H, N), "table": (H, M + N), "plane": (H, M, N), "shared": (N,)}
    return normal(*sizes[name], dtype=dtype, seed=11)


@pytest.mark.representative(2)
@pytest.mark.parametrize(
    ("name", "multiplied", "dtype"),
    tiered(
        lambda name, multiplied, dtype: dtype == F32 and (not multiplied or name in ("row", "plane")),
        PLACES,
        (False, True),
        (F32, BF16, F16, F64),
    ),
    ids=str,
)
def test_captured_tensors(name: str, multiplied: bool, dtype: torch.dtype) -> None:
    term = load(name, *PLACES[name])
    score = op("mul", QK, term) if multiplied else op("add", QK, term)
    spec = attention(score, op("ge", op("add", Q, 9), KV), parameters=(TensorParameter(name, FLOATS, SHAPES_OF[name]),))
    B, H, M, N = 2, 4, 145, 150
    q, k, v = operands(dtype, B=B, H=H, HKV=2, M=M, N=N)
    check_spec(spec, q, k, v, **{name: captured(name, dtype, B, H, M, N)})


def test_several_captured_tensors() -> None:
    names = ("gain", "row", "column", "table", "plane")
    score: Expr = QK
    for name in names:
        score = op("add", score, load(name, *PLACES[name]))
    parameters = tuple(TensorParameter(name, FLOATS, SHAPES_OF[name]) for name in names)
    q, k, v = operands(H=4, HKV=2, M=300, N=70)
    inputs = {name: captured(name, F32, 1, 4, 300, 70) for name in names}
    check_spec(attention(score, parameters=parameters), q, k, v, **inputs)


# --- numbers out of the ordinary ------------------------------------------------------------------------------------


@types(F32)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_masked_pairs_contribute_nothing(value: float, dtype: torch.dtype) -> None:
    """Keys from 40 on and queries from 130 on are masked against each other's finite halves, and hold `value`."""
    q, k, v = operands(dtype, M=150, N=60)
    do = normal(1, 2, 150, 16, dtype=dtype, seed=7)
    spec = attention(mask=op("eq", op("ge", Index("q_row"), 130), op("ge", KV, 40)))
    expected = run_backward(spec, q, k, v, do)
    for x, first in ((q, 130), (do, 130), (k, 40), (v, 40)):
        x[:, :, first:] = value
    found = run_backward(spec, q, k, v, do)
    for name, first in (("q", 130), ("k", 40), ("v", 40)):
        torch.testing.assert_close(found[name][:, :, :first], expected[name][:, :, :first])
        assert found[name][:, :, first:].isnan().any()


def test_pairs_that_a_captured_tensor_masks_contribute_nothing() -> None:
    allowed = TensorParameter("allowed", (DType.BOOL,), (Size("M"), Size("N")))
    spec = attention(mask=load("allowed", ROW, KV, kind=Kind.BOOL), parameters=(allowed,))
    q, k, v = operands(M=150, N=60)
    do = normal(1, 2, 150, 16, seed=7)
    inputs = {"allowed": (torch.arange(150)[:, None] >= 130) == (torch.arange(60)[None, :] >= 40)}
    expected = run_backward(spec, q, k, v, do, None, inputs)
    for x, first in ((q, 130), (do, 130), (k, 40), (v, 40)):
        x[:, :, first:] = float("nan")
    found = run_backward(spec, q, k, v, do, None, inputs)
    for name, first in (("q", 130), ("k", 40), ("v", 40)):
        torch.testing.assert_close(found[name][:, :, :first], expected[name][:, :, :first])
        assert found[name][:, :, first:].isnan().any()


@pytest.mark.representative(1)
@DTYPES
def test_rows_without_kept_pairs_have_no_gradient(dtype: torch.dtype) -> None:
    q, k, v = operands(dtype, M=150, N=60)
    do = normal(1, 2, 150, 16, dtype=dtype, seed=7)
    dlse = normal(1, 2, 150, seed=8, dtype=wide(dtype))
    for x in (q, do, dlse):
        x[:, :, 20:] = float("nan")
    found = run_backward(attention(mask=op("lt", Index("q_row"), 20)), q, k, v, do, dlse)
    assert not found["q"][:, :, 20:].any()
    assert found["k"].isfinite().all()
    assert found["v"].isfinite().all()


def test_rows_of_equal_masks_and_keys_of_minus_infinity() -> None:
    """All scores of the last rows are -inf: they have no sum, and no pair of theirs counts."""
    spec = attention(op("add", QK, load("row", B, ROW)), parameters=(TensorParameter("row", FLOATS, SHAPES_OF["row"]),))
    q, k, v = operands(M=150, N=60)
    row = torch.zeros(1, 150)
    row[:, 100:] = -torch.inf
    v[:, :, 3, 2] = torch.inf
    found = run_backward(spec, q, k, v, normal(1, 2, 150, 16), inputs={"row": row})
    assert not found["q"][:, :, 100:].any()
    assert not found["row"][:, 100:].any()


def test_large_scores() -> None:
    q, k, v = operands(M=80, N=90)
    check_spec(CAUSAL_ONLY, q * 4, k * 4, v)


@pytest.mark.representative(1)
@pytest.mark.parametrize("position", [Q, KV, op("sub", Q, KV)], ids=["query", "key", "pair"])
def test_scales_of_positions(position: Expr) -> None:
    scale = op("log", op("add", 2.0, op("to_float", op("abs", position))))
    check_spec(replace(CAUSAL_ONLY, scale=scale), *operands())
