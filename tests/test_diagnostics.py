"""How errors look: places, carets, labels in several lines and files, help."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

import pytest

from attncc.diagnostics import AttnError, CallError, Diagnostic, Label, SpecError, render
from attncc.source import Source, Span


@dataclass(frozen=True, slots=True)
class Odd(Diagnostic):
    code = "T0001"
    title = "`{name}` is odd"
    label = "odd here"
    help = "make `{name}` even"

    name: str


def span(source: Source, text: str, *, last: bool = False) -> Span:
    start = source.text.rindex(text) if last else source.text.index(text)
    return Span(source, start, start + len(text))


def test_without_a_place() -> None:
    assert render(Odd(None, "x")) == "error[T0001]: `x` is odd\n  = help: make `x` even"


def test_labels_in_other_lines_and_files() -> None:
    source = Source("a.attn", "".join(f"line {i}\n" for i in range(1, 12)))
    other = Source("b.attn", "elsewhere\n")
    related = (Label(span(source, "line 1"), "first"), Label(span(other, "where"), "and there"))
    assert (
        render(Odd(span(source, "11"), "x", related=related))
        == """\
error[T0001]: `x` is odd
  --> a.attn:11:6
   |
 1 | line 1
   | ------ first
...
11 | line 11
   |      ^^ odd here
  ::: b.attn:1:5
   |
 1 | elsewhere
   |     ----- and there
   |
   = help: make `x` even"""
    )


def test_a_place_over_several_lines_is_marked_where_it_starts() -> None:
    source = Source("a.attn", "mask = (a\n    and b)\n")
    assert "1 | mask = (a\n  |        ^^ odd here" in render(Odd(span(source, "(a\n    and b)"), "x"))


def test_an_empty_place_and_one_at_the_end_of_the_text() -> None:
    source = Source("a.attn", "mask =")
    assert "1 | mask =\n  |       ^ odd here" in render(Odd(Span(source, 6, 6), "x"))
    assert "1 |\n  | ^ odd here" in render(Odd(Span(Source("empty", ""), 0, 0), "x"))


def test_wide_characters_and_tabs_keep_the_caret_below() -> None:
    wide = Source("a.attn", "# 注意 x\n")
    assert "1 | # 注意 x\n  |        ^ odd here" in render(Odd(span(wide, "x"), "x"))
    tabbed = Source("a.attn", "a\tx\n")
    assert "1 | a x\n  |   ^ odd here" in render(Odd(span(tabbed, "x"), "x"))


def test_braces_in_fields_are_plain_text() -> None:
    assert render(Odd(None, "{name}")).startswith("error[T0001]: `{name}` is odd")


def test_an_error_sorts_what_it_holds() -> None:
    source = Source("a.attn", "abc\n")
    error = SpecError(Odd(span(source, "c"), "c"), Odd(span(source, "a"), "a"), Odd(None, "n"))
    assert [d.name for d in error.diagnostics if isinstance(d, Odd)] == ["n", "a", "c"]
    assert isinstance(error, AttnError)
    assert not isinstance(error, CallError)
    assert str(error) == "\n\n".join(render(d) for d in error.diagnostics)


def test_an_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(CallError(Odd(None, "x"))))
    assert str(error) == str(CallError(Odd(None, "x")))


def test_a_code_belongs_to_one_kind() -> None:
    with pytest.raises(TypeError, match="reuses the code T0001"):
        type("Again", (Diagnostic,), {"code": "T0001"})
