"""docs/language.md: every snippet does what the page says, and no builtin or definition is left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from attncc.check.functions import BUILTINS
from attncc.check.modules import prelude
from attncc.check.rope import SCALINGS
from attncc.check.specification import check_all
from attncc.check.suggest import define_signature
from attncc.check.world import CONSTANTS, COORDINATES, HOLES, LATER_CLAUSES, LATER_FUNCTIONS, ROWS, SIZES
from attncc.diagnostics import SpecError
from attncc.ir.recurrence import Recurrence
from attncc.ir.recurrence_verify import verify_recurrence
from attncc.ir.verify import verify
from attncc.source import Source
from attncc.syntax import parse, print_file

PAGE = (Path(__file__).parent.parent / "docs" / "language.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```attn\n(.*?)```", PAGE, re.DOTALL)
WRONG = re.findall(r"```attn error\n(.*?)```(?:\s*```text\n(.*?)```)?", PAGE, re.DOTALL)


def source(text: str, tmp_path: Path) -> Source:
    (tmp_path / "masks.attn").write_text("define visible = causal\n")
    return Source(str(tmp_path / "language.attn"), text)


def test_the_page_has_snippets() -> None:
    assert len(SNIPPETS) >= 6
    assert len(WRONG) == 2


@pytest.mark.parametrize("text", SNIPPETS)
def test_a_snippet_is_right(text: str, tmp_path: Path) -> None:
    for attention in check_all(source(text, tmp_path)).values():
        if isinstance(attention, Recurrence):
            verify_recurrence(attention)
        else:
            verify(attention)


@pytest.mark.parametrize("text", SNIPPETS)
def test_a_snippet_reads_back_the_same(text: str, tmp_path: Path) -> None:
    file = parse(source(text, tmp_path))
    assert parse(Source("printed", print_file(file))) == file


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_wrong_snippet_is_refused_as_shown(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        check_all(Source("language.attn", text))
    if message:
        assert str(caught.value) == message.rstrip()


@pytest.mark.parametrize("name", [*COORDINATES, *SIZES, *ROWS, *HOLES, *CONSTANTS, *LATER_CLAUSES, *LATER_FUNCTIONS])
def test_every_name_is_described(name: str) -> None:
    assert re.search(rf"`{name}[`:( ]|`{name} by", PAGE)


@pytest.mark.parametrize("name", [*BUILTINS, *SCALINGS])
def test_every_function_is_described(name: str) -> None:
    assert f"`{name}(" in PAGE


@pytest.mark.parametrize("name", [*prelude().defines])
def test_the_prelude_is_described_as_it_is_called(name: str) -> None:
    define = prelude().defines[name]
    assert f"| `{name if define.parameters is None else define_signature(define)}` |" in PAGE


def test_the_page_names_no_definition_that_is_not_there() -> None:
    table = PAGE.split("### The prelude")[1].split("## Errors")[0]
    assert set(re.findall(r"^\| `(\w+)", table, re.MULTILINE)) == set(prelude().defines)
