"""Random predicates and the calls to try them on, and the brute-force truth about tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from hypothesis import strategies as st
from torch import Tensor

from attncc.ir.nodes import Apply, Constant, Expr, Index, Load, Parameter, Size
from attncc.ir.operators import OPERATORS
from attncc.ir.types import Kind
from attncc.passes.evaluate import Scene, evaluate

Q, ROW, KV = Index("q_idx"), Index("q_row"), Index("kv_idx")

# The tensors that random predicates read: rank and kind.
TENSORS = {
    "ids": (1, Kind.INT),
    "limit": (1, Kind.INT),
    "layout": (2, Kind.BOOL),
    "table": (2, Kind.INT),
    "seen": (1, Kind.BOOL),
    "weights": (1, Kind.FLOAT),
}
SCALARS = {"w": Kind.INT, "s": Kind.INT, "tau": Kind.FLOAT, "flag": Kind.BOOL}


def op(name: str, *args: Expr) -> Apply:
    return Apply(name, args)


@dataclass(frozen=True)
class Tiles:
    """All tiles of a call: corners (T,), and for each the pairs of the mask that it covers."""

    corners: dict[str, Tensor]
    spans: tuple[tuple[slice, slice], ...]

    def any(self, mask: Tensor) -> Tensor:
        return torch.tensor([bool(mask[span].any()) for span in self.spans])

    def all(self, mask: Tensor) -> Tensor:
        return torch.tensor([bool(mask[span].all()) for span in self.spans])


def pieces(size: int, block: int) -> Iterator[tuple[int, int]]:
    """First and last element of each block."""
    for start in range(0, size, block):
        yield start, min(start + block, size) - 1


def tiles_of(scene: Scene, block_m: int, block_n: int) -> Tiles:
    rows, keys, offset = scene.sizes["M"], scene.sizes["N"], scene.sizes["q_offset"]
    boxes = [(q, k) for q in pieces(rows, block_m) for k in pieces(keys, block_n)]
    columns = {
        "q_lo": [q[0] + offset for q, _ in boxes],
        "q_hi": [q[1] + offset for q, _ in boxes],
        "kv_lo": [k[0] for _, k in boxes],
        "kv_hi": [k[1] for _, k in boxes],
    }
    spans = tuple((slice(q[0], q[1] + 1), slice(k[0], k[1] + 1)) for q, k in boxes)
    return Tiles({name: torch.tensor(column) for name, column in columns.items()}, spans)


def pairs(mask: Expr, scene: Scene) -> Tensor:
    """The mask of every pair (M, N)."""
    q, k = scene.queries, scene.keys
    value = evaluate(mask, scene, {"q_idx": q[:, None], "kv_idx": k[None, :]})
    return value.broadcast_to(len(q), len(k))


def at_tiles(expr: Expr, scene: Scene, tiles: Tiles) -> Tensor:
    return evaluate(expr, scene, tiles.corners).broadcast_to(tiles.corners["q_lo"].shape)


# --- random predicates -----------------------------------------------------------------------------------------------

INT, FLOAT, BOOL = Kind.INT, Kind.FLOAT, Kind.BOOL
_small = st.integers(-9, 20)
_floats = st.sampled_from([0.0, -0.0, 0.5, -1.5, 3.0, 1e30, math.inf, -math.inf])


@cache
def exprs(kind: Kind, depth: int) -> st.SearchStrategy[Expr]:
    """Expressions of `kind`, about `depth` operations deep, rich in the shapes that masks have."""
    return {INT: _ints, FLOAT: _floating, BOOL: _bools}[kind](depth)


def _leaf_of(kind: Kind) -> st.SearchStrategy[Expr]:
    return st.sampled_from([Parameter(name, k) for name, k in SCALARS.items() if k is kind])


@cache
def _load(kind: Kind, depth: int) -> st.SearchStrategy[Expr]:
    index = _ints(depth - 1)

    def load(name: str) -> st.SearchStrategy[Expr]:
        rank, _ = TENSORS[name]
        return st.tuples(*[index] * rank).map(lambda indices: Load(name, indices, kind))

    return st.sampled_from([name for name, (_, k) in TENSORS.items() if k is kind]).flatmap(load)


def _apply(names: list[str], *args: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    return st.tuples(st.sampled_from(names), st.tuples(*args)).map(lambda t: Apply(*t))


@cache
def _ints(depth: int) -> st.SearchStrategy[Expr]:
    coordinate = st.sampled_from([Q, KV, op("sub", Q, KV), ROW, Index("h"), Size("N"), Size("q_offset")])
    leaf = st.one_of(coordinate, coordinate, _small.map(Constant), _leaf_of(INT))
    if depth <= 0:
        return leaf
    inner = st.deferred(lambda: _ints(depth - 1))
    positive = st.one_of(st.integers(1, 9).map(Constant), _leaf_of(INT))
    return st.one_of(
        leaf,
        _apply(["add", "sub", "mul", "min", "max"], inner, inner),
        _apply(["floordiv", "mod"], inner, positive),
        _apply(["neg", "abs", "sign", "relu", "bit_not", "popcount", "bit_length"], inner),
        _apply(["floordiv", "mod", "bit_and", "bit_or", "bit_xor"], inner, inner),
        _apply(["shl", "shr"], inner, st.integers(0, 5).map(Constant)),
        _apply(["where"], st.deferred(lambda: _bools(depth - 1)), inner, inner),
        _apply(["to_int"], st.deferred(lambda: _floating(depth - 1))),
        st.deferred(lambda: _load(INT, depth)),
    )


@cache
def _floating(depth: int) -> st.SearchStrategy[Expr]:
    leaf = st.one_of(_floats.map(Constant), _leaf_of(FLOAT), _ints(0).map(lambda a: op("to_float", a)))
    if depth <= 0:
        return leaf
    inner = st.deferred(lambda: _floating(depth - 1))
    return st.one_of(
        leaf,
        _apply(["add", "sub", "mul", "div", "min", "max"], inner, inner),
        _apply(["mul"], inner, st.one_of(_floats.map(Constant), _leaf_of(FLOAT))),
        _apply(["neg", "abs", "floor", "ceil", "round", "exp", "tanh", "sqrt"], inner),
        _apply(["where"], st.deferred(lambda: _bools(depth - 1)), inner, inner),
        st.deferred(lambda: _ints(depth - 1)).map(lambda a: op("to_float", a)),
        st.deferred(lambda: _load(FLOAT, depth)),
    )


@cache
def _bools(depth: int) -> st.SearchStrategy[Expr]:
    comparisons = ["lt", "le", "gt", "ge", "eq", "ne"]
    compared = _apply(comparisons, st.deferred(lambda: _ints(depth - 1)), st.deferred(lambda: _ints(depth - 1)))
    if depth <= 0:
        return st.one_of(_apply(comparisons, _ints(0), _ints(0)), st.booleans().map(Constant), _leaf_of(BOOL))
    inner = st.deferred(lambda: _bools(depth - 1))
    floating = st.deferred(lambda: _floating(depth - 1))
    return st.one_of(
        compared,
        compared,
        _apply(["and", "or", "eq", "ne"], inner, inner),
        _apply(["and", "or"], inner, inner),
        _apply(["not"], inner),
        _apply(["where"], inner, inner, inner),
        _apply(comparisons, floating, floating),
        st.deferred(lambda: _load(BOOL, depth)),
    )


def applications(name: str, depth: int = 1) -> st.SearchStrategy[Expr]:
    """One operator applied to small arguments of any of its overloads."""
    overloads = st.sampled_from(OPERATORS[name].overloads)
    return overloads.flatmap(
        lambda overload: st.tuples(*(_argument(kind, depth) for kind in overload.arguments)).map(
            lambda args: Apply(name, args)
        )
    )


_BLOCK_OF_ROW = op("floordiv", ROW, Constant(3))
_BLOCK_OF_KEY = op("floordiv", KV, Constant(4))


@cache
def _argument(kind: Kind, depth: int) -> st.SearchStrategy[Expr]:
    """Mostly something that varies within a tile and is simple enough to have bounds."""
    reads = {
        INT: [
            Load("ids", (KV,), INT),
            Load("limit", (ROW,), INT),
            Load("table", (_BLOCK_OF_ROW, _BLOCK_OF_KEY), INT),
            Load("table", (_BLOCK_OF_ROW, Constant(1)), INT),
            op("sub", Q, KV),
            op("sub", KV, Q),
            Q,
            KV,
        ],
        FLOAT: [Load("weights", (KV,), FLOAT), Load("weights", (ROW,), FLOAT), op("to_float", op("sub", Q, KV))],
        BOOL: [
            Load("seen", (KV,), BOOL),
            Load("layout", (_BLOCK_OF_ROW, _BLOCK_OF_KEY), BOOL),
            op("le", KV, Q),
            op("lt", op("sub", Q, KV), Parameter("w", INT)),
        ],
    }
    simple = st.sampled_from(reads[kind])
    return st.integers(0, 2).flatmap(lambda choice: simple if choice else exprs(kind, depth))


@cache
def _positions(depth: int) -> st.SearchStrategy[Expr]:
    """Ints that the solver takes apart: linear in a key or a query, divided, the smaller or greater of two."""
    of = st.sampled_from([KV, KV, Q, ROW, Load("limit", (ROW,), INT), Parameter("w", INT)])
    leaf = st.tuples(st.sampled_from([-3, -2, -1, 1, 1, 2, 3]), of, _small).map(
        lambda t: op("add", op("mul", Constant(t[0]), t[1]), Constant(t[2]))
    )
    if depth == 0:
        return leaf
    inner = _positions(depth - 1)
    divisor = st.one_of(st.integers(1, 6).map(Constant), st.just(Parameter("s", INT)), st.just(Constant(-2)))
    return st.one_of(
        leaf,
        _apply(["floordiv"], inner, divisor),
        _apply(["min", "max", "add", "sub"], inner, leaf),
        _apply(["abs", "neg"], inner),
        _apply(["where"], st.sampled_from([Parameter("flag", BOOL), op("lt", KV, Q), op("lt", Q, KV)]), inner, leaf),
    )


@cache
def _solvable(depth: int) -> st.SearchStrategy[Expr]:
    compared = _apply(["lt", "le", "gt", "ge", "eq", "ne"], _positions(2), _positions(1))
    if depth == 0:
        return compared
    inner = _solvable(depth - 1)
    return st.one_of(compared, _apply(["and", "or", "eq"], inner, inner), _apply(["not"], inner))


# Predicates whose ranges have a closed form.
solvable = st.integers(0, 3).flatmap(_solvable)

predicates = st.integers(1, 4).flatmap(lambda depth: exprs(BOOL, depth))


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    """A small call, tensors of any length, some of them empty, floats of any value."""
    rows, keys = draw(st.integers(1, 20)), draw(st.integers(1, 24))
    offset = draw(st.one_of(st.just(keys - rows), st.integers(-8, 30)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    inputs: dict[str, Tensor | bool | float] = {
        "w": draw(st.integers(-3, 12)),
        "s": draw(st.integers(-3, 6)),
        "tau": draw(st.one_of(_floats, st.just(math.nan))),
        "flag": draw(st.booleans()),
    }
    for name, (rank, kind) in TENSORS.items():
        shape = tuple(draw(st.integers(0, 9) if rank == 2 else st.integers(0, 26)) for _ in range(rank))
        inputs[name] = _contents(kind, shape, generator)
    sizes = {"B": 1, "H": 2, "HKV": 1, "M": rows, "N": keys, "D": 8, "E": 8, "q_offset": offset}
    return Scene(sizes, inputs, {"b": 0, "h": 1, "hkv": 0})


def _contents(kind: Kind, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    match kind:
        case Kind.BOOL:
            return torch.rand(shape, generator=generator) < 0.7
        case Kind.INT:
            # Sorted as often as not: runs of equal numbers, as in document ids.
            values = torch.randint(-2, 12, shape, generator=generator)
            ordered = bool(torch.randint(0, 2, (), generator=generator)) and values.numel() > 0
            return values.sort(-1).values if ordered else values
        case Kind.FLOAT:
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            special = torch.tensor([math.nan, math.inf, -math.inf, 0.0], dtype=torch.float64)
            # One in eight is special, in every other tensor.
            which = torch.randint(0, 32, shape, generator=generator) + 4 * torch.randint(0, 2, (), generator=generator)
            return torch.where(which < 4, special[which.clamp(max=3)], 5 * values)
