"""Runs an Attention on the C++ target, for the tests of that target."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attncc.build import backward_sources_of, sources_of
from attncc.ir.nodes import (
    Apply,
    Attention,
    Constant,
    Expr,
    Hole,
    Index,
    Normalizer,
    ScalarParameter,
    Softmax,
    Sum,
    TensorParameter,
    identity_row,
)
from attncc.plan.nodes import BackwardProgram, Specialization, Target
from attncc.runtime import cache
from attncc.runtime.arguments import DTYPES, Bound, Signature
from attncc.runtime.backward import CompiledBackward, Results, compile_backward
from attncc.runtime.captured import captured_gradients
from attncc.runtime.cpp_toolchain import ARCHS, native_arch
from attncc.runtime.programs import CompiledProgram, compile_program

# Those that this machine runs, widest first.
NATIVE_ARCHS = ARCHS[ARCHS.index(native_arch()) :]

Q, KV, H, B = Index("q_idx"), Index("kv_idx"), Index("h"), Index("b")
CAUSAL = Apply("ge", (Q, KV))


def op(name: str, *args: Expr | float) -> Apply:
    """An operator applied to expressions and literals."""
    return Apply(name, tuple(Constant(arg) if isinstance(arg, bool | int | float) else arg for arg in args))


QK, EVERYTHING, SOFTMAX = Hole("qk"), Constant(True), Softmax()


def attention(
    score: Expr = QK,
    mask: Expr = EVERYTHING,
    normalizer: Normalizer = SOFTMAX,
    parameters: tuple[ScalarParameter | TensorParameter, ...] = (),
    scale: float = 0.125,
) -> Attention:
    """An attention with untransformed rows."""
    q, k, v = (identity_row(row) for row in ("q", "k", "v"))
    return Attention("spec", "", parameters, q, k, v, Constant(scale), score, mask, normalizer)


_programs: dict[object, CompiledProgram] = {}


def run(
    spec: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Tensor | bool | float] | None = None,
    q_offset: int | None = None,
    arch: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """o and lse of the C++ kernels of `spec`."""
    bound = bind(spec, q, k, v, inputs, q_offset)
    tensors = tuple((p.name, DTYPES[bound.tensors[p.name].dtype]) for p in spec.tensors)
    specialization = Specialization(DTYPES[q.dtype], q.shape[3], v.shape[3], tensors)
    key = (spec, specialization, arch)
    if key not in _programs:
        sources = sources_of(spec, specialization, Target("cpp", arch or native_arch()))
        _programs[key] = compile_program(*sources, cache.folder())
    o, total = _programs[key].run(q, k, v, bound, return_total=True)
    return o, total.log() if isinstance(spec.normalizer, Sum) and total is not None else total


def bind(
    spec: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Tensor | bool | float] | None,
    q_offset: int | None,
) -> Bound:
    return Signature(spec).bind(q, k, v, q_offset, inputs or {})


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


_backward: dict[object, tuple[BackwardProgram, CompiledBackward]] = {}


def run_backward(
    spec: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    dlse: Tensor | None = None,
    inputs: Mapping[str, Tensor | bool | float] | None = None,
    q_offset: int | None = None,
    arch: str | None = None,
) -> dict[str, Tensor]:
    """The gradients of q, k, v and of captured tensors of floats by the C++ kernels of `spec`, where `do` and `dlse`
    are those of o and lse."""
    o, lse = run(spec, q, k, v, inputs, q_offset, arch)
    total, dtotal = lse, dlse
    if isinstance(spec.normalizer, Sum) and lse is not None:
        total = lse.exp()
        dtotal = None if dlse is None else (dlse / total).where(total != 0, 0.0)
    bound = bind(spec, q, k, v, inputs, q_offset)
    wanted = tuple(name for name, tensor in bound.tensors.items() if tensor.is_floating_point())
    tensors = tuple((p.name, DTYPES[bound.tensors[p.name].dtype]) for p in spec.tensors)
    specialization = Specialization(DTYPES[q.dtype], q.shape[3], v.shape[3], tensors)
    key = (spec, specialization, arch)
    if key not in _backward:
        program, sources = backward_sources_of(spec, specialization, Target("cpp", arch or native_arch()), wanted)
        _backward[key] = program, compile_backward(program, sources, cache.folder())
    program, compiled = _backward[key]
    found = compiled.run(q, k, v, bound, Results(o, total, do, dtotal))
    captured = captured_gradients(program, bound, found, total, wanted)
    return {"q": found.dq, "k": found.dk, "v": found.dv, **captured}
