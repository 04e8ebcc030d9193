"""Inputs for a specification when nobody gave any: random operands, and captured tensors of plausible content."""

from __future__ import annotations

import torch
from torch import Tensor

from attncc.ir.nodes import Size, TensorParameter
from attncc.ir.recurrence import Specification
from attncc.ir.rewrite import contains
from attncc.ir.types import DType, Kind
from attncc.runtime.arguments import DTYPES, TORCH_DTYPES, Signature, Sizes, preferred_dtype

# Packed documents, where ids are made up, have this many tokens on average.
DOCUMENT_LENGTH = 128


def operands(sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Normally distributed q (B, H, M, D), k (B, HKV, N, D), v (B, HKV, N, E)."""
    shapes = (
        (sizes.B, sizes.H, sizes.M, sizes.D),
        (sizes.B, sizes.HKV, sizes.N, sizes.D),
        (sizes.B, sizes.HKV, sizes.N, sizes.E),
    )
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


def captured_tensors(
    attention: Specification,
    sizes: Sizes,
    dtype: torch.dtype,
    generator: torch.Generator,
    document_length: int = DOCUMENT_LENGTH,
) -> dict[str, Tensor]:
    """A value for every captured tensor. Raises ValueError where these sizes leave a tensor no shape."""
    signature = Signature(attention)
    result: dict[str, Tensor] = {}
    for parameter in attention.tensors:
        shape = signature.shape(parameter.name, sizes)
        if any(size < 0 for size in shape):
            raise ValueError(f"`{parameter.name}` has no shape at these sizes: {shape}")
        result[parameter.name] = _content(parameter, shape, sizes, dtype, generator, document_length)
    return result


def describe(parameter: TensorParameter) -> str:
    """What `captured_tensors` makes up for a parameter, in a few words."""
    match parameter.dtypes[0].kind:
        case Kind.BOOL:
            return "true and false at random"
        case Kind.FLOAT:
            return "random numbers between 0.25 and 1.75"
        case Kind.INT if _along_sequence(parameter):
            return "ids that ascend along the sequence, as those of packed documents"
        case Kind.INT:
            return "random indices"


def _content(
    parameter: TensorParameter,
    shape: tuple[int, ...],
    sizes: Sizes,
    dtype: torch.dtype,
    generator: torch.Generator,
    document_length: int,
) -> Tensor:
    element = element_type(parameter, dtype)
    match element.kind:
        case Kind.BOOL:
            return torch.rand(shape, generator=generator) < 0.5
        case Kind.FLOAT:
            # Positive and not near 0, which suits slopes, gains, temperatures and divisors alike.
            return (0.25 + 1.5 * torch.rand(shape, generator=generator)).to(TORCH_DTYPES[element])
        case Kind.INT if _along_sequence(parameter):
            starts = torch.rand(shape, generator=generator) < 1 / document_length
            return starts.cumsum(-1).to(TORCH_DTYPES[element])
        case Kind.INT:
            bound = sizes.N if len(shape) < 2 else max(shape)
            return torch.randint(0, max(bound, 1), shape, generator=generator).to(TORCH_DTYPES[element])


def element_type(parameter: TensorParameter, dtype: torch.dtype) -> DType:
    """The type of the operands where the parameter may have it; 32 bits rather than 64 otherwise."""
    own = DTYPES[dtype]
    if own in parameter.dtypes:
        return own
    return DType.I32 if DType.I32 in parameter.dtypes else preferred_dtype(parameter)


def _along_sequence(parameter: TensorParameter) -> bool:
    """Whether the last axis runs over tokens."""
    return bool(parameter.shape) and contains(parameter.shape[-1], lambda node: node in (Size("M"), Size("N")))
