"""Builtins that Triton has no function for, or whose own differs from the language's.

A kernel gets a copy of those that it calls. They are written in plain Triton, without the device libraries, so that
they run on every target and in the interpreter. `FLOAT` is the type that the kernel computes in; `EXACT` says that the
inputs are as precise as that type, so that the last bits matter.
"""

import triton
import triton.language as tl

FLOAT = tl.constexpr(tl.float32)
EXACT = tl.constexpr(True)


@triton.jit
def attn_clamp(index, size):
    """The index, moved into [0, size)."""
    return tl.maximum(tl.minimum(index, size - 1), 0)


@triton.jit
def attn_tally(v):
    """1 for -inf, 256 for inf, 40960 for NaN, else 0: sums over up to 128 of them say which there are."""
    number = tl.where(v == float("inf"), 256.0, 0.0)
    number = tl.where(v == float("-inf"), 1.0, number)
    return tl.where(v != v, 40960.0, number)


@triton.jit
def attn_add_tallied(acc, seen):
    """acc plus the infinite and missing values that were counted in `seen`."""
    acc = tl.where(seen >= 256.0, acc + float("inf"), acc)
    acc = tl.where(seen - 256.0 * tl.floor(seen / 256.0) > 0.0, acc - float("inf"), acc)
    return tl.where(seen >= 40960.0, float("nan"), acc)


@triton.jit
def attn_floordiv(x, y):
    """x // y, rounded down (Triton's rounds towards zero); 0 where y is 0."""
    divisor = tl.where(y == 0, 1, y)
    quotient = x // divisor
    rest = x - quotient * divisor
    quotient = tl.where((rest != 0) & ((rest < 0) != (divisor < 0)), quotient - 1, quotient)
    return tl.where(y == 0, 0, quotient)


@triton.jit
def attn_mod(x, y):
    """x % y with the sign of y (Triton's has that of x); 0 where y is 0."""
    divisor = tl.where(y == 0, 1, y)
    rest = x % divisor
    rest = tl.where((rest != 0) & ((rest < 0) != (divisor < 0)), rest + divisor, rest)
    return tl.where(y == 0, 0, rest)


@triton.jit
def attn_min(x, y):
    """The smaller; NaN if either is."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def attn_max(x, y):
    """The greater; NaN if either is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def attn_sign(x):
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def attn_relu(x):
    return tl.where(x < 0, 0, x)


@triton.jit
def attn_pow(x, y):
    """x ** y. A negative x asks for a whole y."""
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    size = tl.where(y == 0, 1.0, size)
    odd = y - 2.0 * tl.floor(y * 0.5) == 1.0
    signed = tl.where(odd, -size, size)
    signed = tl.where(y == tl.floor(y), signed, float("nan"))
    return tl.where(x < 0, signed, size)


@triton.jit
def attn_within_turn(x):
    """An angle in f64, less whole turns, as f32: from -pi to pi."""
    turns = tl.floor(x * 0.15915494309189535 + 0.5)
    return (x - turns * 6.283185307179586).to(tl.float32)


@triton.jit
def attn_sin(x):
    """Of an angle in f64, to the digits of f32: GPUs take sines of f64 by long programs."""
    return tl.sin(attn_within_turn(x)).to(tl.float64)


@triton.jit
def attn_cos(x):
    return tl.cos(attn_within_turn(x)).to(tl.float64)


@triton.jit
def attn_log1p(x):
    """log(1 + x): the rounding error of 1 + x, known from what came out, is divided out again."""
    y = 1.0 + x
    exact = tl.log(y) * (x / (y - 1.0))
    return tl.where(y == 1.0, x, tl.where(y == float("inf"), y, exact))


@triton.jit
def attn_tanh(x):
    """By exp(-2|x|), which cannot overflow; near 0, where that loses digits, by the series."""
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    t = (1.0 - e) / (1.0 + e)
    t = tl.where(x < 0, -t, t)
    if EXACT:
        z = x * x
        series = 3.5921280365724810e-3
        series = series * z - 8.8632355299021966e-3
        series = series * z + 2.1869488536155203e-2
        series = series * z - 5.3968253968253968e-2
        series = series * z + 0.13333333333333333
        series = series * z - 0.33333333333333333
        t = tl.where(size < 0.125, x + x * z * series, t)
    return t


