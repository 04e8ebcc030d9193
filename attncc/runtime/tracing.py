"""Who looks at a call beside its kernels: autograd, tracers, transforms, modes, autocast.

Each question is a look at PyTorch's state of this thread and takes some 50 ns; together a twentieth of a tiny call.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from attncc.runtime.arguments import Bound
from attncc.runtime.recurrent_arguments import BoundRecurrence

P = ParamSpec("P")
R = TypeVar("R")

# Types whose elements lie in memory, where kernels may read them, unless a transform is active.
_PLAIN: frozenset[type] = frozenset((Tensor, Parameter))


def is_followed(q: Tensor, k: Tensor, v: Tensor, bound: Bound) -> bool:
    """Whether anything has to see this call as an operator of PyTorch rather than as what its kernels do to memory."""
    if _C._len_torch_function_stack() or not lies_in_memory(q, k, v, bound):  # default devices
        return True
    if not torch.is_grad_enabled():
        return False
    if q.requires_grad or k.requires_grad or v.requires_grad:
        return True
    for tensor in bound.tensors.values():  # noqa: SIM110 - `any` takes twice as long
        if tensor.requires_grad:
            return True
    return False


def lies_in_memory(q: Tensor, k: Tensor, v: Tensor, bound: Bound | BoundRecurrence) -> bool:
    """Whether the tensors are what they seem, and a kernel may read them."""
    if (
        is_dynamo_compiling()
        or _C._len_torch_dispatch_stack()  # FakeTensorMode, make_fx, counters of operations
        or _C._are_functorch_transforms_active()  # grad, vmap
        or _C._is_tracing()  # torch.jit.trace
        or forward_ad._current_level >= 0
        or type(q) not in _PLAIN
        or type(k) not in _PLAIN
        or type(v) not in _PLAIN
        or q.is_meta
    ):
        return False
    for tensor in bound.tensors.values():  # noqa: SIM110 - as above
        if type(tensor) not in _PLAIN:
            return False
    return True


def outside_dynamo(function: Callable[P, R]) -> Callable[P, R]:
    """`function` as one break of the graph under `torch.compile`, as `torch.compiler.disable` makes it; but without
    importing a compiler that nobody may ask for."""
    disabled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **keywords: P.kwargs) -> R:
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is None:
            return function(*args, **keywords)
        if not disabled:
            disabled.append(dynamo.disable(function))
        return disabled[0](*args, **keywords)

    call.__dict__["_torchdynamo_disable"] = True  # what Dynamo asks of a function before it follows it
    return call


def without_modes() -> Any:
    """A context in which `torch.empty` gives memory where a kernel wants it, whatever the default device."""
    return _C.DisableTorchFunction()


def cast_by_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as `torch.autocast` would hand them to scaled_dot_product_attention. Captured tensors stay in the type
    that the specification asks for."""
    if is_dynamo_compiling() or _C._is_any_autocast_enabled():
        return _cast(q), _cast(k), _cast(v)
    return q, k, v


def _cast(x: Any) -> Any:
    if not isinstance(x, Tensor):  # It will be refused.
        return x
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    if not x.is_floating_point() or x.dtype is torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))
