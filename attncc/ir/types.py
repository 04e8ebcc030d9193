"""Types of the IR: the kind of a scalar expression, the element types of tensors, what pairs may share."""

from __future__ import annotations

from enum import Enum
from typing import Literal, TypeAlias


class Kind(Enum):
    """What a scalar expression computes. Width is a matter of planning, not of meaning."""

    BOOL = "bool"
    INT = "int"
    FLOAT = "float"


class DType(Enum):
    """Element type of a tensor at a call."""

    BOOL = "bool"
    I32 = "i32"
    I64 = "i64"
    F16 = "f16"
    BF16 = "bf16"
    F32 = "f32"
    F64 = "f64"

    @property
    def kind(self) -> Kind:
        if self is DType.BOOL:
            return Kind.BOOL
        return Kind.INT if self in (DType.I32, DType.I64) else Kind.FLOAT

    @property
    def bytes(self) -> int:
        sizes = {"bool": 1, "i32": 4, "i64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8}
        return sizes[self.value]

    @property
    def accumulator(self) -> DType:
        """The type of sums of floats of this type."""
        return DType.F64 if self is DType.F64 else DType.F32


FLOATS = (DType.F16, DType.BF16, DType.F32, DType.F64)
INTS = (DType.I32, DType.I64)

# Which pairs share a value, and so an entry of its gradient: all of a head (B, H); those of a query (B, H, M); those of
# a key (B, H, N); those at one distance (B, H, M + N - 1), entry q_row - kv_idx + N - 1; none.
Along: TypeAlias = Literal["head", "row", "column", "diagonal", "pair"]
