"""The syntax tree of a `.attn` file: what was written, before names or types are looked at.

Nodes compare by structure: spans and the spelling of numbers ride along without taking part. Comments are no part of
the tree; the printer finds them in the source again (`attncc.syntax.printer`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from attncc.source import Span

UnaryOperator = Literal["not", "-", "+", "~"]
BinaryOperator = Literal[
    "or", "and", "|", "^", "&", "<<", ">>", "+", "-", "*", "/", "//", "%", "@", "**"
]  # fmt: skip
UpdateOperator = Literal["*=", "+=", "-="]
Comparison = Literal["==", "!=", "<", "<=", ">", ">="]


def _span() -> Span:
    return field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Name:
    """A value named: a parameter, a `let`, an index, a size, a definition without parameters."""

    name: str
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Number:
    """An int or float literal; `text` is how it was spelled."""

    value: int | float
    text: str = field(compare=False, repr=False)
    span: Span = _span()

    # 1 and 1.0 are equal in Python but different literals here.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Number) and repr(self.value) == repr(other.value)

    def __hash__(self) -> int:
        return hash(repr(self.value))


@dataclass(frozen=True, slots=True)
class Boolean:
    """`true` or `false`."""

    value: bool
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Unary:
    """`-x`, `not x` and the like."""

    operator: UnaryOperator
    operand: Expression
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Binary:
    """`left operator right`; `operator_span` is the operator's own place."""

    operator: BinaryOperator
    left: Expression
    right: Expression
    span: Span = _span()
    operator_span: Span = _span()


@dataclass(frozen=True, slots=True)
class Compare:
    """A chain `first < x <= y`: true where every link is."""

    first: Expression
    rest: tuple[tuple[Comparison, Expression], ...]
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Conditional:
    """`then if condition else otherwise`."""

    then: Expression
    condition: Expression
    otherwise: Expression
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Keyword:
    """`name=value` in a call."""

    name: str
    value: Expression
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Call:
    """`function(a, b, name=c)`."""

    function: str
    arguments: tuple[Expression, ...]
    keywords: tuple[Keyword, ...]
    span: Span = _span()
    function_span: Span = _span()


@dataclass(frozen=True, slots=True)
class FullSlice:
    """The `:` of `x[h, :]`: the whole axis."""

    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Subscript:
    """`base[i, j]`."""

    base: Expression
    indices: tuple[Expression | FullSlice, ...]
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Attribute:
    """`base.name`, which only branches have."""

    base: Expression
    name: str
    span: Span = _span()


Expression: TypeAlias = (
    Name | Number | Boolean | Unary | Binary | Compare | Conditional | Call | Subscript | Attribute
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Type:
    """`int`, `f32[H]`; `shape` is None for a scalar and () for a 0-d tensor."""

    name: str
    shape: tuple[Expression, ...] | None
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of an attention."""

    name: str
    const: bool
    type: Type
    default: Expression | None
    span: Span = _span()
    name_span: Span = _span()


@dataclass(frozen=True, slots=True)
class Clause:
    """`name = value`, or `name(of) = value`."""

    name: str
    value: Expression
    span: Span = _span()
    name_span: Span = _span()
    of: str = ""

    @property
    def target(self) -> str:
        """What stands before the `=`."""
        return f"{self.name}({self.of})" if self.of else self.name


@dataclass(frozen=True, slots=True)
class Let:
    """`let name = value`."""

    name: str
    value: Expression
    span: Span = _span()
    name_span: Span = _span()


@dataclass(frozen=True, slots=True)
class Update:
    """`name *= value` and the like; `operator_span` is the operator's own place."""

    name: str
    operator: UpdateOperator
    value: Expression
    span: Span = _span()
    name_span: Span = _span()
    operator_span: Span = _span()


@dataclass(frozen=True, slots=True)
class Recurrence:
    """`recurrence:` and the statements under it; `header_span` reaches to the colon."""

    body: tuple[Let | Clause | Update, ...]
    span: Span = _span()
    name_span: Span = _span()
    header_span: Span = _span()

    @property
    def name(self) -> str:
        return "recurrence"


@dataclass(frozen=True, slots=True)
class Later:
    """A clause that this version reads as a whole and refuses by name, such as `select`.

    `text` holds its lines with the indentation of the clause taken off, as they stand.
    """

    name: str
    text: str
    span: Span = _span()
    name_span: Span = _span()


Statement: TypeAlias = Clause | Let | Recurrence | Later


@dataclass(frozen=True, slots=True)
class Attention:
    """`attention name(parameters):` and its clauses; `doc` without its indentation, None where there is none.

    `header_span` reaches to the colon.
    """

    name: str
    parameters: tuple[Parameter, ...]
    doc: str | None
    body: tuple[Statement, ...]
    span: Span = _span()
    name_span: Span = _span()
    header_span: Span = _span()
    doc_span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class DefineParameter:
    """A parameter of a definition, with the value that it has where none is given."""

    name: str
    default: Expression | None
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Define:
    """`define name(parameters) = value`; `parameters` is None for one that is used without brackets."""

    name: str
    parameters: tuple[DefineParameter, ...] | None
    value: Expression
    span: Span = _span()
    name_span: Span = _span()


@dataclass(frozen=True, slots=True)
class Use:
    """`use "path"`."""

    path: str
    span: Span = _span()
    path_span: Span = _span()


Item: TypeAlias = Use | Define | Attention


@dataclass(frozen=True, slots=True)
class File:
    """A whole file, in the order in which it is written."""

    items: tuple[Item, ...]
    span: Span = _span()

    @property
    def attentions(self) -> tuple[Attention, ...]:
        return tuple(item for item in self.items if isinstance(item, Attention))

    @property
    def defines(self) -> tuple[Define, ...]:
        return tuple(item for item in self.items if isinstance(item, Define))

    @property
    def uses(self) -> tuple[Use, ...]:
        return tuple(item for item in self.items if isinstance(item, Use))
