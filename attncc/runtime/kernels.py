"""The programs of one attention: compiled when a call first asks for them, kept from then on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

from torch import Tensor

from attncc.ir.nodes import Attention
from attncc.ir.text import to_text
from attncc.plan.nodes import BackwardProgram, Program, Specialization, Target
from attncc.runtime import cache
from attncc.runtime.arguments import DTYPES, Bound
from attncc.runtime.backward import CompiledBackward, Results, compile_backward
from attncc.runtime.captured import captured_gradients
from attncc.runtime.programs import CompiledProgram, compile_program
from attncc.runtime.targets import default_target, resolve

# The plans, their sources, and that of the module that launches them.
Sources = tuple[Program, tuple[str, ...], str]
BackwardSources = tuple[BackwardProgram, tuple[str, ...]]


class MakeSources(Protocol):
    """Plans and renders the kernels of a specialization (`attncc.build`)."""

    def __call__(
        self, attention: Attention, specialization: Specialization, target: Target, templates: Sequence[Path], /
    ) -> Sources: ...


class MakeBackwardSources(Protocol):
    """The same for a backward pass; `wanted`: captured tensors whose gradients are asked for."""

    def __call__(
        self,
        attention: Attention,
        specialization: Specialization,
        target: Target,
        wanted: tuple[str, ...],
        templates: Sequence[Path],
        /,
    ) -> BackwardSources: ...


class Kernels:
    """Runs an attention and its backward pass on arguments that have been bound (`attncc.runtime.arguments`)."""

    def __init__(
        self,
        attention: Attention,
        target: str | None,
        templates: Sequence[Path],
        make_sources: MakeSources,
        make_backward_sources: MakeBackwardSources,
    ) -> None:
        self.attention = attention
        self.templates = tuple(templates)
        self.target = target
        self.built: dict[tuple[Specialization, Target], Sources] = {}
        self._make_sources = make_sources
        self._make_backward_sources = make_backward_sources
        self._forward: dict[object, CompiledProgram] = {}
        self._backward: dict[object, tuple[BackwardProgram, CompiledBackward]] = {}
        self._lock = threading.Lock()

    def of(self, attention: Attention) -> Kernels:
        """Kernels of another attention, made for the same target from the same templates."""
        return Kernels(attention, self.target, self.templates, self._make_sources, self._make_backward_sources)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bound: Bound, return_total: bool
    ) -> tuple[Tensor, Tensor | None]:
        """o (B, H, M, E) and, where asked for and there is one, what each row was divided by (B, H, M): its log for
        softmax, itself for `normalize = sum`."""
        sizes = bound.sizes
        key = (q.dtype, sizes.D, sizes.E, q.device, *[tensor.dtype for tensor in bound.tensors.values()])
        program = self._forward.get(key)
        if program is None:
            program = self._compile(key, q, bound)
        o, total, *_ = program.run(q, k, v, bound, return_total)
        return o, total

    def statistics(self, q: Tensor, k: Tensor, v: Tensor, bound: Bound) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For softmax: o and lse as `forward` gives them, the greatest score and the entropy of each row (B, H, M)."""
        sizes = bound.sizes
        key = ("statistics", q.dtype, sizes.D, sizes.E, q.device, *[x.dtype for x in bound.tensors.values()])
        program = self._forward.get(key) or self._compile(key, q, bound, statistics=True)
        o, lse, row_max, entropy = program.run(q, k, v, bound, True)
        assert lse is not None
        return o, lse, row_max, entropy

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bound: Bound,
        results: Results,
        wanted: tuple[str, ...],
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """dq, dk, dv, and the gradients of the captured tensors `wanted`, from those of what `forward` has returned."""
        sizes = bound.sizes
        key = (wanted, q.dtype, sizes.D, sizes.E, q.device, *[tensor.dtype for tensor in bound.tensors.values()])
        if key not in self._backward:
            self._compile_backward(key, q, bound, wanted)
        program, compiled = self._backward[key]
        found = compiled.run(q, k, v, bound, results)
        captured = captured_gradients(program, bound, found, results.total, wanted) if wanted else {}
        return found.dq, found.dk, found.dv, captured

    def sources(self, specialization: Specialization, target: Target | None = None) -> Sources:
        """The plans of one specialization, their sources, and that of the module that launches them; from the cache
        folder where they have been made before."""
        target = target or self._default_target()
        key = self._key("program", specialization, target)
        return cache.remember(key, lambda: self._make_sources(self.attention, specialization, target, self.templates))

    def backward_sources(
        self, specialization: Specialization, wanted: tuple[str, ...], target: Target | None = None
    ) -> BackwardSources:
        """The plans of a backward pass and their sources, likewise."""
        target = target or self._default_target()
        key = self._key("backward", specialization, target, wanted)
        make = self._make_backward_sources
        return cache.remember(key, lambda: make(self.attention, specialization, target, wanted, self.templates))

    def _key(self, *parts: object) -> str:
        files = cache.fingerprint(self.templates)
        return cache.key_of(*parts, cache.compiler_fingerprint(), to_text(self.attention), files)

    def _default_target(self) -> Target:
        return default_target(self.target, self.templates)

    def _compile(self, key: object, q: Tensor, bound: Bound, *, statistics: bool = False) -> CompiledProgram:
        specialization = replace(specialization_of(q, bound), statistics=statistics)
        with self._lock:
            if key not in self._forward:
                target = resolve(self.target, q.device, self.templates)
                sources = self.sources(specialization, target)
                self.built[specialization, target] = sources
                self._forward[key] = cache.in_folder(partial(compile_program, *sources))
            return self._forward[key]

    def _compile_backward(self, key: object, q: Tensor, bound: Bound, wanted: tuple[str, ...]) -> None:
        with self._lock:
            if key not in self._backward:
                target = resolve(self.target, q.device, self.templates)
                program, texts = self.backward_sources(specialization_of(q, bound), wanted, target)
                make: Callable[[Path], CompiledBackward] = partial(compile_backward, program, texts)
                self._backward[key] = program, cache.in_folder(make)


def specialization_of(q: Tensor, bound: Bound) -> Specialization:
    """What kernels are compiled for, of a call."""
    tensors = tuple((name, DTYPES[tensor.dtype]) for name, tensor in bound.tensors.items())
    return Specialization(DTYPES[q.dtype], bound.sizes.D, bound.sizes.E, tensors)
