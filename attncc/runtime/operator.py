"""Attention as operators of PyTorch.

    torch.ops.attncc.attend(spec, q, k, v, tensors, ints, floats, q_offset) -> (o, total)
    torch.ops.attncc.attend_backward(spec, …, o, total, do, dtotal, wanted) -> [dq, dk, dv, gradients of tensors]

Autograd, `torch.compile`, `torch.export`, `torch.func` and tensor subclasses see a call as one of these, with shapes
and types known without running it. A call that none of them looks at goes to its kernels directly
(`attncc.runtime.tracing`).

spec       names the attention: a text that it can be built from again, in any process (`attncc.build`)
tensors    captured tensors, in the order in which the specification declares them
ints       run-time scalars that are ints or bools, in that order; floats likewise
total      what each row was divided by (B, H, M), as the kernels give it; empty where nothing is divided
wanted     which of `tensors` need a gradient
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import _C, Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from attncc.diagnostics import CallError
from attncc.ir.nodes import Elementwise
from attncc.ir.types import Kind
from attncc.runtime import vmap
from attncc.runtime.arguments import Bound, Mismatch, Signature
from attncc.runtime.backward import Results
from attncc.runtime.errors import NoDerivative
from attncc.runtime.kernels import Kernels
from attncc.runtime.refusals import refuse
from attncc.runtime.tracing import without_modes

_CALL = "str spec, Tensor q, Tensor k, Tensor v, Tensor[] tensors, SymInt[] ints, float[] floats, SymInt q_offset"
_RESULTS = "Tensor o, Tensor total, Tensor do, Tensor? dtotal, bool[] wanted"

_LIBRARY = torch.library.Library("attncc", "DEF")
_LIBRARY.define(f"attend({_CALL}) -> (Tensor o, Tensor total)", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(f"attend_backward({_CALL}, {_RESULTS}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
ATTEND = torch.ops.attncc.attend.default
ATTEND_BACKWARD = torch.ops.attncc.attend_backward.default


@dataclass(frozen=True)
class Variant:
    """What the operators know of an attention."""

    signature: Signature
    kernels: Kernels


# Those that somebody holds, the last one where there are several, and those that were built here.
_known: WeakValueDictionary[str, Variant] = WeakValueDictionary()
_built: dict[str, Variant] = {}
_build: Callable[[str], Variant] | None = None


def use_builder(build: Callable[[str], Variant]) -> None:
    """Tells how to build the variant of a `spec` that nobody in this process holds: that of an exported program."""
    global _build  # noqa: PLW0603 - one for the process, as operators are
    _build = build


def register(spec: str, variant: Variant) -> None:
    """Lets the operators run `spec` by these kernels."""
    _known[spec] = variant


def variant_of(spec: str) -> Variant:
    """The variant that `spec` names, built where there is none yet."""
    variant = _known.get(spec)
    if variant is None:
        assert _build is not None, "attncc.build sets it as it registers the operators"
        variant = _known[spec] = _built[spec] = _build(spec)
    return variant


def attend(spec: str, q: Tensor, k: Tensor, v: Tensor, bound: Bound) -> tuple[Tensor, Tensor]:
    """The operator `attend` on arguments that have been bound."""
    ints: list[int] = []
    floats: list[float] = []
    for value in bound.scalars.values():
        if isinstance(value, float | torch.SymFloat):
            floats.append(value)
        else:
            ints.append(int(value) if isinstance(value, bool) else value)
    return ATTEND(spec, q, k, v, list(bound.tensors.values()), ints, floats, bound.q_offset)


# --- what they compute ----------------------------------------------------------------------------------------------


def _bind(
    signature: Signature,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor] | None,
    ints: Sequence[int] | None,
    floats: Sequence[float] | None,
    q_offset: int,
) -> Bound:
    """Arguments of an operator as those of a call. They are checked again: an exported program passes what it is
    given, and kernels read memory. AOTInductor passes None for an empty list."""
    inputs: dict[str, Any] = {p.name: tensor for p, tensor in zip(signature.tensors, tensors or (), strict=True)}
    exact = [p for p in signature.scalars if p.kind is not Kind.FLOAT]
    inputs |= {p.name: number for p, number in zip(exact, ints or (), strict=True)}
    inputs |= {p.name: bool(inputs[p.name]) for p in exact if p.kind is Kind.BOOL}
    floating = [p for p in signature.scalars if p.kind is Kind.FLOAT]
    inputs |= {p.name: number for p, number in zip(floating, floats or (), strict=True)}
    try:
        return signature.bind(q, k, v, q_offset, inputs)
    except Mismatch:
        raise refuse(signature, {"q": q, "k": k, "v": v}, q_offset, inputs) from None


def _wide(x: Tensor) -> torch.dtype:
    """The type that kernels compute in."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _attend(spec: str, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    variant = variant_of(spec)
    signature, kernels = variant.signature, variant.kernels
    with without_modes():
        o, total = kernels.forward(q, k, v, _bind(signature, q, k, v, *rest), True)
        return o, q.new_empty(0, dtype=_wide(q)) if total is None else total


