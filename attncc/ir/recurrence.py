"""The IR of a recurrence: what a token does to the state, and what it reads of it.

Everything is a scalar expression again. An expression with a free `d` is a vector over key channels, one with a free
`e` a vector over value channels, one with both is as large as the state; a product with the state is a `Reduce`.
Vectors and the state are read as tensors are, by `Load`:

    q[b, h, t, d]   k[b, h, t, d]   v[b, h, t, e]     the transformed rows, as head h reads them
    S[b, h, d, e]                                     the state, as the statements above have left it
    z[b, h, d]                                        a `Bind`, with those of d and e that its vector runs over
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, assert_never

from attncc.ir.nodes import Apply, Attention, Expr, Index, Load, Reduce, ScalarParameter, Size, TensorParameter
from attncc.ir.types import Kind
from attncc.source import Span

HEAD = (Index("b"), Index("h"))
CHANNELS = (Index("d"), Index("e"))


@dataclass(frozen=True, slots=True)
class Update:
    """The state becomes `value`, over d and e; `Load("S", …)` in it is the state before."""

    value: Expr
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Bind:
    """A name for `value` at this point, before later statements change the state that it reads."""

    name: str
    value: Expr
    span: Span | None = field(default=None, compare=False, repr=False)

    @property
    def load(self) -> Load:
        """What reads it."""
        from attncc.ir.rewrite import has_free

        free = (index for index in CHANNELS if has_free(self.value, index.name))
        return Load(self.name, (*HEAD, *free), Kind.FLOAT)


@dataclass(frozen=True, slots=True)
class Output:
    """Element e of what the token gives is `value`, over e."""

    value: Expr
    span: Span | None = field(default=None, compare=False, repr=False)


Statement: TypeAlias = Update | Bind | Output


@dataclass(frozen=True, slots=True)
class Recurrence:
    """An attention given as a recurrence (forward meaning: docs/language.md).

    q, k, v        element `d` of the transformed row, over `Element` and coordinates, as in `Attention`; q and k have
                   `key_width` of them, and all may sum over `e` besides (products with matrices)
    statements     what each token does, in order; one of them is an `Output`
    key_width      the extent of `d` in statements, and so of the state's first axis; made of constants, D and E
    normalizer     "sum": the output is divided by what the statements make of ones in the place of v, and 0 where that
                   is 0. The state has one more value column for it, the last one: E + 1 in all
    bidirectional  every query reads the state that all tokens have left, and there may be more or fewer queries than
                   tokens (M, N). Updates do not read q, the output reads neither k nor v, and nothing is bound; the
                   position of a query is t + q_offset as ever, that of a key t
    """

    name: str
    doc: str
    parameters: tuple[ScalarParameter | TensorParameter, ...]
    q: Expr
    k: Expr
    v: Expr
    statements: tuple[Statement, ...]
    key_width: Expr = Size("D")
    normalizer: Literal["none", "sum"] = "none"
    bidirectional: bool = False

    @property
    def scalars(self) -> tuple[ScalarParameter, ...]:
        return tuple(p for p in self.parameters if isinstance(p, ScalarParameter))

    @property
    def tensors(self) -> tuple[TensorParameter, ...]:
        return tuple(p for p in self.parameters if isinstance(p, TensorParameter))


# What a specification is lowered to.
Specification: TypeAlias = Attention | Recurrence

STATE = Load("S", (*HEAD, *CHANNELS), Kind.FLOAT)
QUERY = Load("q", (*HEAD, Index("t"), Index("d")), Kind.FLOAT)
KEY = Load("k", (*HEAD, Index("t"), Index("d")), Kind.FLOAT)
VALUE = Load("v", (*HEAD, Index("t"), Index("e")), Kind.FLOAT)


def linear_statements(query: Expr, key_width: Expr, key: Expr = KEY) -> tuple[Statement, ...]:
    """What linear attention does: the state gains `key` (over d) times v, and `query` (over d) reads it."""
    written = Apply("add", (STATE, Apply("mul", (key, VALUE))))
    return Update(written), Output(Reduce("sum", Apply("mul", (query, STATE)), key_width))


def map_expressions(recurrence: Recurrence, f: Callable[[Expr], Expr]) -> Recurrence:
    """`recurrence` with `f` of each of its expressions in its place, in the order of their meaning."""
    q, k, v = f(recurrence.q), f(recurrence.k), f(recurrence.v)
    statements = tuple(replace(statement, value=f(statement.value)) for statement in recurrence.statements)
    return replace(recurrence, q=q, k=k, v=v, statements=statements)


def statement_name(statement: Statement) -> str:
    """What a statement gives a value to."""
    match statement:
        case Update():
            return "S"
        case Bind(name=name):
            return name
        case Output():
            return "out"
        case _:
            assert_never(statement)
