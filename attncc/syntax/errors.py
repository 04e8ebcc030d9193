"""Errors of syntax (A01xx)."""

from __future__ import annotations

from dataclasses import dataclass

from attncc.diagnostics import Diagnostic


@dataclass(frozen=True, slots=True)
class Unexpected(Diagnostic):
    code = "A0101"
    title = "unexpected {found}"
    label = "expected {expected}"
    explanation = (
        "The text does not follow the grammar at this place. The label lists what could stand here. One clause "
        "stands on one line, unless brackets hold it together over several."
    )
    bad = "attention full():\n    score = qk +\n"
    good = "attention full():\n    score = qk + 1.0\n"

    found: str
    expected: str
    hint: str = ""

    def helps(self) -> tuple[str, ...]:
        return (self.hint,) if self.hint else ()


@dataclass(frozen=True, slots=True)
class UnknownCharacter(Diagnostic):
    code = "A0102"
    title = "unknown character `{character}`"
    label = "not part of the language"
    explanation = "Specs are written with letters, digits, the operators of Python and `#` comments."
    bad = "attention full():\n    mask = causal ? true : false\n"
    good = "attention full():\n    mask = true if causal else false\n"

    character: str
    hint: str = ""

    def helps(self) -> tuple[str, ...]:
        return (self.hint,) if self.hint else ()


@dataclass(frozen=True, slots=True)
class BadIndentation(Diagnostic):
    code = "A0103"
    title = "{problem}"
    label = "{where}"
    help = "{mend}"
    explanation = (
        "Layout is Python's: the clauses of an attention are indented under its first line, all by the same number"
        " of spaces. Tabs do not indent, since their width is a matter of taste."
    )
    bad = "attention full():\n    score = qk\n      mask = causal\n"
    good = "attention full():\n    score = qk\n    mask = causal\n"

    problem: str
    where: str
    mend: str


@dataclass(frozen=True, slots=True)
class UnclosedBracket(Diagnostic):
    code = "A0104"
    title = "`{bracket}` is never closed"
    label = "opened here"
    help = "close it with `{closing}`"
    explanation = (
        "Every bracket needs its partner. Inside brackets a line break means nothing, so the rest of the file "
        "belongs to it."
    )
    bad = "attention capped():\n    score = 50.0 * tanh(qk / 50.0\n    mask = causal\n"
    good = "attention capped():\n    score = 50.0 * tanh(qk / 50.0)\n    mask = causal\n"

    bracket: str
    closing: str


@dataclass(frozen=True, slots=True)
class UnmatchedBracket(Diagnostic):
    code = "A0105"
    title = "`{bracket}` closes nothing"
    label = "no open bracket here that it could close"
    help = "remove it, or open a bracket before it"
    explanation = "A closing bracket needs an open one of its own sort before it: `(` with `)`, `[` with `]`."
    bad = "attention capped():\n    score = qk + 1.0)\n"
    good = "attention capped():\n    score = (qk + 1.0)\n"

    bracket: str


@dataclass(frozen=True, slots=True)
class SingleEquals(Diagnostic):
    code = "A0106"
    title = "`=` inside an expression"
    label = "this is no comparison"
    help = "write `==` to compare"
    explanation = "`=` gives a clause its value, once per line. Two values are compared with `==`."
    bad = "attention document(doc: int[B, N]):\n    mask = doc[b, q_idx] = doc[b, kv_idx]\n"
    good = "attention document(doc: int[B, N]):\n    mask = doc[b, q_idx] == doc[b, kv_idx]\n"


@dataclass(frozen=True, slots=True)
class ForeignOperator(Diagnostic):
    code = "A0107"
    title = "`{found}` is no operator here"
    label = "written as in another language"
    help = "write `{ours}`"
    explanation = (
        "Operators are Python's: `and`, `or`, `not`, `x if c else y`. The operators `&`, `|`, `^` and `~` are "
        "those on the bits of ints."
    )
    bad = "attention window():\n    mask = causal && q_idx - kv_idx < 8\n"
    good = "attention window():\n    mask = causal and q_idx - kv_idx < 8\n"

    found: str
    ours: str


