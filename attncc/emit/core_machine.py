"""A C++ core: the machine that it is for, and its updates by what they need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attncc.emit.cpp_machine import ELEMENT_TYPES
from attncc.ir.types import DType
from attncc.plan.recurrent import CorePlan

# Bytes of a vector register.
_REGISTER_BYTES = {"avx512_bf16": 64, "avx512": 64, "avx2": 32, "portable": 16}


@dataclass(frozen=True, slots=True)
class CoreMachine:
    """A C++ target at one element type, as the kernels of recurrent cores see it.

    real      type of the state and of sums
    element   type of the operands in memory
    lanes     numbers in a vector register
    rows      and `vectors`: a product keeps that many rows of so many registers as sums
    chunk     tokens that are taken together
    pairs     products multiply pairs of bf16 and add them up in f32 (vdpbf16ps)
    streams   tokens pass by parts of the state that stay in registers; otherwise a chunk is a few matrix products
    """

    arch: str
    real: Literal["float", "double"]
    element: str
    lanes: int
    rows: int
    vectors: int
    chunk: int
    avx512: bool
    pairs: bool
    streams: bool

    @property
    def suffix(self) -> str:
        """Of C's mathematical functions and literals of type `real`."""
        return "f" if self.real == "float" else ""

    @property
    def transpose_steps(self) -> tuple[int, ...]:
        return tuple(1 << i for i in range(self.lanes.bit_length() - 1))

    def literal(self, digits: str) -> str:
        """A number as a literal of type `real`."""
        return f"{digits}{self.suffix}"


def core_machine(plan: CorePlan) -> CoreMachine:
    """The machine that `plan` is for. Eight rows of two registers are 16 sums, enough to hide the latency of products
    where there are 32 registers; four of two are what fits where there are 16."""
    arch = plan.target.arch
    avx512 = arch.startswith("avx512")
    # Decays of key channels are taken into readers and keys, which bf16 rounds once more. Sums bear that, but not what
    # erases read, as it is written and read again.
    roundable = plan.side in ("none", "scalar") or (plan.side == "key" and not plan.erasing)
    pairs = plan.dtype is DType.BF16 and arch == "avx512_bf16" and plan.kernel == "recurrent" and roundable
    # Without erasures a token needs nothing but the state, and products within a chunk only add work.
    streams = plan.kernel == "recurrent" and not pairs and not plan.erasing
    return CoreMachine(
        arch=arch,
        real="double" if plan.dtype is DType.F64 else "float",
        element=ELEMENT_TYPES[plan.dtype],
        lanes=_REGISTER_BYTES[arch] // (8 if plan.dtype is DType.F64 else 4),
        rows=8 if avx512 else 4,
        vectors=2,
        chunk=32 if pairs or streams else 16,
        avx512=avx512,
        pairs=pairs,
        streams=streams,
    )


@dataclass(frozen=True, slots=True)
class NumberedUpdate:
    """An update of a plan.

    key, value, erase   the names of its operands; None where it has none
    row                 where a chunk has that of `token`, among the updates of all tokens
    """

    key: str
    value: str | None
    erase: str | None
    row: str


def known_updates(plan: CorePlan) -> list[NumberedUpdate]:
    """Updates by a value as it is given."""
    return _numbered(plan, "token * KNOWN_PER_TOKEN", erasing=False)


def erasing_updates(plan: CorePlan) -> list[NumberedUpdate]:
    """Updates that depend on the state."""
    return _numbered(plan, "KNOWN + token * ERASING_PER_TOKEN", erasing=True)


def _numbered(plan: CorePlan, row: str, *, erasing: bool) -> list[NumberedUpdate]:
    found = [(i, x) for i, x in enumerate(plan.updates) if x.erase is erasing and (x.value or x.erase)]
    return [
        NumberedUpdate(
            f"key_{i}",
            f"value_{i}" if update.value else None,
            f"erase_{i}" if update.erase else None,
            f"{row} + {place}" if place else row,
        )
        for place, (i, update) in enumerate(found)
    ]
