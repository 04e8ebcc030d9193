"""Reading and printing: whatever is printed reads back the same, and formatting is stable and loses nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from syntax_strategies import expressions, files
from tiers import by_tier

from attncc.diagnostics import SpecError
from attncc.resources import folder
from attncc.source import Source
from attncc.syntax import format_source, nodes, parse, print_file, use_cache_folder
from attncc.syntax import parser as parser_module
from attncc.syntax.printer import WIDTH, expression_text

ROOT = Path(__file__).parent.parent
SPECS = [*sorted((ROOT / "examples").glob("*.attn")), folder("grammar") / "prelude.attn"]


def read(text: str) -> nodes.File:
    return parse(Source("test.attn", text))


def expression(text: str) -> nodes.Expression:
    return read(f"define x = {text}\n").defines[0].value


@given(files())
@settings(max_examples=by_tier(150), deadline=None)
def test_a_printed_file_reads_back_the_same(file: nodes.File) -> None:
    assert read(print_file(file)) == file


@given(expressions)
@settings(max_examples=300, deadline=None)
def test_a_printed_expression_reads_back_the_same(value: nodes.Expression) -> None:
    assert expression(expression_text(value)) == value


@given(files())
@settings(max_examples=by_tier(100), deadline=None)
def test_a_printed_file_is_formatted(file: nodes.File) -> None:
    text = print_file(file)
    formatted = format_source(Source("test.attn", text))
    assert read(formatted) == file
    assert format_source(Source("test.attn", formatted)) == formatted


@st.composite
def commented(draw: st.DrawFn) -> str:
    """A printed file with comments and blank lines strewn over it."""
    lines = print_file(draw(files())).split("\n")
    result: list[str] = []
    inside_doc = False
    for number, line in enumerate(lines[:-1]):
        quotes = line.count('"""')
        if not inside_doc:
            result += [""] * draw(st.integers(0, 2))
            if draw(st.booleans()):
                indent = draw(st.sampled_from(["", "    ", "  "]))
                result.append(f"{indent}# above {number}")
        inside_doc ^= quotes == 1
        trailing = not inside_doc and draw(st.booleans())
        result.append(f"{line} # beside {number}" if trailing else line)
    return "\n".join(result) + "\n"


@given(commented())
@settings(max_examples=by_tier(200), deadline=None)
def test_formatting_is_stable_and_keeps_every_comment(text: str) -> None:
    formatted = format_source(Source("test.attn", text))
    assert read(formatted) == read(text)
    assert format_source(Source("test.attn", formatted)) == formatted
    assert re.findall(r"# \w+ \d+", formatted) == re.findall(r"# \w+ \d+", text)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_our_own_specs_are_formatted(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert format_source(Source(str(path), text)) == text


def test_layout() -> None:
    messy = '''
use   "masks.attn"
# about near
define near( n ,far = 1_000 )= abs(q_idx-kv_idx)<n or(q_idx>far and causal)  # beside


attention  one(a:int=3,b : const   float=1e-6, c:float[H,2*N-1], tau:float[]):
  """First line

     and more.
  """

  # about q
  q=rope( q,q_idx,scaling=yarn( 4,8192 ) )
  k = k * gain[h,:]
  scale=1/sqrt(D)
  mask = (causal and # inside
      near(a))
  let distance = q_idx-kv_idx
  let x = -distance**2 if not(a==3) else ~distance
attention two():
    mask=0<=q_idx-kv_idx<8
'''
    assert (
        format_source(Source("test.attn", messy))
        == '''use "masks.attn"

# about near
define near(n, far=1_000) = abs(q_idx - kv_idx) < n or (q_idx > far and causal)  # beside

attention one(a: int = 3, b: const float = 1e-6, c: float[H, 2 * N - 1], tau: float[]):
    """First line

    and more.
    """

    # about q
    q = rope(q, q_idx, scaling=yarn(4, 8192))
    k = k * gain[h, :]
    scale = 1 / sqrt(D)
    # inside
    mask = causal and near(a)
    let distance = q_idx - kv_idx
    let x = -distance ** 2 if not a == 3 else ~distance

attention two():
    mask = 0 <= q_idx - kv_idx < 8
'''
    )


def test_long_lines_are_broken_before_operators() -> None:
    terms = [f"doc_{i}[b, q_idx] == doc_{i}[b, kv_idx]" for i in range(4)]
    text = (
        f"attention long():\n    mask = {' and '.join(terms)}\n    score = where({terms[0]}, {terms[1]}, {terms[2]})\n"
    )
    formatted = format_source(Source("test.attn", text))
    assert read(formatted) == read(text)
    assert max(map(len, formatted.split("\n"))) <= WIDTH
    assert "\n        and doc_1" in formatted


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("a or b and c", "(a or (b and c))"),
        ("not a == b", "(not (a == b))"),
        ("a < b & c", "(a < (b & c))"),
        ("a | b ^ c & d << e + f", "(a | (b ^ (c & (d << (e + f)))))"),
        ("-a ** b", "(- (a ** b))"),
        ("a ** -b", "(a ** (- b))"),
        ("a ** b ** c", "(a ** (b ** c))"),
        ("a - b - c", "((a - b) - c)"),
        ("a if b else c if d else e", "(a if b else (c if d else e))"),
        ("-x[h] * y", "((- x[h]) * y)"),
        ("a * b // c % d", "(((a * b) // c) % d)"),
        ("~a + b", "((~ a) + b)"),
        ("a << b >> c", "((a << b) >> c)"),
    ],
)
def test_precedence_is_that_of_python(text: str, shape: str) -> None:
    assert _shape(expression(text)) == shape


