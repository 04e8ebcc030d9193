"""Why the arguments of a call do not fit: every independent reason, in the words of the caller."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from attncc.diagnostics import CallError, Diagnostic
from attncc.ir.nodes import ScalarParameter, Size, TensorParameter
from attncc.ir.types import Kind
from attncc.runtime.arguments import (
    INT_RANGE,
    MAX_LENGTH,
    OPERAND_DTYPES,
    PYTHON_TYPES,
    TORCH_DTYPES,
    Signature,
    Sizes,
    preferred_dtype,
)
from attncc.runtime.errors import (
    EmptyWidth,
    HeadsDoNotDivide,
    MissingInput,
    NotATensor,
    TooLong,
    UnknownInput,
    WrongDevice,
    WrongDType,
    WrongRank,
    WrongScalar,
    WrongSize,
)

_OPERAND_SHAPES = {"q": "(B, H, M, D)", "k": "(B, HKV, N, D)", "v": "(B, HKV, N, E)"}
# (operand, axis) must agree with (operand, axis), and is called so.
_AGREEMENTS = (
    ("k", 0, "q", 0, "B"),
    ("k", 3, "q", 3, "D"),
    ("v", 0, "q", 0, "B"),
    ("v", 1, "k", 1, "HKV"),
    ("v", 2, "k", 2, "N"),
)


def refuse(
    signature: Signature, operands: Mapping[str, Any], q_offset: Any, inputs: Mapping[str, Any]
) -> CallError:
    """The error for arguments that `Signature.bind` has turned down."""
    reasons = [*_operand_reasons(operands), *_keyword_reasons(signature, inputs)]
    if q_offset is not None and (
        type(q_offset) is not int or q_offset < -MAX_LENGTH or (not reasons and q_offset + operands["q"].shape[2] > MAX_LENGTH)
    ):
        advice = "pass the position of query row 0; positions lie within 2**30"
        reasons.append(WrongScalar(None, "q_offset", "an int", _describe(q_offset), advice))
    if not reasons:
        reasons = [*_input_reasons(signature, _sizes(operands), inputs, operands["q"].device)]
    else:
        reasons += [*_scalar_reasons(signature, inputs)]
    assert reasons, "arguments were refused without a reason"
    return CallError(*reasons)


def _operand_reasons(operands: Mapping[str, Any]) -> Iterator[Diagnostic]:
    sound: dict[str, Tensor] = {}
    for name, value in operands.items():
        if not isinstance(value, Tensor):
            yield NotATensor(None, name, type(value).__name__, _OPERAND_SHAPES[name])
        elif value.dim() != 4:
            yield WrongRank(None, name, value.dim(), 4, _OPERAND_SHAPES[name])
        else:
            sound[name] = value
    for name, value in sound.items():
        if value.shape[3] == 0:
            yield EmptyWidth(None, name)
        if value.shape[2] > MAX_LENGTH:
            yield TooLong(None, name, value.shape[2], MAX_LENGTH)
    for name, axis, other, other_axis, meaning in _AGREEMENTS:
        if name in sound and other in sound and sound[name].shape[axis] != sound[other].shape[other_axis]:
            found, expected = sound[name].shape[axis], sound[other].shape[other_axis]
            because = f", as {other} does"
            yield WrongSize(None, name, axis, found, expected, meaning, str(tuple(sound[name].shape)), because)
    if "q" in sound and "k" in sound:
        heads, heads_kv = sound["q"].shape[1], sound["k"].shape[1]
        if heads % heads_kv if heads_kv else heads:
            yield HeadsDoNotDivide(None, heads, heads_kv)
    yield from _operand_type_reasons(sound)


def _operand_type_reasons(sound: Mapping[str, Tensor]) -> Iterator[Diagnostic]:
    supported = ", ".join(_short(dtype) for dtype in OPERAND_DTYPES)
    first = next(iter(sound.values()), None)
    for name, value in sound.items():
        assert first is not None
        if value.dtype not in OPERAND_DTYPES:
            yield WrongDType(None, name, _short(value.dtype), f"one of {supported}", "torch.float32")
        elif first.dtype in OPERAND_DTYPES and value.dtype is not first.dtype:
            yield WrongDType(
                None, name, _short(value.dtype), f"{_short(first.dtype)} (that of q)", f"torch.{_short(first.dtype)}"
            )
        if value.device != first.device:
            yield WrongDevice(None, name, str(value.device), str(first.device))


def _keyword_reasons(signature: Signature, inputs: Mapping[str, Any]) -> Iterator[Diagnostic]:
    declared = {p.name: p for p in signature.attention.parameters}
    for name in inputs:
        if name not in declared:
            close = difflib.get_close_matches(name, declared, n=1)
            advice = (
                f"did you mean `{close[0]}`?"
                if close
                else f"its inputs are {', '.join(f'`{n}`' for n in declared)}"
                if declared
                else "it takes q, k and v alone"
            )
            yield UnknownInput(None, signature.attention.name, name, advice)
    for parameter in declared.values():
        if parameter.name not in inputs:
            match parameter:
                case ScalarParameter(default=None, kind=kind):
                    yield MissingInput(parameter.span, parameter.name, {"int": "128", "float": "1.0"}.get(kind.value, "True"))
                case ScalarParameter():
                    pass
                case TensorParameter():
                    yield MissingInput(parameter.span, parameter.name, "a tensor " + _declared_shape(parameter))


def _input_reasons(
    signature: Signature, sizes: Sizes, inputs: Mapping[str, Any], device: torch.device
) -> Iterator[Diagnostic]:
    yield from _scalar_reasons(signature, inputs)
    for parameter in signature.tensors:
        name, value = parameter.name, inputs[parameter.name]
        if not isinstance(value, Tensor):
            if parameter.shape or not isinstance(value, int | float):
                yield NotATensor(parameter.span, name, type(value).__name__, _declared_shape(parameter))
            continue
        dtypes = [TORCH_DTYPES[d] for d in parameter.dtypes]
        if value.dtype not in dtypes:
            expected = " or ".join(_short(d) for d in dtypes)
            wanted = f"torch.{_short(TORCH_DTYPES[preferred_dtype(parameter)])}"
            yield WrongDType(parameter.span, name, _short(value.dtype), expected, wanted)
        if value.device != device:
            yield WrongDevice(parameter.span, name, str(value.device), str(device))
        shape = signature.shape(name, sizes)
        if value.dim() != len(shape):
            yield WrongRank(parameter.span, name, value.dim(), len(shape), f"{_declared_shape(parameter)} = {shape}")
            continue
        for axis, (found, expected) in enumerate(zip(value.shape, shape, strict=True)):
            if found != expected:
                meaning = _axis_name(parameter, axis)
                yield WrongSize(parameter.span, name, axis, found, expected, meaning, str(tuple(value.shape)))


def _scalar_reasons(signature: Signature, inputs: Mapping[str, Any]) -> Iterator[Diagnostic]:
    for parameter in signature.scalars:
        if parameter.name not in inputs:
            continue
        name, value = parameter.name, inputs[parameter.name]
        if isinstance(value, Tensor):
            if value.numel() != 1:
                yield WrongScalar(
                    parameter.span, name, f"one {parameter.kind.value}", _describe(value), "pass a Python number"
                )
                continue
            value = value.item()
        if type(value) not in PYTHON_TYPES[parameter.kind]:
            yield WrongScalar(
                parameter.span, name, f"{_article(parameter.kind)}", _describe(value), "pass a Python number of that kind"
            )
        elif parameter.kind is Kind.INT and value not in INT_RANGE:
            yield WrongScalar(
                parameter.span, name, "an int that fits 32 bits", _describe(value), "2**30 is beyond every position"
            )


def _sizes(operands: Mapping[str, Tensor]) -> Sizes:
    q, k, v = operands["q"], operands["k"], operands["v"]
    return Sizes(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])


def _declared_shape(parameter: TensorParameter) -> str:
    return "(" + ", ".join(_axis_name(parameter, axis) for axis in range(len(parameter.shape))) + ")"


def _axis_name(parameter: TensorParameter, axis: int) -> str:
    expr = parameter.shape[axis]
    if isinstance(expr, Size):
        return expr.name
    return expr.span.text if expr.span is not None else f"axis {axis}"


def _article(kind: Kind) -> str:
    return {Kind.INT: "an int", Kind.FLOAT: "a float", Kind.BOOL: "a bool"}[kind]


def _describe(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
