"""How the compiler uses the mask of each example, and that it may."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from formulas import VARIANTS, Sizes
from masks import pairs

from attncc.build import check
from attncc.passes.blocks import block_structure
from attncc.passes.evaluate import Scene
from attncc.passes.simplify import simplify
from attncc.picture import tile_counts

EXAMPLES = Path(__file__).parent.parent / "examples"

# All others have closed forms.
STRATEGIES = {
    "bigbird": "scan",
    "block_diffusion": "scan",
    "block_sparse": "list",
    "dilated_window": "scan",
    "document": "list",
    "document_causal": "list",
    "longformer": "list",
    "natten_2d": "scan",
    "strided": "scan",
}
# A tile may hold pairs in reach by row and others by column, or within a window and others on a stride, and none that
# is both; and nothing is known of the tiles of a tree.
VISITED_TOO = {"natten_2d", "dilated_window", "tree"}
# A tile may be full of pairs of several conditions, each of which keeps a part of it.
PATCHED = {"bigbird", "block_diffusion"}


@pytest.mark.parametrize("name", VARIANTS)
def test_strategy(name: str) -> None:
    structure = block_structure(simplify(check(EXAMPLES / f"{name}.attn")).mask)
    assert structure.strategy == STRATEGIES.get(name, "bounds")
    assert len(structure.ranges) == (2 if name in ("streaming_llm", "block_diffusion") else 1)
    if name not in ("document", "document_causal", "longformer"):
        assert not structure.summaries, "tables are for ids of keys"


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 32), (32, 16), (8, 64)])
def test_tiles(name: str, block_m: int, block_n: int) -> None:
    variant = VARIANTS[name]
    sizes = variant.fit(Sizes(B=1, H=2, HKV=1, M=160, N=192, D=4, E=4))
    problem = variant.problem(sizes, torch.float64)
    attention = simplify(check(EXAMPLES / f"{name}.attn", **problem.constants))
    scalars = {scalar.name: scalar.default for scalar in attention.scalars if scalar.default is not None}
    inputs = {**scalars, **problem.inputs}
    offset = sizes.N - sizes.M
    scene = Scene({**asdict(sizes), "q_offset": offset}, inputs, {"b": 0, "h": 1, "hkv": 0})
    kept = pairs(attention.mask, scene)
    tiles = [piece for rows in kept.split(block_m) for piece in rows.split(block_n, 1)]
    alive, whole = sum(bool(tile.any()) for tile in tiles), sum(bool(tile.all()) for tile in tiles)

    counts = tile_counts(attention, asdict(sizes), inputs, block_m=block_m, block_n=block_n, b=0, h=1)
    assert counts.total == len(tiles)
    assert counts.visited >= alive
    assert counts.full <= whole
    assert counts.visited == alive or name in VISITED_TOO
    assert counts.full == whole or name in PATCHED