def _shape(value: nodes.Expression) -> str:
    """The expression with every bracket written."""
    match value:
        case nodes.Unary(operator=operator, operand=operand):
            return f"({operator} {_shape(operand)})"
        case nodes.Binary(operator=operator, left=left, right=right):
            return f"({_shape(left)} {operator} {_shape(right)})"
        case nodes.Compare(first=first, rest=rest):
            return f"({_shape(first)}" + "".join(f" {o} {_shape(v)}" for o, v in rest) + ")"
        case nodes.Conditional(then=then, condition=condition, otherwise=otherwise):
            return f"({_shape(then)} if {_shape(condition)} else {_shape(otherwise)})"
        case _:
            return expression_text(value)


def test_a_chain_of_comparisons_is_one() -> None:
    value = expression("0 <= a < b")
    assert isinstance(value, nodes.Compare)
    assert [operator for operator, _ in value.rest] == ["<=", "<"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("64", 64), ("1_000", 1000), ("0x1F", 31), ("0b101", 5), ("0.5", 0.5), (".5", 0.5), ("5.", 5.0), ("1e-6", 1e-6)],
)
def test_numbers(text: str, value: float) -> None:
    number = expression(text)
    assert isinstance(number, nodes.Number)
    assert repr(number.value) == repr(value)


def test_names_of_later_clauses_are_names_elsewhere() -> None:
    file = read("attention f(sort: int, by: int):\n    let chunk = sort + by\n    score = qk + chunk * back\n")
    assert [parameter.name for parameter in file.attentions[0].parameters] == ["sort", "by"]


def test_a_text_may_be_indented_as_a_whole() -> None:
    inner = "attention f():\n    mask = causal\n\n# between\nattention g():\n    score = qk\n"
    indented = "\n" + "".join(f"        {line}\n" if line else "\n" for line in inner.split("\n")) + "    "
    assert read(indented) == read(inner)


def test_line_ends_of_windows() -> None:
    text = 'attention f():\n    """Doc\n    more."""\n    # comment\n    mask = causal\n'
    assert read(text.replace("\n", "\r\n")) == read(text)


def test_spans_cover_what_they_name() -> None:
    text = 'attention f(a: int = 3):\n    """Doc."""\n    mask = (causal and kv_idx < a)  # why\n'
    attention = read(text).attentions[0]
    assert attention.header_span.text == "attention f(a: int = 3):"
    assert attention.name_span.text == "f"
    assert attention.body[0].span.text == "mask = (causal and kv_idx < a)"
    assert attention.parameters[0].span.text == "a: int = 3"
    clause = attention.body[0]
    assert isinstance(clause, nodes.Clause)
    assert clause.value.span.text == "(causal and kv_idx < a)"


def test_every_syntax_error_of_a_file_is_reported() -> None:
    bad = [f"attention f{i}():\n    score = qk +\n    mask = causal\n" for i in range(5)]
    with pytest.raises(SpecError) as caught:
        read("\n".join(bad))
    assert [d.code for d in caught.value.diagnostics] == ["A0101"] * 5


@given(st.text(alphabet='attention f():\n score=qk+*"#[]\\\0\té–', max_size=80))
@settings(max_examples=400, deadline=None)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        file = read(text)
    except SpecError as error:
        assert str(error)
    else:
        assert read(print_file(file)) == file


def test_the_parser_is_kept_in_a_folder(tmp_path: Path) -> None:
    text = "attention f():\n    mask = causal\n"
    expected = read(text)
    try:
        use_cache_folder(tmp_path)
        for _ in range(2):
            parser_module._lark.cache_clear()
            assert read(text) == expected
        (kept,) = tmp_path.iterdir()
        kept.write_bytes(kept.read_bytes()[:1000])
        parser_module._lark.cache_clear()
        assert read(text) == expected
        use_cache_folder(tmp_path / "missing")
        parser_module._lark.cache_clear()
        assert read(text) == expected
    finally:
        use_cache_folder(None)
        parser_module._lark.cache_clear()
