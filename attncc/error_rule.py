"""The error rule: how far a kernel's result may be from the float64 oracle.

    max|out - oracle| <= 2 * max|plain - oracle| + ULPS[dtype] * ulp(max|oracle|)

`plain` is what the formula gives as a person would write it in eager PyTorch with tensors of the kernel's dtype, so the
bound follows each variant's own conditioning. A few units in the last place are added because on a small case the plain
formula is exact by luck: one rounding undoes another. For results that are more precise than q, k and v (lse, gradients
of captured tensors) they are too few where rows are transformed, as a transformed row is rounded to the type of its
tensor: `plain` is then also the oracle with this rounding alone, and the larger error counts. NaN must stand where the
oracle has NaN, and infinities must be equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

ULPS: dict[torch.dtype, int] = {torch.float64: 16, torch.float32: 16, torch.float16: 2, torch.bfloat16: 2}


def compare(name: str, found: Tensor, oracle: Tensor, *plain: Tensor, terms: Tensor | None = None) -> str | None:
    """What is wrong with `found` by the error rule, or None. All have one shape; `oracle` is float64.

    terms: for a result that is a difference, what it is taken from. The units in the last place are of the greater of
    the two: where they cancel to 0 the plain formula is exact by luck, and units of 0 are none.
    """
    if found.shape != oracle.shape:
        return f"{name} has shape {tuple(found.shape)}, not {tuple(oracle.shape)}"
    wide = found.detach().double().to(oracle.device)
    finite = oracle.isfinite()
    odd = (wide.isnan() != oracle.isnan()) | (~finite & ~oracle.isnan() & (wide != oracle))
    if odd.any():
        at = odd.nonzero()[0].tolist()
        return f"{name}{at} is {wide[tuple(at)]:g}, not {oracle[tuple(at)]:g} ({int(odd.sum())} such elements)"
    if not finite.any():
        return None
    error = (wide - oracle).abs().where(finite, 0.0)
    # Where the plain formula overflows it sets no standard.
    errors = [(x.double() - oracle).abs().where(finite, 0.0).nan_to_num(nan=0.0, posinf=0.0).max() for x in plain]
    plain_error = torch.stack(errors).max()
    size = oracle[finite].abs().max()
    if terms is not None:
        size = torch.maximum(size, terms[finite].abs().nan_to_num(nan=0.0, posinf=0.0).max())
    allowed = 2 * plain_error + ULPS[found.dtype] * ulp(size, found.dtype)
    if error.max() <= allowed:
        return None
    at = (error == error.max()).nonzero()[0].tolist()
    return (
        f"{name}{at} is {wide[tuple(at)]:g}, not {oracle[tuple(at)]:g}: off by {error.max():.2e}, "
        f"allowed {allowed:.2e} (the plain PyTorch formula is off by {plain_error:.2e} at most)"
    )


def ulp(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of numbers of `dtype` about `magnitude`, no finer than that of the smallest normal one."""
    info = torch.finfo(dtype)
    return info.eps * torch.exp2(torch.floor(torch.log2(magnitude.clamp(min=info.smallest_normal))))
