"""Every example, on every backend that this machine can run, in every type, against its formula by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from formulas import VARIANTS, Problem, Sizes, Variant
from tiers import tiered

from attncc.build import build, check
from attncc.eager import eager
from attncc.error_rule import compare
from attncc.gradients import compare_gradients
from attncc.reference import evaluate
from attncc.runtime.cpp_toolchain import ARCHS, native_arch

EXAMPLES = Path(__file__).parent.parent / "examples"
CPP = [f"cpp:{arch}" for arch in ARCHS[ARCHS.index(native_arch()) :]]
INTERPRETED = "triton:interpret"
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

# Grouped heads, lengths and widths that no tile divides, fewer queries than keys.
ODD = Sizes()
SHAPES = {
    "odd": ODD,
    "square": Sizes(B=1, H=2, HKV=2, M=192, N=192, D=64, E=64),
    "decode": Sizes(B=2, H=6, HKV=1, M=1, N=301, D=32, E=32),
    "wide": Sizes(B=1, H=2, HKV=1, M=33, N=65, D=128, E=128),
    "narrow": Sizes(B=1, H=1, HKV=1, M=20, N=20, D=2, E=1),
    "no keys": Sizes(B=1, H=2, HKV=1, M=3, N=0, D=8, E=8),
    "no queries": Sizes(B=1, H=2, HKV=1, M=0, N=5, D=8, E=8),
    "no batch": Sizes(B=0, H=2, HKV=1, M=3, N=5, D=8, E=8),
}
# Bias tables of 2 N - 1 entries do not exist for no keys.
IMPOSSIBLE = {("relative_bias", "no keys")}

VARIANT = pytest.mark.parametrize("name", VARIANTS)
# One per family of plans.
FAMILIES = {"causal", "alibi", "document_causal", "relative_bias", "attention_sink", "qk_norm", "relu_squared"}
# Those whose backward kernels differ from another example's in a constant, or in a mask of positions alone.
ALIKE = set(
    "yarn longrope cosine dilated_window strided document prefix_lm bigbird longformer streaming_llm natten_2d"
    " block_diffusion".split()
)


def path_of(name: str) -> Path:
    return EXAMPLES / f"{name}.attn"


def nudged(problem: Problem) -> Problem:
    """Operands one unit in the last place off, at random. In float64 the plain formula is the oracle itself and has no
    error to compare with: how far this moves its result tells how exact a float64 formula can be."""
    generator = torch.Generator().manual_seed(1)

    def nudge(x: torch.Tensor) -> torch.Tensor:
        return x * (1 + torch.finfo(F64).eps * torch.randint(-1, 2, x.shape, generator=generator).double())

    return replace(problem, q=nudge(problem.q), k=nudge(problem.k), v=nudge(problem.v))


def assert_right(variant: Variant, problem: Problem, o: torch.Tensor, lse: torch.Tensor | None) -> None:
    """By the error rule: the oracle is the formula in float64, the standard the formula in the kernel's type."""
    oracle, oracle_lse = variant.evaluate(problem, F64)
    plain, plain_lse = variant.evaluate(nudged(problem) if problem.q.dtype == F64 else problem)
    assert o.dtype == problem.q.dtype
    assert (message := compare("o", o, oracle, plain)) is None, message
    if oracle_lse is None:
        assert lse is None
        return
    assert lse is not None
    assert plain_lse is not None
    assert lse.dtype == (F64 if problem.q.dtype == F64 else F32)
    assert (message := compare("lse", lse, oracle_lse, plain_lse)) is None, message


def assert_kernel_right(name: str, target: str, dtype: torch.dtype, sizes: Sizes) -> None:
    variant = VARIANTS[name]
    problem = variant.problem(sizes, dtype)
    attn = build(path_of(name), target=target, **problem.constants)
    o, lse = attn(problem.q, problem.k, problem.v, **problem.inputs), None
    if variant.evaluate(problem)[1] is not None:
        with_lse, lse = attn(problem.q, problem.k, problem.v, return_lse=True, **problem.inputs)
        assert torch.equal(with_lse, o), "asking for lse changes the output"
    assert_right(variant, problem, o, lse)


def test_every_example_has_a_formula_and_every_formula_an_example() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.attn")} == set(VARIANTS)


@VARIANT
def test_a_docstring_names_paper_and_year(name: str) -> None:
    doc = check(path_of(name)).doc
    assert any(f"{year}" in doc for year in range(2017, 2027)), doc


