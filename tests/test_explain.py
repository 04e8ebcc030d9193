"""What `explain` says of a specification can be read in a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

import attncc
from attncc.runtime.call import CompiledAttention

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.attn"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_lines_are_no_longer_than_a_line(path: Path) -> None:
    attn = attncc.build(path, target="cpp:avx2")
    assert isinstance(attn, CompiledAttention)
    said = attn.explain().split("Clauses, and what each varies with", 1)[1]
    assert [line for line in said.splitlines() if len(line) > 120] == []


def test_a_long_clause_is_broken_at_spaces() -> None:
    attn = attncc.build(EXAMPLES[0].parent / "rope.attn", target="cpp:avx2")
    assert isinstance(attn, CompiledAttention)
    said = attn.explain()
    clause = said[said.index("  q      = ") : said.index("  k      = ")].splitlines()
    assert len(clause) == 4
    assert all(line.startswith("      ") for line in clause[1:])
    assert " ".join(line.strip() for line in clause).endswith("[varies with batch, head, query, element]")
