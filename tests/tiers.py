"""The two tiers: `make test` runs the quick one, `make test-all` both."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def tiered(quick: Callable[..., bool], *axes: Iterable[Any]) -> list[Any]:
    """Every combination of the axes as parameters; those for which `quick` is false are of the long tier."""
    return [pytest.param(*case, marks=() if quick(*case) else pytest.mark.slow) for case in itertools.product(*axes)]