@VARIANT
@pytest.mark.parametrize("shape", SHAPES)
def test_reference(name: str, shape: str) -> None:
    """The reference computes the formula: so the kernels' tests against the reference are tests of meaning."""
    if (name, shape) in IMPOSSIBLE:
        pytest.skip("the bias table has no shape")
    variant = VARIANTS[name]
    problem = variant.problem(SHAPES[shape], F64)
    attention = check(path_of(name), **problem.constants)
    o, lse = evaluate(attention, problem.q, problem.k, problem.v, problem.inputs)
    expected, expected_lse = variant.evaluate(problem, F64)
    torch.testing.assert_close(o, expected, rtol=1e-11, atol=1e-11)
    assert (lse is None) == (expected_lse is None)
    if lse is not None:
        torch.testing.assert_close(lse, expected_lse, rtol=1e-11, atol=1e-11)


@VARIANT
@pytest.mark.parametrize("dtype", [F64, BF16], ids=str)
def test_eager_formula(name: str, dtype: torch.dtype) -> None:
    """The formula that `bench` and `verify` derive from a specification is the one that a person writes."""
    variant = VARIANTS[name]
    problem = variant.problem(ODD, dtype)
    attention = check(path_of(name), **problem.constants)
    found = eager(attention, problem.q, problem.k, problem.v, problem.inputs)
    oracle, _ = variant.evaluate(problem, F64)
    plain, _ = variant.evaluate(nudged(problem) if dtype == F64 else problem)
    assert (message := compare("o", found, oracle, plain)) is None, message


@pytest.mark.representative(10)
@pytest.mark.parametrize(
    ("name", "dtype"), tiered(lambda name, dtype: dtype == F32 or name in FAMILIES, VARIANTS, (F32, BF16)), ids=str
)
def test_cpp(name: str, dtype: torch.dtype) -> None:
    assert_kernel_right(name, CPP[0], dtype, ODD)


@pytest.mark.representative(8)
@VARIANT
def test_triton_interpreted(name: str) -> None:
    assert_kernel_right(name, INTERPRETED, F32, ODD)


def assert_gradients_right(name: str, target: str, dtype: torch.dtype, sizes: Sizes) -> None:
    """Of q, k, v and every captured tensor of floats, as users get them."""
    problem = VARIANTS[name].problem(sizes, dtype)
    attn = build(path_of(name), target=target, **problem.constants)
    message = compare_gradients(attn.attention, attn, problem.q, problem.k, problem.v, problem.inputs)
    assert message is None, message


@pytest.mark.representative(4)
@pytest.mark.parametrize("name", tiered(lambda name: name not in ALIKE, VARIANTS))
def test_cpp_gradients(name: str) -> None:
    assert_gradients_right(name, CPP[0], F32, ODD)


@pytest.mark.slow
@VARIANT
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("target", [*CPP, INTERPRETED])
def test_gradients_on_every_target(name: str, target: str, dtype: torch.dtype) -> None:
    assert_gradients_right(name, target, dtype, ODD)


@pytest.mark.slow
@VARIANT
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("target", CPP)
def test_cpp_machines(name: str, target: str, dtype: torch.dtype) -> None:
    assert_kernel_right(name, target, dtype, ODD)


@pytest.mark.slow
@VARIANT
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_cpp_shapes(name: str, dtype: torch.dtype, shape: str) -> None:
    if (name, shape) in IMPOSSIBLE:
        pytest.skip("the bias table has no shape")
    assert_kernel_right(name, CPP[0], dtype, SHAPES[shape])


@pytest.mark.slow
@VARIANT
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_interpreted_shapes(name: str, dtype: torch.dtype, shape: str) -> None:
    if (name, shape) in IMPOSSIBLE:
        pytest.skip("the bias table has no shape")
    assert_kernel_right(name, INTERPRETED, dtype, SHAPES[shape])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@VARIANT
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_gpu(name: str, dtype: torch.dtype, shape: str) -> None:
    if (name, shape) in IMPOSSIBLE:
        pytest.skip("the bias table has no shape")
    variant = VARIANTS[name]
    problem = variant.problem(SHAPES[shape], dtype)
    q, k, v = (x.cuda() for x in (problem.q, problem.k, problem.v))
    inputs = {key: x.cuda() if isinstance(x, torch.Tensor) else x for key, x in problem.inputs.items()}
    attn = build(path_of(name), target="triton", **problem.constants)
    lse = None
    if variant.evaluate(problem)[1] is not None:
        lse = attn(q, k, v, return_lse=True, **inputs)[1].cpu()
    assert_right(variant, problem, attn(q, k, v, **inputs).cpu(), lse)
