"""A recurrence that was built: its reference, its normal form, and what a call says until there are kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Never

import torch
from torch import Tensor

from attncc import recurrent_reference
from attncc.diagnostics import BuildError, CallError, Diagnostic
from attncc.explain_recurrence import explain_recurrence
from attncc.ir.recurrence import Recurrence
from attncc.reference import OutOfRange
from attncc.runtime import refusals
from attncc.runtime.arguments import MAX_LENGTH, OPERAND_DTYPES, Signature, Sizes, python_number
from attncc.runtime.errors import EmptyWidth, TooLong, WrongSize
from attncc.runtime.recurrent_errors import NoRecurrentKernel, RecurrentHeads

_OPERAND_SHAPES = {"q": "(B, heads, N, D)", "k": "(B, heads, N, D)", "v": "(B, heads, N, E)"}
_STATE_SHAPE = "(B, H, D, E)"


class RecurrentAttention:
    """An attention given as a recurrence. Made by `attncc.build`; `attention` is its IR, `text` its specification."""

    def __init__(self, attention: Recurrence, text: str) -> None:
        self.attention = attention
        self.text = text
        self._signature = Signature(attention)

    def __repr__(self) -> str:
        inputs = "".join(f", {p.name}" for p in self.attention.parameters)
        return f"<RecurrentAttention {self.attention.name}(q, k, v{', *' if inputs else ''}{inputs})>"

    def __call__(self, /, *_arguments: Any, **_inputs: Any) -> Never:
        """Raises BuildError: this version has no kernels of recurrences."""
        raise BuildError(NoRecurrentKernel(None, self.attention.name))

    def reference(
        self,
        /,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *extra: Any,
        initial_state: Tensor | None = None,
        return_state: bool = False,
        q_offset: int = 0,
        **inputs: Any,
    ) -> Any:
        """The statements in float64, token by token: o (B, H, N, E), of q, k (B, heads, N, D) and v (B, heads, N, E).

        H is the greatest of the three numbers of heads. initial_state: (B, H, D, E); 0 if not given. return_state: also
        the state after the last token. q_offset: the position of the first token, where row transforms read positions.
        inputs: the tensors and run-time scalars of the specification.

        Raises CallError for arguments that do not fit, and where a token reads outside a captured tensor.
        """
        if extra:
            raise refusals.by_position(self._signature, extra, inputs)
        captured = self._bound({"q": q, "k": k, "v": v}, initial_state, q_offset, inputs)
        try:
            o, state = recurrent_reference.evaluate(self.attention, q, k, v, captured, initial_state, int(q_offset))
        except OutOfRange as error:
            raise CallError(refusals.reads_outside(error)) from error
        return (o, state) if return_state else o

    def explain(self) -> str:
        """The statements as they were understood, and the normal form that they were brought to."""
        return explain_recurrence(self.text, self.attention)

    def _bound(
        self, operands: Mapping[str, Any], initial_state: Any, q_offset: Any, inputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The inputs by name. Raises CallError with every reason why the arguments do not fit."""
        signature = self._signature
        reasons = list(_reasons(signature, operands, initial_state, q_offset, inputs))
        if reasons:
            raise CallError(*reasons)
        device, sizes = operands["q"].device, _sizes(operands)
        tensors = {p.name: signature.tensor(p, inputs[p.name], sizes, device) for p in signature.tensors}
        scalars = {p.name: signature.scalar(p, inputs.get(p.name, p.default)) for p in signature.scalars}
        return {**tensors, **scalars}


def _sizes(operands: Mapping[str, Tensor]) -> Sizes:
    q, k, v = (operands[name] for name in "qkv")
    heads, tokens = max(x.shape[1] for x in (q, k, v)), q.shape[2]
    return Sizes(q.shape[0], heads, k.shape[1], tokens, tokens, q.shape[3], v.shape[3])


def _reasons(
    signature: Signature, operands: Mapping[str, Any], initial_state: Any, q_offset: Any, inputs: Mapping[str, Any]
) -> Iterator[Diagnostic]:
    tensors = {name: value for name, value in operands.items() if isinstance(value, Tensor)}
    sound = {name: value for name, value in tensors.items() if refusals.is_dense(value) and value.dim() == 4}
    shapes = list(_shape_reasons(sound))
    sizes = _sizes(sound) if len(sound) == len(operands) and not shapes else None
    yield from refusals.kind_reasons(operands, _OPERAND_SHAPES)
    yield from shapes
    yield from refusals.type_reasons(tensors)
    yield from refusals.keyword_reasons(signature, inputs)
    yield from refusals.scalar_reasons(signature, inputs)
    device = tensors["q"].device if "q" in tensors else None
    yield from refusals.captured_reasons(signature, sizes, inputs, device)
    yield from _offset_reasons(q_offset)
    if initial_state is not None:
        yield from _state_reasons(initial_state, sizes, device)


def _shape_reasons(sound: Mapping[str, Tensor]) -> Iterator[Diagnostic]:
    for name, value in sound.items():
        if value.shape[3] == 0:
            yield EmptyWidth(None, name)
        if value.shape[2] > MAX_LENGTH:
            yield TooLong(None, name, value.shape[2], MAX_LENGTH)
    for name, axis, meaning in (("k", 0, "B"), ("v", 0, "B"), ("k", 2, "N"), ("v", 2, "N"), ("k", 3, "D")):
        if name in sound and "q" in sound and sound[name].shape[axis] != sound["q"].shape[axis]:
            found, expected = sound[name].shape[axis], sound["q"].shape[axis]
            shape = str(tuple(sound[name].shape))
            yield WrongSize(None, name, axis, found, expected, meaning, shape, ", as q does")
    heads = max((value.shape[1] for value in sound.values()), default=0)
    for name, value in sound.items():
        found = value.shape[1]
        if heads % found if found else heads:
            yield RecurrentHeads(None, name, found, heads)


def _state_reasons(state: Any, sizes: Sizes | None, device: torch.device | None) -> Iterator[Diagnostic]:
    name = "initial_state"
    kinds = list(refusals.kind_reasons({name: state}, {name: _STATE_SHAPE}))
    yield from kinds
    if kinds:
        return
    if state.dtype not in OPERAND_DTYPES:
        yield refusals.WrongDType(None, name, refusals.short(state.dtype), "one of the floats", "torch.float32")
    if device is not None and state.device != device:
        yield refusals.WrongDevice(None, name, str(state.device), str(device), "q")
    if sizes is None:
        return
    wanted = (sizes.B, sizes.H, sizes.D, sizes.E)
    for axis, (found, expected, meaning) in enumerate(zip(state.shape, wanted, "BHDE", strict=True)):
        if found != expected:
            yield WrongSize(None, name, axis, found, expected, meaning, str(tuple(state.shape)))


def _offset_reasons(q_offset: Any) -> Iterator[Diagnostic]:
    try:
        number = python_number(q_offset)
    except (TypeError, ValueError, RuntimeError):
        number = None
    if type(number) is not int or not -MAX_LENGTH <= number <= MAX_LENGTH:
        yield from refusals.q_offset_reasons(q_offset if q_offset is not None else "None", None)
