"""Generated Triton kernels of backward passes, interpreted, against autograd of the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from error_rule import same_dtype_formula
from formulas import VARIANTS, Sizes
from gradients import assert_gradients, gradients
from torch import Tensor
from triton.runtime import interpreter as base

import attncc
from attncc.build import check
from attncc.emit.printers import printer_of
from attncc.emit.render import render
from attncc.ir.nodes import Attention
from attncc.ir.types import DType
from attncc.plan.backward import plan_backward
from attncc.plan.nodes import Specialization, Target
from attncc.reference import evaluate
from attncc.runtime import triton_backward
from attncc.runtime.arguments import Signature
from attncc.runtime.interpreter import Builder
from attncc.runtime.kernels import specialization_of
from attncc.runtime.triton_aot import compile_ahead
from attncc.runtime.triton_backward import BackwardKernels
from attncc.runtime.triton_fields import Function

EXAMPLES = Path(__file__).parent.parent / "examples"
TARGET = "triton:interpret"
SLOW = pytest.mark.slow
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# Two tiles of queries and three of keys, the last of both cut short.
SIZES = Sizes(B=1, H=2, HKV=1, M=150, N=300, D=16, E=24)


def check_call(
    spec: str | Path,
    dtype: torch.dtype,
    operands: Mapping[str, Tensor],
    inputs: Mapping[str, Any],
    *,
    with_lse: bool = True,
    q_offset: int | None = None,
    do: Tensor | None = None,
    constants: Mapping[str, int] | None = None,
    target: str | None = TARGET,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """The gradients of a call with random do and dlse, checked by the error rule."""
    attention = check(spec, **(constants or {}))
    attn = attncc.build(spec, target=target, **(constants or {}))
    arguments = {**{name: x.to(dtype) for name, x in operands.items()}, **inputs}
    q, v = arguments["q"], arguments["v"]
    generator = torch.Generator().manual_seed(1)
    if do is None:
        do = torch.randn(*q.shape[:3], v.shape[3], generator=generator)
    do = do.to(dtype)
    dlse = torch.randn(q.shape[:3], generator=generator) if with_lse and has_lse(attention) else None

    def kernel(named: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        there = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in named.items()}
        if dlse is None:
            return attn(**there, q_offset=q_offset).cpu(), None
        o, lse = attn(**there, q_offset=q_offset, return_lse=True)
        return o.cpu(), lse.cpu()

    def formula(run: Callable[..., Any], named: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        rest = {name: x for name, x in named.items() if name not in ("q", "k", "v")}
        return run(attention, named["q"], named["k"], named["v"], rest, q_offset)

    found = gradients(kernel, arguments, do, dlse)
    oracle = gradients(partial(formula, evaluate), arguments, do, dlse)
    plain = gradients(partial(formula, same_dtype_formula), arguments, do, dlse)
    rounded = gradients(partial(formula, partial(evaluate, rounded_rows=True)), arguments, do, dlse)
    assert_gradients(found, oracle, plain, rounded)
    return found


def has_lse(attention: Attention) -> bool:
    return type(attention.normalizer).__name__ != "Elementwise"


def random_operands(sizes: Sizes, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "q": (sizes.B, sizes.H, sizes.M, sizes.D),
        "k": (sizes.B, sizes.HKV, sizes.N, sizes.D),
        "v": (sizes.B, sizes.HKV, sizes.N, sizes.E),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def check_spec(spec: str, dtype: torch.dtype = F32, sizes: Sizes = SIZES, **rest: Any) -> dict[str, Tensor]:
    return check_call(spec, dtype, random_operands(sizes), rest.pop("inputs", {}), **rest)


# --- every example ---------------------------------------------------------------------------------------------------

QUICK_BF16 = {"causal", "softcap", "relative_bias"}
CASES = [
    pytest.param(
        name,
        dtype,
        id=f"{name}-{dtype}",
        marks=() if (dtype is F32 and name != "bigbird") or (dtype is BF16 and name in QUICK_BF16) else SLOW,
    )
    for name in VARIANTS
    for dtype in (F32, BF16, F16, F64)
]


@pytest.mark.representative(8)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_examples(name: str, dtype: torch.dtype) -> None:
    variant = VARIANTS[name]
    problem = variant.problem(variant.fit(SIZES), dtype)
    operands = {"q": problem.q, "k": problem.k, "v": problem.v}
    spec = EXAMPLES / f"{name}.attn"
    check_call(spec, dtype, operands, problem.inputs, q_offset=problem.q_offset, constants=problem.constants)


# --- masks, groups, sizes --------------------------------------------------------------------------------------------

CAUSAL = "attention a():\n    mask = causal\n"
SUMS = "attention a():\n    weight = relu(score) ** 2 + 0.1\n    normalize = sum\n    mask = causal\n"
DOCUMENT = "attention a(doc: i32[N]):\n    mask = doc[q_idx] == doc[kv_idx]\n"
DILATED = "attention a():\n    mask = abs(q_idx - kv_idx) < 90 and (q_idx - kv_idx) % 2 == 0\n"
TWO_RANGES = "attention a():\n    mask = causal and (kv_idx < 4 or q_idx - kv_idx < 60)\n"


def documents(length: int) -> dict[str, Tensor]:
    return {"doc": torch.arange(length).mul(5).div(length, rounding_mode="floor").int()}


@pytest.mark.parametrize("spec", [CAUSAL, SUMS, DILATED, TWO_RANGES])
def test_masks(spec: str) -> None:
    check_spec(spec)


def test_lists_of_tiles() -> None:
    check_spec(DOCUMENT, inputs=documents(SIZES.N))


@pytest.mark.representative(4)
@pytest.mark.parametrize(("H", "HKV"), [(3, 3), (6, 2), (4, 1)])
@pytest.mark.parametrize("spec", [CAUSAL, "attention a(t: f32[H]):\n    score = qk * t[h]\n    mask = window(50)\n"])
def test_groups_of_query_heads(spec: str, H: int, HKV: int) -> None:
    sizes = Sizes(B=2, H=H, HKV=HKV, M=40, N=140, D=16, E=8)
    check_spec(spec, sizes=sizes, inputs={"t": torch.linspace(0.5, 2.0, H)} if "t:" in spec else {})


@pytest.mark.parametrize(("D", "E"), [(1, 3), (17, 16), (72, 40), (96, 33), (80, 80)])
def test_widths(D: int, E: int) -> None:
    check_spec(CAUSAL, sizes=Sizes(B=1, H=1, HKV=1, M=130, N=140, D=D, E=E))


@pytest.mark.representative(5)
@pytest.mark.parametrize(("M", "N"), [(1, 2), (1, 300), (300, 3), (128, 128), (129, 127), (257, 130)])
@pytest.mark.parametrize("spec", [CAUSAL, TWO_RANGES, DILATED])
def test_lengths(spec: str, M: int, N: int) -> None:
    check_spec(spec, sizes=Sizes(B=1, H=2, HKV=1, M=M, N=N, D=16, E=16))


@pytest.mark.parametrize("q_offset", [-400, -100, 0, 500])
def test_rows_that_keep_nothing_have_no_gradients(q_offset: int) -> None:
    found = check_spec(CAUSAL, q_offset=q_offset)
    if q_offset == -400:
        assert not any(x.any() for x in found.values())


@pytest.mark.parametrize(("B", "H", "M", "N"), [(2, 2, 0, 5), (2, 2, 5, 0), (2, 2, 0, 0)])
def test_empty(B: int, H: int, M: int, N: int) -> None:
    spec = (
        "attention a(t: f32[H], r: f32[H, 7], c: f32[H, N], s: f32[H]):\n"
        "    score = qk * t[h] + r[h, clamp(q_idx - kv_idx, 0, 6)] + c[h, kv_idx]\n"
        "    weight = softmax(score, sink=s[h])\n"
    )
    inputs = {"t": torch.ones(H), "r": torch.ones(H, 7), "c": torch.ones(H, N), "s": torch.ones(H)}
    check_spec(spec, sizes=Sizes(B=B, H=H, HKV=H, M=M, N=N, D=8, E=8), inputs=inputs)


def test_no_batch() -> None:
    """The reference has no gradients there."""
    operands = random_operands(Sizes(B=0, H=2, HKV=1, M=5, N=7, D=8, E=8))
    spec = "attention a(t: f32[H]):\n    k = l2norm(k)\n    score = qk * t[h]\n    mask = causal\n"
    attn = attncc.build(spec, target=TARGET)
    found = gradients(lambda named: (attn(**named), None), {**operands, "t": torch.ones(2)}, torch.zeros(0, 2, 5, 8))
    assert {name: x.shape for name, x in found.items()} == {**{n: x.shape for n, x in operands.items()}, "t": (2,)}
    assert not found["t"].any()


def test_strides_of_operands_and_of_the_gradient() -> None:
    operands = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in random_operands(SIZES).items()}
    do = torch.randn(SIZES.B, SIZES.E, SIZES.M, SIZES.H).permute(0, 3, 2, 1)
    check_call(CAUSAL, F32, operands, {}, do=do)


def test_without_lse() -> None:
    check_spec(CAUSAL, with_lse=False)
    check_spec(SUMS, with_lse=False)


# --- captured tensors ------------------------------------------------------------------------------------------------

ADJOINTS: dict[str, tuple[str, dict[str, tuple[int, ...]], tuple[str, ...]]] = {
    "head": ("attention a(t: f32[H]):\n    score = qk * t[h]\n    mask = causal\n", {"t": (2,)}, ("head",)),
    "row": (
        "attention a(t: f32[M]):\n    score = qk * t[q_row]\n    mask = window(70)\n",
        {"t": (150,)},
        ("row",),
    ),
    "row and column": (
        "attention a(t: f32[N]):\n    score = qk + t[q_idx] - t[kv_idx]\n    mask = causal\n",
        {"t": (300,)},
        ("row", "column"),
    ),
    "column": ("attention a(t: f32[H, N]):\n    score = tanh(qk * t[h, kv_idx])\n", {"t": (2, 300)}, ("column",)),
    "diagonal": (
        "attention a(t: f32[H, 449]):\n    score = qk + t[h, q_row - kv_idx + 299]\n    mask = q_idx - kv_idx < 100\n",
        {"t": (2, 449)},
        ("diagonal",),
    ),
    "diagonal of documents": (
        """attention a(t: f32[9], doc: i32[N]):
    score = qk + t[clamp(q_idx - kv_idx, 0, 8)]
    mask = doc[q_idx] == doc[kv_idx]