def _attend_fake(spec: str, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    variant = variant_of(spec)
    signature, kernels = variant.signature, variant.kernels
    sizes = _bind(signature, q, k, v, *rest).sizes
    o = q.new_empty((sizes.B, sizes.H, sizes.M, sizes.E))
    divides = not isinstance(kernels.attention.normalizer, Elementwise)
    return o, q.new_empty((sizes.B, sizes.H, sizes.M) if divides else 0, dtype=_wide(q))


def _backward(spec: str, q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor] | None, *rest: Any) -> list[Tensor]:
    if torch.is_inference_mode_enabled():  # Autograd, which captured tensors go through, takes no tensors of this mode.
        with torch.inference_mode(mode=False):
            return _backward(spec, q, k, v, [tensor.clone() for tensor in tensors or ()], *rest)
    variant = variant_of(spec)
    signature, kernels = variant.signature, variant.kernels
    *numbers, o, total, do, dtotal, wanted = rest
    with without_modes():
        bound = _bind(signature, q, k, v, tensors, *numbers)
        sizes = bound.sizes
        divides = not isinstance(kernels.attention.normalizer, Elementwise)
        assert o.shape == do.shape == (sizes.B, sizes.H, sizes.M, sizes.E)
        assert not divides or all(x is None or x.shape == o.shape[:3] for x in (total, dtotal))
        names = tuple(name for name, is_wanted in zip(bound.tensors, wanted or (), strict=True) if is_wanted)
        with _recording():
            results = Results(o, total if divides else None, do, dtotal if divides else None)
            dq, dk, dv, captured = kernels.backward(q, k, v, bound, results, names)
        return [dq, dk, dv, *(captured[name] for name in names)]


