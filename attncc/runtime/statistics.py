"""The argument `stats` of a call: figures of the weights of softmax, before dropout and without gradients.

    max          the greatest score of each row (B, H, M); -inf where a row keeps nothing
    entropy      -sum(p log p) of the weights of each row (B, H, M), in nats; 0 where a row keeps nothing
    column_sums  what each key gets in all, the sum of its weights over the queries (B, H, N)

The first two come from the forward kernel itself. Column sums are rows of another attention (`attncc.passes.columns`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attncc.diagnostics import CallError
from attncc.ir.nodes import Attention, Softmax
from attncc.passes.columns import GROUP, LSE, WIDTH_V
from attncc.runtime.arguments import Bound, Sizes
from attncc.runtime.errors import NoStatistics, WrongScalar
from attncc.runtime.kernels import Kernels
from attncc.runtime.refusals import _describe

STATISTICS = ("max", "entropy", "column_sums")


def bind_statistics(attention: Attention, stats: Any) -> tuple[str, ...]:
    """The names in `stats`, each once. Raises CallError where one is no statistic, or the attention has none."""
    names = tuple(dict.fromkeys((stats,) if isinstance(stats, str) or not isinstance(stats, Sequence) else stats))
    wrong = [name for name in names if name not in STATISTICS]
    if wrong:
        expected = "names among " + ", ".join(f'"{name}"' for name in STATISTICS)
        raise CallError(
            *(WrongScalar(None, "stats", expected, _describe(name), "pass a tuple of names") for name in wrong)
        )
    if names and not isinstance(attention.normalizer, Softmax):
        raise CallError(NoStatistics(None, attention.name))
    return names


def of_columns(columns: Kernels, q: Tensor, k: Tensor, bound: Bound, lse: Tensor) -> Tensor:
    """The column sums (B, H, N) of weights whose rows are divided by exp(lse); f32, f64 for f64."""
    sizes = bound.sizes
    group = sizes.H // max(sizes.HKV, 1)
    keys = k if group == 1 else k.repeat_interleave(group, 1)
    values = q.new_zeros(()).expand(sizes.B, sizes.H, sizes.M, 1)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # exp(score - inf) is 0: a row without a sum gives nothing
    exchanged = Bound(
        Sizes(sizes.B, sizes.H, sizes.H, sizes.N, sizes.M, sizes.D, 1),
        -bound.q_offset,
        {**bound.tensors, LSE: lse},
        {**bound.scalars, GROUP: group, WIDTH_V: sizes.E},
    )
    _, total = columns.forward(keys, q, values, exchanged, True)
    assert total is not None
    return total