""",
        {"t": (9,)},
        ("diagonal",),
    ),
    "pair": (
        "attention a(t: f32[H, M, N]):\n    score = qk + 2 * t[h, q_row, kv_idx]\n    mask = causal\n",
        {"t": (2, 150, 300)},
        ("pair",),
    ),
    "gathered": (
        "attention a(t: f32[40, 50]):\n    score = qk + t[q_idx % 40, kv_idx % 50]\n",
        {"t": (40, 50)},
        ("pair",),
    ),
    "of weights": (
        "attention a(t: f32[H], u: f32[N]):\n    weight = sigmoid(score * t[h] + u[kv_idx])\n    mask = causal\n",
        {"t": (2,), "u": (300,)},
        ("head", "column"),
    ),
    "of sums": (
        "attention a(t: f32[H]):\n    weight = exp(t[h] * score) + 0.1\n    normalize = sum\n    mask = causal\n",
        {"t": (2,)},
        ("head",),
    ),
}


@pytest.mark.representative(5)
@pytest.mark.parametrize("name", ADJOINTS)
def test_captured_tensors(name: str) -> None:
    spec, shapes, along = ADJOINTS[name]
    generator = torch.Generator().manual_seed(2)
    inputs = {tensor: 1 + 0.3 * torch.randn(shape, generator=generator) for tensor, shape in shapes.items()}
    if "doc" in spec:
        inputs |= documents(SIZES.N)
    operands = random_operands(SIZES)
    attention = attncc.check(spec)
    bound = Signature(attention).bind(*operands.values(), None, inputs)
    plan = plan_backward(
        attention, specialization_of(operands["q"], bound), Target("triton", "interpret"), frozenset(shapes)
    )
    assert tuple(dict.fromkeys(adjoint.along for adjoint in plan.backward.adjoints)) == along
    found = check_call(spec, F32, operands, inputs)
    assert all(found[tensor].any() for tensor in shapes)


def test_transforms_of_rows_by_query_head() -> None:
    spec = (
        "attention a(g: f32[H, D], u: f32[HKV, E]):\n"
        "    q = rope(q, q_idx)\n    k = rope(l2norm(k) * g[h], kv_idx)\n    v = v * u[hkv]\n    mask = causal\n"
    )
    sizes = Sizes(B=2, H=4, HKV=2, M=30, N=50, D=16, E=8)
    generator = torch.Generator().manual_seed(3)
    inputs = {"g": torch.randn(4, 16, generator=generator), "u": torch.randn(2, 8, generator=generator)}
    check_spec(spec, sizes=sizes, inputs=inputs)


# --- masked values ---------------------------------------------------------------------------------------------------


@pytest.mark.representative(2)
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", [F32, pytest.param(BF16, marks=SLOW)], ids=str)
@pytest.mark.parametrize(
    "spec",
    [
        "attention a():\n    mask = kv_idx != 7 and kv_idx < 290 and q_idx != 155\n",
        "attention a():\n    weight = score\n    mask = kv_idx != 7 and kv_idx < 290 and q_idx != 155\n",
        "attention a(seen: bool[N]):\n    mask = seen[kv_idx] and q_idx != 155\n",
        "attention a():\n    mask = (kv_idx - 7) % 283 != 0 and q_idx != 155\n",
    ],
)
def test_masked_pairs_add_nothing_whatever_stands_there(spec: str, dtype: torch.dtype, odd: float) -> None:
    """Key 7, keys 290 and later where the mask says so, and query row 5, hold what is no number."""
    operands = random_operands(SIZES)
    do = torch.randn(SIZES.B, SIZES.H, SIZES.M, SIZES.E, generator=torch.Generator().manual_seed(4))
    seen = torch.ones(SIZES.N, dtype=torch.bool)
    seen[7], seen[290] = False, False
    inputs = {"seen": seen} if "seen" in spec else {}
    clean = check_call(spec, dtype, operands, inputs, do=do, with_lse=False)
    for x in (operands["k"], operands["v"]):
        x[:, :, [7, 290]] = odd
    operands["q"][:, :, 5] = odd
    do[:, :, 5] = odd
    attn = attncc.build(spec, target=TARGET)
    arguments = {**{name: x.to(dtype) for name, x in operands.items()}, **inputs}
    found = gradients(lambda named: (attn(**named), None), arguments, do.to(dtype))
    for name, x in found.items():
        assert torch.equal(x, clean[name]), name


@pytest.mark.representative(2)
@pytest.mark.parametrize("spec", [CAUSAL, DILATED, "attention a():\n    weight = score\n    mask = causal\n"])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf], ids=str)
def test_kept_pairs_follow_the_mathematics(spec: str, odd: float) -> None:
    """What is no number reaches the gradients of the rows that see it, and no others."""
    operands = random_operands(SIZES)
    operands["v"][0, 0, 200, 3] = odd
    do = torch.randn(SIZES.B, SIZES.H, SIZES.M, SIZES.E, generator=torch.Generator().manual_seed(4))
    do[0, 1, 140, 2] = odd
    check_call(spec, F32, operands, {}, do=do, with_lse=False)


# --- the same in every run --------------------------------------------------------------------------------------------

GATHERS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "bias of all heads": (
        "attention a(t: f32[M, N]):\n    score = qk + t[q_row, kv_idx]\n    mask = causal\n",
        {"t": (150, 300)},
    ),
    "table": ("attention a(t: f32[4, 4]):\n    score = qk + t[q_idx % 4, kv_idx % 4]\n", {"t": (4, 4)}),
    "two tables": (
        """attention a(t: f32[HKV, 4], u: f32[9], w: f32[H], doc: i32[N]):
    score = qk * w[h] + t[hkv, (q_idx + doc[kv_idx] * 1000000007) % 4] - u[(q_idx + 2 * kv_idx) % 9]
    mask = doc[q_idx] == doc[kv_idx]