@dataclass(frozen=True, slots=True)
class MissingColon(Diagnostic):
    code = "A0108"
    title = "missing `:` after {after}"
    label = "expected `:` here"
    help = "end the line with `:`"
    explanation = "As in Python, a line that opens an indented block ends with a colon."
    bad = "attention full()\n    mask = causal\n"
    good = "attention full():\n    mask = causal\n"

    after: str


@dataclass(frozen=True, slots=True)
class MissingType(Diagnostic):
    code = "A0109"
    title = "parameter `{name}` has no type"
    label = "expected `: TYPE` after this"
    help = "write `{name}: int`, `{name}: float` or a tensor such as `{name}: float[H]`"
    explanation = (
        "Every parameter says what it is: a run-time scalar `window: int`, a compile-time constant `block: const "
        "int`, or a tensor with its shape `bias: float[H, M, N]`."
    )
    bad = "attention sliding(window):\n    mask = window(window)\n"
    good = "attention sliding(window: int):\n    mask = window(window)\n"

    name: str


@dataclass(frozen=True, slots=True)
class EmptyBody(Diagnostic):
    code = "A0110"
    title = "`{name}` has no body"
    label = "nothing is indented under this line"
    help = 'indent its clauses under it; where the defaults are wanted, a docstring is enough: """Plain attention."""'
    explanation = "An attention needs at least a docstring or one clause, indented under its first line."
    bad = "attention full():\n"
    good = 'attention full():\n    """Plain attention."""\n'

    name: str


@dataclass(frozen=True, slots=True)
class NotAnItem(Diagnostic):
    code = "A0111"
    title = "{found} cannot start a line of a file"
    label = "expected `attention`, `define` or `use`"
    help = "{hint}"
    explanation = (
        'A file holds `use "other.attn"` lines, `define name(parameters) = expression` lines and `attention '
        "name(parameters):` with its indented clauses."
    )
    bad = "attention full():\n    score = qk\nmask = causal\n"
    good = "attention full():\n    score = qk\n    mask = causal\n"

    found: str
    hint: str


@dataclass(frozen=True, slots=True)
class BadNumber(Diagnostic):
    code = "A0112"
    title = "`{text}` is no number"
    label = "{problem}"
    explanation = (
        "Numbers are written as in Python: `64`, `1_000`, `0x1f`, `0.5`, `1e-6`. Ints have 64 bits; floats must be"
        " finite (`inf` is a name of its own)."
    )
    bad = "attention full():\n    score = qk + 1e999\n"
    good = "attention full():\n    score = qk + 1e99\n"

    text: str
    problem: str


@dataclass(frozen=True, slots=True)
class Unterminated(Diagnostic):
    code = "A0113"
    title = "this {what} has no end"
    label = "opened here"
    help = "close it with {quotes}"
    explanation = 'A docstring runs from `"""` to the next `"""`; a path stands between two `"` on one line.'
    bad = 'attention full():\n    """Plain attention.\n    mask = causal\n'
    good = 'attention full():\n    """Plain attention."""\n    mask = causal\n'

    what: str
    quotes: str


@dataclass(frozen=True, slots=True)
class TooDeep(Diagnostic):
    code = "A0114"
    title = "this expression is nested more than {limit} levels deep"
    label = "the whole expression"
    help = "name parts of it with `let`"
    explanation = (
        "Expressions may be nested up to a fixed depth, which nothing that a person writes comes near. In a "
        "generated spec, name parts with `let`, or read a table from a tensor."
    )
    bad = f"attention deep():\n    score = {'-' * 130}qk\n"
    good = "attention deep():\n    score = -qk\n"

    limit: int
