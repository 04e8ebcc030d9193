"""The arguments of a call of a recurrence: bound where they fit, else every reason why they do not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attncc.diagnostics import CallError, Diagnostic
from attncc.ir.recurrence import Recurrence
from attncc.runtime import refusals
from attncc.runtime.arguments import (
    MAX_LENGTH,
    OPERAND_DTYPES,
    Mismatch,
    Signature,
    Sizes,
    python_number,
    size_function,
    unlike,
)
from attncc.runtime.errors import EmptyWidth, TooLong, WrongSize
from attncc.runtime.recurrent_errors import NoPacking, PackedBatch, RecurrentHeads, WrongOffsets

_OPERAND_SHAPES = {"q": "(B, heads, N, D)", "k": "(B, heads, N, D)", "v": "(B, heads, N, E)"}

_OPTIONS = ("initial_state", "return_state", "cu_seqlens", "q_offset")
_NO_WEIGHTS = "a recurrence has no weights of pairs: drop it"
# What calls of attentions take, and what models call a state.
_ELSEWHERE = {
    **dict.fromkeys(("return_lse", "stats", "dropout_p", "seed"), _NO_WEIGHTS),
    "is_causal": "a token reads those before it and itself: drop it",
    "scale": "write it in the specification: `scale = 0.1` beside `feature`, `out = 0.1 * q @ S` in a recurrence",
    "state": "a call starts from initial_state=; attn.step(…, state=) goes on with a state in place",
}
# The keywords of a step, and what those of a call are there.
_OPTIONS_OF_STEPS = ("state", "q_offset")
_IN_PLACE = "a step has state=, which becomes the state after it: what comes back is o"
_ELSEWHERE_FROM_STEPS = {
    **_ELSEWHERE,
    **dict.fromkeys(("initial_state", "return_state"), _IN_PLACE),
    "cu_seqlens": "a step is of the next tokens of each sequence of a batch: drop it, or make a call",
}


class GivenToRecurrence(NamedTuple):
    """What a caller gives, and what `state` is called there. inputs: the specification's, by name."""

    q: Any
    k: Any
    v: Any
    state: Any
    cu_seqlens: Any
    q_offset: Any
    inputs: Mapping[str, Any]
    state_name: str = "initial_state"

    @property
    def operands(self) -> dict[str, Any]:
        return {"q": self.q, "k": self.k, "v": self.v}


class BoundRecurrence(NamedTuple):
    """Arguments that fit. tensors and scalars: the inputs of the specification by name. offsets: where each packed
    sequence begins, and the end of the last, int64 on the device of q; None where nothing is packed. exact_state: the
    last state keeps what rounding takes from products of bf16; nobody will see it otherwise. keeps_state: something is
    read from the last state."""

    sizes: Sizes
    q_offset: int
    tensors: dict[str, Tensor]
    scalars: dict[str, bool | int | float]
    initial_state: Tensor | None
    offsets: Tensor | None
    exact_state: bool = True
    keeps_state: bool = True

    @property
    def inputs(self) -> dict[str, Any]:
        """Tensors and scalars together."""
        return {**self.tensors, **self.scalars}


def bind_recurrence(signature: Signature, given: GivenToRecurrence) -> BoundRecurrence:
    """The arguments in the form in which kernels take them. Raises CallError with every reason why they do not fit."""
    try:
        return _bound(signature, given)
    except (Mismatch, AttributeError, TypeError, ValueError, KeyError, OverflowError, RuntimeError):
        reasons = list(_reasons(signature, given))
        if not reasons:
            raise
        raise CallError(*reasons) from None


