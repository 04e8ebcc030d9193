"""A compiled recurrence: checks a call, picks its kernels, runs them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from attncc import recurrent_reference
from attncc.diagnostics import CallError
from attncc.explain_recurrence import explain_recurrence
from attncc.ir.recurrence import Recurrence
from attncc.passes.normal_form import Sequential, normal_form
from attncc.passes.updates import update_form
from attncc.plan.nodes import Specialization
from attncc.reference import OutOfRange
from attncc.runtime import refusals
from attncc.runtime.arguments import DTYPES, Signature, preferred_dtype, stored_dtype
from attncc.runtime.decays import Decays
from attncc.runtime.recurrent_arguments import BoundRecurrence, GivenToRecurrence, bind_recurrence
from attncc.runtime.recurrent_errors import RecurrenceNotTraced, WrongState
from attncc.runtime.recurrent_kernels import RecurrentKernels
from attncc.runtime.sequential import SequentialKernels
from attncc.runtime.targets import default_target
from attncc.runtime.tracing import cast_by_autocast, lies_in_memory, outside_dynamo


class RecurrentAttention:
    """An attention given as a recurrence. Made by `attncc.build`.

    attention: its IR. text: its specification. templates: folders of templates that come before the project's own.
    recipe: a text that `from_recipe` builds it from again.
    Kernels are compiled at the first call of each element type and widths; lengths, batch, heads and run-time scalars
    never compile anything.
    """

    def __init__(
        self,
        attention: Recurrence,
        text: str,
        target: str | None,
        templates: Sequence[Path],
        from_recipe: Callable[[str], object],
        recipe: str,
    ) -> None:
        self.attention = attention
        self.text = text
        self.target = target
        self.templates = tuple(templates)
        self.recipe = recipe
        self._from_recipe = from_recipe
        self._signature = Signature(attention)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._from_recipe, (self.recipe,)

    def __deepcopy__(self, _: object) -> RecurrentAttention:
        return self  # Copies of a module that holds it share its kernels.

    def __repr__(self) -> str:
        inputs = "".join(f", {p.name}" for p in self.attention.parameters)
        return f"<RecurrentAttention {self.attention.name}(q, k, v{', *' if inputs else ''}{inputs})>"

    @outside_dynamo
    def __call__(
        self,
        /,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *extra: Any,
        initial_state: Tensor | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        q_offset: int = 0,
        **inputs: Any,
    ) -> Any:
        """o (B, H, N, E), in their dtype, of q, k (B, heads, N, D) and v (B, heads, N, E). Differentiable.

        H is the greatest of the three numbers of heads; head h reads head h // (H // heads) of those that have fewer.
        initial_state: (B, H, D, E), where D is the width of the transformed keys, and with one more column where
        outputs are divided by a sum; 0 if not given. return_state: also the state after the last token, in f32 (f64
        beside f64). cu_seqlens: where each sequence begins that is packed along N, and the end of the last, a 1-D int
        tensor; B is 1 then, and states are (sequences, H, D, E). q_offset: the position of the first token, where row
        transforms read positions. inputs: the tensors and run-time scalars of the specification.

        Raises CallError for arguments that do not fit, BuildError where no kernel can be made of it here.
        """
        q, k, v = cast_by_autocast(q, k, v)
        bound = self._bound(extra, GivenToRecurrence(q, k, v, initial_state, cu_seqlens, q_offset, inputs))
        _refuse_tracing(q, k, v, bound)
        o, state = self._run(q, k, v, bound._replace(exact_state=return_state))
        return (o, state) if return_state else o

    @outside_dynamo
    def step(
        self, /, q: Tensor, k: Tensor, v: Tensor, *extra: Any, state: Tensor, q_offset: int = 0, **inputs: Any
    ) -> Tensor:
        """o (B, H, N, E) of the next token (N = 1), or the next few; `state` (B, H, D, E) becomes what they leave.

        Arguments as at a call; q_offset is the number of tokens before these. Nothing of it is differentiable. Raises
        CallError for arguments that do not fit, and for a state that cannot be written to.
        """
        q, k, v = cast_by_autocast(q, k, v)
        if not _is_state(state):
            raise CallError(*refusals.kind_reasons({"state": state}, {"state": "(B, H, D, E)"}))
        bound = self._bound(extra, GivenToRecurrence(q, k, v, state, None, q_offset, inputs, "state"))
        _refuse_tracing(q, k, v, bound)
        reason = _not_in_place(self.attention, state, q)
        if reason:
            raise CallError(WrongState(None, reason))
        with torch.no_grad():
            kernels = self.kernels if self._have_logarithms(q, k, v, bound) else self._token_by_token
            return kernels.step(q, k, v, bound, state)

    def reference(
        self,
        /,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *extra: Any,
        initial_state: Tensor | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        q_offset: int = 0,
        **inputs: Any,
    ) -> Any:
        """The statements in float64, token by token: the oracle. Arguments and results as for a call.

        Raises CallError for arguments that do not fit, and where a token reads outside a captured tensor.
        """
        bound = self._bound(extra, GivenToRecurrence(q, k, v, initial_state, cu_seqlens, q_offset, inputs))
        offsets = None if bound.offsets is None else bound.offsets.tolist()
        try:
            o, state = recurrent_reference.evaluate(
                self.attention, q, k, v, bound.inputs, bound.initial_state, bound.q_offset, offsets
            )
        except OutOfRange as error:
            raise CallError(refusals.reads_outside(error)) from error
        return (o, state) if return_state else o

    def source(
        self, *, dtype: torch.dtype = torch.float32, head_dim: int = 64, head_dim_v: int | None = None
    ) -> dict[str, str]:
        """The source of each kernel by its name: of all forward kernels that have been compiled so far, or else for
        these types. Nothing where every query reads all tokens and PyTorch takes two products of matrices."""
        tensors = tuple((p.name, stored_dtype(p, preferred_dtype(p))) for p in self.attention.tensors)
        specialization = Specialization(DTYPES[dtype], head_dim, head_dim_v or head_dim, tensors)
        target = default_target(self.target, self.templates)
        built = (*self.kernels.built_sources(), *self._token_by_token.built_sources())
        kernels = built or self.kernels.sources(specialization, target)
        return {plan.name: text for plan, text in kernels}

    def explain(self) -> str:
        """The statements as they were understood, the normal form that they were brought to, and the kernel."""
        return explain_recurrence(self.text, self.attention)

    @functools.cached_property
    def kernels(self) -> RecurrentKernels | SequentialKernels:
        """What calls run on: chunks of tokens where there is a normal form, else token by token."""
        form = normal_form(self.attention)
        if isinstance(form, Sequential):
            return self._token_by_token
        return RecurrentKernels(self.attention, update_form(form), self.target, self.templates)

    @functools.cached_property
    def _token_by_token(self) -> SequentialKernels:
        return SequentialKernels(self.attention, self.target, self.templates)

    @functools.cached_property
    def _decays(self) -> Decays | None:
        """Where there is a normal form."""
        form = normal_form(self.attention)
        return None if isinstance(form, Sequential) else Decays.of(self.attention, form.decay)

    def _have_logarithms(self, q: Tensor, k: Tensor, v: Tensor, bound: BoundRecurrence) -> bool:
        return self._decays is None or self._decays.have_logarithms(q, k, v, bound)

    def _run(self, q: Tensor, k: Tensor, v: Tensor, bound: BoundRecurrence) -> tuple[Tensor, Tensor]:
        """o and the last state: by chunks of tokens where the decays have logarithms, else token by token."""
        if self._decays is None or not self._decays.logged:
            return self.kernels.run(q, k, v, bound._replace(keeps_state=bound.exact_state))
        if not self._decays.are_followed(q, k, v, bound):
            # Whatever has no logarithm leaves a NaN in the state, which stays there. To look for one takes less time
            # than to look at the decays of all tokens.
            o, state = self.kernels.run(q, k, v, bound)
            if not math.isnan(state.detach().sum().item()) or self._have_logarithms(q, k, v, bound):
                return o, state
        elif self._have_logarithms(q, k, v, bound):
            return self.kernels.run(q, k, v, bound)
        return self._token_by_token.run(q, k, v, bound)

    def _bound(self, extra: Sequence[Any], given: GivenToRecurrence) -> BoundRecurrence:
        if extra:
            raise refusals.by_position(self._signature, extra, given.inputs)
        return bind_recurrence(self._signature, given)


def _refuse_tracing(q: Tensor, k: Tensor, v: Tensor, bound: BoundRecurrence) -> None:
    """Raises CallError where kernels would be handed what has no memory, or what they write would be lost on those
    that look on. torch.compile breaks its graph here, and runs what follows as it is."""
    if not is_dynamo_compiling() and not lies_in_memory(q, k, v, bound):
        raise CallError(RecurrenceNotTraced(None))


def _is_state(value: Any) -> bool:
    return isinstance(value, Tensor) and refusals.is_dense(value) and value.dim() == 4


def _not_in_place(recurrence: Recurrence, state: Tensor, q: Tensor) -> str:
    """Why kernels cannot write to `state`; empty where they can."""
    wanted = torch.promote_types(q.dtype, torch.float32)
    if recurrence.bidirectional:
        return "every query reads what all tokens have left, so there is no next token"
    if state.dtype is not wanted:
        return f"its type is {refusals.short(state.dtype)}, and that of the kernel's states {refusals.short(wanted)}"
    if not state.is_contiguous():
        return "it is not contiguous"
    if state.is_neg():
        return "it is a negation that PyTorch has put off; pass state.resolve_neg()"
    if state.requires_grad:
        return "autograd follows it; pass state.detach()"
    return ""
