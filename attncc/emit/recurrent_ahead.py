"""What a C++ core asks memory for, a chunk before it is needed, and how that is spread over its work.

Where values are much narrower than keys, passes are too few for all lines: the last are not asked for. Where keys are
wider than a pass needs words, it asks for lines of the chunk after next, too.
"""

from __future__ import annotations

from dataclasses import dataclass

from attncc.emit.core_machine import core_machine, erasing_updates, known_updates
from attncc.emit.staging_cpp import staged_operands
from attncc.ir.types import DType
from attncc.plan.recurrent import CorePlan

_LINE_BYTES = 64
# More lines at a time, fewer tokens in a pass, and more words between two requests than this are not worth their code.
_WIDEST, _RAREST, _FARTHEST = 8, 4, 8


@dataclass(frozen=True, slots=True)
class RowsInPlace:
    """An operand that lies where the caller has it. lines: of the cache, that one of its rows takes."""

    operand: str
    lines: int


@dataclass(frozen=True, slots=True)
class Ahead:
    """How the lines of the next chunk's rows are asked for, while some rows of this chunk read a part of the state, or
    in `streams` pass by it.

    A few at a time, all the while: a core waits for no more than some tens of lines at once, those of the state too.

    rows           what there is to ask for, besides the outputs
    output_lines   lines of a row of these
    wide           so many lines that lie side by side are asked for together
    every          a pass asks for one of so many tokens, the next pass for the next
    apart          words of a pass from one request to the next; where it is 1, `requests` are made with each
    """

    rows: tuple[RowsInPlace, ...]
    output_lines: int
    wide: int
    every: int
    apart: int
    requests: int

    @property
    def at_once(self) -> int:
        """Words that products with the state take at once: a multiple of `apart`, which is counted within them."""
        return max(self.apart, 2)

    def span(self, lines: int) -> int:
        """What so many lines of a row are counted as: passes take them `wide` at a time."""
        return _ratio(lines, self.wide) * self.wide


def ahead(plan: CorePlan) -> Ahead:
    """The schedule of a core's requests."""
    machine = core_machine(plan)
    rows = rows_in_place(plan)
    columns = plan.value_width - 1 if plan.normalized else plan.value_width
    outputs = _lines(columns, plan.dtype)
    if machine.streams:
        return Ahead(rows, outputs, wide=1, every=1, apart=1, requests=1)
    lines = [*(x.lines for x in rows), outputs]
    panels = _ratio(plan.value_width, machine.lanes * machine.vectors)
    readers = machine.chunk * (1 + len(erasing_updates(plan)))
    passes = panels * (readers // machine.rows)
    wide = next((n for n in range(1, _WIDEST) if _groups(lines, n) <= passes), _WIDEST)
    every = max(n for n in (1, 2, _RAREST) if n == 1 or _groups(lines, 1) * n <= passes)
    asked = machine.chunk // every
    words = _ratio(plan.key_width, 2 if machine.pairs else 1)
    apart = max(n for n in (1, 2, 4, _FARTHEST) if n == 1 or n * asked <= words)
    return Ahead(rows, outputs, wide, every, apart, requests=_ratio(asked * apart, words))


def rows_in_place(plan: CorePlan) -> tuple[RowsInPlace, ...]:
    """The operands with channels that no steps make; of those that are the same rows, one."""
    keys, values = _lines(plan.key_width, plan.dtype), _lines(plan.value_width, plan.dtype)
    rows = [RowsInPlace("query", keys)]
    for update in (*known_updates(plan), *erasing_updates(plan)):
        rows.append(RowsInPlace(update.key, keys))
        if update.value:
            rows.append(RowsInPlace(update.value, values))
        if update.erase:
            rows.append(RowsInPlace(update.erase, keys))
    if plan.side in ("key", "value"):
        width = plan.key_width if plan.side == "key" else plan.value_width
        rows.append(RowsInPlace("log_decay", _lines(width, plan.state_dtype)))
    if plan.staging is None:
        return tuple(rows)
    sources = {x.source: x.name for x in reversed(staged_operands(plan)) if x.source in plan.staging.passed}
    return tuple(row for row in rows if row.operand in sources.values())


def _lines(width: int, dtype: DType) -> int:
    return _ratio(width * dtype.bytes, _LINE_BYTES)


def _groups(lines: list[int], wide: int) -> int:
    return sum(_ratio(n, wide) for n in lines)


def _ratio(a: int, b: int) -> int:
    return -(-a // b)
