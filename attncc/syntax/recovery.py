"""What went wrong where the grammar gave up, in the words of someone who writes specs, and where to read on."""

from __future__ import annotations

import difflib
import re
from typing import Any

from attncc.diagnostics import Diagnostic, Label
from attncc.source import Source, Span
from attncc.syntax.errors import (
    BadIndentation,
    EmptyBody,
    ForeignOperator,
    MissingColon,
    MissingType,
    NotAnItem,
    SingleEquals,
    UnclosedBracket,
    Unexpected,
    UnknownCharacter,
    UnmatchedBracket,
    Unterminated,
)
from attncc.syntax.lexical import CLOSING, open_brackets, parts, statement_starts

Range = tuple[int, int]

ITEMS = ("attention", "define", "use")
BLOCKS = ("recurrence", "select", "branch")

# Operators of other languages, longest first, and what to write for them here.
_FOREIGN = {"&&": "and", "||": "or", "!": "not", "<>": "!=", "===": "==", "!==": "!=", ":=": "=", "**=": "="}
_FOREIGN_WORDS = {"is": "==", "xor": "!=", "mod": "%", "div": "//"}

# Terminals as a person would name them; those that can start an expression are named together.
_TERMINALS = {
    "COLON": "`:`",
    "COMMA": "`,`",
    "RPAR": "`)`",
    "RSQB": "`]`",
    "LPAR": "`(`",
    "LSQB": "`[`",
    "EQUAL": "`=`",
    "NAME": "a name",
    "NUMBER": "a number",
    "STRING": 'a path such as "masks.attn"',
    "_NEWLINE": "the end of the line",
    "_INDENT": "an indented block",
    "IF": "`if`",
    "ELSE": "`else`",
    "BY": "`by`",
    "CHUNK": "`chunk`",
    "BACK": "`back`",
    "STAR_EQUAL": "`*=`",
    "PLUS_EQUAL": "`+=`",
    "MINUS_EQUAL": "`-=`",
}
_OPERAND = {"NAME", "NUMBER", "LPAR"}
_EXPRESSION_START = {*_OPERAND, "NOT", "TRUE", "FALSE"}
_OPERATORS = {"OR", "AND", "COMPARE", "BAR", "CARET", "AMPERSAND", "SHIFT", "STAR", "POWER", "TIMES", "PLUS", "MINUS"}
_ELSE = re.compile(r"\s*(elif|else)\b")
_CLAUSES = {"LET", "RECURRENCE", "SELECT", "BRANCH", "SORT"}


def forbidden_characters(source: Source) -> list[Diagnostic]:
    """Tabs that indent, and NUL, which marks broken lines while parsing."""
    errors: list[Diagnostic] = []
    depth = 0
    for part in parts(source.text):
        span = Span(source, part.start, part.end)
        if part.kind == "bracket":
            depth = depth + 1 if part.text in CLOSING else max(0, depth - 1)
        elif part.kind == "tab" and depth == 0:
            where, mend = "a tab starts this line", "indent with four spaces per level"
            errors.append(BadIndentation(span, "a tab cannot indent", where, mend))
        if "\0" in part.text:
            at = part.start + part.text.index("\0")
            errors.append(UnknownCharacter(Span(source, at, at + 1), "\\0"))
    return errors


def bad_dedent(source: Source, text: str, base: int) -> Diagnostic:
    """The first line whose indentation returns to a level that no earlier line has."""
    levels = [base]
    for start in statement_starts(text):
        line = text[start:].split("\n", 1)[0]
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        indent = len(line) - len(line.lstrip())
        while levels and indent < levels[-1]:
            levels.pop()
        if not levels or indent > levels[-1]:
            if start and (not levels or indent < base or _went_deeper(levels, indent, text, start)):
                where = f"{indent} spaces fit no line above"
                mend = "indent all clauses of an attention by the same number of spaces"
                return BadIndentation(
                    _clipped(source, start, start + indent + 1), "this line fits no level of indentation", where, mend
                )
            levels.append(indent)
    raise AssertionError("no bad dedent in the text")


def _went_deeper(levels: list[int], indent: int, text: str, start: int) -> bool:
    """Whether the line at `start` is less indented than the statement before it, yet at no known level."""
    before = [line for line in text[:start].split("\n") if line.strip() and not line.lstrip().startswith("#")]
    return bool(before) and indent < len(before[-1]) - len(before[-1].lstrip()) and indent > levels[-1]


