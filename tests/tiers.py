"""The two tiers: `make test` runs the quick one, `make test-all` both."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable
from typing import Any

import pytest
import torch

# Whether this run is of the quick tier alone; `conftest.py` sets it before it loads a test.
quick = False
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def by_tier(examples: int) -> int:
    """How many examples hypothesis draws: `examples` in the long tier, half of them in the quick one."""
    return (examples + 1) // 2 if quick else examples


def types(*taken: torch.dtype) -> pytest.MarkDecorator:
    """The test's `dtype` is each one; all but those `taken` are of the long tier."""
    return pytest.mark.parametrize("dtype", tiered(taken.__contains__, TYPES), ids=str)


def tiered(quick: Callable[..., bool], *axes: Iterable[Any]) -> list[Any]:
    """Every combination of the axes as parameters; those for which `quick` is false are of the long tier."""
    return [pytest.param(*case, marks=() if quick(*case) else pytest.mark.slow) for case in itertools.product(*axes)]


def by_type(
    names: Iterable[str], dtypes: Iterable[Any], representative: Container[str], alike: Container[str]
) -> list[Any]:
    """Names in each type: representative ones quick in all, those alike to others in none, the rest in the first."""
    return tiered(
        lambda name, dtype: name in representative or (dtype == dtypes[0] and name not in alike), names, dtypes
    )
