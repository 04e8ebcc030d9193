"""What each operator means: torch functions over float64, int64 and bool tensors that broadcast.

They are total (no argument traps) and differentiable where the function is. What the kernels must match beyond the
obvious is said here once: division by zero, shift counts, conversions, NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attncc.ir.philox import WORD, philox_2x32, philox_4x32

# Floats convert to ints within these bounds, exact in every float type that a kernel computes in.
INT_LIMIT = 2**30


def _nonzero(divisor: Tensor) -> tuple[Tensor, Tensor]:
    """Where the divisor is zero, and the divisor with 1 in those places."""
    zero = divisor == 0
    return zero, torch.where(zero, torch.ones_like(divisor), divisor)


def floordiv(a: Tensor, b: Tensor) -> Tensor:
    """Rounds towards minus infinity; 0 where b is 0."""
    zero, divisor = _nonzero(b)
    quotient = torch.div(a, divisor, rounding_mode="floor")
    return torch.where(zero, torch.zeros_like(quotient), quotient)


def mod(a: Tensor, b: Tensor) -> Tensor:
    """The sign of b; 0 where b is 0."""
    zero, divisor = _nonzero(b)
    rest = torch.remainder(a, divisor)
    return torch.where(zero, torch.zeros_like(rest), rest)


def shl(a: Tensor, count: Tensor) -> Tensor:
    """Counts are clamped to [0, 63]."""
    return torch.bitwise_left_shift(a, count.clamp(0, 63))


def shr(a: Tensor, count: Tensor) -> Tensor:
    """Arithmetic; counts are clamped to [0, 63]."""
    return torch.bitwise_right_shift(a, count.clamp(0, 63))


def popcount(a: Tensor) -> Tensor:
    """Set bits of |a|, as `int.bit_count`: no width is implied."""
    x = a.abs()
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    # Adding bytes by shifts, not by a multiplication whose top byte would land in the sign bit.
    for width in (8, 16, 32):
        x = x + (x >> width)
    return x & 0x7F


def bit_length(a: Tensor) -> Tensor:
    """Bits needed for |a|, as `int.bit_length`; 0 for 0."""
    x = a.abs()
    for width in (1, 2, 4, 8, 16, 32):
        x = x | (x >> width)
    return popcount(x)


def to_int(a: Tensor) -> Tensor:
    """Floats: truncated towards zero, clamped to ±2**30, NaN to 0. Bools: 0 or 1."""
    if a.dtype == torch.bool:
        return a.to(torch.int64)
    bounded = torch.nan_to_num(a.detach(), nan=0.0, posinf=INT_LIMIT, neginf=-INT_LIMIT)
    return bounded.clamp(-INT_LIMIT, INT_LIMIT).trunc().to(torch.int64)


def to_float(a: Tensor) -> Tensor:
    return a.to(torch.float64)


def gelu(a: Tensor) -> Tensor:
    """The exact form, by erf."""
    return a * 0.5 * (1 + torch.erf(a * math.sqrt(0.5)))


def elu(a: Tensor) -> Tensor:
    """alpha = 1. The branch not taken sees 0, so that it has no infinite gradient."""
    return torch.where(a > 0, a, torch.expm1(torch.where(a > 0, torch.zeros_like(a), a)))


def softplus(a: Tensor) -> Tensor:
    """log(1 + exp(a)), with no threshold."""
    return torch.logaddexp(a, torch.zeros_like(a))


def relu(a: Tensor) -> Tensor:
    """Derivative 0 at 0, as `torch.relu`; NaN stays."""
    return torch.relu(a)


def random_key(seed: Tensor, stream: Tensor) -> Tensor:
    """The upper 31 bits of the first word of Philox 4x32 with the stream as counter and the seed as key, both of 64
    bits."""
    zero = torch.zeros_like(seed + stream)
    counter = stream & WORD, stream >> 32 & WORD, zero, zero
    return philox_4x32(counter, (seed & WORD, seed >> 32 & WORD))[0] >> 1


def uniform(key: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The upper 24 bits of the first word of Philox 2x32 with counter (a, b): a fraction that every float type which
    kernels compute in holds exactly. Only the lower 32 bits of the arguments count."""
    return (philox_2x32((a & WORD, b & WORD), key & WORD)[0] >> 8).to(torch.float64) * 2.0**-24