@triton.jit
def attn_sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def attn_silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def attn_gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.70710678118654752))


@triton.jit
def attn_elu(x):
    return tl.where(x <= 0, tl.exp(tl.minimum(x, 0.0)) - 1.0, x)  # a NaN stays


@triton.jit
def attn_softplus(x):
    return attn_max(x, 0.0) + attn_log1p(tl.exp(-tl.abs(x)))


@triton.jit
def attn_round(x):
    """To the nearest whole number, ties to even."""
    below = tl.floor(x)
    rest = x - below
    odd = below - 2.0 * tl.floor(below * 0.5) == 1.0
    return tl.where((rest > 0.5) | ((rest == 0.5) & odd), below + 1.0, below)


@triton.jit
def attn_shl(x, count):
    """x << count in 64 bits; counts are clamped to 0..63."""
    return tl.cast(x, tl.int64) << tl.maximum(tl.minimum(count, 63), 0)


@triton.jit
def attn_shr(x, count):
    """x >> count in 64 bits, keeping the sign; counts are clamped to 0..63."""
    return tl.cast(x, tl.int64) >> tl.maximum(tl.minimum(count, 63), 0)


@triton.jit
def attn_popcount(x):
    """Set bits of |x|, by sums over pairs, nibbles and bytes."""
    bits = tl.abs(tl.cast(x, tl.int64))
    bits = bits - ((bits >> 1) & 0x5555555555555555)
    bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
    bits = bits + (bits >> 8)
    bits = bits + (bits >> 16)
    bits = bits + (bits >> 32)
    return (bits & 0x7F).to(tl.int32)


@triton.jit
def attn_bit_length(x):
    """Bits needed for |x|: those below the highest one are set first."""
    bits = tl.abs(tl.cast(x, tl.int64))
    bits = bits | (bits >> 1)
    bits = bits | (bits >> 2)
    bits = bits | (bits >> 4)
    bits = bits | (bits >> 8)
    bits = bits | (bits >> 16)
    bits = bits | (bits >> 32)
    return attn_popcount(bits)


@triton.jit
def attn_to_int(x):
    """Without its fraction and within 2**30 either way; 0 for NaN; 0 or 1 for a bool."""
    if x.dtype == tl.int1:
        whole = x.to(tl.int32)
    else:
        bounded = tl.minimum(tl.maximum(x, -1073741824.0), 1073741824.0)
        whole = tl.where(x == x, bounded, 0.0).to(tl.int32)
    return whole


@triton.jit
def attn_random_key(seed, stream):
    """The upper 31 bits of the first word of Philox 4x32 with the stream as counter and the seed as key."""
    k = tl.cast(seed, tl.uint32)
    m = tl.cast(tl.cast(seed, tl.int64) >> 32, tl.uint32)
    x = tl.cast(stream, tl.uint32)
    y = tl.cast(tl.cast(stream, tl.int64) >> 32, tl.uint32)
    z = x & 0
    w = x & 0
    for _ in tl.static_range(10):
        high_x = tl.umulhi(x, 0xD2511F53)
        low_x = x * 0xD2511F53
        high_z = tl.umulhi(z, 0xCD9E8D57)
        low_z = z * 0xCD9E8D57
        x = high_z ^ y ^ k
        y = low_z
        z = high_x ^ w ^ m
        w = low_x
        k += 0x9E3779B9
        m += 0xBB67AE85
    return (x >> 1).to(tl.int32)


@triton.jit
def attn_uniform(key, a, b):
    """The upper 24 bits of the first word of Philox 2x32 with counter (a, b), as a fraction."""
    k = tl.cast(key, tl.uint32)
    x = tl.cast(a, tl.uint32)
    y = tl.cast(b, tl.uint32)
    for _ in tl.static_range(10):
        high = tl.umulhi(x, 0xD256D193)
        low = x * 0xD256D193
        x = high ^ k ^ y
        y = low
        k += 0x9E3779B9
    return (x >> 8).to(tl.int32).to(FLOAT) * 5.9604644775390625e-08  # 2**-24
