"""Bounds over tiles: sound for every predicate, exact for the common ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import KV, ROW, TENSORS, Q, applications, at_tiles, exprs, op, pairs, predicates, scenes, tiles_of
from tiers import by_tier

from attncc.ir.nodes import Constant, Expr, Index, Load, Parameter, Size, Summary
from attncc.ir.operators import OPERATORS
from attncc.ir.rewrite import walk
from attncc.ir.types import Kind
from attncc.passes.evaluate import Scene
from attncc.passes.intervals import interval, truth, varies_in_tile

blocks = st.sampled_from([1, 2, 3, 4, 5, 8, 16])


@settings(max_examples=by_tier(500), deadline=None)
@given(predicates, scenes(), blocks, blocks)
def test_an_empty_tile_keeps_nothing_and_a_full_one_everything(
    mask: Expr, scene: Scene, block_m: int, block_n: int
) -> None:
    tiles = tiles_of(scene, block_m, block_n)
    bounds = truth(mask)
    kept = pairs(mask, scene)
    possible, certain = at_tiles(bounds.possible, scene, tiles), at_tiles(bounds.certain, scene, tiles)
    assert not (tiles.any(kept) & ~possible).any(), "a tile called empty keeps a pair"
    assert not (certain & ~tiles.all(kept)).any(), "a tile called full masks a pair"


@settings(max_examples=by_tier(300), deadline=None)
@given(st.sampled_from([Kind.INT, Kind.FLOAT]).flatmap(lambda kind: exprs(kind, 3)), scenes(), blocks, blocks)
def test_bounds_hold_every_value(expr: Expr, scene: Scene, block_m: int, block_n: int) -> None:
    assert_sound(expr, scene, block_m, block_n)


@pytest.mark.parametrize("name", OPERATORS)
@settings(max_examples=by_tier(20), deadline=None)
@given(st.data(), scenes(), blocks, blocks)
def test_the_rule_of_each_operator(name: str, data: st.DataObject, scene: Scene, block_m: int, block_n: int) -> None:
    assert_sound(data.draw(applications(name)), scene, block_m, block_n)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
@settings(max_examples=200, deadline=None)
@given(st.data(), scenes(), blocks, blocks)
def test_the_rule_of_each_operator_many_times(
    name: str, data: st.DataObject, scene: Scene, block_m: int, block_n: int
) -> None:
    assert_sound(data.draw(applications(name)), scene, block_m, block_n)


def assert_sound(expr: Expr, scene: Scene, block_m: int, block_n: int) -> None:
    bounds = interval(expr)
    if bounds is None:
        return
    tiles = tiles_of(scene, block_m, block_n)
    values = pairs(expr, scene)
    lo, hi, valid = (at_tiles(end, scene, tiles) for end in (bounds.lo, bounds.hi, bounds.valid))
    for i, span in enumerate(tiles.spans):
        if values.dtype is torch.bool:
            assert not (values[span].any() and not hi[i]), "a tile called empty keeps a pair"
            assert not (lo[i] and not values[span].all()), "a tile called full masks a pair"
            continue
        if not valid[i]:
            continue
        # A NaN in a bound says nothing, and a NaN must not be told to be less or greater than anything.
        assert not ((values[span] < lo[i]) | (values[span] > hi[i])).any()
        if values[span].isnan().any():
            assert not lo[i] > -math.inf
            assert not hi[i] < math.inf


@given(predicates)
def test_bounds_do_not_vary_within_a_tile(mask: Expr) -> None:
    bounds = truth(mask)
    for expr in (bounds.certain, bounds.possible):
        assert not varies_in_tile(expr)
        for node in walk(expr):
            if isinstance(node, Summary):
                assert varies_in_tile(node.load)
                assert node.load.tensor in TENSORS


# --- exactness -------------------------------------------------------------------------------------------------------

W, S = Parameter("w", Kind.INT), Parameter("s", Kind.INT)
DISTANCE = op("sub", Q, KV)
CAUSAL = op("ge", Q, KV)


def both(*terms: Expr) -> Expr:
    first, *rest = terms
    for term in rest:
        first = op("and", first, term)
    return first


def either(a: Expr, b: Expr) -> Expr:
    return op("or", a, b)


def at_most(a: Expr, b: Expr) -> Expr:
    return op("le", a, b)


def block_of(a: Expr, size: int) -> Expr:
    return op("floordiv", a, Constant(size))


EXACT = {
    "causal": CAUSAL,
    "causal by rows": op("le", KV, op("add", ROW, Size("q_offset"))),
    "window": both(at_most(Constant(0), DISTANCE), op("lt", DISTANCE, W)),
    "symmetric window": op("lt", op("abs", DISTANCE), W),
    "twice the same difference": op("lt", op("sub", op("add", Q, Q), KV), op("add", Q, W)),
    "shifted window": both(op("gt", op("sub", KV, Q), Constant(2)), at_most(op("sub", KV, op("add", Q, S)), W)),
    "block diagonal": op("eq", block_of(Q, 4), block_of(KV, 4)),
    "block causal": op("ge", block_of(Q, 4), block_of(KV, 4)),
    "blocks of a size given at run time": op("ge", op("floordiv", Q, S), op("floordiv", KV, S)),
    "stride": op("eq", op("mod", DISTANCE, S), Constant(0)),
    "stride with a residue": op("eq", op("mod", DISTANCE, Constant(7)), Constant(3)),
    "not on the stride": op("ne", op("mod", DISTANCE, S), Constant(0)),
    "all but the diagonal": op("ne", Q, KV),
    "one diagonal": op("eq", KV, op("sub", Q, Constant(2))),
    "flipped": op("not", op("lt", Q, KV)),
    "limit of a row": op("lt", KV, Load("limit", (ROW,), Kind.INT)),
    "seen keys": Load("seen", (KV,), Kind.BOOL),
    "head": op("lt", KV, Load("limit", (Index("h"),), Kind.INT)),
}


def scene_of(rows: int, keys: int, **scalars: int) -> Scene:
    generator = torch.Generator().manual_seed(3)
    inputs = {
        "w": 5,
        "s": 3,
        "limit": torch.randint(0, keys, (rows,), generator=generator),
        "seen": torch.rand(keys, generator=generator) < 0.5,
        "ids": torch.arange(keys) // 5,
        **scalars,
    }
    sizes = {"B": 1, "H": 2, "HKV": 1, "M": rows, "N": keys, "D": 8, "E": 8, "q_offset": keys - rows}
    return Scene(sizes, inputs, {"b": 0, "h": 1, "hkv": 0})


@pytest.mark.representative(200)
@pytest.mark.parametrize("mask", EXACT.values(), ids=EXACT.keys())
@pytest.mark.parametrize("block_m", [1, 4, 7])
@pytest.mark.parametrize("block_n", [1, 4, 6, 16])
@pytest.mark.parametrize("stride", [1, 3, 11])
def test_exact(mask: Expr, block_m: int, block_n: int, stride: int) -> None:
    scene = scene_of(29, 37, s=stride)
    tiles = tiles_of(scene, block_m, block_n)
    bounds, kept = truth(mask), pairs(mask, scene)
    assert torch.equal(at_tiles(bounds.possible, scene, tiles), tiles.any(kept))
    assert torch.equal(at_tiles(bounds.certain, scene, tiles), tiles.all(kept))


WEIGHT_Q, WEIGHT_KV = Load("weights", (Q,), Kind.FLOAT), Load("weights", (KV,), Kind.FLOAT)


@pytest.mark.parametrize(
    "mask",
    [
        op("le", op("sub", WEIGHT_Q, WEIGHT_KV), Constant(math.inf)),
        op("gt", op("mul", WEIGHT_KV, Constant(0.0)), Constant(-1.0)),
        op("ne", op("mul", WEIGHT_KV, Parameter("zero", Kind.FLOAT)), Constant(7.0)),
        op("eq", op("to_int", WEIGHT_KV), Constant(0)),
        op("not", op("lt", WEIGHT_KV, Constant(0.0))),
        op("lt", op("max", WEIGHT_KV, Constant(0.0)), Constant(9.0)),
    ],
)
@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
def test_no_nan_passes_for_a_number(mask: Expr, special: float) -> None:
    scene = scene_of(8, 8)
    weights = torch.tensor([1.0, special, special, 2.0, special, 5.0, -3.0, 0.0])
    scene = Scene(scene.sizes, {**scene.inputs, "weights": weights, "zero": 0.0}, scene.head)
    for block_n in (1, 2, 4, 8):
        assert_sound(mask, scene, 4, block_n)


def test_documents_in_order_are_exact() -> None:
    def document(position: Expr) -> Expr:
        return Load("ids", (position,), Kind.INT)

    scene = scene_of(37, 37)
    tiles = tiles_of(scene, 4, 8)
    mask = op("eq", document(Q), document(KV))
    bounds, kept = truth(mask), pairs(mask, scene)
    assert torch.equal(at_tiles(bounds.possible, scene, tiles), tiles.any(kept))
    assert torch.equal(at_tiles(bounds.certain, scene, tiles), tiles.all(kept))


@pytest.mark.parametrize(("block_m", "block_n"), [(4, 4), (8, 8), (2, 16), (4, 12)])
def test_a_layout_of_blocks_is_exact_for_a_few_cells(block_m: int, block_n: int) -> None:
    layout = torch.rand(2, 8, 10, generator=torch.Generator().manual_seed(0)) < 0.3
    scene = scene_of(32, 40)
    scene = Scene(scene.sizes, {**scene.inputs, "layout": layout}, scene.head)
    mask = Load("layout", (Index("h"), block_of(ROW, 4), block_of(KV, 4)), Kind.BOOL)
    tiles = tiles_of(scene, block_m, block_n)
    bounds, kept = truth(mask), pairs(mask, scene)
    assert torch.equal(at_tiles(bounds.possible, scene, tiles), tiles.any(kept))
    assert torch.equal(at_tiles(bounds.certain, scene, tiles), tiles.all(kept))
