"""What C++ cores ask memory for ahead: every line of what the next chunk reads and writes, where passes
are enough."""

from __future__ import annotations

from collections import Counter

import pytest
from test_cpp_recurrent import plan_of

from attncc.emit.core_machine import core_machine
from attncc.emit.recurrent_ahead import ahead
from attncc.ir.types import DType
from attncc.plan.recurrent import CorePlan

KINDS = [
    ("delta", "scalar", DType.F32, "avx512"),
    ("delta", "none", DType.F64, "avx2"),
    ("delta", "scalar", DType.BF16, "avx512_bf16"),
    ("write", "scalar", DType.BF16, "avx512_bf16"),
    ("write", "key", DType.BF16, "avx512_bf16"),
]
SIZES = [(64, 64), (128, 128), (256, 256), (64, 128), (48, 80), (40, 64)]


def asked(plan: CorePlan) -> Counter[tuple[str, int, int]]:
    """How often the passes of a chunk ask for each (operand, token, line), as the templates have it."""
    machine, schedule = core_machine(plan), ahead(plan)
    readers = machine.chunk * (1 + sum(x.erase for x in plan.updates))
    panels = -(-plan.value_width // (machine.lanes * machine.vectors))
    words = plan.key_width // (2 if machine.pairs else 1)
    found: Counter[tuple[str, int, int]] = Counter()
    groups = [(rows.operand, rows.lines) for rows in schedule.rows] + [("o", schedule.output_lines)]
    for number in range(panels * (readers // machine.rows)):
        line = number // schedule.every * schedule.wide
        for operand, lines in groups:
            if line < lines:
                requests = words // schedule.at_once * (schedule.at_once // schedule.apart) * schedule.requests
                for i in range(requests):
                    token = number % schedule.every + i * schedule.every
                    found.update((operand, token, x) for x in range(line, min(line + schedule.wide, lines)))
                break
            line -= schedule.span(lines)
    return found


@pytest.mark.parametrize(("updates", "side", "dtype", "arch"), KINDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_all_lines_are_asked_for(updates: str, side: str, dtype: DType, arch: str, sizes: tuple[int, int]) -> None:
    plan = plan_of(updates, side, dtype=dtype, widths=sizes, arch=arch)
    schedule, chunk = ahead(plan), core_machine(plan).chunk
    found = asked(plan)
    lines = {rows.operand: rows.lines for rows in schedule.rows} | {"o": schedule.output_lines}
    assert {
        (operand, token, line) for operand in lines for token in range(chunk) for line in range(lines[operand])
    } <= set(found)
    assert set(found.values()) == {1}