def explain(source: Source, text: str, error: Any, base: int) -> tuple[Diagnostic, Range | None]:
    """The error at which parsing of `text` stopped, and the range to blot out so as to read on; None to stop there.

    `text` is that of the source, or has earlier broken lines blotted out; offsets are the same. `base` is the
    indentation of its first line.
    """
    from lark import UnexpectedCharacters
    from lark.indenter import DedentError

    if isinstance(error, DedentError):
        return bad_dedent(source, text, base), None
    expected: frozenset[str]
    if isinstance(error, UnexpectedCharacters):
        at: Any = error  # lark's errors are untyped
        position, token, expected = at.pos_in_stream or 0, "", frozenset(at.allowed or ())
    else:
        token, position = _token(error, text)
        expected = frozenset(getattr(error, "accepts", None) or getattr(error, "expected", ()))
    place = _Place(source, text, position, token, expected)
    found = place.explain()
    return found, place.broken(found)


def _token(error: Any, text: str) -> tuple[str, int]:
    token = error.token
    if token.type == "$END" or token.start_pos is None:
        return "$END", len(text.rstrip())
    # Tokens of layout lie where the text of their line starts.
    if token.type in ("_INDENT", "_DEDENT"):
        return token.type, token.end_pos or token.start_pos
    return token.type, token.start_pos


