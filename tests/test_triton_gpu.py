"""The same kernels on a GPU: `make gpu`, or pytest -m gpu where there is one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from error_rule import check_kernel
from test_triton_backward import ADJOINTS, SIZES, check_call, documents, random_operands
from test_triton_forward import SPECS

import attncc
from attncc.plan.triton_tiles import WITHOUT_F64
from attncc.runtime.arguments import Signature
from attncc.runtime.triton import arch_of
from attncc.runtime.triton_tuning import tiled_programs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
HALF = [torch.bfloat16, torch.float16]
ALL = [*HALF, torch.float32, torch.float64]


def check(
    name: str,
    dtype: torch.dtype,
    *,
    B: int = 2,
    H: int = 4,
    HKV: int = 2,
    M: int = 500,
    N: int = 700,
    D: int = 64,
    E: int | None = None,
    heads_inside: bool = False,
    poison: bool = False,
) -> None:
    if dtype is torch.float64 and arch_of(torch.device("cuda")) in WITHOUT_F64:
        pytest.skip("Triton has no products of f64 here")
    spec, inputs, _ = SPECS[name]
    if "doc[b, q_idx]" in spec:
        M = N
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, M, D), (B, HKV, N, D), (B, HKV, N, D if E is None else E))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    if poison:
        v[:, :, 100, 0], v[:, :, 300, 1], k[:, :, 600] = torch.nan, torch.inf, torch.nan
    named = dict(inputs({"B": B, "H": H, "HKV": HKV, "M": M, "N": N}))
    on_gpu = [x.cuda() for x in (q, k, v)]
    if heads_inside:
        on_gpu = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in on_gpu]
    attn = attncc.build(spec)
    inputs_on_gpu = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in named.items()}
    has_lse = name != "sigmoid"
    result = attn(*on_gpu, return_lse=has_lse, **inputs_on_gpu)
    o, lse = result if has_lse else (result, None)
    check_kernel(o.cpu(), None if lse is None else lse.cpu(), attn.attention, q, k, v, named)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_every_spec_and_dtype(name: str, dtype: torch.dtype) -> None:
    check(name, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("D", "E"), [(1, 1), (3, 5), (72, 40), (80, 80), (96, 33), (128, 128), (192, 128), (256, 256)])
def test_widths(D: int, E: int, dtype: torch.dtype) -> None:
    check("causal", dtype, D=D, E=E)
    check("softcap", dtype, D=D, E=E)


@pytest.mark.parametrize(("M", "N"), [(1, 1), (1, 4096), (4096, 1), (129, 127), (2048, 2048), (2047, 2049)])
@pytest.mark.parametrize("name", ["causal", "window", "sink_window", "dilated"])
def test_lengths(name: str, M: int, N: int) -> None:
    check(name, torch.bfloat16, B=1, H=2, HKV=1, M=M, N=N)


@pytest.mark.parametrize("name", ["causal", "document", "dilated", "relu_squared"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_layouts_and_odd_numbers(name: str, dtype: torch.dtype) -> None:
    check(name, dtype, heads_inside=True)
    check(name, dtype, poison=True)


def test_unaligned_rows() -> None:
    check("causal", torch.bfloat16, D=65, E=67)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("name", ["full", "causal", "window", "alibi", "softcap", "document"])
def test_every_tile_of_the_tuning_set_gives_the_same(name: str, D: int) -> None:
    spec, inputs, _ = SPECS[name]
    sizes = {"B": 1, "H": 2, "HKV": 2, "M": 700, "N": 700}
    q, k, v = (torch.randn(1, 2, 700, D, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    named = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in inputs(sizes).items()}
    attention = attncc.check(spec)
    bound = Signature(attention).bind(q, k, v, None, named)
    expected = None
    for program, _ in tiled_programs(attention, bound, torch.bfloat16, D, arch_of(q.device)):
        o, _ = program.run(q, k, v, bound, return_total=False)
        expected = o if expected is None else expected
        torch.testing.assert_close(o, expected, rtol=2e-2, atol=2e-2)


# --- backward passes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_gradients(name: str, dtype: torch.dtype) -> None:
    if dtype is torch.float64 and arch_of(torch.device("cuda")) in WITHOUT_F64:
        pytest.skip("Triton has no products of f64 here")
    spec, inputs, _ = SPECS[name]
    sizes = replace(SIZES, B=2, H=4, HKV=2, M=700 if "doc[b, q_idx]" in spec else 500, N=700, D=64, E=64)
    named = dict(inputs({"B": sizes.B, "H": sizes.H, "HKV": sizes.HKV, "M": sizes.M, "N": sizes.N}))
    check_call(spec, dtype, random_operands(sizes), named, target=None, device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("D", "E"), [(1, 3), (72, 40), (96, 33), (128, 128), (256, 256)])
def test_gradients_of_widths(D: int, E: int, dtype: torch.dtype) -> None:
    sizes = replace(SIZES, H=4, HKV=2, M=300, N=400, D=D, E=E)
    check_call(SPECS["causal"][0], dtype, random_operands(sizes), {}, target=None, device="cuda")


@pytest.mark.parametrize("name", ADJOINTS)
def test_gradients_of_captured_tensors(name: str) -> None:
    spec, shapes, _ = ADJOINTS[name]
    generator = torch.Generator().manual_seed(2)
    inputs = {tensor: 1 + 0.3 * torch.randn(shape, generator=generator) for tensor, shape in shapes.items()}
    inputs |= documents(SIZES.N) if "doc" in spec else {}
    check_call(spec, torch.float32, random_operands(SIZES), inputs, target=None, device="cuda")


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_are_the_same_in_every_run(dtype: torch.dtype) -> None:
    attn = attncc.build(SPECS["causal"][0])
    q, k, v = (torch.randn(2, 8, 2048, 128, device="cuda", dtype=dtype, requires_grad=True) for _ in "qkv")
    o = attn(q, k, v)
    do = torch.randn_like(o)
    first, second = (torch.autograd.grad(o, (q, k, v), do, retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