def _backward_fake(spec: str, q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    del spec
    captured = [tensor for tensor, wanted in zip(tensors, rest[-1], strict=True) if wanted]
    return [x.new_empty(x.shape) for x in (q, k, v, *captured)]


def _recording() -> Any:
    """Within an operator, autograd is switched off for the thread below `torch.enable_grad`. Gradients of captured
    tensors go through PyTorch's own, so it is switched on again."""
    excluded = _C._dispatch_tls_local_exclude_set()
    for key in (
        _C.DispatchKey.AutogradFunctionality,
        _C.DispatchKey.AutogradOther,
        _C.DispatchKey.AutogradNestedTensor,
    ):
        excluded = excluded.remove(key)
    return _C._ForceDispatchKeyGuard(_C._dispatch_tls_local_include_set(), excluded)


# --- autograd -------------------------------------------------------------------------------------------------------

# `torch.func` has come down to one of its levels when it asks for an operator's autograd. `Function.apply` would start
# from the top again; its base class, which PyTorch makes its own levels of, goes on from there.


class _Attend(_SingleLevelFunction):
    @staticmethod
    def forward(
        ctx: Any, keys: Any, call: tuple[Any, ...], q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        spec, *numbers = call
        o, total = _below_autograd(ATTEND, keys, spec, q, k, v, list(tensors), *numbers)
        ctx.save_for_backward(q, k, v, o, total, *tensors)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return o, total

    @staticmethod
    def backward(  # type: ignore[override] - two results, two gradients
        ctx: Any, do: Tensor | None, dtotal: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, o, total, *tensors = ctx.saved_tensors
        spec, *numbers = ctx.call
        do = torch.zeros_like(o) if do is None else do
        wanted = list(ctx.needs_input_grad[5:])
        dq, dk, dv, *found = ATTEND_BACKWARD(spec, q, k, v, tensors, *numbers, o, total, do, dtotal, wanted)
        captured = iter(found)
        return None, None, dq, dk, dv, *(next(captured) if is_wanted else None for is_wanted in wanted)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        del tangents
        raise _no_derivative(ctx.call[0], "derivatives in forward mode")


class _Backward(_SingleLevelFunction):
    """The gradients, which have none themselves. They may be asked for with `create_graph=True`, as `torch.func.grad`
    always does; only whoever goes back through them is refused."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[[], list[Tensor]], spec: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        del inputs  # By them autograd knows what the gradients depend on.
        ctx.spec = spec
        return tuple(compute())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        del gradients
        raise _no_derivative(ctx.spec, "second derivatives")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        del tangents
        raise _no_derivative(ctx.spec, "derivatives in forward mode")


def _no_derivative(spec: str, kind: str) -> CallError:
    return CallError(NoDerivative(None, variant_of(spec).signature.attention.name, kind))


def _attend_autograd(
    keys: Any, spec: str, q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor] | None, *numbers: Any
) -> tuple[Tensor, Tensor]:
    with _at_one_level():
        apply: Any = _Attend.apply  # type: ignore[attr-defined] - left out of its stub
        return apply(keys, (spec, *numbers), q, k, v, *(tensors or ()))


def _backward_autograd(
    keys: Any, spec: str, q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor] | None, *rest: Any
) -> list[Tensor]:
    def compute() -> list[Tensor]:
        return _below_autograd(ATTEND_BACKWARD, keys, spec, q, k, v, tensors, *rest)

    if not torch.is_grad_enabled():
        return compute()
    results = [x for x in rest if isinstance(x, Tensor)]
    with _at_one_level():
        apply: Any = _Backward.apply  # type: ignore[attr-defined] - as above
        return list(apply(compute, spec, q, k, v, *(tensors or ()), *results))


def _below_autograd(operator: Any, keys: Any, *arguments: Any) -> Any:
    """The results of an operator at what comes after autograd: kernels, tracers, an outer level of `torch.func`."""
    with _C._AutoDispatchBelowAutograd():
        if not _C._are_functorch_transforms_active():
            return operator.redispatch(keys & _C._after_autograd_keyset, *arguments)
        # Recording is off within a `Function`; that of an outer level has to go on.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return operator.redispatch(keys & _C._after_autograd_keyset, *arguments)


def _at_one_level() -> contextlib.AbstractContextManager[None]:
    if _C._are_functorch_transforms_active():
        return enable_single_level_autograd_function()
    return contextlib.nullcontext()


# --- vmap -----------------------------------------------------------------------------------------------------------


def _attend_vmap(info: Any, axes: tuple[Any, ...], spec: str, *rest: Any) -> Any:
    attention = variant_of(spec).kernels.attention
    return vmap.attend(ATTEND, attention, info.batch_size, axes, spec, *rest)


def _backward_vmap(info: Any, axes: tuple[Any, ...], spec: str, *rest: Any) -> Any:
    attention = variant_of(spec).kernels.attention
    return vmap.attend_backward(ATTEND_BACKWARD, attention, info.batch_size, axes, spec, *rest)


# --- registration ---------------------------------------------------------------------------------------------------

_LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")
_LIBRARY.impl("attend", _attend_autograd, "Autograd", with_keyset=True)
torch.library.register_fake("attncc::attend", _attend_fake, lib=_LIBRARY)
_LIBRARY.impl("attend_backward", _backward, "CompositeExplicitAutograd")
_LIBRARY.impl("attend_backward", _backward_autograd, "Autograd", with_keyset=True)
torch.library.register_fake("attncc::attend_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_vmap("attncc::attend", _attend_vmap, lib=_LIBRARY)
torch.library.register_vmap("attncc::attend_backward", _backward_vmap, lib=_LIBRARY)
