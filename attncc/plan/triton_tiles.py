"""Tiles of the Triton kernels: queries and keys per step, warps and pipeline stages.

A static model of shared memory and registers decides what fits a target, so that every head dimension and element
type gets a tile that launches. Of those that fit, a preference list picks one; `candidates` returns several for tuning
on a real GPU. No length is part of either choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from attncc.ir.types import DType
from attncc.plan.nodes import TritonTile


@dataclass(frozen=True, slots=True)
class Machine:
    """What a tile must fit: shared memory of a program (bytes), threads of a warp, 32-bit registers of a thread."""

    shared: int
    warp_size: int
    registers: int


# The interpreter pays per loop step whatever the tile holds: large tiles, and no limit worth modelling.
INTERPRET = TritonTile(block_m=128, block_n=128, num_warps=4, num_stages=1)

MACHINES = {
    "sm_80": Machine(shared=166_912, warp_size=32, registers=255),
    "sm_90": Machine(shared=232_448, warp_size=32, registers=255),
    "sm_100": Machine(shared=232_448, warp_size=32, registers=255),
    "gfx942": Machine(shared=65_536, warp_size=64, registers=512),
}

# Triton 3.6 and 3.7 cannot lower products of f64 there.
WITHOUT_F64 = ("sm_100", "gfx942")

_Shape: TypeAlias = tuple[int, int, int, int]

# Heads up to so many elements wide share a list of tiles.
_WIDTHS = (64, 128, 256)

# (block_m, block_n, num_warps, num_stages), best first, per target and width. All were compiled ahead of time
# with a causal mask, a window, a soft cap and biases: the first ones spill nothing. Which is fastest no GPU has said.
_HALF: dict[str, tuple[tuple[_Shape, ...], ...]] = {
    "sm_80": (
        ((128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 4, 3)),
        ((128, 32, 8, 3), (64, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 3)),
        ((64, 32, 8, 2), (64, 64, 8, 2)),
    ),
    "sm_90": (
        ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3)),
        ((128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2)),
        ((64, 32, 8, 2), (64, 64, 8, 2)),
    ),
    "sm_100": (
        ((128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 2)),
        ((128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 8, 2)),
        ((64, 64, 8, 2), (64, 32, 8, 2)),
    ),
    "gfx942": (
        ((128, 64, 4, 2), (128, 64, 4, 1), (64, 64, 4, 2)),
        ((128, 64, 4, 1), (128, 32, 4, 2), (64, 64, 4, 1)),
        ((64, 32, 8, 1), (64, 64, 8, 1)),
    ),
}
# Products of f32 and f64 take no matrix instructions on most targets: a program holds its operands in registers.
_SINGLE: tuple[tuple[_Shape, ...], ...] = (
    ((64, 32, 8, 2), (64, 32, 8, 1), (32, 32, 4, 2)),
    ((16, 32, 8, 2), (32, 16, 8, 1), (16, 32, 8, 1)),
    ((16, 32, 8, 1), (32, 16, 8, 1)),
)
_DOUBLE: tuple[tuple[_Shape, ...], ...] = (
    ((32, 32, 8, 2), (32, 32, 8, 1)),
    ((32, 16, 8, 1), (16, 16, 8, 1)),
    ((16, 16, 8, 1),),
)
# Of the kernel of dq, and of that of dk and dv, per target and width; compiled ahead of time like the others. What
# is listed up to 128 elements wide spills next to nothing in half precision (on sm_90, steps of 64 queries would).
_HALF_BACKWARD: dict[str, tuple[tuple[_Shape, _Shape], ...]] = {
    "sm_80": (((64, 64, 4, 2), (32, 64, 4, 2)), ((64, 32, 4, 2), (64, 64, 8, 2)), ((32, 32, 8, 1), (32, 32, 8, 1))),
    "sm_90": (((128, 64, 8, 2), (64, 128, 8, 2)), ((128, 64, 8, 2), (32, 128, 8, 2)), ((64, 32, 8, 1), (32, 64, 8, 1))),
    "sm_100": (
        ((128, 128, 8, 2), (64, 128, 8, 2)),
        ((128, 64, 8, 2), (32, 64, 8, 2)),
        ((64, 32, 8, 1), (32, 64, 8, 1)),
    ),
    "gfx942": (((64, 64, 4, 1), (64, 64, 4, 1)), ((64, 32, 4, 1), (32, 32, 4, 1)), ((32, 32, 8, 1), (32, 32, 8, 1))),
}
_SINGLE_BACKWARD: tuple[tuple[_Shape, _Shape], ...] = (
    ((32, 32, 8, 1), (32, 32, 8, 1)),
    ((16, 16, 8, 1), (16, 16, 8, 1)),
    ((16, 16, 8, 1), (16, 16, 8, 1)),
)
_DOUBLE_BACKWARD: tuple[tuple[_Shape, _Shape], ...] = (
    ((32, 16, 8, 1), (16, 32, 8, 1)),
    ((16, 16, 8, 1), (16, 16, 8, 1)),
    ((16, 16, 8, 1), (16, 16, 8, 1)),
)
_LAST_BACKWARD: tuple[_Shape, _Shape] = ((16, 16, 8, 1), (16, 16, 8, 1))
_LAST_RESORTS: tuple[_Shape, ...] = ((32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1))


def choose_tile(arch: str, dtype: DType, head_dim_qk: int, head_dim_v: int, *, reads_pairs: bool = False) -> TritonTile:
    """The tile for a target when nothing has been measured. Arguments as for `candidates`."""
    return candidates(arch, dtype, head_dim_qk, head_dim_v, reads_pairs=reads_pairs)[0]


def candidates(
    arch: str, dtype: DType, head_dim_qk: int, head_dim_v: int, *, reads_pairs: bool = False
) -> tuple[TritonTile, ...]:
    """The tiles worth measuring, best guess first. Never empty: the smallest tile is the last resort.

    reads_pairs: a captured tensor is read at every pair, which takes the room that a head twice as wide would take.
    """
    if arch == "interpret":
        return (INTERPRET,)
    width = max(head_dim_qk, head_dim_v) * (2 if reads_pairs else 1)
    for shapes in (_preferred(arch, dtype, width), _LAST_RESORTS):
        tiles = tuple(TritonTile(*shape) for shape in shapes)
        if fitting := tuple(tile for tile in tiles if fits(tile, arch, dtype, head_dim_qk, head_dim_v)):
            return fitting
    return (TritonTile(*_LAST_RESORTS[-1]),)


def _preferred(arch: str, dtype: DType, width: int) -> tuple[_Shape, ...]:
    lists = {DType.F32: _SINGLE, DType.F64: _DOUBLE}.get(dtype, _HALF[arch])
    return next((shapes for limit, shapes in zip(_WIDTHS, lists, strict=True) if width <= limit), ())


def fits(tile: TritonTile, arch: str, dtype: DType, head_dim_qk: int, head_dim_v: int) -> bool:
    """Whether the model says that the tile launches on the target and keeps its accumulators in registers."""
    machine = MACHINES[arch]
    threads = tile.num_warps * machine.warp_size
    return (
        shared_bytes(tile, dtype, head_dim_qk, head_dim_v) <= machine.shared
        and accumulator_registers(tile, dtype, head_dim_v, threads) <= machine.registers * 5 // 8
    )


def shared_bytes(tile: TritonTile, dtype: DType, head_dim_qk: int, head_dim_v: int) -> int:
    """Bytes of shared memory, from above: the queries, K and V once per stage, the weights on their way to PV."""
    keys = tile.block_n * (covered(head_dim_qk) + covered(head_dim_v)) * max(tile.num_stages, 1)
    queries = tile.block_m * covered(head_dim_qk)
    weights = tile.block_m * tile.block_n
    return (queries + max(keys, weights)) * dtype.bytes


def accumulator_registers(tile: TritonTile, dtype: DType, head_dim_v: int, threads: int) -> int:
    """Registers per thread for the output accumulator and the scores, which live at the same time."""
    words = 2 if dtype is DType.F64 else 1
    return tile.block_m * (covered(head_dim_v) + tile.block_n) * words // threads


def chunk_widths(size: int) -> tuple[int, ...]:
    """`size` elements as one or two powers of two of at least 16, widest first, covering no more than they must.

    80 is 64 + 16 and 576 is 512 + 64; 120 is 128, since two pieces would cover as much.
    """
    whole = power_of_two(size)
    if size <= 16:
        return (16,)
    half = whole // 2
    rest = max(power_of_two(size - half), 16)
    return (half, rest) if half + rest < whole else (whole,)


def covered(size: int) -> int:
    """Elements that the chunks of a row of `size` elements hold, padding included."""
    return sum(chunk_widths(size))


def power_of_two(size: int) -> int:
    """The least power of two that is not less than `size`."""
    return 1 << max(size - 1, 0).bit_length()


def choose_backward_tiles(arch: str, dtype: DType, head_dim_qk: int, head_dim_v: int) -> tuple[TritonTile, TritonTile]:
    """The tiles of the kernels of dq, and of dk and dv: of those that fit, the first."""
    if arch == "interpret":
        return INTERPRET, INTERPRET
    width = max(head_dim_qk, head_dim_v)
    lists = {DType.F32: _SINGLE_BACKWARD, DType.F64: _DOUBLE_BACKWARD}.get(dtype, _HALF_BACKWARD[arch])
    tiles = next((shapes for limit, shapes in zip(_WIDTHS, lists, strict=True) if width <= limit), _LAST_BACKWARD)
    return TritonTile(*tiles[0]), TritonTile(*tiles[1])
