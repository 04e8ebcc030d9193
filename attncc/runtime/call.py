"""A compiled attention: checks a call, picks its kernels, runs them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attncc import reference
from attncc.diagnostics import CallError
from attncc.eager import running_sums
from attncc.explain import explain
from attncc.ir.nodes import Attention, Elementwise, Sum
from attncc.passes.columns import column_sums
from attncc.passes.dropout import with_dropout
from attncc.plan.nodes import Specialization, Target
from attncc.runtime.arguments import DTYPES, Bound, Mismatch, Signature, preferred_dtype, stored_dtype
from attncc.runtime.dropout import bind_dropout, recipe_with_dropout
from attncc.runtime.errors import NoLse, NotTraced
from attncc.runtime.kernels import Kernels, MakeBackwardSources, MakeSources, Sources
from attncc.runtime.operator import Variant, attend, register
from attncc.runtime.reassociated import reassociated
from attncc.runtime.refusals import by_position, reads_outside, refuse
from attncc.runtime.statistics import bind_statistics, of_columns
from attncc.runtime.tracing import cast_by_autocast, is_followed, lies_in_memory, without_modes


class CompiledAttention:
    """An attention variant that can be called. Made by `attncc.build`.

    attention: its IR. text: its specification. templates: folders of templates that come before the project's own.
    recipe: a text that it can be built from again (`attncc.runtime.operator`).
    Kernels are compiled at the first call of each combination of element types and head dimensions; lengths, batch,
    heads and run-time scalars never compile anything.
    """

    def __init__(
        self,
        attention: Attention,
        text: str,
        target: str | None,
        templates: Sequence[Path],
        make_sources: MakeSources,
        make_backward_sources: MakeBackwardSources,
        from_recipe: Callable[[str], object],
        recipe: str,
    ) -> None:
        self.attention = attention
        self.text = text
        self.recipe = recipe
        self._from_recipe = from_recipe
        self._recipe_with_dropout = recipe_with_dropout(recipe)
        self.templates = tuple(templates)
        self._signature = Signature(attention)
        self.kernels = Kernels(attention, target, templates, make_sources, make_backward_sources)
        self.variant = Variant(self._signature, self.kernels)
        register(recipe, self.variant)
        self._sums = any(p.summed is not None for p in attention.tensors)
        self._linear = reassociated(attention, target, templates)
        self._has_lse = not isinstance(attention.normalizer, Elementwise)
        self._divides_by_sum = isinstance(attention.normalizer, Sum)

    def __repr__(self) -> str:
        defaults = self._signature.defaults
        inputs = [f"{p.name}={defaults[p.name]}" if p.name in defaults else p.name for p in self.attention.parameters]
        arguments = ", ".join(["q, k, v", *(["*", *inputs] if inputs else [])])
        target = "the device of q" if self.kernels.target is None else self.kernels.target
        return f"<CompiledAttention {self.attention.name}({arguments}) for {target}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return self._from_recipe, (self.recipe,)

    def __deepcopy__(self, _: object) -> CompiledAttention:
        return self  # Copies of a module that holds it share its kernels.

    def __call__(
        self,
        /,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *extra: Any,
        q_offset: int | None = None,
        return_lse: bool = False,
        dropout_p: float = 0.0,
        seed: int | None = None,
        stats: Sequence[str] = (),
        **inputs: Any,
    ) -> Any:
        """Attention of q (B, H, M, D) over k (B, HKV, N, D) and v (B, HKV, N, E): o (B, H, M, E) in their dtype.

        inputs: the tensors and run-time scalars of the specification. q_offset: the position of query row 0; N - M if
        not given. return_lse: also the natural logarithm of what each row's weights were divided by, (B, H, M), f32
        (f64 for f64). dropout_p: the probability that a weight is dropped, by the random numbers of `seed`; without one
        it is drawn from PyTorch's generator. stats: last of all a dictionary of what it names: "max", the greatest
        score of each row, and "entropy" of its weights (B, H, M), "column_sums" of all weights (B, H, N).

        Raises CallError for arguments that do not fit, BuildError where no kernel can be made of it here.
        """
        if extra:
            raise by_position(self._signature, extra, inputs)
        q, k, v = cast_by_autocast(q, k, v)
        try:
            bound = self._signature.bind(q, k, v, q_offset, inputs)
        except Mismatch:
            raise refuse(self._signature, {"q": q, "k": k, "v": v}, q_offset, inputs) from None
        if return_lse and not self._has_lse:
            raise CallError(NoLse(None, self.attention.name))
        given = bound
        if self._sums:
            bound = bound._replace(tensors={**bound.tensors, **running_sums(self.attention, bound.tensors)})
        drops, recipe = False, self.recipe
        if (type(dropout_p) is not float or dropout_p != 0.0) and (drawn := bind_dropout(dropout_p, seed)):
            drops, recipe = True, self._recipe_with_dropout
            bound = bound._replace(scalars={**bound.scalars, **drawn})
        if stats:
            return self._with_statistics(drops, q, k, v, bound, return_lse, stats)
        if self._linear is not None and not (return_lse or drops) and self._linear.takes(q, k, v, given):
            return self._linear.run(q, k, v, given)  # It sums by its state what pairs read the running sums of.
        if is_followed(q, k, v, bound):
            o, lse = attend(recipe, q, k, v, bound)
        else:
            kernels = self.dropped.kernels if drops else self.kernels
            o, lse = kernels.forward(q, k, v, bound, return_lse)
        if not return_lse:
            return o
        # A kernel of `normalize = sum` gives the sum itself.
        return o, lse.log() if self._divides_by_sum and lse is not None else lse

    def _with_statistics(
        self,
        drops: bool,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bound: Bound,
        return_lse: bool,
        stats: Sequence[str],
    ) -> Any:
        """What a call returns that asks for statistics."""
        names = bind_statistics(self.attention, stats)
        if not lies_in_memory(q, k, v, bound):
            raise CallError(NotTraced(None))
        kernels = self.dropped.kernels if drops else self.kernels
        of_rows = "max" in names or "entropy" in names
        result: tuple[Tensor, Tensor | None] | None = None
        if is_followed(q, k, v, bound):
            result = attend(self._recipe_with_dropout if drops else self.recipe, q, k, v, bound)
        found: dict[str, Tensor] = {}
        with torch.no_grad(), without_modes():
            if of_rows:
                o, lse, found["max"], found["entropy"] = kernels.statistics(q, k, v, bound)
                result = result or (o, lse)
            result = result or kernels.forward(q, k, v, bound, True)
            o, lse = result
            if "column_sums" in names:
                assert lse is not None
                found["column_sums"] = of_columns(self._columns, q, k, bound, lse)
        statistics = {name: found[name] for name in names}
        return (o, lse, statistics) if return_lse else (o, statistics)

    @functools.cached_property
    def dropped(self) -> Variant:
        """The same with dropout."""
        attention = with_dropout(self.attention)
        variant = Variant(Signature(attention), self.kernels.of(attention))
        register(self._recipe_with_dropout, variant)
        return variant

    @functools.cached_property
    def _columns(self) -> Kernels:
        return self.kernels.of(column_sums(self.attention))

    def reference(
        self,
        /,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *extra: Any,
        q_offset: int | None = None,
        return_lse: bool = False,
        dropout_p: float = 0.0,
        seed: int | None = None,
        **inputs: Any,
    ) -> Any:
        """The same in float64, interpreted: the oracle. Arguments as for a call; memory is quadratic.

        Raises CallError for arguments that do not fit, and where a kept pair reads outside a captured tensor.
        """
        if extra:
            raise by_position(self._signature, extra, inputs)
        try:
            bound = self._signature.bind(q, k, v, q_offset, inputs)
        except Mismatch:
            raise refuse(self._signature, {"q": q, "k": k, "v": v}, q_offset, inputs) from None
        if return_lse and not self._has_lse:
            raise CallError(NoLse(None, self.attention.name))
        attention = self.attention
        if (type(dropout_p) is not float or dropout_p != 0.0) and (drawn := bind_dropout(dropout_p, seed)):
            attention = with_dropout(attention)
            bound = bound._replace(scalars={**bound.scalars, **drawn})
        try:
            o, lse = reference.evaluate(attention, q, k, v, bound.inputs, bound.q_offset)
        except reference.OutOfRange as error:
            raise CallError(reads_outside(error)) from error
        return (o, lse) if return_lse else o

    def source(
        self, *, dtype: torch.dtype = torch.float32, head_dim: int = 64, head_dim_v: int | None = None
    ) -> dict[str, str]:
        """The source of each kernel by its name: of all that have been compiled so far, or else for these types."""
        built = list(self.kernels.built.values()) or [self.sources(self._specialization(dtype, head_dim, head_dim_v))]
        return {
            plan.name: text for program, texts, _ in built for plan, text in zip(program.kernels, texts, strict=True)
        }

    def explain(self, *, dtype: torch.dtype = torch.float32, head_dim: int = 64, head_dim_v: int | None = None) -> str:
        """What was derived from the specification, what was chosen, and why not something else; with the plan of the
        last program that was compiled, or else for these types."""
        built = list(self.kernels.built.values()) or [self.sources(self._specialization(dtype, head_dim, head_dim_v))]
        return explain(self.text, self.attention, built[-1][0])

    def sources(self, specialization: Specialization, target: Target | None = None) -> Sources:
        """The plans of one specialization, their sources, and that of the module that launches them; from the cache
        folder where they have been made before."""
        return self.kernels.sources(specialization, target)

    def _specialization(self, dtype: torch.dtype, head_dim: int, head_dim_v: int | None) -> Specialization:
        tensors = tuple((p.name, stored_dtype(p, preferred_dtype(p))) for p in self.attention.tensors)
        return Specialization(DTYPES[dtype], head_dim, head_dim_v or head_dim, tensors)