def _bound(signature: Signature, given: GivenToRecurrence) -> BoundRecurrence:
    """As `bind_recurrence`, with no more comparisons than it takes: of a step of a small state they are most of the
    time. Raises `Mismatch`, or what Python and PyTorch say of such arguments, where they do not fit."""
    recurrence = signature.attention
    assert isinstance(recurrence, Recurrence)
    q, k, v, state, cu_seqlens, q_offset, inputs, _ = given
    sizes = agreed_sizes(q, k, v, recurrence.bidirectional)
    device, offset = q.device, python_number(q_offset)
    if type(offset) is not int or not -MAX_LENGTH <= offset <= MAX_LENGTH:
        raise Mismatch
    offsets = None
    if cu_seqlens is not None:
        if any(
            True for _ in _packing_reasons(cu_seqlens, sizes, recurrence.name, bidirectional=recurrence.bidirectional)
        ):
            raise Mismatch
        offsets = cu_seqlens.to(device=device, dtype=torch.int64).contiguous()
    if state is not None:
        sequences = sizes.B if offsets is None else len(offsets) - 1
        if (
            state.shape != state_shape(recurrence, sizes, sequences)
            or state.dtype not in OPERAND_DTYPES
            or state.device != device
            or state.layout is not torch.strided
        ):
            raise Mismatch
    tensors = {p.name: signature.tensor(p, inputs[p.name], sizes, device) for p in signature.tensors}
    scalars = {p.name: signature.scalar(p, inputs.get(p.name, p.default)) for p in signature.scalars}
    if len(inputs) > len(tensors) + sum(p.name in inputs for p in signature.scalars):
        raise Mismatch
    return BoundRecurrence(sizes, offset, tensors, scalars, state, offsets)


def agreed_sizes(q: Tensor, k: Tensor, v: Tensor, bidirectional: bool) -> Sizes:
    """Those of `sizes_of`. Raises `Mismatch` or `ValueError` where the operands do not agree on them."""
    batch, heads_q, rows, width = q.shape
    batch_k, heads_k, keys, width_k = k.shape
    batch_v, heads_v, keys_v, width_v = v.shape
    heads = max(heads_q, heads_k, heads_v)
    if (
        batch_k != batch
        or batch_v != batch
        or keys_v != keys
        or (keys != rows and not bidirectional)
        or width_k != width
        or (heads and (not (heads_q and heads_k and heads_v) or heads % heads_q or heads % heads_k or heads % heads_v))
        or unlike(q, k, v)
        or rows > MAX_LENGTH
        or keys > MAX_LENGTH
        or width == 0
        or width_v == 0
    ):
        raise Mismatch
    return Sizes(batch, heads, heads_k, rows, keys, width, width_v)


def sizes_of(operands: Mapping[str, Tensor]) -> Sizes:
    """B, H (the greatest number of heads), HKV (those of k), M and N (tokens), D and E."""
    q, k, v = (operands[name] for name in "qkv")
    heads = max(x.shape[1] for x in (q, k, v))
    return Sizes(q.shape[0], heads, k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])


def state_shape(recurrence: Recurrence, sizes: Sizes, sequences: int) -> tuple[int, int, int, int]:
    """The shape of a call's states, one for each sequence and head: (sequences, H, key width, E), with one more column
    where outputs are divided by a sum."""
    width = size_function(recurrence.key_width)(sizes)
    return sequences, sizes.H, width, sizes.E + (recurrence.normalizer == "sum")


def _reasons(signature: Signature, given: GivenToRecurrence) -> Iterator[Diagnostic]:
    operands, cu_seqlens, inputs = given.operands, given.cu_seqlens, given.inputs
    tensors = {name: value for name, value in operands.items() if isinstance(value, Tensor)}
    sound = {name: value for name, value in tensors.items() if refusals.is_dense(value) and value.dim() == 4}
    assert isinstance(signature.attention, Recurrence)
    bidirectional = signature.attention.bidirectional
    shapes = list(_shape_reasons(sound, bidirectional))
    sizes = sizes_of(sound) if len(sound) == len(operands) and not shapes else None
    yield from refusals.kind_reasons(operands, _OPERAND_SHAPES)
    yield from shapes
    yield from refusals.type_reasons(tensors)
    if given.state_name == "state":
        yield from refusals.keyword_reasons(signature, inputs, _OPTIONS_OF_STEPS, _ELSEWHERE_FROM_STEPS)
    else:
        yield from refusals.keyword_reasons(signature, inputs, _OPTIONS, _ELSEWHERE)
    yield from refusals.scalar_reasons(signature, inputs)
    device = tensors["q"].device if "q" in tensors else None
    yield from refusals.captured_reasons(signature, sizes, inputs, device)
    yield from _offset_reasons(given.q_offset)
    packed = list(_packing_reasons(cu_seqlens, sizes, signature.attention.name, bidirectional=bidirectional))
    yield from packed
    if given.state is not None and not packed:
        sequences = None if sizes is None else sizes.B if cu_seqlens is None else len(cu_seqlens) - 1
        shape = None if sizes is None or sequences is None else state_shape(signature.attention, sizes, sequences)
        yield from _state_reasons(given.state_name, given.state, shape, tensors.get("q"))


