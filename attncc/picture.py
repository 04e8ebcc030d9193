"""Pictures of masks: which tiles a kernel skips, computes without mask code, or computes pair by pair."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attncc.diagnostics import BuildError, CallError
from attncc.errors import CannotWrite
from attncc.ir.blocks import BlockStructure
from attncc.ir.nodes import Attention, Expr
from attncc.passes.algebra import canonical
from attncc.passes.blocks import block_structure
from attncc.passes.evaluate import Scene, evaluate
from attncc.picture_errors import NoMatplotlib, NothingToDraw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Inputs = Mapping[str, "Tensor | bool | int | float"]

# Sides of the largest mask that is drawn pair by pair; a larger one is drawn tile by tile.
MOST_PAIRS = 4096
MOST_TILES_WITH_GRID = 130


class Class(IntEnum):
    """What a kernel does with a tile."""

    EMPTY = 0
    PARTIAL = 1
    FULL = 2


@dataclass(frozen=True, slots=True)
class TileCounts:
    """Tiles of each class, for one head."""

    empty: int
    partial: int
    full: int

    @property
    def total(self) -> int:
        return self.empty + self.partial + self.full

    @property
    def visited(self) -> int:
        return self.partial + self.full


def tile_counts(
    attention: Attention,
    sizes: Mapping[str, int],
    inputs: Inputs,
    *,
    block_m: int,
    block_n: int,
    b: int = 0,
    h: int = 0,
) -> TileCounts:
    """How many tiles of `block_m` queries by `block_n` keys are skipped, masked pair by pair, and kept whole.

    sizes: B, H, HKV, M, N, D, E of a call, and q_offset (N - M if absent). inputs: its captured tensors and scalars;
    scalars left out take their defaults.
    """
    scene = _scene(attention, sizes, inputs, b, h)
    classes = _classes(block_structure(attention.mask), scene, block_m, block_n).flatten()
    empty, partial, full = (int((classes == kind).sum()) for kind in Class)
    return TileCounts(empty, partial, full)


def draw(
    attention: Attention,
    sizes: Mapping[str, int],
    inputs: Inputs,
    path: str | os.PathLike[str],
    *,
    block_m: int = 64,
    block_n: int = 64,
    b: int = 0,
    h: int = 0,
) -> TileCounts:
    """Writes a PNG of the mask of one head, its tiles coloured by what a kernel does with them; see `tile_counts`.

    Raises BuildError without matplotlib, CallError for a mask without pairs and for a file that cannot be written.
    """
    scene = _scene(attention, sizes, inputs, b, h)
    rows, keys = scene.sizes["M"], scene.sizes["N"]
    if rows == 0 or keys == 0:
        raise CallError(NothingToDraw(None, rows, keys))
    blocks = block_structure(attention.mask)
    classes = _classes(blocks, scene, block_m, block_n)
    counts = TileCounts(*(int((classes == kind).sum()) for kind in Class))
    figure = _figure(attention.name, blocks, scene, classes, _kept(attention.mask, scene), (block_m, block_n))
    _write(figure, Path(path))
    return counts


# --- what is drawn ---------------------------------------------------------------------------------------------------


def _scene(attention: Attention, sizes: Mapping[str, int], inputs: Inputs, b: int, h: int) -> Scene:
    defaults = {scalar.name: scalar.default for scalar in attention.scalars if scalar.default is not None}
    given = {**defaults, **{name: x.cpu() if isinstance(x, Tensor) else x for name, x in inputs.items()}}
    group = max(sizes["H"] // max(sizes["HKV"], 1), 1)
    offset = sizes.get("q_offset", sizes["N"] - sizes["M"])
    return Scene({**sizes, "q_offset": offset}, given, {"b": b, "h": h, "hkv": h // group})


def _classes(blocks: BlockStructure, scene: Scene, block_m: int, block_n: int) -> Tensor:
    """The class of each tile, (tiles of queries, tiles of keys)."""
    rows, keys, offset = scene.sizes["M"], scene.sizes["N"], scene.sizes["q_offset"]
    q_lo, kv_lo = torch.arange(0, rows, block_m)[:, None], torch.arange(0, keys, block_n)[None, :]
    corners = {
        "q_lo": q_lo + offset,
        "q_hi": (q_lo + block_m).clamp(max=rows) - 1 + offset,
        "kv_lo": kv_lo,
        "kv_hi": (kv_lo + block_n).clamp(max=keys) - 1,
    }
    shape = (q_lo.shape[0], kv_lo.shape[1])
    if 0 in shape:
        return torch.zeros(shape, dtype=torch.int64)

    def at_tiles(expr: Expr) -> Tensor:
        return evaluate(expr, scene, corners).broadcast_to(shape)

    visited, full = torch.zeros(shape, dtype=torch.bool), at_tiles(blocks.certain)
    for key_range in blocks.ranges:
        lo, hi = at_tiles(key_range.lo), at_tiles(key_range.hi)
        visited |= (lo < hi) & (lo <= corners["kv_hi"]) & (corners["kv_lo"] < hi)
    visited &= at_tiles(blocks.possible)
    return torch.where(visited, torch.where(full, Class.FULL, Class.PARTIAL), Class.EMPTY)


def _kept(mask: Expr, scene: Scene) -> Tensor | None:
    """The mask of every pair (M, N); None where those are too many to draw."""
    rows, keys = scene.sizes["M"], scene.sizes["N"]
    if max(rows, keys) > MOST_PAIRS:
        return None
    pairs = {"q_idx": scene.queries[:, None], "kv_idx": scene.keys[None, :]}
    return evaluate(canonical(mask), scene, pairs).broadcast_to(rows, keys)


# --- how -------------------------------------------------------------------------------------------------------------

_PAPER, _INK, _MUTED, _GRID = "#FFFFFF", "#2B2D33", "#7A7F8A", "#FFFFFF"
# Of each class: tiles, and the kept pairs within them.
_TILE = {Class.EMPTY: "#F3F3F1", Class.PARTIAL: "#F6DFC0", Class.FULL: "#8FB4CF"}
_PAIR = {Class.EMPTY: "#F3F3F1", Class.PARTIAL: "#DE9A4B", Class.FULL: "#8FB4CF"}
_MEANING = {
    Class.FULL: "full: no mask code",
    Class.PARTIAL: "partial: masked pair by pair",
    Class.EMPTY: "empty: skipped",
}
_SIDE, _LEAST_SIDE = 6.6, 1.1  # inches


def _figure(
    name: str, blocks: BlockStructure, scene: Scene, classes: Tensor, kept: Tensor | None, block: tuple[int, int]
) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BuildError(NoMatplotlib(None)) from error
    rows, keys = scene.sizes["M"], scene.sizes["N"]
    width = max(_SIDE * min(keys / rows, 1.0), _LEAST_SIDE)
    height = max(_SIDE * min(rows / keys, 1.0), _LEAST_SIDE)
    left, right, below, above = 0.85, 0.35, 1.3, 1.35
    # Room for the texts, however narrow the mask is.
    total_w, total_h = max(left + width + right, 6.2), below + height + above
    figure = Figure(figsize=(total_w, total_h), facecolor=_PAPER)
    left = (total_w - width + left - right) / 2
    axes = figure.add_axes((left / total_w, below / total_h, width / total_w, height / total_h))
    _paint(axes, classes, kept, rows, keys, block)
    _label(axes, scene, rows, keys, block)
    text_x = (total_w - max(width, 5.0) + 0.5) / 2 / total_w if width < 5.0 else left / total_w
    many = scene.sizes["B"] * scene.sizes["H"] > 1
    title = f"{name}, batch {scene.head['b']}, head {scene.head['h']}" if many else name
    figure.text(text_x, 1 - 0.42 / total_h, title, fontsize=17, fontweight="bold", color=_INK, va="center")
    facts = (
        f"{rows:,} {'query' if rows == 1 else 'queries'}, {keys:,} {'key' if keys == 1 else 'keys'}, "
        f"tiles of {block[0]} by {block[1]}, found by {blocks.strategy}"
    )
    figure.text(text_x, 1 - 0.72 / total_h, facts, fontsize=9.5, color=_MUTED, va="center")
    _legend(figure, classes, text_x, total_w, total_h)
    return figure


def _paint(axes: Axes, classes: Tensor, kept: Tensor | None, rows: int, keys: int, block: tuple[int, int]) -> None:
    tiles = _colours(_TILE)[classes]
    if kept is None:
        picture = tiles
    else:
        pair_class = classes.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :keys]
        picture = torch.where(kept[..., None], _colours(_PAIR)[pair_class], _colours(_TILE)[pair_class])
    # Tiles at the end may be smaller than the others: the extent of whole tiles is clipped to the mask.
    whole = (rows, keys) if kept is not None else (classes.shape[0] * block[0], classes.shape[1] * block[1])
    axes.imshow(
        picture.numpy(),
        extent=(0, whole[1], whole[0], 0),
        interpolation="nearest" if max(rows, keys) <= 1024 or kept is None else "antialiased",
        aspect="auto",
    )
    axes.set_xlim(0, keys)
    axes.set_ylim(rows, 0)
    if max(classes.shape) <= MOST_TILES_WITH_GRID:
        thickness = 1.2 if max(classes.shape) <= 32 else 0.5
        axes.hlines(range(block[0], rows, block[0]), 0, keys, colors=_GRID, linewidth=thickness)
        axes.vlines(range(block[1], keys, block[1]), 0, rows, colors=_GRID, linewidth=thickness)


def _colours(of_class: Mapping[Class, str]) -> Tensor:
    """(classes, 3), each channel in [0, 1]."""
    return torch.tensor([[int(of_class[kind][i : i + 2], 16) / 255 for i in (1, 3, 5)] for kind in Class])


def _label(axes: Axes, scene: Scene, rows: int, keys: int, block: tuple[int, int]) -> None:
    offset = scene.sizes["q_offset"]
    axes.set_xlabel("keys", fontsize=10, color=_INK, labelpad=6)
    axes.set_ylabel("queries", fontsize=10, color=_INK, labelpad=6)
    axes.xaxis.set_label_position("top")
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=8, labelcolor=_MUTED, pad=4)
    # Positions, counted as in a specification.
    columns, rows_at = (
        _ticks(keys, block[1], 8 if keys >= rows else 3),
        _ticks(rows, block[0], 8 if rows >= keys else 2),
    )
    axes.set_xticks(columns, [f"{key:,}" for key in columns])
    axes.set_yticks(rows_at, [f"{row + offset:,}" for row in rows_at])
    for side in axes.spines.values():
        side.set_visible(False)


def _ticks(size: int, block: int, most: int) -> list[int]:
    """At most about `most` ticks, where tiles begin."""
    tiles = -(-size // block)
    return list(range(0, size, block * max(-(-tiles // most), 1)))


def _legend(figure: Figure, classes: Tensor, x: float, width: float, height: float) -> None:
    from matplotlib.patches import Rectangle

    for line, kind in enumerate(_MEANING):
        y = (0.92 - 0.27 * line) / height
        count = int((classes == kind).sum())
        size = (0.2 / width, 0.17 / height)
        swatch = Rectangle((x, y - size[1] / 2), *size, transform=figure.transFigure, facecolor=_TILE[kind])
        figure.patches.append(swatch)
        if kind is Class.PARTIAL:
            half = Rectangle(
                (x, y - size[1] / 2), size[0] / 2, size[1], transform=figure.transFigure, facecolor=_PAIR[kind]
            )
            figure.patches.append(half)
        share = f"{count:,} of {classes.numel():,} tiles, {count / classes.numel():.0%}"
        figure.text(x + 0.32 / width, y, _MEANING[kind], fontsize=9.5, color=_INK, va="center")
        figure.text(x + 2.45 / width, y, share, fontsize=9.5, color=_MUTED, va="center")


def _write(figure: Figure, path: Path) -> None:
    """The PNG whole or not at all."""
    content = BytesIO()
    figure.savefig(content, format="png", dpi=200)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".png", delete=False) as file:
            temporary = Path(file.name)
            file.write(content.getvalue())
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise CallError(CannotWrite(None, str(path), error.strerror or str(error))) from error
