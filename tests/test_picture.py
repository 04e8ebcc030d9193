"""Pictures of masks, and the counts of tiles that they show."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from attncc.diagnostics import BuildError, CallError
from attncc.ir.nodes import (
    Apply,
    Attention,
    Constant,
    Expr,
    Index,
    Load,
    Parameter,
    ScalarParameter,
    Size,
    Softmax,
    TensorParameter,
    identity_row,
)
from attncc.ir.types import DType, Kind
from attncc.picture import MOST_PAIRS, TileCounts, draw, tile_counts

Q, KV = Index("q_idx"), Index("kv_idx")
CAUSAL = Apply("le", (KV, Q))
WINDOW = Apply("and", (CAUSAL, Apply("lt", (Apply("sub", (Q, KV)), Parameter("window", Kind.INT)))))
DOC = TensorParameter("doc", (DType.I32,), (Size("B"), Size("N")))
DOCUMENT = Apply("eq", tuple(Load("doc", (Index("b"), position), Kind.INT) for position in (Q, KV)))


def attention(mask: Expr) -> Attention:
    return Attention(
        name="drawn",
        doc="",
        parameters=(ScalarParameter("window", Kind.INT, 64), DOC),
        q=identity_row("q"),
        k=identity_row("k"),
        v=identity_row("v"),
        scale=Constant(1.0),
        score=Apply("mul", (Constant(1.0), Constant(1.0))),
        mask=mask,
        normalizer=Softmax(),
    )


def sizes(rows: int, keys: int) -> dict[str, int]:
    return {"B": 2, "H": 2, "HKV": 1, "M": rows, "N": keys, "D": 8, "E": 8}


def test_counts_of_a_causal_mask() -> None:
    counts = tile_counts(attention(CAUSAL), sizes(128, 128), {}, block_m=16, block_n=16)
    assert counts == TileCounts(empty=28, partial=8, full=28)
    assert (counts.total, counts.visited) == (64, 36)


def test_scalars_left_out_take_their_defaults() -> None:
    mask = attention(WINDOW)
    default = tile_counts(mask, sizes(256, 256), {}, block_m=32, block_n=32)
    assert default == tile_counts(mask, sizes(256, 256), {"window": 64}, block_m=32, block_n=32)
    assert default.visited < tile_counts(mask, sizes(256, 256), {"window": 128}, block_m=32, block_n=32).visited


def test_counts_are_those_of_the_chosen_batch() -> None:
    doc = torch.stack([torch.zeros(64), torch.arange(64) // 16]).to(torch.int32)
    one = tile_counts(attention(DOCUMENT), sizes(64, 64), {"doc": doc}, block_m=16, block_n=16, b=0)
    four = tile_counts(attention(DOCUMENT), sizes(64, 64), {"doc": doc}, block_m=16, block_n=16, b=1)
    assert one == TileCounts(empty=0, partial=0, full=16)
    assert four == TileCounts(empty=12, partial=0, full=4)


def test_no_queries_have_no_tiles() -> None:
    assert tile_counts(attention(CAUSAL), sizes(0, 64), {}, block_m=16, block_n=16).total == 0


@pytest.mark.parametrize(("rows", "keys"), [(128, 128), (1, 300), (90, 7), (50, MOST_PAIRS + 100)])
def test_a_picture_shows_three_classes(tmp_path: Path, rows: int, keys: int) -> None:
    path = tmp_path / "new folder" / "mask.png"
    counts = draw(attention(WINDOW), sizes(rows, keys), {"window": 40}, path, block_m=16, block_n=16)
    assert counts == tile_counts(attention(WINDOW), sizes(rows, keys), {"window": 40}, block_m=16, block_n=16)
    picture = imread(path)
    assert min(picture.shape[:2]) > 500
    assert [p.name for p in path.parent.iterdir()] == ["mask.png"]


def test_colours_cover_their_share(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    counts = draw(attention(CAUSAL), sizes(256, 256), {}, path, block_m=32, block_n=32)
    picture = torch.from_numpy(imread(path)[..., :3])
    blue = (picture - torch.tensor([0x8F, 0xB4, 0xCF]) / 255).abs().amax(-1) < 0.01
    side = 6.6 * 200
    share = blue.sum() / side**2
    assert abs(float(share) - counts.full / counts.total) < 0.03


def test_a_mask_without_pairs_has_no_picture(tmp_path: Path) -> None:
    with pytest.raises(CallError, match="0 queries"):
        draw(attention(CAUSAL), sizes(0, 8), {}, tmp_path / "mask.png")


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BuildError, match=r"attncc\[plot\]"):
        draw(attention(CAUSAL), sizes(8, 8), {}, tmp_path / "mask.png")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "mask.png").mkdir()
    with pytest.raises(CallError, match=r"mask\.png"):
        draw(attention(CAUSAL), sizes(8, 8), {}, tmp_path / "mask.png")
    assert [p.name for p in tmp_path.iterdir()] == ["mask.png"]
