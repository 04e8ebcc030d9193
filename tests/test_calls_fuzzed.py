"""Calls with anything for an argument: a result, or an error of ours."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import torch
from call_support import F64, SPECS, built, captured, operands
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import by_tier

from attncc import AttnError

_Q, _K, _V = operands()
_IDS = torch.zeros(1, 5, dtype=torch.int64)
VALUES: list[Any] = [
    None, True, 3, -1, 2.5, "x", 1j, [1], {}, object(), math.nan, 2**31, 2**70, 10**400, np.float32(1), np.int64(2),
    np.zeros(2), torch.tensor(1), torch.tensor(1.0), torch.tensor(1j), torch.tensor(True), torch.ones(2), torch.ones(0),
    torch.tensor(1, device="meta"), _Q, _Q.half(), _Q.double(), _Q.int(), _Q.bool(), _Q[0], _Q.to("meta"),
    _Q.to_sparse(), _Q[..., :0],
    _Q[:, :, :0], _Q[:, :0], _Q[:0], _Q.mT, torch.zeros(2, 5, 5), torch.zeros(2, 5, 5, dtype=F64), _IDS,
    _IDS.int(), _IDS.to_sparse(), _IDS[:, :0], torch.zeros(2),
]  # fmt: skip


@settings(max_examples=by_tier(300), deadline=None)
@given(st.sampled_from([name for name in SPECS if name not in ("required", "chosen", "rates", "table")]), st.data())
def test_a_result_or_an_error_of_ours(spec: str, data: st.DataObject) -> None:
    attn = built(spec)
    arguments = {"q": _Q, "k": _K, "v": _V, **captured(spec, _Q, _K)}
    names = [*arguments, *(p.name for p in attn.attention.parameters), "q_offset", "other"]
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        arguments[name] = data.draw(st.sampled_from(range(len(VALUES))).map(VALUES.__getitem__))
    for function in (attn, attn.reference):
        with contextlib.suppress(AttnError):
            o = function(**arguments)
            assert o.shape == (*arguments["q"].shape[:3], arguments["v"].shape[3])
