"""The block structure of a mask, as expressions over the corners of a tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attncc.ir.nodes import Expr, Summary


@dataclass(frozen=True, slots=True)
class KeyRange:
    """Keys [lo, hi) that a tile of queries may see, and the part [full_lo, full_hi) where no mask code is needed.

    Int expressions over call- and head-level values, Index q_lo, q_hi and `Summary` leaves of axis "q". 0 <= lo and
    hi <= N; the range is empty where lo >= hi. The full part is what [full_lo, full_hi) shares with [lo, hi), nothing
    where full_lo >= full_hi; no part of the range is ever full if full_lo and full_hi are the same expression.
    """

    lo: Expr
    hi: Expr
    full_lo: Expr
    full_hi: Expr


@dataclass(frozen=True, slots=True)
class BlockStructure:
    """Which (tile of queries) x (tile of keys) pairs are empty, full or partial.

    strategy
      bounds   the ranges are all there is: outside them nothing is kept
      scan     inside the ranges each tile is classified in the loop by `possible` and `certain`
      list     as scan, but live tiles are listed per tile of queries before the kernel runs
    possible, certain: bool expressions over q_lo, q_hi, kv_lo, kv_hi, head-level values and `Summary` leaves: a tile
    is empty where not `possible`, full where `certain`. They are sound for every non-empty tile, whatever the strategy.
    Ranges ascend by lo, empty ones too; they may overlap, and neighbours, rounded to tiles, may share tiles: what two
    ranges hold counts once (a kernel goes on from where it is). `ranges` is never empty. summaries: every `Summary` in
    any of these expressions, of either axis.
    Loads at tile corners may lie outside their tensor: like every load of a kernel, they are clamped.
    per_batch, per_head: whether the structure differs between batches and heads; lists of tiles are shared where not.
    """

    strategy: Literal["bounds", "scan", "list"]
    ranges: tuple[KeyRange, ...]
    possible: Expr
    certain: Expr
    summaries: tuple[Summary, ...] = ()
    per_batch: bool = True
    per_head: bool = True
