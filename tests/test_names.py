"""A specification may use any name that the language leaves it, also those that generated code uses itself."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import attncc
from attncc.runtime.arguments import Sizes

# Names of generated kernels: arguments, locals, types, functions, members; keywords of C++; builtins of Python.
NAMES = sorted(
    re.findall(
        r"\w+",
        """
        acc alpha args arguments at base bias call captured certain dot double end entry exp2_all first float_of floats
        full head heads hkv_ i inputs inside ints j keep kept key keys kv l_i lane large lo longs lse m_i main
        num_threads o
        offs_m out p part pid possible product range rows run s self size start_m std stride struct table this tile
        tile_m tl torch total triton unsigned value word words x y register signed typename volatile auto char short
        long goto static template vector Head Rows Tile Key Call LANES KEYS BLOCK_M FLOAT EXACT LOG2E real group_size
        summary_0 list_offsets x_ o_ real_ stride_kv
        """,
    )
)
SIZES = Sizes(1, 2, 1, 9, 11, 8, 8)


def usable(name: str) -> bool:
    try:
        attncc.check(f"attention a({name}: float):\n    score = qk + {name}")
    except attncc.SpecError:
        return False
    return True


USABLE = [name for name in NAMES if usable(name)]


def test_most_names_are_left_to_specifications() -> None:
    assert len(USABLE) > 0.6 * len(NAMES)


def check(names: list[str], target: str) -> None:
    """A specification with a scalar, a tensor and a let of each name, transforms of rows and a table of tiles."""
    q, k, v = (
        torch.randn(1, heads, n, 8, generator=torch.Generator().manual_seed(n))
        for heads, n in ((2, 9), (1, 11), (1, 11))
    )
    half = len(names) // 2
    scalars, tensors = names[:half], names[half:]
    parameters = ", ".join([*(f"{n}: float" for n in scalars), *(f"{n}: f32[N]" for n in tensors)])
    total = " + ".join([*scalars, *(f"{n}[kv_idx]" for n in tensors)])
    spec = (
        f"attention a({parameters}):\n"
        f"    k = k * ({' + '.join(scalars)})\n"
        f"    score = qk + {total}\n"
        f"    mask = {' + '.join(f'{n}[kv_idx]' for n in tensors)} < 100.0\n"
    )
    inputs: dict[str, Any] = {n: 0.01 * i for i, n in enumerate(scalars)} | {n: torch.randn(11) for n in tensors}
    attn = attncc.build(spec, target=target)
    torch.testing.assert_close(attn(q, k, v, **inputs).double(), attn.reference(q, k, v, **inputs), rtol=0, atol=2e-5)


@pytest.mark.representative(1)
@pytest.mark.parametrize("target", ["cpp", "triton:interpret"])
@pytest.mark.parametrize("step", [1, pytest.param(-1, marks=pytest.mark.slow)], ids=["in order", "reversed"])
def test_generated_code_keeps_its_names_apart(step: int, target: str) -> None:
    """Names of scalars are those of tensors in the other order."""
    for start in range(0, len(USABLE), 36):
        check(USABLE[start : start + 36][::step], target)


# Names of backward kernels: what they take, what they hold; a tensor and a scalar that is called as one of its sizes.
BACKWARD = """
    g delta total dtotal d_o do dq dk dv adjoint_0 partial_0 sums tiles delta_i p ds df places_0 left right probe
    strange
    dq_stride_row g_stride_b rows rows_size_0 x num_threads part summed m lse entries
""".split()


@pytest.mark.representative(1)
@pytest.mark.parametrize("target", ["cpp", "triton:interpret"])
def test_gradients_of_tensors_of_any_name(target: str) -> None:
    names = [name for name in BACKWARD if usable(name)]
    scalars, tensors = names[1::2], names[::2]
    assert "g" in tensors
    assert ("rows" in tensors) != ("rows_size_0" in tensors)
    parameters = ", ".join([*(f"{n}: float" for n in scalars), *(f"{n}: f32[N]" for n in tensors)])
    spec = (
        f"attention a({parameters}):\n"
        f"    k = k * k * ({' + '.join((*scalars, *(f'{n}[kv_idx]' for n in tensors)))})\n"
        f"    score = qk + {' + '.join((*scalars, *(f'tanh({n}[kv_idx])' for n in tensors)))}\n"
        f"    mask = {' + '.join(f'{n}[kv_idx]' for n in tensors)} < 100.0\n"
    )
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, 8, generator=generator) for heads, n in ((2, 9), (1, 11), (1, 11)))
    captured = {name: 0.1 * torch.randn(11, generator=generator) for name in tensors}
    leaves = [x.requires_grad_() for x in (q, k, v, *captured.values())]
    inputs: dict[str, Any] = {name: 0.01 * i for i, name in enumerate(scalars)} | captured
    attn = attncc.build(spec, target=target)
    found = torch.autograd.grad(attn(q, k, v, **inputs).square().sum(), leaves)
    oracle = torch.autograd.grad(attn.reference(q, k, v, **inputs).square().sum(), leaves)
    for name, x, exact in zip(("q", "k", "v", *tensors), found, oracle, strict=True):
        torch.testing.assert_close(x, exact, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"d{name}: {text}")
