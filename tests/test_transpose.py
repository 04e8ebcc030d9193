"""Which queries a tile of keys sees: sound for every mask, exact for masks that have names."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import at_tiles, pairs, pieces, predicates, scenes, solvable, tiles_of
from test_blocks import BOUNDS, LIST, SCAN, SHAPES, TILES, TWO_RANGES, UNTOLD, scene_of
from tiers import by_tier
from torch import Tensor

from attncc.ir.blocks import BlockStructure
from attncc.ir.nodes import Expr, Index, Summary
from attncc.ir.rewrite import walk
from attncc.passes.evaluate import Scene, evaluate
from attncc.passes.intervals import varies_in_tile
from attncc.passes.transpose import transposed_block_structure

blocks = st.sampled_from([1, 2, 3, 4, 5, 8, 16])


def check(structure: BlockStructure, scene: Scene, block_n: int, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Asserts that nothing is kept outside the ranges of a tile of keys and nothing masked in a full part, that ranges
    ascend and stay in the tensor; gives the pairs within ranges and within full parts, (M, N) both."""
    rows, keys = kept.shape
    tiles = list(pieces(keys, block_n))
    corners = {"kv_lo": torch.tensor([t[0] for t in tiles]), "kv_hi": torch.tensor([t[1] for t in tiles])}
    ends = [
        [evaluate(end, scene, corners).broadcast_to(len(tiles)).tolist() for end in (r.lo, r.hi, r.full_lo, r.full_hi)]
        for r in structure.ranges
    ]
    visited, full = torch.zeros_like(kept), torch.zeros_like(kept)
    for number, (first, last) in enumerate(tiles):
        starts = [lows[number] for lows, *_ in ends]
        assert starts == sorted(starts)
        for lo, hi, full_lo, full_hi in ([end[number] for end in r] for r in ends):
            assert lo >= 0
            assert hi <= rows
            if lo < hi:
                visited[lo:hi, first : last + 1] = True
                full[max(lo, full_lo) : max(lo, min(hi, full_hi)), first : last + 1] = True
    assert not (kept & ~visited).any(), "a kept pair lies outside the ranges"
    assert not (full & ~kept).any(), "a full part masks a pair"
    return visited, full


@settings(max_examples=by_tier(300), deadline=None)
@given(predicates, scenes(), blocks)
def test_ranges_hold_every_kept_pair_and_their_full_parts_nothing_else(mask: Expr, scene: Scene, block_n: int) -> None:
    check(transposed_block_structure(mask), scene, block_n, pairs(mask, scene))


@settings(max_examples=by_tier(150), deadline=None)
@given(solvable, scenes(), blocks)
def test_ranges_of_predicates_that_can_be_solved(mask: Expr, scene: Scene, block_n: int) -> None:
    check(transposed_block_structure(mask), scene, block_n, pairs(mask, scene))


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(solvable, scenes(), blocks)
def test_ranges_of_many_predicates_that_can_be_solved(mask: Expr, scene: Scene, block_n: int) -> None:
    check(transposed_block_structure(mask), scene, block_n, pairs(mask, scene))


@settings(max_examples=150, deadline=None)
@given(predicates, scenes(), blocks, blocks)
def test_questions_are_sound(mask: Expr, scene: Scene, block_m: int, block_n: int) -> None:
    structure, tiles, kept = transposed_block_structure(mask), tiles_of(scene, block_m, block_n), pairs(mask, scene)
    assert not (tiles.any(kept) & ~at_tiles(structure.possible, scene, tiles)).any()
    assert not (at_tiles(structure.certain, scene, tiles) & ~tiles.all(kept)).any()


@settings(max_examples=150, deadline=None)
@given(predicates)
def test_what_a_structure_is_made_of(mask: Expr) -> None:
    structure = transposed_block_structure(mask)
    assert structure.strategy in ("bounds", "scan")
    ends = [end for r in structure.ranges for end in (r.lo, r.hi, r.full_lo, r.full_hi)]
    found = {node for expr in (*ends, structure.possible, structure.certain) for node in walk(expr)}
    assert set(structure.summaries) == {node for node in found if isinstance(node, Summary)}
    for end in ends:
        assert not varies_in_tile(end)
        for node in walk(end):
            assert node not in (Index("q_lo"), Index("q_hi"))
            assert not (isinstance(node, Summary) and node.axis == "q")


# Ranges that hold two conditions at once are full where one of them is, and not where they take turns.
IN_TURNS = {"longformer", "streaming llm", "two windows, either first"}


@pytest.mark.parametrize("name", [name for name in (*BOUNDS, *TWO_RANGES) if name != "limit of each row"])
def test_masks_that_have_names(name: str) -> None:
    mask = {**BOUNDS, **TWO_RANGES}[name]
    structure = transposed_block_structure(mask)
    assert structure.strategy == "bounds"
    for rows, keys in SHAPES:
        for scalars in ({}, {"w": 1, "s": 1}, {"s": 8, "flag": False}):
            scene = scene_of(rows, keys, **scalars)
            kept = pairs(mask, scene)
            for _, block_n in TILES:
                visited, full = check(structure, scene, block_n, kept)
                for first, last in pieces(keys, block_n):
                    assert torch.equal(visited[:, first], kept[:, first : last + 1].any(1))
                    if name not in IN_TURNS:
                        assert torch.equal(full[:, first], kept[:, first : last + 1].all(1))


@pytest.mark.parametrize("mask", [BOUNDS["limit of each row"], *SCAN.values(), *LIST.values(), *UNTOLD.values()])
def test_what_is_left_to_questions_is_sound_too(mask: Expr) -> None:
    structure = transposed_block_structure(mask)
    for rows, keys in SHAPES:
        scene = scene_of(rows, keys)
        kept = pairs(mask, scene)
        for block_m, block_n in TILES:
            check(structure, scene, block_n, kept)
            tiles = tiles_of(scene, block_m, block_n)
            assert not (tiles.any(kept) & ~at_tiles(structure.possible, scene, tiles)).any()
            assert not (at_tiles(structure.certain, scene, tiles) & ~tiles.all(kept)).any()
