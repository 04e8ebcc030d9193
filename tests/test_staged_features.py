"""Cores that make rows of features themselves: the same results as with features that PyTorch made."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from recurrent_formulas import FEATURE_FORMULAS
from test_staging import staging_of
from tiers import tiered
from torch import Tensor

import attncc
from attncc.error_rule import compare
from attncc.ir.nodes import Apply, Expr
from attncc.ir.rewrite import contains
from attncc.plan.features import Features, Product
from attncc.plan.sequential import Step
from attncc.recurrent_eager import token_loop
from attncc.runtime.recurrent import RecurrentAttention
from attncc.runtime.recurrent_kernels import RecurrentKernels

EXAMPLES = Path(__file__).parent.parent / "examples" / "recurrent"
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
B, N, D, E = 2, 37, 9, 21

# Features of every sort: what is made of rows, of places, of captured tensors; with and without division.
FEATURES = {
    "a concatenation within a sum": "feature = softmax(concat(x, -x, 0.5))",
    "a greatest of a concatenation": "feature = exp(concat(x, 2 * x) - max(concat(x, 2 * x)))",
    "an outer product of two rows": "feature = outer(relu(x), elu(x) + 1) / sqrt(D)",
    "an outer product within a concatenation": "feature = concat(1, relu(x), outer(x, x) * 0.5, relu(x))",
    "a matrix": "feature = elu(x @ W[h]) + 1",
    "two matrices": "feature = relu(silu(x @ W[h]) @ M7)",
    "a matrix of every head of keys": "feature = relu(x @ P[hkv] + bias)",
    "a matrix of parts": "feature = concat(relu(x @ W[h]), abs(x @ W[h]))",
    "an outer product of projections": "feature = outer(x @ M5, x @ M5)",
    "rows of a captured tensor": "feature = concat(relu(x) * gain[h], relu(x) / (1 + gain[h]))",
    "numbers of tokens": "feature = concat(relu(x) * g[b, h, t], relu(x))",
    "bools and ints of tokens": "feature = concat(relu(x) * where(reset[b, t], 0.5, level[b, t] + 1), relu(x))",
    "scalars of a call": "feature = concat(relu(x) * rate, relu(x) * (2 if sharp else 3) * tau)",
    "positions": "feature = concat(relu(x) * cos(q_idx * 0.01), relu(x) * sin(q_idx * 0.01))",
    "positions that choose": "feature = concat(relu(x) * where(q_idx % 3 == 1, 0.5, 2), relu(x))",
    "sizes": "feature = concat(relu(x) / sqrt(N), relu(x) * H)",
    "heads": "feature = concat(relu(x) * 0.5 ** (h + 1), relu(x) * hkv, relu(x))",
}
INPUTS = {
    "rate": "float = 0.5", "sharp": "bool = true", "W": "float[H, D, 6]", "M7": "float[6, 7]", "M5": "float[D, 5]",
    "P": "float[HKV, D, 6]", "bias": "float[6]", "gain": "float[H, D]", "turned": "float[D, H]", "g": "float[B, H, N]",
    "reset": "bool[B, N]", "level": "i32[B, N]", "tau": "float", "on": "bool[D]",
}  # fmt: skip


def spec(clauses: str) -> str:
    """An attention with these clauses, and the inputs that they read."""
    used = (f"{name}: {kind}" for name, kind in INPUTS.items() if re.search(rf"\b{name}\b", clauses))
    return f"attention featured({', '.join(used)}):\n    " + "\n    ".join(clauses.split("\n"))


def inputs_of(attn: RecurrentAttention, heads: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    wide, H = torch.promote_types(dtype, F32), max(heads)
    drawn: dict[str, Any] = {
        "rate": 0.25,
        "sharp": False,
        "W": torch.randn(H, 6, D, dtype=wide).mT,  # strided
        "M7": torch.randn(6, 7, dtype=dtype),
        "M5": torch.randn(D, 5, dtype=wide),
        "P": torch.randn(heads[1], D, 6, dtype=dtype),
        "bias": torch.randn(6, dtype=wide),
        "gain": torch.rand(D, H, dtype=wide).T + 0.5,
        "turned": torch.rand(D, H, dtype=wide) + 0.5,
        "g": torch.rand(B, N, H, dtype=wide).transpose(1, 2),
        "reset": torch.rand(B, N) < 0.3,
        "level": torch.randint(0, 9, (B, N), dtype=torch.int32),
        "tau": 0.7,
        "on": torch.arange(D) % 3 != 0,
    }
    names = [p.name for p in attn.attention.parameters]
    return {name: x for name, x in drawn.items() if name in names}


def rows_of(heads: tuple[int, int, int], dtype: torch.dtype, tokens: int = N) -> list[Tensor]:
    return [torch.randn(B, h, tokens, w).to(dtype) for h, w in zip(heads, (D, D, E), strict=True)]


def assert_staged_and_right(attn: RecurrentAttention, rows: list[Tensor], inputs: dict[str, Any], **more: Any) -> None:
    assert isinstance(attn.kernels, RecurrentKernels)
    with torch.no_grad():
        o, state = attn(*rows, return_state=True, **inputs, **more)
    assert any(core is not None for core in attn.kernels.staged.values()), "it is staged"
    exact = attn.reference(*rows, return_state=True, **inputs, **more)
    offsets = more.pop("cu_seqlens", None)
    plain = token_loop(
        attn.attention,
        attn.kernels.form,
        *rows,
        inputs,
        q_offset=more.get("q_offset", 0),
        offsets=None if offsets is None else offsets.tolist(),
    )
    for name, found, oracle, formula in zip(("o", "state"), (o, state), exact, plain, strict=True):
        message = compare(name, found, oracle, formula)
        assert message is None, message


def built(text: str) -> RecurrentAttention:
    attn = attncc.build(text)
    assert isinstance(attn, RecurrentAttention)
    return attn


TYPES = [(F32, (4, 4, 4)), (BF16, (4, 2, 2)), (F64, (1, 2, 4))]


def cases(names: Iterable[str]) -> list[Any]:
    """Each with each type; one of them is quick, in turn."""
    return [
        pytest.param(name, *case, id=f"{name}-{case[0]}", marks=() if i % 3 == j else pytest.mark.slow)
        for i, name in enumerate(names)
        for j, case in enumerate(TYPES)
    ]


@pytest.mark.representative(5)
@pytest.mark.parametrize(("name", "dtype", "heads"), cases(FEATURES))
def test_features_of_every_sort(name: str, dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    attn = built(spec(f"{FEATURES[name]}\nmask = causal\nnormalize = sum"))
    assert_staged_and_right(attn, rows_of(heads, dtype), inputs_of(attn, heads, dtype))


WIDTHS = [(16, 32), (7, 5), (33, 70), (1, 1)]


HEADS = [(4, 4, 4), (4, 2, 2), (1, 2, 4), (2, 2, 2)]


def is_quick(name: str, dtype: torch.dtype, widths: tuple[int, int]) -> bool:
    """Whole vectors in f32, parts of them in bf16."""
    return widths == {F32: (16, 32), BF16: (7, 5)}.get(dtype)


@pytest.mark.representative(3)
@pytest.mark.parametrize(
    ("name", "dtype", "widths"), tiered(is_quick, FEATURE_FORMULAS, (F32, BF16, F16, F64), WIDTHS), ids=str
)
def test_examples(name: str, dtype: torch.dtype, widths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, F32)
    heads, (width, columns) = HEADS[WIDTHS.index(widths)], widths
    attn = attncc.build(EXAMPLES / f"{name}.attn")
    assert isinstance(attn, RecurrentAttention)
    rows = [torch.randn(B, h, N, w).to(dtype) for h, w in zip(heads, (width, width, columns), strict=True)]
    drawn = FEATURE_FORMULAS[name].draw(B, max(heads), N, width, columns, heads[1])
    inputs = {n: (0.3 * x).to(wide) if isinstance(x, Tensor) else N for n, x in drawn.items()}
    assert_staged_and_right(attn, rows, inputs)


@pytest.mark.parametrize("tokens", [1, 2, 16, 17])
@pytest.mark.parametrize("name", ["positions", "two matrices", "an outer product within a concatenation"])
def test_steps(name: str, tokens: int) -> None:
    torch.manual_seed(0)
    attn = built(spec(f"{FEATURES[name]}\nmask = causal\nnormalize = sum"))
    (q, k, v), inputs = rows_of((4, 2, 2), F64), inputs_of(attn, (4, 2, 2), F64)
    whole, last = attn(q, k, v, return_state=True, **inputs)
    state = torch.zeros_like(last)
    for start in range(0, N, tokens):
        at = slice(start, start + tokens)
        o = attn.step(q[:, :, at], k[:, :, at], v[:, :, at], state=state, q_offset=start, **inputs)
        assert torch.allclose(o, whole[:, :, at], rtol=1e-9, atol=1e-9)
    assert torch.allclose(state, last, rtol=1e-9, atol=1e-9)


def test_positions_far_from_0_in_packed_sequences() -> None:
    """In f32 an angle at 10,000,000 has hardly a digit behind the point."""
    torch.manual_seed(0)
    attn = built(spec(f"{FEATURES['positions']}\nmask = causal\nnormalize = sum"))
    rows = [x[:1] for x in rows_of((2, 2, 2), F32)]
    assert_staged_and_right(attn, rows, {}, q_offset=10_000_000, cu_seqlens=torch.tensor([0, 11, 11, N]))


@pytest.mark.representative(2)
@pytest.mark.parametrize("width", [8, 16, 40, 9])
def test_rotary_embeddings(width: int) -> None:
    torch.manual_seed(0)
    clauses = "q = rope(q, t)\nk = rope(k, t)\nrecurrence:\n    S *= 0.9\n    S += outer(k, v)\n    out = q @ S"
    attn = built(spec(clauses))
    rows = [torch.randn(B, 2, N, w) for w in (width, width, E)]
    assert_staged_and_right(attn, rows, {}, q_offset=12_345)


def test_nothing_is_divided_by_0() -> None:
    attn = built(spec("feature = relu(x)\nmask = causal\nnormalize = sum"))
    q, k, v = rows_of((2, 2, 2), F32)
    with torch.no_grad():
        o = attn(-q.abs(), k, v)
    assert torch.equal(o, torch.zeros_like(o))


# What depends on sizes and places, beside rows that keep their width.
OPERANDS = {
    "a size": "q = q / sqrt(N)",
    "a position": "q = q * (t + 1)",
    "a head of keys": "q = q * (hkv + 1)",
    "sums of values": "v = l2norm(v)",
    "rows of a tensor whose channels are not neighbours": "q = q * turned[:, h]",
}


@pytest.mark.representative(3)
@pytest.mark.parametrize(("name", "dtype", "heads"), cases(OPERANDS))
def test_operands_of_places(name: str, dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    attn = built(spec(f"{OPERANDS[name]}\nrecurrence:\n    S += outer(k, v)\n    out = q @ S"))
    assert_staged_and_right(attn, rows_of(heads, dtype), inputs_of(attn, heads, dtype))


def test_positions_that_forget() -> None:
    torch.manual_seed(0)
    attn = built(spec("recurrence:\n    S *= where(t % 7 == 0, 0.1, 0.9)\n    S += outer(k, v)\n    out = q @ S"))
    assert_staged_and_right(attn, rows_of((2, 2, 2), F32), {})


def test_a_head_is_one_task_where_its_outputs_are_divided() -> None:
    torch.manual_seed(0)
    attn = built(spec("feature = elu(x) + 1\nmask = causal\nnormalize = sum"))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert_staged_and_right(attn, [torch.randn(1, 1, N, w) for w in (16, 16, 64)], {})
    finally:
        torch.set_num_threads(before)


# What PyTorch makes: the same results all the same.
MADE_BY_PYTORCH = {
    "an outer product of outer products": "feature = outer(relu(x), outer(relu(x), relu(x)))",
    "an outer product of concatenations": "feature = outer(concat(1, relu(x)), concat(1, relu(x)))",
    "a function of an outer product": "feature = exp(outer(x, x) * 0.1)",
    "a sum of an outer product": "feature = softmax(outer(x, x))",
    "bools of channels": "feature = where(on, relu(x), 1)",
}


@pytest.mark.representative(3)
@pytest.mark.parametrize("name", MADE_BY_PYTORCH)
def test_what_is_not_staged_is_right(name: str) -> None:
    torch.manual_seed(0)
    attn = built(spec(f"{MADE_BY_PYTORCH[name]}\nmask = causal\nnormalize = sum"))
    rows, inputs = rows_of((4, 2, 2), F64), inputs_of(attn, (4, 2, 2), F64)
    with torch.no_grad():
        o, state = attn(*rows, return_state=True, **inputs)
    assert isinstance(attn.kernels, RecurrentKernels)
    assert list(attn.kernels.staged.values()) == [None]
    for found, exact in zip((o, state), attn.reference(*rows, return_state=True, **inputs), strict=True):
        assert torch.allclose(found, exact, rtol=1e-9, atol=1e-9)


def features_of(name: str) -> Features:
    return staging_of(name).features


def test_what_occurs_twice_is_computed_once() -> None:
    """The numerators of a softmax, and their sum; the projections of both softmaxes."""
    steps = features_of("hedgehog").steps
    assert sum(isinstance(step, Product) for step in steps) == 2  # of q and of k
    exponentials = [s for s in steps if isinstance(s, Step) and contains(s.value, _is_exponential)]
    assert len(exponentials) == 4  # of either sign, of q and of k


def _is_exponential(node: Expr) -> bool:
    return isinstance(node, Apply) and node.op == "exp"


def test_parts_of_a_row() -> None:
    (made, *_) = features_of("based").rows
    assert (made.row, made.width) == ("q", 1 + 64 + 64 * 64)
    assert [(part.start, part.outer is not None) for part in made.parts] == [(0, False), (1, False), (65, True)]


def test_tables_of_heads_are_kept_and_made_anew_where_a_scalar_changes() -> None:
    text = """
attention of_heads(base: int):
    recurrence:
        S *= 1 - 1.0 / (base + h)
        S += outer(k, v)
        out = q @ S
"""
    attn = attncc.build(text)
    rows = [torch.randn(1, heads, 5, 8) for heads in (3, 3, 3)]
    for base in (2, 2, 5, 2):
        with torch.no_grad():
            o = attn(*rows, base=base)
        torch.testing.assert_close(o.double(), attn.reference(*rows, base=base), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        fewer = attn(*(x[:, :2] for x in rows), base=2)
    torch.testing.assert_close(fewer, o[:, :2])