def _shape_reasons(sound: Mapping[str, Tensor], bidirectional: bool) -> Iterator[Diagnostic]:
    for name, value in sound.items():
        if value.shape[3] == 0:
            yield EmptyWidth(None, name)
        if value.shape[2] > MAX_LENGTH:
            yield TooLong(None, name, value.shape[2], MAX_LENGTH)
    tokens = (("v", "k", 2, "N"),) if bidirectional else (("k", "q", 2, "N"), ("v", "q", 2, "N"))
    for name, as_of, axis, meaning in (("k", "q", 0, "B"), ("v", "q", 0, "B"), *tokens, ("k", "q", 3, "D")):
        if name in sound and as_of in sound and sound[name].shape[axis] != sound[as_of].shape[axis]:
            found, expected = sound[name].shape[axis], sound[as_of].shape[axis]
            shape = str(tuple(sound[name].shape))
            yield WrongSize(None, name, axis, found, expected, meaning, shape, f", as {as_of} does")
    heads = max((value.shape[1] for value in sound.values()), default=0)
    for name, value in sound.items():
        found = value.shape[1]
        if heads % found if found else heads:
            yield RecurrentHeads(None, name, found, heads)


def _state_reasons(name: str, state: Any, shape: tuple[int, ...] | None, q: Tensor | None) -> Iterator[Diagnostic]:
    kinds = list(refusals.kind_reasons({name: state}, {name: "(B, H, D, E)"}))
    yield from kinds
    if kinds:
        return
    if state.dtype not in OPERAND_DTYPES:
        yield refusals.WrongDType(None, name, refusals.short(state.dtype), "one of the floats", "torch.float32")
    if q is not None and state.device != q.device:
        yield refusals.WrongDevice(None, name, str(state.device), str(q.device), "q")
    for axis, (found, expected, meaning) in enumerate(zip(state.shape, shape or (), "BHDE", strict=False)):
        if found != expected:
            yield WrongSize(None, name, axis, found, expected, meaning, str(tuple(state.shape)))


def _packing_reasons(cu_seqlens: Any, sizes: Sizes | None, name: str, *, bidirectional: bool) -> Iterator[Diagnostic]:
    if cu_seqlens is None:
        return
    if bidirectional:
        yield NoPacking(None, name)
        return
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        found = refusals.short(cu_seqlens.dtype) if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        yield WrongOffsets(None, f"it is {found}, not a tensor of int32 or int64")
        return
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        yield WrongOffsets(None, f"its shape is {tuple(cu_seqlens.shape)}")
        return
    places = cu_seqlens.tolist()
    if places[0] != 0 or any(end < start for start, end in itertools.pairwise(places)):
        yield WrongOffsets(None, "it does not ascend from 0")
    if sizes is not None and places[-1] != sizes.N:
        yield WrongOffsets(None, f"it ends with {places[-1]}, and there are {sizes.N} tokens")
    if sizes is not None and sizes.B != 1:
        yield PackedBatch(None, sizes.B)


def _offset_reasons(q_offset: Any) -> Iterator[Diagnostic]:
    try:
        number = python_number(q_offset)
    except (TypeError, ValueError, RuntimeError):
        number = None
    if type(number) is not int or not -MAX_LENGTH <= number <= MAX_LENGTH:
        yield from refusals.q_offset_reasons(q_offset if q_offset is not None else "None", None)