class _Place:
    """Where parsing stopped: the offending token and what could have stood there."""

    def __init__(self, source: Source, text: str, position: int, token: str, expected: frozenset[str]) -> None:
        self.source = source
        self.text = text
        self.position = position
        self.token = token
        self.expected = expected
        match = re.compile(r'"{3}|\w+|[()\[\],.]|[^\w\s"()\[\],.]+|"[^"\n]*"?').match(text, position)
        self.word = match.group() if match else ""
        starts = statement_starts(text)
        self.start = max((s for s in starts if s <= position), default=0)
        self.end = next((s for s in starts if s > position), len(text))
        self.before = text[self.start : position].rstrip()

    def span(self, length: int | None = None) -> Span:
        return _clipped(self.source, self.position, self.position + (len(self.word) if length is None else length))

    def after_previous(self) -> Span:
        """The place right after the last thing before the offending token, on its line."""
        end = len(self.text[: self.position].rstrip())
        return Span(self.source, min(end, len(self.source.text)), min(end + 1, len(self.source.text)))

    def explain(self) -> Diagnostic:
        for rule in (self._layout, self._strings, self._brackets, self._operators, self._headers, self._items):
            if (found := rule()) is not None:
                return found
        span = self.after_previous() if self.token in ("_NEWLINE", "$END", "_DEDENT") else self.span()
        if self.token == "":
            return UnknownCharacter(span, self.word[:1] or self.text[self.position], self._character_hint())
        return Unexpected(span, self._found(), describe(self.expected), self._hint())

    def _layout(self) -> Diagnostic | None:
        if self.token == "_INDENT":
            mend = "give all clauses the same indentation, or put an expression of several lines in brackets"
            return BadIndentation(self.span(), "unexpected indentation", "deeper than the line above", mend)
        if (
            self.token in ("_DEDENT", "$END")
            and self.expected & {"_DEDENT", "_INDENT"}
            and "_INDENT" not in self.expected
        ):
            return None
        if self.expected == frozenset(("_INDENT",)):
            header = self.text[: self.position].rstrip()
            start = header.rfind("\n") + 1
            name = re.search(r"(attention|branch)\s+(\w+)|(\w+)", header[start:])
            assert name is not None
            return EmptyBody(
                _clipped(self.source, start + len(header[start:]) - len(header[start:].lstrip()), len(header)),
                name.group(2) or name.group(3),
            )
        return None

    def _strings(self) -> Diagnostic | None:
        for part in parts(self.text):
            if part.kind in ("open_docstring", "open_string") and part.start <= max(self.position, self.start):
                quotes = '"""' if part.kind == "open_docstring" else '"'
                what = "docstring" if part.kind == "open_docstring" else "string"
                return Unterminated(_clipped(self.source, part.start, part.start + len(quotes)), what, f"`{quotes}`")
        return None

    def _brackets(self) -> Diagnostic | None:
        opened = open_brackets(self.text, self.position)
        if self.word[:1] in (")", "]") and self.token != "_NEWLINE":
            wrong = not opened or CLOSING[opened[-1].text] != self.word[0]
            if wrong:
                related = tuple(
                    Label(_clipped(self.source, b.start, b.end), f"`{b.text}` is closed by `{CLOSING[b.text]}`")
                    for b in opened[-1:]
                )
                return UnmatchedBracket(self.span(1), self.word[0], related=related)
        starts_line = self.text[self.text.rfind("\n", 0, self.position) + 1 : self.position].strip() == ""
        clause = re.compile(r"(let\s+)?[A-Za-z_]\w*\s*=(?!=)|(attention|define|use|let|\"\"\")\b").match(
            self.text, self._line_start()
        )
        if opened and (self.token == "$END" or starts_line or clause):
            bracket = opened[-1]
            if self.text.count("\n", bracket.start, self.position) or self.token == "$END":
                return UnclosedBracket(
                    _clipped(self.source, bracket.start, bracket.end), bracket.text, CLOSING[bracket.text]
                )
        return None

    def _line_start(self) -> int:
        start = self.text.rfind("\n", 0, self.position) + 1
        return start + len(self.text[start:]) - len(self.text[start:].lstrip())

    def _operators(self) -> Diagnostic | None:
        # `&&` is read as `&` and a misplaced `&`: look at the run of symbols around the place.
        start = self.position
        while start > self.start and self.text[start - 1] in "&|=!<>:*":
            start -= 1
        run = re.compile(r"[&|=!<>:*?]+").match(self.text, start)
        if run and run.group() in _FOREIGN and self.word != "=":
            return ForeignOperator(_clipped(self.source, start, run.end()), run.group(), _FOREIGN[run.group()])
        if self.token == "NAME" and self.word in _FOREIGN_WORDS and self.expected & _OPERATORS:
            return ForeignOperator(self.span(), self.word, _FOREIGN_WORDS[self.word])
        if (
            self.word == "="
            and re.fullmatch(r"\s*(let\s+)?\w+\s*=", self.before)
            and self.text[self.position - 1] == "="
        ):
            return ForeignOperator(_clipped(self.source, self.position - 1, self.position + 1), "==", "=")
        if self.word == "=" and "EQUAL" not in self.expected and "=" in self.before:
            return SingleEquals(self.span())
        return None

    def _headers(self) -> Diagnostic | None:
        if "COLON" not in self.expected:
            return None
        parameter = re.search(r"[(,]\s*(\w+)$", self.before)
        if self.before.lstrip().startswith("attention") and parameter and self.word[:1] in ("", ",", ")", "="):
            name = parameter.group(1)
            end = self.start + len(self.before)
            return MissingType(_clipped(self.source, end - len(name), end), name)
        header = re.match(r"\s*(attention|recurrence|select|branch)\b", self.before)
        if header and self.token in ("_NEWLINE", "$END"):
            return MissingColon(self.after_previous(), f"the first line of this `{header.group(1)}`")
        return None

    def _items(self) -> Diagnostic | None:
        if "DEFINE" not in self.expected or self.token in ("$END", "_NEWLINE"):
            return None
        line = self.text[self.position :].split("\n", 1)[0]
        near = difflib.get_close_matches(self.word, ITEMS, n=1)
        if self.word == "def":
            hint = "write `attention NAME(PARAMETERS):`, or `define NAME(PARAMETERS) = EXPRESSION` for a function"
        elif near:
            hint = f"did you mean `{near[0]}`?"
        elif re.match(r"(let\s+)?\w+\s*=|\"\"\"|(recurrence|select|sort|branch)\b", line):
            hint = "indent clauses under the `attention` that they belong to; write `define NAME = …` for a definition"
        else:
            hint = "start the file with `attention NAME():`"
        return NotAnItem(self.span(), self._found(), hint)

    def _found(self) -> str:
        if self.token == "$END":
            return "end of the file"
        if self.token == "_NEWLINE":
            return "end of the line"
        if self.token == "_DEDENT":
            return "end of the block"
        if self.token == "DOCSTRING":
            return "docstring"
        return f"`{self.word}`"

    def _hint(self) -> str:
        if self.token == "DOCSTRING":
            return "the docstring is the first thing under the first line of an attention"
        if self.token == "STRING":
            return 'a docstring stands between `"""` and `"""`'
        if self.word in ("+=", "*=", "-="):
            return f"`{self.word}` updates the state `S` and stands under `recurrence:`"
        if re.fullmatch(r"\s*(score|mask|weight|scale)\s*\(\s*\w*", self.before):
            return "a clause has no parameters: use names such as `q_idx` and `qk` directly"
        if re.search(r"(^|=)\s*(if|elif|else)\b", self.before):
            return "a choice is an expression: `x if condition else y`"
        if self.token == "NAME" and self.before.endswith(("define", "attention")):
            return ""
        header = re.fullmatch(r"\s*(attention \w+)", self.before)
        if header and self.token == "COLON":
            return f"write `{header.group(1)}():`, also where there are no parameters"
        if near := self._near_block():
            return f"did you mean `{near}:`?"
        in_recurrence = "STAR_EQUAL" in self.expected
        if re.fullmatch(r"\s*return", self.before):
            return "write `out = …`" if in_recurrence else "nothing is returned: a clause has a name, as `score = …`"
        if self.token == "LSQB" and (indexed := re.fullmatch(r"\s*(\w+)", self.before)):
            return self._index_hint(indexed.group(1), in_recurrence)
        if self.token == "LPAR" and re.search(r"\.\w+$", self.before):
            return "functions are called by their bare names, such as `tanh(x)`"
        if self.expected & _OPERATORS and self.token in _EXPRESSION_START:
            if self.text[self.position - 1 : self.position].isdigit():
                return "a name cannot start with a digit; a product needs `*`"
            return "is an operator missing before it?"
        if "ELSE" in self.expected and "if" in self.before.split():
            return "a choice is written `x if condition else y`"
        return ""

    def _index_hint(self, name: str, in_recurrence: bool) -> str:
        """What to write for `name[…] = …`."""
        if name == "S" and not in_recurrence:
            return "the state stands under `recurrence:`, without an index"
        if name == "feature":
            return "write `feature = …`, or `feature(q) = …` and `feature(k) = …`"
        rows = "row" if name in ("q", "k", "v") else "pair of a query and a key"
        return f"write `{name}` without an index: each line is about one {'token' if in_recurrence else rows}"

    def _near_block(self) -> str:
        """The block that a line `name:` was meant to open."""
        opened = re.fullmatch(r"\s*(\w+)", self.before) if self.token == "COLON" else None
        near = difflib.get_close_matches(opened.group(1), BLOCKS, n=1) if opened else []
        return near[0] if near else ""

    def _character_hint(self) -> str:
        hints = {
            "?": "a choice is written `x if condition else y`",
            "'": 'write a docstring as """text""", a path as "path"',
            "{": "group with `(` and `)`",
            "}": "group with `(` and `)`",
            ";": "write one clause per line",
            "−": "write `-`",
            "×": "write `*`",
            "·": "write `*`",
            "≤": "write `<=`",
            "≥": "write `>=`",
            "≠": "write `!=`",
            "√": "write `sqrt(x)`",
            "∞": "write `inf`",
            "π": "write `pi`",
            "“": 'write `"`',
            "”": 'write `"`',
        }
        return hints.get(self.text[self.position], "")

    def broken(self, found: Diagnostic) -> Range | None:
        """The lines to blot out: a clause, or a whole item if its first line is what cannot be read."""
        if isinstance(found, (BadIndentation, EmptyBody, Unterminated)) or self.token in ("$END", "_INDENT", "_DEDENT"):
            return None
        if isinstance(found, UnclosedBracket):
            return None
        start, end = self.start, self.end
        if start >= len(self.text.rstrip()):
            return None
        line = self.text[start:end]
        indent = len(line) - len(line.lstrip())
        opens = re.match(r"\s*(attention|recurrence|select|branch|if)\b", line) or self._near_block()
        if opens or isinstance(found, NotAnItem):
            # A block without its first line means nothing.
            end = self._block_end(end, indent)
        stop = start + len(self.text[start:end].rstrip())
        return (start + indent, stop) if start + indent < stop else None

    def _block_end(self, end: int, indent: int) -> int:
        for start in statement_starts(self.text):
            line = self.text[start:].split("\n", 1)[0]
            # What follows `else:` belongs to the `if` before it.
            if start >= end and line.strip() and len(line) - len(line.lstrip()) <= indent and not _ELSE.match(line):
                return start
        return len(self.text)


