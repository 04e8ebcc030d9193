"""The arguments of a call: what fits is bound quickly, what does not is explained.

`Signature.bind` takes the common path with a few comparisons; only when one fails does `attncc.runtime.refusals` look
for every reason.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attncc.ir.nodes import Apply, Constant, Expr, ScalarParameter, Size, TensorParameter
from attncc.ir.recurrence import Specification
from attncc.ir.types import DType, Kind

# Positions are 32-bit in the kernels, with room to add two of them.
MAX_LENGTH = 2**30
INT_RANGE = range(-(2**31), 2**31)

TORCH_DTYPES: dict[DType, torch.dtype] = {
    DType.BOOL: torch.bool,
    DType.I32: torch.int32,
    DType.I64: torch.int64,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.F32: torch.float32,
    DType.F64: torch.float64,
}
DTYPES = {torch_dtype: dtype for dtype, torch_dtype in TORCH_DTYPES.items()}
OPERAND_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PYTHON_TYPES: dict[Kind, tuple[type, ...]] = {Kind.BOOL: (bool,), Kind.INT: (int,), Kind.FLOAT: (float, int)}


class Mismatch(Exception):
    """The arguments do not fit; says no more than that."""


class Sizes(NamedTuple):
    """The sizes of a call, in the order in which kernels take them."""

    B: int
    H: int
    HKV: int
    M: int
    N: int
    D: int
    E: int


class Bound(NamedTuple):
    """Arguments that fit. `tensors` and `scalars` hold the inputs of the specification by name."""

    sizes: Sizes
    q_offset: int
    tensors: dict[str, Tensor]
    scalars: dict[str, bool | int | float]

    @property
    def inputs(self) -> dict[str, Any]:
        """Tensors and scalars together."""
        return {**self.tensors, **self.scalars} if self.tensors else self.scalars


class Signature:
    """What an attention asks of its callers."""

    def __init__(self, attention: Specification) -> None:
        self.attention = attention
        self.scalars = attention.scalars
        self.defaults = {p.name: p.default for p in self.scalars if p.default is not None}
        self.tensors = attention.tensors
        self._shapes = {p.name: tuple(size_function(axis) for axis in p.shape) for p in self.tensors}
        self._dtypes = {p.name: frozenset(TORCH_DTYPES[d] for d in p.dtypes) for p in self.tensors}
        # Kept for sizes that were met lately: evaluating a shape would take half as long as a tiny call.
        self._known_shape = functools.lru_cache(maxsize=64)(self._shape)

    def shape(self, name: str, sizes: Sizes) -> tuple[int, ...]:
        """The shape that the captured tensor `name` must have at these sizes. Raises ValueError where it has none,
        because an axis is declared as a quotient and its divisor is 0."""
        if torch.compiler.is_dynamo_compiling():
            return self._shape(name, sizes)
        try:
            return self._known_shape(name, sizes)
        except TypeError:  # sizes that a tracer does not know yet have no hash
            return self._shape(name, sizes)

    def _shape(self, name: str, sizes: Sizes) -> tuple[int, ...]:
        try:
            return tuple(axis(sizes) for axis in self._shapes[name])
        except ZeroDivisionError:
            raise ValueError(f"the shape of `{name}` divides by a size that is 0") from None

    def bind(self, q: Any, k: Any, v: Any, q_offset: int | None, inputs: Mapping[str, Any]) -> Bound:
        """The arguments in the form in which kernels take them. Raises `Mismatch` where they do not fit."""
        try:
            sizes = operand_sizes(q, k, v)
            offset = python_number(sizes.N - sizes.M if q_offset is None else q_offset)
            if _type(offset) is not int or not _lies_within(offset, -MAX_LENGTH, MAX_LENGTH - sizes.M):
                raise Mismatch
            if not self.scalars and not self.tensors:
                if inputs:
                    raise Mismatch
                return Bound(sizes, offset, {}, {})
            tensors = {p.name: self.tensor(p, inputs[p.name], sizes, q.device) for p in self.tensors}
            scalars = {p.name: self.scalar(p, inputs.get(p.name, p.default)) for p in self.scalars}
        except (AttributeError, TypeError, ValueError, KeyError, OverflowError, RuntimeError) as error:
            raise Mismatch from error  # RuntimeError is what PyTorch says where a tensor has no shape, or no value.
        if len(inputs) > len(tensors) + sum(p.name in inputs for p in self.scalars):
            raise Mismatch
        return Bound(sizes, offset, tensors, scalars)

    def tensor(self, parameter: TensorParameter, value: Any, sizes: Sizes, device: torch.device) -> Tensor:
        name = parameter.name
        if not parameter.shape and not isinstance(value, Tensor):
            return scalar_tensor(parameter, value, device)
        if value.dtype not in self._dtypes[name] or value.device != device or value.layout is not torch.strided:
            raise Mismatch
        if value.shape != self.shape(name, sizes):
            raise Mismatch
        if torch.compiler.is_dynamo_compiling():  # Operators have no lazy negations among their arguments.
            return value
        return value.resolve_neg() if value.is_neg() else value

    @staticmethod
    def scalar(parameter: ScalarParameter, value: Any) -> Any:
        number = python_number(value)
        if number is not value and loses_gradient(value):
            raise Mismatch
        kind, given = parameter.kind, _type(number)
        if given not in PYTHON_TYPES[kind] or (
            kind is Kind.INT and not _lies_within(number, INT_RANGE[0], INT_RANGE[-1])
        ):
            raise Mismatch
        return torch.sym_float(number) if kind is Kind.FLOAT else number


# Numbers that a tracer does not know yet, and what they stand for.
_SYMBOLIC: dict[type, type] = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}


def _lies_within(value: int | torch.SymInt, low: int, high: int) -> bool:
    """Whether `value` does; where a tracer will only know when the program runs, it is to be asserted then."""
    if isinstance(value, torch.SymInt):
        torch._check(value >= low)  # noqa: SLF001 - documented, its name notwithstanding
        torch._check(value <= high)  # noqa: SLF001 - likewise
        return True
    return low <= value <= high


def _type(value: object) -> type:
    return _SYMBOLIC.get(type(value), type(value))


def python_number(value: Any) -> Any:
    """The Python number in a tensor or array of one element; anything else as it is.

    Raises ValueError or RuntimeError for a tensor of several elements, or of none that can be read.
    """
    if _type(value) in (int, float, bool) or not hasattr(value, "item"):
        return value
    return value.item()


def loses_gradient(value: Any) -> bool:
    """Whether autograd follows `value`, which it could not do any longer once the number in it has been read."""
    return isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()


def scalar_tensor(parameter: TensorParameter, value: Any, device: torch.device) -> Tensor:
    """A number as the 0-d tensor that `parameter` declares. Raises `Mismatch` for another kind, or one too large."""
    dtype = preferred_dtype(parameter)
    number = python_number(value)
    if _type(number) not in PYTHON_TYPES[dtype.kind]:
        raise Mismatch
    if dtype.kind is Kind.FLOAT and not math.isinf(number) and abs(number) > torch.finfo(TORCH_DTYPES[dtype]).max:
        raise Mismatch
    return torch.tensor(number, dtype=TORCH_DTYPES[dtype]).to(device)


def operand_sizes(q: Tensor, k: Tensor, v: Tensor) -> Sizes:
    """The sizes that q (B, H, M, D), k (B, HKV, N, D) and v (B, HKV, N, E) agree on. Raises `Mismatch` or `ValueError`
    where they do not."""
    batch, heads, rows, width = q.shape
    batch_k, heads_k, keys, width_k = k.shape
    batch_v, heads_v, keys_v, width_v = v.shape
    if (
        batch_k != batch
        or batch_v != batch
        or heads_v != heads_k
        or keys_v != keys
        or width_k != width
        or (heads % heads_k if heads_k else heads)
        or unlike(q, k, v)
        or rows > MAX_LENGTH
        or keys > MAX_LENGTH
        or width == 0
        or width_v == 0
    ):
        raise Mismatch
    return Sizes(batch, heads, heads_k, rows, keys, width, width_v)


def unlike(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether they differ in type or device, or are not what kernels read."""
    dtype, device, layout = q.dtype, q.device, torch.strided
    return (
        k.dtype is not dtype
        or v.dtype is not dtype
        or dtype not in OPERAND_DTYPES
        or k.device != device
        or v.device != device
        or q.layout is not layout
        or k.layout is not layout
        or v.layout is not layout
    )


def preferred_dtype(parameter: TensorParameter) -> DType:
    """The element type that a Python number takes when it is passed for a 0-d tensor."""
    for wanted in (DType.F32, DType.I64):
        if wanted in parameter.dtypes:
            return wanted
    return parameter.dtypes[0]


def stored_dtype(parameter: TensorParameter, dtype: DType) -> DType:
    """The element type that kernels read of a captured tensor of this type: its own, or that of its running sum."""
    if parameter.summed is None:
        return dtype
    return DType.F64 if dtype is DType.F64 else DType.F32


def size_function(expr: Expr) -> Callable[[Sizes], int]:
    """A shape expression as a function of the sizes of a call."""
    match expr:
        case Constant(value=value):
            return lambda _: int(value)
        case Size(name=name):
            return lambda sizes: getattr(sizes, name)
        case Apply(op=op, args=args):
            function = _SIZE_OPERATIONS[op]
            parts = [size_function(arg) for arg in args]
            return lambda sizes: function(*(part(sizes) for part in parts))
        case _:
            raise AssertionError(f"not a shape expression: {expr}")


_SIZE_OPERATIONS: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "neg": lambda a: -a,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "min": min,
    "max": max,
}
