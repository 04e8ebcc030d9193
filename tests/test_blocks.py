"""Ranges of keys and classes of tiles: sound for every mask, exact for the masks that have names."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import KV, ROW, Q, Tiles, at_tiles, op, pairs, pieces, predicates, scenes, solvable, tiles_of
from tiers import by_tier
from torch import Tensor

from attncc.ir.blocks import BlockStructure
from attncc.ir.nodes import Constant, Expr, Index, Load, Parameter, Size, Summary
from attncc.ir.rewrite import kind_of, walk
from attncc.ir.types import Kind
from attncc.passes.blocks import MOST_RANGES, block_structure
from attncc.passes.evaluate import Scene, evaluate
from attncc.passes.intervals import varies_in_tile

blocks = st.sampled_from([1, 2, 3, 4, 5, 8, 16])


class Rows:
    """The ranges of a structure at each tile of queries of a call."""

    def __init__(self, structure: BlockStructure, scene: Scene, block_m: int) -> None:
        rows = list(pieces(scene.sizes["M"], block_m))
        offset = scene.sizes["q_offset"]
        corners = {
            "q_lo": torch.tensor([first + offset for first, _ in rows]),
            "q_hi": torch.tensor([last + offset for _, last in rows]),
        }
        self.slices = [slice(first, last + 1) for first, last in rows]
        self.ranges = [
            torch.stack(
                [evaluate(end, scene, corners).broadcast_to(len(rows)) for end in (r.lo, r.hi, r.full_lo, r.full_hi)],
                -1,
            ).tolist()
            for r in structure.ranges
        ]

    def check(self, kept: Tensor) -> None:
        """Nothing kept outside the ranges, nothing masked in a full part, ranges in order and in the tensor."""
        keys = kept.shape[1]
        for i, rows in enumerate(self.slices):
            outside = kept[rows].clone()
            for lo, hi, full_lo, full_hi in (ranges[i] for ranges in self.ranges):
                assert lo >= 0
                assert hi <= keys
                if lo < hi:
                    outside[:, lo:hi] = False
                    full = slice(max(lo, full_lo), max(lo, min(hi, full_hi)))
                    assert kept[rows, full].all(), "a full part masks a pair"
            assert not outside.any(), "a kept pair lies outside the ranges"
            starts = [ranges[i][0] for ranges in self.ranges]
            assert starts == sorted(starts)

    def visited(self, tiles: Tiles) -> Tensor:
        """The tiles that the ranges touch."""
        return self._any_of(
            tiles, lambda tile, lo, hi, _full_lo, _full_hi: lo < hi and lo <= tile.stop - 1 and hi > tile.start
        )

    def full(self, tiles: Tiles) -> Tensor:
        """The tiles that lie within a full part."""
        return self._any_of(
            tiles,
            lambda tile, lo, hi, full_lo, full_hi: max(lo, full_lo) <= tile.start and tile.stop <= min(hi, full_hi),
        )

    def _any_of(self, tiles: Tiles, test) -> Tensor:
        where = {rows.start: i for i, rows in enumerate(self.slices)}
        return torch.tensor(
            [any(test(keys, *ranges[where[rows.start]]) for ranges in self.ranges) for rows, keys in tiles.spans]
        )


@settings(max_examples=by_tier(400), deadline=None)
@given(predicates, scenes(), blocks)
def test_ranges_hold_every_kept_pair_and_their_full_parts_nothing_else(mask: Expr, scene: Scene, block_m: int) -> None:
    Rows(block_structure(mask), scene, block_m).check(pairs(mask, scene))


@settings(max_examples=by_tier(150), deadline=None)
@given(solvable, scenes(), blocks)
def test_ranges_of_predicates_that_can_be_solved(mask: Expr, scene: Scene, block_m: int) -> None:
    Rows(block_structure(mask), scene, block_m).check(pairs(mask, scene))


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(solvable, scenes(), blocks)
def test_ranges_of_many_predicates_that_can_be_solved(mask: Expr, scene: Scene, block_m: int) -> None:
    Rows(block_structure(mask), scene, block_m).check(pairs(mask, scene))


@settings(max_examples=by_tier(150), deadline=None)
@given(predicates, scenes(), blocks, blocks)
def test_simplified_questions_stay_sound(mask: Expr, scene: Scene, block_m: int, block_n: int) -> None:
    structure, tiles, kept = block_structure(mask), tiles_of(scene, block_m, block_n), pairs(mask, scene)
    assert not (tiles.any(kept) & ~at_tiles(structure.possible, scene, tiles)).any()
    assert not (at_tiles(structure.certain, scene, tiles) & ~tiles.all(kept)).any()


@settings(max_examples=200, deadline=None)
@given(predicates)
def test_what_a_structure_is_made_of(mask: Expr) -> None:
    structure = block_structure(mask)
    assert 1 <= len(structure.ranges) <= MOST_RANGES
    ends = [end for r in structure.ranges for end in (r.lo, r.hi, r.full_lo, r.full_hi)]
    assert all(kind_of(end) is Kind.INT for end in ends)
    found = {node for expr in (*ends, structure.possible, structure.certain) for node in walk(expr)}
    assert set(structure.summaries) == {node for node in found if isinstance(node, Summary)}
    for end in ends:
        assert not varies_in_tile(end)
        for node in walk(end):
            assert node not in (Index("kv_lo"), Index("kv_hi"))
            assert not (isinstance(node, Summary) and node.axis == "kv")


# --- masks that have names -------------------------------------------------------------------------------------------

W, S, G = Parameter("w", Kind.INT), Parameter("s", Kind.INT), Parameter("g", Kind.INT)
DISTANCE = op("sub", Q, KV)
CAUSAL = op("le", KV, Q)
N, M = Size("N"), Size("M")
B, H = Index("b"), Index("h")


def both(a: Expr, *others: Expr) -> Expr:
    return op("and", a, both(*others)) if others else a


def either(a: Expr, *others: Expr) -> Expr:
    return op("or", a, either(*others)) if others else a


def block_of(a: Expr, size: Expr) -> Expr:
    return op("floordiv", a, size)


def between(low: Expr, x: Expr, high: Expr) -> Expr:
    return both(op("le", low, x), op("lt", x, high))


def load(name: str, *indices: Expr, kind: Kind = Kind.INT) -> Load:
    return Load(name, indices, kind)


FOUR, ZERO = Constant(4), Constant(0)
HALF = op("floordiv", N, Constant(2))
WINDOW = both(CAUSAL, op("lt", DISTANCE, W))

# Masks whose ranges touch the live tiles and no others, and whose full parts hold every full tile.
BOUNDS = {
    "full": Constant(True),
    "nothing": Constant(False),
    "causal": CAUSAL,
    "causal by rows": op("le", KV, op("add", ROW, op("sub", N, M))),
    "anticausal": op("ge", KV, Q),
    "sliding window": WINDOW,
    "window by abs": op("lt", op("abs", DISTANCE), W),
    "window moved on": both(op("ge", op("sub", KV, Q), S), op("lt", op("sub", KV, Q), op("add", S, W))),
    "prefix lm": either(CAUSAL, op("lt", KV, load("prefix", B))),
    "lengths": op("lt", KV, load("length", B)),
    "causal with lengths": both(CAUSAL, op("lt", KV, load("length", B))),
    "lengths on both sides": both(op("lt", KV, load("length", B)), op("lt", ROW, load("length", B))),
    "limit of each row": op("lt", KV, load("limit", B, ROW)),
    "diagonal": op("eq", KV, op("sub", Q, Constant(3))),
    "all but the diagonal": op("ne", KV, Q),
    "block diagonal": op("eq", block_of(KV, FOUR), block_of(Q, FOUR)),
    "earlier blocks": op("lt", block_of(KV, S), block_of(Q, S)),
    "block causal": op("le", block_of(KV, S), block_of(Q, S)),
    "every other key is half as far": op("le", op("mul", KV, Constant(2)), Q),
    "not in the window": op("not", WINDOW),
    "flag": both(Parameter("flag", Kind.BOOL), CAUSAL),
    "flag or causal": either(Parameter("flag", Kind.BOOL), CAUSAL),
    "choice": op("where", Parameter("flag", Kind.BOOL), CAUSAL, op("ge", KV, Q)),
    "nearest rows of an image": between(
        ZERO,
        op("sub", block_of(KV, FOUR), op("min", op("max", op("sub", block_of(Q, FOUR), Constant(1)), ZERO), FOUR)),
        Constant(3),
    ),
}

# Masks with two ranges: exact outside the tile where one begins and the other has not ended.
TWO_RANGES = {
    "streaming llm": both(CAUSAL, either(op("lt", KV, G), op("lt", DISTANCE, W))),
    "longformer": either(op("le", op("abs", DISTANCE), W), op("lt", KV, G), op("lt", Q, G)),
    "two diagonals": either(op("eq", KV, op("sub", Q, Constant(2))), op("eq", KV, op("sub", Q, Constant(11)))),
    "two windows, either first": either(
        op("lt", op("abs", op("sub", KV, op("mul", Q, Constant(2)))), W), op("lt", op("abs", DISTANCE), W)
    ),
}

SCAN = {
    "strided": both(CAUSAL, either(op("lt", DISTANCE, S), op("eq", op("mod", DISTANCE, S), ZERO))),
    "dilated window": both(between(ZERO, DISTANCE, op("mul", W, S)), op("eq", op("mod", DISTANCE, S), ZERO)),
    "natten 2d": both(
        between(Constant(-1), op("sub", block_of(KV, S), block_of(Q, S)), Constant(2)),
        between(Constant(-1), op("sub", op("mod", KV, S), op("mod", Q, S)), Constant(2)),
    ),
    "block diffusion over two copies": either(
        both(
            op("eq", block_of(op("mod", KV, HALF), FOUR), block_of(op("mod", Q, HALF), FOUR)),
            op("eq", op("ge", Q, HALF), op("ge", KV, HALF)),
        ),
        both(
            op("lt", block_of(op("mod", KV, HALF), FOUR), block_of(op("mod", Q, HALF), FOUR)),
            op("ge", KV, HALF),
        ),
    ),
    "bigbird": either(
        op("eq", block_of(Q, FOUR), ZERO),
        op("eq", block_of(KV, FOUR), ZERO),
        op("le", op("abs", op("sub", block_of(Q, FOUR), block_of(KV, FOUR))), Constant(1)),
        op("eq", block_of(KV, FOUR), load("random", H, block_of(Q, FOUR), Constant(0))),
        op("eq", block_of(KV, FOUR), load("random", H, block_of(Q, FOUR), Constant(1))),
    ),
    "alibi that ends": op("lt", op("mul", Parameter("slope", Kind.FLOAT), op("to_float", DISTANCE)), Constant(8.0)),
}

DOCUMENT = op("eq", load("doc", B, Q), load("doc", B, KV))
LIST = {
    "document": DOCUMENT,
    "document causal": both(CAUSAL, DOCUMENT),
    "block sparse": load("layout", H, block_of(Q, FOUR), block_of(KV, FOUR), kind=Kind.BOOL),
    "padding": load("seen", B, KV, kind=Kind.BOOL),
    "longformer with a tensor": either(
        op("le", op("abs", DISTANCE), W),
        load("seen", B, Q, kind=Kind.BOOL),
        load("seen", B, KV, kind=Kind.BOOL),
    ),
}

# Reads that say nothing about a tile: the ranges are all there is.
CONTEXT = op("sub", N, M)
UNTOLD = {
    "tree": either(op("lt", KV, CONTEXT), load("ancestor", B, ROW, op("sub", KV, CONTEXT), kind=Kind.BOOL)),
    "any mask": load("dense", B, ROW, KV, kind=Kind.BOOL),
}


def scene_of(rows: int, keys: int, **scalars: float) -> Scene:
    generator = torch.Generator().manual_seed(7)
    inputs = {
        "w": 5,
        "s": 3,
        "g": 2,
        "flag": True,
        "slope": 0.5,
        "prefix": torch.tensor([6]),
        "length": torch.tensor([19]),
        "limit": torch.randint(0, keys + 1, (1, rows), generator=generator),
        "random": torch.randint(0, (keys + 3) // 4, (2, keys, 2), generator=generator),
        "doc": (torch.arange(keys) // 6)[None],
        "seen": torch.rand((1, keys), generator=generator) < 0.2,
        "layout": torch.rand((2, 16, 16), generator=generator) < 0.4,
        "ancestor": torch.rand((1, rows, rows), generator=generator) < 0.5,
        "dense": torch.rand((1, rows, keys), generator=generator) < 0.5,
        **scalars,
    }
    sizes = {"B": 1, "H": 2, "HKV": 1, "M": rows, "N": keys, "D": 8, "E": 8, "q_offset": keys - rows}
    return Scene(sizes, inputs, {"b": 0, "h": 1, "hkv": 0})


SHAPES = [(32, 32), (29, 37), (1, 40), (37, 21)]
TILES = [(1, 1), (4, 4), (8, 4), (4, 16), (7, 5)]


@pytest.mark.representative(8)
@pytest.mark.parametrize("mask", BOUNDS.values(), ids=BOUNDS.keys())
def test_bounds(mask: Expr) -> None:
    structure = block_structure(mask)
    assert structure.strategy == "bounds"
    for rows, keys in SHAPES:
        for scalars in ({}, {"w": 1, "s": 1}, {"s": 8, "flag": False}):
            scene = scene_of(rows, keys, **scalars)
            kept = pairs(mask, scene)
            for block_m, block_n in TILES:
                tiles, ranges = tiles_of(scene, block_m, block_n), Rows(structure, scene, block_m)
                ranges.check(kept)
                assert torch.equal(ranges.visited(tiles), tiles.any(kept))
                assert torch.equal(ranges.full(tiles), tiles.all(kept))
                assert torch.equal(at_tiles(structure.possible, scene, tiles), tiles.any(kept))
                assert torch.equal(at_tiles(structure.certain, scene, tiles), tiles.all(kept))


@pytest.mark.parametrize("mask", TWO_RANGES.values(), ids=TWO_RANGES.keys())
def test_two_ranges(mask: Expr) -> None:
    structure = block_structure(mask)
    assert structure.strategy == "bounds"
    assert len(structure.ranges) == 2
    for rows, keys in SHAPES:
        scene = scene_of(rows, keys)
        kept = pairs(mask, scene)
        for block_m, block_n in TILES:
            tiles, ranges = tiles_of(scene, block_m, block_n), Rows(structure, scene, block_m)
            ranges.check(kept)
            assert torch.equal(ranges.visited(tiles), tiles.any(kept))


@pytest.mark.parametrize("mask", SCAN.values(), ids=SCAN.keys())
def test_scan(mask: Expr) -> None:
    structure = block_structure(mask)
    assert structure.strategy == "scan"
    assert all(summary.axis == "q" for summary in structure.summaries)


@pytest.mark.parametrize("mask", LIST.values(), ids=LIST.keys())
def test_list(mask: Expr) -> None:
    assert block_structure(mask).strategy == "list"


@pytest.mark.parametrize("mask", UNTOLD.values(), ids=UNTOLD.keys())
def test_reads_that_say_nothing_of_tiles(mask: Expr) -> None:
    structure = block_structure(mask)
    assert structure.strategy == "bounds"
    assert not structure.summaries


@pytest.mark.parametrize("mask", [*SCAN.values(), *LIST.values(), *UNTOLD.values()])
def test_what_is_left_to_questions_is_sound_too(mask: Expr) -> None:
    structure = block_structure(mask)
    for rows, keys in SHAPES:
        scene = scene_of(rows, keys)
        kept = pairs(mask, scene)
        for block_m, block_n in TILES:
            Rows(structure, scene, block_m).check(kept)
            tiles = tiles_of(scene, block_m, block_n)
            assert not (tiles.any(kept) & ~at_tiles(structure.possible, scene, tiles)).any()
            assert not (at_tiles(structure.certain, scene, tiles) & ~tiles.all(kept)).any()


def test_blocks_that_a_table_names_need_no_tables_of_tiles() -> None:
    assert not block_structure(SCAN["bigbird"]).summaries


def live(mask: Expr, rows: int, keys: int, block_m: int, block_n: int, **scalars: float) -> tuple[int, int, int]:
    """Tiles within the ranges, those of them that are possible, and those that keep a pair."""
    structure, scene = block_structure(mask), scene_of(rows, keys, **scalars)
    tiles = tiles_of(scene, block_m, block_n)
    visited = Rows(structure, scene, block_m).visited(tiles)
    possible = visited & at_tiles(structure.possible, scene, tiles)
    return int(visited.sum()), int(possible.sum()), int(tiles.any(pairs(mask, scene)).sum())


@pytest.mark.parametrize("name", ["document", "document causal", "block sparse", "padding"])
def test_lists_hold_the_live_tiles_alone(name: str) -> None:
    _, possible, alive = live(LIST[name], 48, 48, 4, 8)
    assert possible == alive


@pytest.mark.parametrize("name", ["strided", "bigbird", "block diffusion over two copies"])
def test_scans_find_the_live_tiles_alone(name: str) -> None:
    visited, possible, alive = live(SCAN[name], 96, 96, 4, 4, s=16, w=3)
    assert possible == alive < visited


def test_a_stride_longer_than_a_tile_skips_most_tiles() -> None:
    visited, possible, alive = live(SCAN["dilated window"], 96, 96, 4, 4, s=16, w=3)
    # Where the window ends, a tile may hold keys in it and keys on the stride, but none that is both.
    assert alive <= possible <= 1.2 * alive <= visited / 3


def test_causality_bounds_what_is_listed() -> None:
    visited, _, _ = live(LIST["document causal"], 64, 64, 8, 8)
    assert visited == 8 * 9 // 2


def test_ranges_of_a_window_are_what_a_person_would_write() -> None:
    (window,) = block_structure(WINDOW).ranges
    assert window.lo == op("max", ZERO, op("add", op("sub", Index("q_lo"), W), Constant(1)))
    assert window.hi == op("min", N, op("add", Index("q_hi"), Constant(1)))
    assert window.full_lo == op("max", ZERO, op("add", op("sub", Index("q_hi"), W), Constant(1)))
    assert window.full_hi == op("min", N, op("add", Index("q_lo"), Constant(1)))


def test_many_alternatives_end_in_few_ranges_in_little_time() -> None:
    bands = [between(Constant(i), op("sub", Q, op("mul", KV, Constant(i))), Constant(2 * i)) for i in range(1, 40)]
    mask = both(either(*bands), op("not", both(*bands[:9])), either(*(op("ne", Q, op("add", KV, W)) for _ in range(9))))
    start = time.process_time()
    structure = block_structure(mask)
    assert time.process_time() - start < 2
    assert len(structure.ranges) <= MOST_RANGES
    scene = scene_of(20, 33)
    Rows(structure, scene, 4).check(pairs(mask, scene))