def describe(expected: frozenset[str]) -> str:
    """The terminals of a set in words: "an expression", "`,` or `)`"."""
    words: list[str] = []
    rest = set(expected)
    if rest >= _OPERAND:
        words.append("an expression")
        rest -= _EXPRESSION_START | {"MINUS", "PLUS", "TILDE"}
    elif rest >= _CLAUSES:
        words.append("a clause")
        rest -= _CLAUSES | {"NAME", "BROKEN"}
    elif {"ATTENTION", "DEFINE", "USE"} <= rest:
        words.append("`attention`, `define` or `use`")
        rest -= {"ATTENTION", "DEFINE", "USE"}
    if rest >= {"PLUS", "STAR"}:
        words.append("an operator")
        # What may follow an operand besides operators says more where there is little of it.
        rest -= _OPERATORS | {"LPAR", "LSQB", "IF", "DOT"}
    words += [_TERMINALS[name] for name in sorted(rest) if name in _TERMINALS]
    if not words:
        return "something else"
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def _clipped(source: Source, start: int, end: int) -> Span:
    """A span that does not reach beyond the text, or beyond the line in which it starts."""
    start = min(start, len(source.text))
    line_end = source.text.find("\n", start)
    return Span(source, start, max(start, min(end, len(source.text) if line_end < 0 else line_end)))
