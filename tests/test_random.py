"""Philox: the published test vectors, and the same bits in PyTorch, in C++ and in interpreted Triton."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cpp_support import KV, NATIVE_ARCHS, Q, attention, op, run
from tiers import tiered
from torch import Tensor
from triton_support import elementwise

from attncc.ir.nodes import Apply, Constant, Elementwise, Expr, Index, Parameter, ScalarParameter
from attncc.ir.operators import OPERATORS
from attncc.ir.philox import philox_2x32, philox_4x32
from attncc.ir.types import Kind
from attncc.passes.ranges import INT32, Range, fits_int32, int_range

# From kat_vectors of Random123, ten rounds: counter, key, result.
KNOWN_2X32 = (
    ("00000000 00000000", "00000000", "ff1dae59 6cd10df2"),
    ("ffffffff ffffffff", "ffffffff", "2c3f628b ab4fd7ad"),
    ("243f6a88 85a308d3", "13198a2e", "dd7ce038 f62a4c12"),
)
KNOWN_4X32 = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


def words(text: str) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_2X32)
def test_known_answers_of_two_words(counter: str, key: str, expected: str) -> None:
    assert philox_2x32(words(counter), words(key)[0]) == words(expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_4X32)
def test_known_answers_of_four_words(counter: str, key: str, expected: str) -> None:
    assert philox_4x32(words(counter), words(key)) == words(expected)  # type: ignore[arg-type]


def test_numbers_are_those_of_the_generator() -> None:
    counter, key, expected = (words(text) for text in KNOWN_2X32[2])
    uniform = OPERATORS["uniform"].torch(key[0], *counter)
    assert uniform.item() == (expected[0] >> 8).item() / 2**24
    zero = torch.tensor(0)
    assert OPERATORS["random_key"].torch(zero, zero).item() == int(KNOWN_4X32[0][2].split()[0], 16) >> 1
    minus_one = torch.tensor(-1)  # all 64 bits of seed and stream are set; the rest of the counter is 0
    by_words = philox_4x32((*words("ffffffff ffffffff"), zero, zero), words("ffffffff ffffffff"))  # type: ignore[arg-type]
    assert OPERATORS["random_key"].torch(minus_one, minus_one) == by_words[0] >> 1


NUMBERS = [0, 1, 2, -1, -7, 255, 65535, 65536, 10**6, 2**31 - 1, -(2**31), 123456789, -987654321, 31, 77, 2**30]
WIDE = [*NUMBERS[:12], 2**32, -(2**63), 2**63 - 1, 0x0123456789ABCDEF]


def spread(values: list[int], count: int) -> list[Tensor]:
    """`count` columns of 64 that put each of the values beside others."""
    rows = torch.arange(64)
    return [torch.tensor(values)[rows * (2 * n + 1) % 16 ^ rows // 16 * n] for n in range(count)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_triton_has_the_same_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    values = NUMBERS if dtype is torch.int32 else WIDE
    a, b, c = (x.to(dtype) for x in spread(values, 3))
    key = elementwise(tmp_path, "attn_random_key(x0, x1)", [a, b], torch.int64)
    assert torch.equal(key, OPERATORS["random_key"].torch(a.long(), b.long()))
    for computed in (torch.float32, torch.float64):
        found = elementwise(tmp_path, "attn_uniform(x0, x1, x2)", [a, b, c], computed)
        assert torch.equal(found.double(), OPERATORS["uniform"].torch(a.long(), b.long(), c.long()))


SEED, SHIFT = Parameter("seed", Kind.INT), Parameter("shift", Kind.INT)
KEY = op("random_key", SEED, op("add", op("mul", Index("b"), Constant(1 << 33)), Index("h")))
LANES = {
    "narrow": (KEY, Q, KV),
    "shifted": (KEY, op("sub", KV, Q), SHIFT),
    "wide": (op("mul", SEED, Constant(2**33 + 5)), op("mul", Q, Constant(2**40 + 77)), op("sub", KV, SHIFT)),
    "keys of queries": (op("random_key", op("mul", SEED, op("mul", Q, Constant(2**35))), Q), SHIFT, KV),
    "of keys": (op("random_key", KV, SEED), KV, SHIFT),
}


def in_f32_at_the_ends(dtype: torch.dtype, arch: str) -> bool:
    """On the widest machine and the narrowest, and one in f64."""
    return arch == NATIVE_ARCHS[0] or (arch == NATIVE_ARCHS[-1] and dtype == torch.float32)


@pytest.mark.representative(4)
@pytest.mark.parametrize(
    ("dtype", "arch"), tiered(in_f32_at_the_ends, (torch.float32, torch.float64), NATIVE_ARCHS), ids=str
)
@pytest.mark.parametrize("arguments", LANES.values(), ids=LANES)
def test_cpp_has_the_same_bits(arguments: tuple[Expr, ...], dtype: torch.dtype, arch: str) -> None:
    """Of the number at each pair, which a value of the key's own shows."""
    parameters = (ScalarParameter("seed", Kind.INT, None), ScalarParameter("shift", Kind.INT, None))
    spec = attention(normalizer=Elementwise(Apply("uniform", arguments)), parameters=parameters)
    m, n = 21, 11
    q, k = torch.zeros(2, 3, m, 1, dtype=dtype), torch.zeros(2, 3, n, 1, dtype=dtype)
    v = torch.eye(n, dtype=dtype).expand(2, 3, n, n)
    seed, shift = -123456789, -(2**31)
    found, _ = run(spec, q, k, v, {"seed": seed, "shift": shift}, arch=arch)
    b, h, q_idx, kv_idx = torch.meshgrid(*map(torch.arange, (2, 3, m, n)), indexing="ij")
    at = {
        Index("b"): b,
        Index("h"): h,
        Q: q_idx + n - m,
        KV: kv_idx,
        SEED: torch.tensor(seed),
        SHIFT: torch.tensor(shift),
    }

    def meaning(expr: Expr) -> Tensor:
        match expr:
            case Apply(op=name, args=args):
                return OPERATORS[name].torch(*map(meaning, args))
            case Constant(value=value):
                return torch.tensor(value)
            case _:
                return at[expr]

    assert torch.equal(found.double(), meaning(spec.normalizer.weight).broadcast_to(found.shape))  # type: ignore[union-attr]


def test_keys_fit_32_bits() -> None:
    wide = op("mul", SEED, Constant(2**32))
    assert int_range(op("random_key", wide, SEED)) == Range(0, INT32.hi)
    assert not fits_int32(op("random_key", wide, SEED))
