"""Philox, the counter-based random numbers of dropout, over int64 tensors.

J. Salmon, M. Moraes, R. Dror and D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A word is a number in
[0, 2**32); the same counter and key give the same words everywhere, in any order.
"""

from __future__ import annotations

from torch import Tensor

WORD = 2**32 - 1  # the bits of a word
ROUNDS = 10
# Multipliers, and what is added to the words of a key after each round.
PHILOX_2X32, PHILOX_2X32_KEY = 0xD256D193, 0x9E3779B9
PHILOX_4X32 = (0xD2511F53, 0xCD9E8D57)
PHILOX_4X32_KEYS = (0x9E3779B9, 0xBB67AE85)

Words2 = tuple[Tensor, Tensor]
Words4 = tuple[Tensor, Tensor, Tensor, Tensor]


def philox_2x32(counter: Words2, key: Tensor) -> Words2:
    """Ten rounds of the generator with counters and results of two words and a key of one."""
    x, y = counter
    for _ in range(ROUNDS):
        high, low = _product(x, PHILOX_2X32)
        x, y = high ^ key ^ y, low
        key = (key + PHILOX_2X32_KEY) & WORD
    return x, y


def philox_4x32(counter: Words4, key: Words2) -> Words4:
    """Ten rounds of the generator with counters and results of four words and keys of two."""
    x, y, z, w = counter
    k, m = key
    for _ in range(ROUNDS):
        high_x, low_x = _product(x, PHILOX_4X32[0])
        high_z, low_z = _product(z, PHILOX_4X32[1])
        x, y, z, w = high_z ^ y ^ k, low_z, high_x ^ w ^ m, low_x
        k, m = (k + PHILOX_4X32_KEYS[0]) & WORD, (m + PHILOX_4X32_KEYS[1]) & WORD
    return x, y, z, w


def _product(x: Tensor, factor: int) -> Words2:
    """The high and the low word of x * factor, half a factor at a time: no product leaves 48 bits."""
    below = x * (factor & 0xFFFF)
    above = x * (factor >> 16) + (below >> 16)
    return above >> 16, (above & 0xFFFF) << 16 | below & 0xFFFF
