"""Why the arguments of a call do not fit: every independent reason, in the words of the caller."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from attncc.diagnostics import CallError, Diagnostic
from attncc.errors import PassedByPosition, ReadsOutside
from attncc.ir.nodes import ScalarParameter, Size, TensorParameter
from attncc.ir.types import Kind
from attncc.reference import OutOfRange
from attncc.runtime.arguments import (
    INT_RANGE,
    MAX_LENGTH,
    OPERAND_DTYPES,
    PYTHON_TYPES,
    TORCH_DTYPES,
    Mismatch,
    Signature,
    Sizes,
    loses_gradient,
    operand_sizes,
    preferred_dtype,
    python_number,
    scalar_tensor,
)
from attncc.runtime.errors import (
    EmptyWidth,
    HeadsDoNotDivide,
    LosesGradient,
    MissingInput,
    NoShape,
    NotATensor,
    NotDense,
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
_ARTICLES = {Kind.INT: "an int", Kind.FLOAT: "a float", Kind.BOOL: "a bool"}
# The keywords of a call itself, and what those of other attention functions are here.
_OPTIONS = ("q_offset", "return_lse", "dropout_p", "seed", "stats")
_CAUSAL = "masks are part of the specification: write `mask = causal` there"
_MASK = (
    "masks are part of the specification: declare a tensor, `keep: bool[B, M, N]` say, and write "
    "`mask = keep[b, q_row, kv_idx]` there"
)
_ELSEWHERE = {
    "is_causal": _CAUSAL,
    "causal": _CAUSAL,
    "attn_mask": _MASK,
    "attention_mask": _MASK,
    "mask": _MASK,
    "block_mask": "write `mask = …` in the specification",
    "score_mod": "write `score = …` in the specification",
    "scale": "write `scale = …` in the specification",
    "softmax_scale": "write `scale = …` in the specification",
    "enable_gqa": "leave it out: heads of k and v are shared wherever q has more",
}
_EXAMPLES = {Kind.INT: "128", Kind.FLOAT: "1.0", Kind.BOOL: "True"}


def refuse(signature: Signature, operands: Mapping[str, Any], q_offset: Any, inputs: Mapping[str, Any]) -> CallError:
    """The error for arguments that `Signature.bind` has turned down."""
    tensors = {name: value for name, value in operands.items() if isinstance(value, Tensor)}
    sound = {name: value for name, value in tensors.items() if is_dense(value) and value.dim() == 4}
    try:
        sizes = operand_sizes(*(sound[name] for name in "qkv"))
    except (Mismatch, ValueError, KeyError):
        sizes = None  # The shapes of captured tensors cannot be told.
    device = tensors["q"].device if "q" in tensors else None
    reasons = [
        *kind_reasons(operands),
        *_shape_reasons(sound),
        *type_reasons(tensors),
        *q_offset_reasons(q_offset, sound.get("q")),
        *keyword_reasons(signature, inputs, _OPTIONS, _ELSEWHERE),
        *scalar_reasons(signature, inputs),
        *captured_reasons(signature, sizes, inputs, device),
    ]
    assert reasons, "arguments were refused without a reason"
    return CallError(*_with_layout(reasons, signature, sound, inputs))


def _with_layout(
    reasons: list[Diagnostic], signature: Signature, sound: Mapping[str, Tensor], inputs: Mapping[str, Any]
) -> list[Diagnostic]:
    """The reasons; the first one of shapes says so where the tensors would fit with heads and rows exchanged."""
    for i, reason in enumerate(reasons):
        if isinstance(reason, WrongSize | HeadsDoNotDivide):
            exchanged = next((e for e in ("qkv", "kv", "q", "k", "v") if _fit(e, signature, sound, inputs)), "")
            if exchanged:
                calls = ", ".join(f"{name}.transpose(1, 2)" for name in exchanged)
                hint = f"the order is (batch, heads, rows, width): where heads come after rows, pass {calls}"
                reasons[i] = replace(reason, hint=hint)
            break
    return reasons


def _fit(exchanged: str, signature: Signature, sound: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> bool:
    """Whether all shapes agree when heads and rows of the operands named change places."""
    try:
        sizes = operand_sizes(*(sound[n].transpose(1, 2) if n in exchanged else sound[n] for n in "qkv"))
        return all(tuple(inputs[p.name].shape) == signature.shape(p.name, sizes) for p in signature.tensors)
    except (Mismatch, ValueError, KeyError, AttributeError):
        return False


def by_position(signature: Signature, extra: Sequence[Any], inputs: Mapping[str, Any]) -> CallError:
    """The error for arguments after q, k and v that were passed without their names."""
    parameters = [p for p in signature.attention.parameters if p.name not in inputs]
    # The value itself where it is short to write, or else a variable of that name.
    passed = {
        p.name: repr(value) if type(value) in (bool, int, float) else p.name
        for p, value in zip(parameters, extra, strict=False)
    }
    advice = f"write attn(q, k, v, {', '.join(f'{name}={value}' for name, value in passed.items())})"
    if len(extra) > len(parameters):
        advice = _inputs_of(signature)
    return CallError(PassedByPosition(None, signature.attention.name, "q, k and v", advice))


def reads_outside(error: OutOfRange) -> ReadsOutside:
    """What the reference found at a kept pair, as a user reads it."""
    place = ", ".join(f"{name} = {value}" for name, value in error.at.items())
    return ReadsOutside(error.span, error.tensor, error.axis, error.index, error.size, place)


def kind_reasons(
    operands: Mapping[str, Any], shapes: Mapping[str, str] = MappingProxyType(_OPERAND_SHAPES)
) -> Iterator[Diagnostic]:
    for name, value in operands.items():
        shape = shapes[name]
        if not isinstance(value, Tensor):
            yield NotATensor(None, name, type(value).__name__, shape)
        elif not is_dense(value):
            yield NotDense(None, name, _layout(value))
        elif value.dim() != 4:
            yield WrongRank(None, name, str(tuple(value.shape)), 4, shape)


def _shape_reasons(sound: Mapping[str, Tensor]) -> Iterator[Diagnostic]:
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


def type_reasons(tensors: Mapping[str, Tensor]) -> Iterator[Diagnostic]:
    """Element types and devices of q, k and v: all must be those of the first that may be one."""
    supported = ", ".join(short(dtype) for dtype in OPERAND_DTYPES)
    standard = next((name for name, value in tensors.items() if value.dtype in OPERAND_DTYPES), None)
    for name, value in tensors.items():
        if value.dtype not in OPERAND_DTYPES or standard is None:
            yield WrongDType(None, name, short(value.dtype), f"one of {supported}", "torch.float32")
        elif value.dtype is not tensors[standard].dtype:
            wanted = short(tensors[standard].dtype)
            yield WrongDType(None, name, short(value.dtype), f"{wanted} (that of {standard})", f"torch.{wanted}")
    first = next(iter(tensors), None)
    for name, value in tensors.items():
        if first is not None and value.device != tensors[first].device:
            yield WrongDevice(None, name, str(value.device), str(tensors[first].device), first)


def q_offset_reasons(q_offset: Any, q: Tensor | None) -> Iterator[Diagnostic]:
    number = _number_in(q_offset)
    limit = MAX_LENGTH - (0 if q is None else q.shape[2])
    if number is None or (type(number) is int and -MAX_LENGTH <= number <= limit):
        return
    advice = "pass the position of query row 0; every position must lie within 2**30"
    if isinstance(q_offset, Tensor) and q_offset.dim():
        advice = (
            "it is one number for all sequences; where each has a length of its own, declare `lengths: int[B]` and "
            "write `lengths[b] - M + q_row` for `q_idx`"
        )
    expected = f"an int from {-MAX_LENGTH} to {limit}" if type(number) is int else "an int"
    yield WrongScalar(None, "q_offset", expected, _describe(q_offset), advice)


def keyword_reasons(
    signature: Signature,
    inputs: Mapping[str, Any],
    options: Sequence[str] = (),
    elsewhere: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Diagnostic]:
    """Inputs that nobody declared, and those that are missing. options: the keywords of a call that are no inputs;
    elsewhere: what to write for those of other libraries."""
    declared = {p.name: p for p in signature.attention.parameters}
    for name in inputs:
        if name not in declared:
            if close := difflib.get_close_matches(name, declared, n=1):
                advice = f"did you mean `{close[0]}`?"
            elif name in elsewhere:
                advice = elsewhere[name]
            else:
                close = difflib.get_close_matches(name, options, n=1)
                advice = f"did you mean `{close[0]}`?" if close else _inputs_of(signature)
            yield UnknownInput(None, signature.attention.name, name, advice)
    for name, parameter in declared.items():
        if name not in inputs:
            match parameter:
                case ScalarParameter(default=None, kind=kind):
                    yield MissingInput(parameter.span, name, _ARTICLES[kind], _EXAMPLES[kind])
                case ScalarParameter():
                    pass
                case TensorParameter():
                    yield MissingInput(parameter.span, name, f"a tensor of shape {_declared_shape(parameter)}", name)


def _inputs_of(signature: Signature) -> str:
    names = [f"`{p.name}`" for p in signature.attention.parameters]
    return f"its inputs are {', '.join(names)}" if names else "it takes q, k and v alone"


def scalar_reasons(signature: Signature, inputs: Mapping[str, Any]) -> Iterator[Diagnostic]:
    for parameter in signature.scalars:
        if parameter.name not in inputs:
            continue
        name, kind, value = parameter.name, parameter.kind, inputs[parameter.name]
        if loses_gradient(value):
            yield LosesGradient(parameter.span, name)
            continue
        number = _number_in(value)
        expected, advice = _ARTICLES[kind], "pass a Python number"
        if type(number) in PYTHON_TYPES[kind]:
            if kind is Kind.INT and not INT_RANGE[0] <= number <= INT_RANGE[-1]:
                expected, advice = "an int that fits 32 bits", "2**30 is beyond every position"
            elif kind is Kind.FLOAT and not _is_float(number):
                expected, advice = "a float that fits 64 bits", "float('inf') is beyond every number"
            else:
                continue
        elif kind is Kind.INT and type(number) is float:
            advice = f"pass {int(number)}" if number.is_integer() else "declare it `float`, or pass a whole number"
        yield WrongScalar(parameter.span, name, expected, _describe(value), advice)


def captured_reasons(
    signature: Signature, sizes: Sizes | None, inputs: Mapping[str, Any], device: torch.device | None
) -> Iterator[Diagnostic]:
    for parameter in signature.tensors:
        if parameter.name not in inputs:
            continue
        name, value = parameter.name, inputs[parameter.name]
        if not parameter.shape and not isinstance(value, Tensor):
            yield from _number_reasons(parameter, value)
        elif not isinstance(value, Tensor):
            yield NotATensor(parameter.span, name, type(value).__name__, _declared_shape(parameter))
        else:
            yield from _captured_type_reasons(parameter, value, device)
            if is_dense(value):
                yield from _captured_shape_reasons(signature, parameter, value, sizes)


def _number_reasons(parameter: TensorParameter, value: Any) -> Iterator[Diagnostic]:
    try:
        scalar_tensor(parameter, value, torch.device("cpu"))
    except (Mismatch, ValueError, OverflowError, RuntimeError, TypeError):
        dtype = preferred_dtype(parameter)
        expected = f"{_ARTICLES[dtype.kind]} that fits {short(TORCH_DTYPES[dtype])}"
        advice = "pass a Python number, or a 0-d tensor"
        yield WrongScalar(parameter.span, parameter.name, expected, _describe(value), advice)


def _captured_type_reasons(
    parameter: TensorParameter, value: Tensor, device: torch.device | None
) -> Iterator[Diagnostic]:
    dtypes = [TORCH_DTYPES[d] for d in parameter.dtypes]
    if value.dtype not in dtypes:
        expected = " or ".join(short(d) for d in dtypes)
        wanted = f"torch.{short(TORCH_DTYPES[preferred_dtype(parameter)])}"
        yield WrongDType(parameter.span, parameter.name, short(value.dtype), expected, wanted)
    if device is not None and value.device != device:
        yield WrongDevice(parameter.span, parameter.name, str(value.device), str(device), "q")
    if not is_dense(value):
        yield NotDense(parameter.span, parameter.name, _layout(value))


def _captured_shape_reasons(
    signature: Signature, parameter: TensorParameter, value: Tensor, sizes: Sizes | None
) -> Iterator[Diagnostic]:
    name, declared = parameter.name, _declared_shape(parameter)
    shape: tuple[int, ...] | None = None
    if sizes is not None:
        try:
            shape = signature.shape(name, sizes)
        except ValueError as error:
            yield NoShape(parameter.span, name, str(error), declared)
            return
    if value.dim() != len(parameter.shape):
        known = declared if shape in (None, ()) else f"{declared} = {shape}"
        yield WrongRank(parameter.span, name, str(tuple(value.shape)), len(parameter.shape), known)
    elif shape is not None:
        for axis, (found, expected) in enumerate(zip(value.shape, shape, strict=True)):
            if found != expected:
                meaning = _axis_name(parameter, axis)
                yield WrongSize(parameter.span, name, axis, found, expected, meaning, str(tuple(value.shape)))


def _number_in(value: Any) -> Any:
    """The Python number in `value`; `value` itself where there is not one."""
    try:
        return python_number(value)
    except (TypeError, ValueError, RuntimeError):
        return value


def _is_float(number: int | float) -> bool:
    try:
        float(number)
    except OverflowError:
        return False
    return True


def is_dense(value: Tensor) -> bool:
    """Whether the elements of a tensor lie in memory at strides: no sparse, nested or otherwise packed one."""
    return value.layout is torch.strided and not value.is_nested


def _layout(value: Tensor) -> str:
    return "nested" if value.is_nested else str(value.layout).removeprefix("torch.")


def _declared_shape(parameter: TensorParameter) -> str:
    names = [_axis_name(parameter, axis) for axis in range(len(parameter.shape))]
    return f"({names[0]},)" if len(names) == 1 else f"({', '.join(names)})"


def _axis_name(parameter: TensorParameter, axis: int) -> str:
    expr = parameter.shape[axis]
    if isinstance(expr, Size):
        return expr.name
    return expr.span.text if expr.span is not None else f"axis {axis}"


def _describe(value: object) -> str:
    """A value in a few words, whatever it is."""
    if isinstance(value, Tensor):
        if not is_dense(value) or value.device.type == "meta" or value.numel() != 1:
            where = " on meta" if value.device.type == "meta" else ""
            return (
                f"a {_layout(value)} tensor"
                if not is_dense(value)
                else f"a tensor of shape {tuple(value.shape)}{where}"
            )
        value = value.item()
    if type(value) is int and value.bit_length() > 128:
        return f"an int of {value.bit_length()} bits"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
