"""What random features of softmax are made with (`examples/recurrent/performer.attn`): drawn once, and for the keys."""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonal(
    width: int, features: int, *, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A matrix (width, features) of columns as long as those of independent normal numbers are, and orthogonal to each
    other within each block of `width` of them, which makes the variance of products of features smaller."""
    blocks: list[Tensor] = []
    for start in range(0, features, width):
        square = torch.randn(width, width, generator=generator, dtype=torch.float64)
        # The signs make the distribution uniform: QR by itself prefers some rotations.
        q, r = torch.linalg.qr(square)
        blocks.append((q * r.diagonal().sign())[:, : features - start])
    lengths = torch.randn(width, features, generator=generator, dtype=torch.float64).norm(dim=0)
    return (torch.cat(blocks, 1) * lengths).to(dtype) if blocks else torch.zeros(width, 0, dtype=dtype)


def greatest_exponent(k: Tensor, W: Tensor) -> Tensor:
    """The greatest exponent of the features of all keys, (B, HKV), of k (B, HKV, N, D) and W (D, R): what is taken from
    each of them, so that none overflows. It cancels where rows are divided by their sums, and needs no gradient."""
    wide = k.detach().to(torch.promote_types(k.dtype, torch.float32))
    width = k.shape[3]
    exponents = (wide @ W.detach().to(wide.dtype)) * width**-0.25 - wide.square().sum(3, keepdim=True) / (
        2 * width**0.5
    )
    return exponents.amax((2, 3))