""",
        {"t": (2, 4), "u": (9,), "w": (4,)},
    ),
}
GATHER_SIZES = Sizes(B=2, H=4, HKV=2, M=150, N=300, D=16, E=24)


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Under `use_deterministic_algorithms`, three programs at a time. The functions of backward passes that run."""
    monkeypatch.setattr(triton_backward, "_APART_BYTES", 3 * 128 * GATHER_SIZES.N * 4)
    run, labels = BackwardKernels._run, []

    def recorded(self: BackwardKernels, function: Function, *rest: Any) -> None:
        labels.append(function.label)
        run(self, function, *rest)

    monkeypatch.setattr(BackwardKernels, "_run", recorded)
    torch.use_deterministic_algorithms(True)
    yield labels
    torch.use_deterministic_algorithms(False)


def gathered_inputs(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    inputs = {tensor: torch.randn(shape, generator=generator) for tensor, shape in GATHERS[name][1].items()}
    return inputs | (documents(GATHER_SIZES.N) if "doc" in GATHERS[name][0] else {})


def last_program_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def turned(self: Builder, x: int, y: int, z: int) -> None:
        base.InterpreterBuilder.set_grid_idx(self, self.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(Builder, "set_grid_idx", turned)


@pytest.mark.representative(1)
@pytest.mark.parametrize("name", GATHERS)
def test_gathers_are_sorted_on_request(name: str, deterministic: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order of programs."""
    spec, inputs = GATHERS[name][0], gathered_inputs(name)
    first = check_spec(spec, sizes=GATHER_SIZES, inputs=inputs)
    assert deterministic.count("a_backward_dq[SORTED]") == (6 if name != "two tables" else 16)
    assert "a_backward_dq" not in deterministic
    last_program_first(monkeypatch)
    second = check_spec(spec, sizes=GATHER_SIZES, inputs=inputs)
    assert all(torch.equal(first[x], second[x]) for x in first)


def test_gathers_are_not_sorted_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """And then their sums depend on the order of programs."""
    spec, inputs = GATHERS["table"][0], gathered_inputs("table")
    first = check_spec(spec, sizes=GATHER_SIZES, inputs=inputs)
    last_program_first(monkeypatch)
    second = check_spec(spec, sizes=GATHER_SIZES, inputs=inputs)
    assert [x for x in first if not torch.equal(first[x], second[x])] == ["t"]


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(("M", "N"), [(0, 5), (5, 0), (1, 3)])
def test_sorted_gathers_of_short_sequences(M: int, N: int) -> None:
    sizes = Sizes(B=2, H=2, HKV=1, M=M, N=N, D=8, E=8)
    check_spec(GATHERS["table"][0], sizes=sizes, inputs=gathered_inputs("table"))


@pytest.mark.usefixtures("deterministic")
def test_sorted_gathers_leave_out_what_stands_at_masked_pairs() -> None:
    spec = "attention a(t: f32[4, 4]):\n    score = qk + t[q_idx % 4, kv_idx % 4]\n    mask = kv_idx != 7\n"
    attn = attncc.build(spec, target=TARGET)
    operands = random_operands(SIZES)
    do = torch.randn(SIZES.B, SIZES.H, SIZES.M, SIZES.E, generator=torch.Generator().manual_seed(4))

    def found() -> dict[str, Tensor]:
        return gradients(lambda named: (attn(**named), None), {**operands, **gathered_inputs("table")}, do)

    clean = found()
    operands["k"][:, :, 7] = operands["v"][:, :, 7] = torch.nan
    odd = found()
    assert all(torch.equal(clean[x], odd[x]) for x in clean)


@SLOW
def test_sorted_gathers_compile() -> None:
    attention = attncc.check(GATHERS["two tables"][0])
    tensors = tuple((tensor.name, tensor.dtypes[0]) for tensor in attention.tensors)
    specialization = Specialization(DType.BF16, 64, 64, tensors)
    plan = plan_backward(attention, specialization, Target("triton", "sm_90"), frozenset("tuw")).backward
    functions = compile_ahead(plan, render(plan, printer_of(plan)), "sm_90")
    assert functions["a_backward_dq[SORTED]"].products == functions["a_backward_dq"].products > 0


def test_in_every_run_the_same() -> None:
    spec = ADJOINTS["diagonal"][0]
    inputs = {"t": torch.randn(2, 449, generator=torch.Generator().manual_seed(2))}
    first, second = (check_spec(spec, inputs=inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
