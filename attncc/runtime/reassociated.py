"""A pairwise attention whose weights separate, run as the recurrence that it is: in time linear in the length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from attncc.ir.nodes import Attention
from attncc.passes.normal_form import NormalForm, normal_form
from attncc.passes.reassociate import Refusal, recurrence_of
from attncc.passes.updates import update_form
from attncc.runtime.arguments import Bound
from attncc.runtime.decays import Decays
from attncc.runtime.recurrent_arguments import BoundRecurrence
from attncc.runtime.recurrent_kernels import RecurrentKernels
from attncc.runtime.tracing import lies_in_memory


class Reassociated:
    """The kernels of the recurrence that equals an attention wherever there are as many queries as keys, from position
    0 on."""

    def __init__(self, kernels: RecurrentKernels, decays: Decays) -> None:
        self.kernels = kernels
        self._decays = decays

    def takes(self, q: Tensor, k: Tensor, v: Tensor, bound: Bound) -> bool:
        """Whether a call is one of those, its decays have logarithms, and nothing but autograd looks at it."""
        sizes = bound.sizes
        if sizes.M != sizes.N or bound.q_offset != 0 or not lies_in_memory(q, k, v, bound):
            return False
        return self._decays.have_logarithms(q, k, v, bound)

    def run(self, q: Tensor, k: Tensor, v: Tensor, bound: Bound) -> Tensor:
        """o (B, H, M, E); differentiable."""
        at_zero = BoundRecurrence(
            bound.sizes, 0, bound.tensors, bound.scalars, None, None, exact_state=False, keeps_state=False
        )
        return self.kernels.run(q, k, v, at_zero)[0]


def reassociated(attention: Attention, target: str | None, templates: Sequence[Path]) -> Reassociated | None:
    """None where the weights do not separate."""
    recurrence = recurrence_of(attention)
    if isinstance(recurrence, Refusal):
        return None
    form = normal_form(recurrence)
    assert isinstance(form, NormalForm), "a recurrence made of weights is linear"
    kernels = RecurrentKernels(recurrence, update_form(form), target, templates)
    return Reassociated(kernels, Decays.of(recurrence, form.decay))
