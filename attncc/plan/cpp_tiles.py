"""Tiles of the C++ kernels: how many queries and keys a thread works on at once."""

from __future__ import annotations

from attncc.ir.types import DType
from attncc.plan.nodes import CppTile

# Bytes of a vector register.
_REGISTER_BYTES = {"avx512_bf16": 64, "avx512": 64, "avx2": 32, "portable": 16}


def choose_tile(arch: str, dtype: DType, head_dim_qk: int, head_dim_v: int) -> CppTile:
    """Two registers of queries by eight keys make 16 sums, enough to hide the latency of products on a machine with 32
    registers; three by four make 12 on one with 16. 256 keys of K and V in f32 at D = 128 stay in a 512 KB second-level
    cache."""
    del head_dim_qk, head_dim_v
    lanes = _REGISTER_BYTES[arch] // (8 if dtype is DType.F64 else 4)
    vectors, micro_keys = (3, 4) if arch == "avx2" else (2, 8)
    return CppTile(lanes=lanes, vectors=vectors, block_n=256, micro_keys=micro_keys)


def choose_backward_tile(arch: str, dtype: DType, head_dim_qk: int, head_dim_v: int) -> CppTile:
    """Products over the queries of a tile need it deep: four steps of queries. Keys are fewer than forward, since a
    tile holds weights and their gradients."""
    forward = choose_tile(arch, dtype, head_dim_qk, head_dim_v)
    return CppTile(forward.lanes, forward.vectors, block_n=64, micro_keys=forward.micro_keys, steps=4)
