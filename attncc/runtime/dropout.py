"""The arguments `dropout_p` and `seed` of a call."""

from __future__ import annotations

import json
from typing import Any

import torch

from attncc.diagnostics import CallError
from attncc.passes.dropout import dropout_scalars, rounded
from attncc.runtime.arguments import _type
from attncc.runtime.errors import WrongScalar
from attncc.runtime.refusals import _describe, _number_in

_SEEDS = range(-(2**63), 2**63)


def bind_dropout(dropout_p: Any, seed: Any) -> dict[str, int | float]:
    """The scalars that the attention with dropout has besides; none where nothing is dropped.

    Without a seed one is drawn from PyTorch's generator of the CPU. Raises CallError for arguments that do not fit.
    """
    p, number = _number_in(dropout_p), _number_in(seed)
    reasons: list[WrongScalar] = []
    if _type(p) not in (int, float) or not 0 <= p < 1:
        advice = "it is the probability that a weight is dropped; the others are divided by 1 - dropout_p"
        reasons.append(WrongScalar(None, "dropout_p", "a number of at least 0 and less than 1", _describe(p), advice))
    if number is not None and (_type(number) is not int or not _SEEDS[0] <= number <= _SEEDS[-1]):
        advice = "leave it out to draw one from PyTorch's generator, as torch.manual_seed sets it"
        reasons.append(WrongScalar(None, "seed", "an int that fits 64 bits", _describe(seed), advice))
    if reasons:
        raise CallError(*reasons)
    if not rounded(p):
        return {}
    if number is None:
        number = int(torch.randint(_SEEDS[0], _SEEDS[-1], (), dtype=torch.int64, device="cpu"))
    return dropout_scalars(p, number)


def recipe_with_dropout(recipe: str) -> str:
    """The recipe (`attncc.build`) of the same attention with dropout."""
    return json.dumps({**json.loads(recipe), "dropout": True})
