"""The IR: an attention variant as data.

Every expression is scalar and typed (`Kind`), with conversions written out (`to_float`). A row transform is
the scalar expression of one element of the transformed row, over the bound index `d`; so `rope`, `l2norm` and
elementwise gains need no vector type. Names are resolved: a `Load` names a declared tensor, a `Parameter` a
declared run-time scalar, an `Apply` a row of the operator table (`attncc.ir.operators`).

Nodes are immutable and compare by structure; spans ride along without taking part in comparison.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from attncc.ir.types import DType, Kind
from attncc.source import Span

# Where in the iteration space an expression stands.
#   b, h, hkv        batch, query head, and the key/value head that query head h reads (h // (H // HKV))
#   q_row            row of the q tensor at this call;  q_idx = q_row + q_offset is its position
#   kv_idx           position of a key (and row of the k and v tensors)
#   d                element within a row (row transforms only); in a recurrence, a key channel
# Only recurrences have:
#   t                token of this call;  its position is t + q_offset
#   e                a value channel
# Only analyses and plans produce the corners of a tile, all inclusive:
#   q_lo, q_hi       smallest and largest q_idx of a tile of queries
#   kv_lo, kv_hi     smallest and largest kv_idx of a tile of keys
IndexName = Literal["b", "h", "hkv", "q_row", "q_idx", "kv_idx", "d", "t", "e", "q_lo", "q_hi", "kv_lo", "kv_hi"]

# B batch, H query heads, HKV key/value heads, M query rows, N key rows, D query/key width, E value width;
# q_offset is the position of query row 0.
SizeName = Literal["B", "H", "HKV", "M", "N", "D", "E", "q_offset"]

RowName = Literal["q", "k", "v"]


@dataclass(frozen=True, slots=True)
class Constant:
    """A literal. Its Python type is its kind: `True`, `3`, `3.0`. Floats may be infinite, never NaN."""

    value: bool | int | float
    span: Span | None = field(default=None, compare=False, repr=False)

    # 1, 1.0 and True are equal in Python but different constants here.
    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Constant)
            and type(self.value) is type(other.value)
            and (repr(self.value) == repr(other.value))
        )

    def __hash__(self) -> int:
        return hash((type(self.value), repr(self.value)))


@dataclass(frozen=True, slots=True)
class Index:
    """A coordinate of the iteration space (int)."""

    name: IndexName
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Size:
    """A size of the call (int). `D` and `E` are constants by the time a kernel is planned."""

    name: SizeName
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A run-time scalar of the specification."""

    name: str
    kind: Kind
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Load:
    """One element of a captured tensor; one int index per axis. Negative indices do not wrap."""

    tensor: str
    indices: tuple[Expr, ...]
    kind: Kind
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Element:
    """Element `index` of the untransformed row of q, k or v at the current position (float).

    upstream: instead, of the gradient with respect to the transformed row; only in plans of backward passes.
    """

    row: RowName
    index: Expr
    upstream: bool = False
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Reduce:
    """`op` (`sum` or `max`) of `body` over its own `d` in [0, size) (float). It binds `d`, not that around it.

    over: `e` instead, in recurrences only.
    """

    op: Literal["sum", "max"]
    body: Expr
    size: Expr
    over: Literal["d", "e"] = field(default="d", kw_only=True)
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Hole:
    """A value that the kernel supplies (float): `dot` = dot(q, k) of the transformed rows, unscaled;
    `qk` = scale * dot; `score` = the score clause. `qk` stands in `score`, `score` in a weight."""

    name: Literal["dot", "qk", "score"]
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Apply:
    """A builtin of the operator table applied to arguments of the kinds that its signature asks for."""

    op: str
    args: tuple[Expr, ...]
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Variable:
    """A value bound earlier in a plan (`plan.nodes.Binding`). Not found before planning."""

    name: str
    kind: Kind
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Summary:
    """The least (`min`) or greatest (`max`) value of `load` over a tile: over all kv_idx in [kv_lo, kv_hi] where `axis`
    is "kv", over all q_idx in [q_lo, q_hi] where it is "q".

    Produced by the interval analysis for a load whose indices vary with that coordinate (spelt kv_idx or q_idx, never
    q_row) and no other of the tile; a plan turns it into a table with one entry per tile of keys, or of queries.
    Indices outside the tensor read as in every kernel: clamped. Bool loads summarise as all / any. A float tile with a
    NaN in it summarises to NaN, both ways.
    """

    op: Literal["min", "max"]
    load: Load
    axis: Literal["kv", "q"] = "kv"
    span: Span | None = field(default=None, compare=False, repr=False)


Expr: TypeAlias = Constant | Index | Size | Parameter | Load | Element | Reduce | Hole | Apply | Variable | Summary


@dataclass(frozen=True, slots=True)
class ScalarParameter:
    """A run-time scalar of the call, passed by keyword; `default` None means required."""

    name: str
    kind: Kind
    default: bool | int | float | None
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class TensorParameter:
    """A captured tensor, passed by keyword. `dtypes`: the element types that it may have. `shape`: one int
    expression per axis over `Size` and `Constant`; () for a 0-d tensor. `summed`: an axis along which loads read the
    running sum, up to their element and with it, in the place of the elements; it is taken before any kernel runs."""

    name: str
    dtypes: tuple[DType, ...]
    shape: tuple[Expr, ...]
    summed: int | None = field(default=None, kw_only=True)
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Softmax:
    """weight = exp(score) / (sum of exp(score) over the kept pairs + exp(sink))."""

    sink: Expr | None = None


@dataclass(frozen=True, slots=True)
class Elementwise:
    """weight = an expression over `Hole("score")`; nothing is divided."""

    weight: Expr


@dataclass(frozen=True, slots=True)
class Sum:
    """As `Elementwise`, divided by the row's sum of weights (0 where that sum is 0)."""

    weight: Expr


Normalizer: TypeAlias = Softmax | Elementwise | Sum


@dataclass(frozen=True, slots=True)
class Attention:
    """A pairwise attention variant (forward meaning: docs/language.md).

    q, k, v      element `d` of the transformed row, over `Element` and `Index("d")`; positions are q_idx for q and
                 kv_idx for k and v; identity is `Element(row, Index("d"))`
    scale        over b, h, hkv, q_idx, kv_idx, loads, parameters
    score        over those and `Hole("qk")`
    mask         bool, over coordinates, loads and parameters
    dropout      what a weight is multiplied by after it has been divided; over coordinates and parameters. What rows
                 are divided by does not change. No specification has one: `attncc.passes.dropout` gives it
    """

    name: str
    doc: str
    parameters: tuple[ScalarParameter | TensorParameter, ...]
    q: Expr
    k: Expr
    v: Expr
    scale: Expr
    score: Expr
    mask: Expr
    normalizer: Normalizer
    dropout: Expr | None = None

    @property
    def scalars(self) -> tuple[ScalarParameter, ...]:
        return tuple(p for p in self.parameters if isinstance(p, ScalarParameter))

    @property
    def tensors(self) -> tuple[TensorParameter, ...]:
        return tuple(p for p in self.parameters if isinstance(p, TensorParameter))


def identity_row(row: RowName) -> Element:
    """The transform that leaves a row as it is."""
    return Element(row, Index("d"))
