"""Property tests of a user's own recurrence, as `attncc.verify` has them of pairwise attentions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor

from attncc.diagnostics import AttnError, BuildError, render
from attncc.error_rule import compare
from attncc.gradients import gradient_of_o
from attncc.ir.nodes import Load
from attncc.ir.recurrence import Recurrence
from attncc.ir.rewrite import walk
from attncc.passes.normal_form import NormalForm, normal_form
from attncc.recurrent_eager import plain_recurrence
from attncc.recurrent_inputs import recurrent_tensors
from attncc.recurrent_reference import evaluate
from attncc.reference import OutOfRange
from attncc.runtime.recurrent_arguments import sizes_of, state_shape
from attncc.runtime.refusals import reads_outside
from attncc.verify import DTYPES, WIDTHS, Failure, Report, scalar_values, search

# Called as a compiled recurrence with return_state=True is.
Kernel = Callable[..., tuple[Tensor, Tensor]]
# The reference takes one token after the other, each some milliseconds.
LONGEST = 80


@dataclass(frozen=True, slots=True)
class RecurrentCase:
    """Everything that a call is made from. heads: of q, k and v; queries: tokens of q, where they may differ from those
    of k and v; lengths: of packed sequences; resumed: there is an initial state."""

    batch: int
    heads: tuple[int, int, int]
    queries: int
    tokens: int
    widths: tuple[int, int]
    dtype: str
    seed: int
    scalars: Mapping[str, bool | int | float]
    lengths: tuple[int, ...] | None
    resumed: bool
    strided: bool

    def arguments(self, recurrence: Recurrence) -> dict[str, Any]:
        """The arguments of a call by name. Raises ValueError where the sizes leave a tensor no shape."""
        generator = torch.Generator().manual_seed(self.seed)
        width, width_v = self.widths
        counts = (self.queries, self.tokens, self.tokens)
        shapes = zip(self.heads, counts, (width, width, width_v), strict=True)
        q, k, v = (
            torch.randn((self.batch, heads, count, w), generator=generator).to(DTYPES[self.dtype])
            for heads, count, w in shapes
        )
        tensors = recurrent_tensors(recurrence, q, k, v, self.scalars, generator)
        if self.strided:
            # As a projection leaves them: (batch, token, head, width) in memory.
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        result: dict[str, Any] = {"q": q, "k": k, "v": v, **tensors, **self.scalars}
        if self.lengths is not None:
            result["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(self.lengths)])
        if self.resumed:
            sequences = self.batch if self.lengths is None else len(self.lengths)
            shape = state_shape(recurrence, sizes_of({"q": q, "k": k, "v": v}), sequences)
            wide = torch.promote_types(q.dtype, torch.float32)
            result["initial_state"] = torch.randn(shape, generator=generator, dtype=wide)
        return result


def verify_recurrent(
    recurrence: Recurrence,
    target: str,
    kernel: Kernel,
    *,
    dtypes: Sequence[str] = tuple(DTYPES),
    examples: int = 50,
    longest: int = LONGEST,
    seed: int = 0,
    scalars: Mapping[str, bool | int | float],
    gradients: bool = True,
    tick: Callable[[], object] = lambda: None,
) -> Report:
    """As `attncc.verify.verify`. At most `longest` tokens, nor more than `LONGEST`."""
    report = Report(target)
    strategies = [_cases(recurrence, dtype, min(longest, LONGEST), scalars) for dtype in dtypes]
    search(report, strategies, lambda case: _try(recurrence, kernel, case, report, gradients), examples, seed, tick)
    return report


@st.composite
def _cases(
    draw: st.DrawFn, recurrence: Recurrence, dtype: str, longest: int, scalars: Mapping[str, bool | int | float]
) -> RecurrentCase:
    """Calls of every kind: heads shared both ways, single tokens, tails of chunks, nothing, packed and resumed."""
    seed = draw(st.integers(0, 2**16))
    heads = draw(st.sampled_from([(1, 1, 1), (2, 2, 2), (4, 2, 2), (2, 2, 4), (1, 2, 4)]))
    lengths: tuple[int, ...] | None = None
    if not recurrence.bidirectional and draw(st.booleans()):
        lengths = tuple(draw(st.lists(st.integers(0, longest // 2), min_size=1, max_size=3)))
    tokens = draw(st.integers(0, longest)) if lengths is None else sum(lengths)
    return RecurrentCase(
        batch=draw(st.integers(1, 2)) if lengths is None else 1,
        heads=heads,
        queries=draw(st.integers(0, longest)) if recurrence.bidirectional else tokens,
        tokens=tokens,
        # By the seed, which takes many values: a choice of its own would come out the same in most of a few examples.
        widths=WIDTHS[seed % len(WIDTHS)],
        dtype=dtype,
        seed=seed,
        scalars={s.name: scalars.get(s.name, draw(scalar_values(s, tokens))) for s in recurrence.scalars},
        lengths=lengths,
        resumed=draw(st.booleans()),
        strided=draw(st.booleans()),
    )


def _try(
    recurrence: Recurrence, kernel: Kernel, case: RecurrentCase, report: Report, gradients: bool
) -> tuple[str, str] | None:
    """Which of the kernel's results is wrong, and what is wrong with it; None where nothing is."""
    try:
        arguments = case.arguments(recurrence)
    except ValueError:
        report.discarded += 1
        hypothesis.reject()
    try:
        _exact(recurrence, arguments)
    except OutOfRange as error:
        return "o", render(reads_outside(error))
    results: list[dict[str, Tensor]] = []
    for run, dtype in ((kernel, None), (_exact_of(recurrence), torch.float64), (_plain_of(recurrence), None)):
        try:
            results.append(_results(run, arguments, dtype, case.seed, gradients=gradients))
        except BuildError as error:
            return "o", f"no kernel can be made of it: {error}"
        except AttnError as error:
            diagnostic = error.diagnostics[0]
            report.refused.setdefault(diagnostic.code, diagnostic.fill(diagnostic.title))
            hypothesis.reject()
    report.tried[case.dtype] += 1
    largest = {"B": case.batch, "H": max(case.heads), "N": case.tokens, "D": case.widths[0], "E": case.widths[1]}
    for name, size in largest.items():
        report.largest[name] = max(report.largest.get(name, 0), size)
    found, exact, plain = results
    terms = _terms(recurrence, arguments, case.seed) if gradients else {}
    for name, result in found.items():
        if message := compare(name, result, exact[name], plain[name], terms=terms.get(name)):
            return name, message
    return None


def _terms(recurrence: Recurrence, arguments: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """What the gradients of decays are differences of: those of tensors that a decay is made of, where rows, states and
    what comes from above have no signs. A chunk has the gradient of a decay as sums of q dq less those of k dk."""
    form = normal_form(recurrence)
    if not isinstance(form, NormalForm):
        return {}
    of_decay = {node.tensor for node in walk(form.log_decay) if isinstance(node, Load)} - {"q", "k", "v"}
    rows = {n: arguments[n].abs() for n in ("q", "k", "v", "initial_state") if n in arguments}
    sized = _results(_exact_of(recurrence), {**arguments, **rows}, torch.float64, seed, gradients=True, unsigned=True)
    return {f"d{name}": sized[f"d{name}"] for name in of_decay if f"d{name}" in sized}


def _results(
    run: Kernel,
    arguments: Mapping[str, Any],
    dtype: torch.dtype | None,
    seed: int,
    *,
    gradients: bool,
    unsigned: bool = False,
) -> dict[str, Tensor]:
    """o, the state, and the gradient of every tensor of floats by the name `d…`. unsigned: what comes from above has no
    signs."""
    given = dict(arguments)
    leaves = {n: x for n, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}
    leaves = {n: x.detach().to(dtype or x.dtype).requires_grad_(gradients) for n, x in leaves.items()}
    o, state = run(**{**given, **leaves})
    results = {"o": o.detach(), "state": state.detach()}
    if not gradients:
        return results
    # What depends on nothing has no graph: a state of no tokens, say.
    outputs = [x for x in (o, state) if x.requires_grad]
    found: Sequence[Tensor] = [torch.zeros_like(leaf) for leaf in leaves.values()]
    if outputs:
        upstream = [gradient_of_o(x, seed) for x in outputs]
        upstream = [x.abs() for x in upstream] if unsigned else upstream
        found = torch.autograd.grad(outputs, list(leaves.values()), upstream, materialize_grads=True)
    return results | {f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}


def _exact_of(recurrence: Recurrence) -> Kernel:
    return lambda **arguments: _exact(recurrence, arguments)


def _plain_of(recurrence: Recurrence) -> Kernel:
    return lambda **arguments: plain_recurrence(recurrence, *_split(arguments))


def _exact(recurrence: Recurrence, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    q, k, v, inputs, state, offsets = _split(arguments)
    return evaluate(recurrence, q, k, v, inputs, state, 0, None if offsets is None else offsets.tolist())


def _split(
    arguments: Mapping[str, Any],
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any], Tensor | None, Tensor | None]:
    """q, k, v, the inputs of the specification, the initial state, and where packed sequences lie."""
    rest = dict(arguments)
    q, k, v, state, offsets = (rest.pop(name, None) for name in ("q", "k", "v", "initial_state", "cu_seqlens"))
    assert q is not None
    assert k is not None
    assert v is not None
    return q, k, v, rest, state, offsets


def recurrent_snippet(
    failure: Failure,
    spec: str,
    name: str | None,
    constants: Mapping[str, bool | int | float],
    templates: Sequence[str] = (),
    device: str = "cpu",
) -> str:
    """A program that computes what was wrong, and the same by the reference. device: where the kernel runs."""
    named = {"name": name, "templates": list(templates) or None, **constants}
    options = "".join(f", {key}={value!r}" for key, value in named.items() if value is not None)
    move = "" if device == "cpu" else f".to({device!r})"
    return f"""\
import torch

import attncc
from attncc.gradients import gradient_of_o
from attncc.verify_recurrent import RecurrentCase

attn = attncc.build({spec!r}{options}, target={failure.target!r})
case = {failure.case!r}
inputs = case.arguments(attn.attention)
inputs = {{n: x{move} if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}}
{_compared(failure)}
print(found, exact, sep="\\n")
print("off by", (found.double() - exact).abs().max().item())
"""


def _compared(failure: Failure) -> str:
    """Statements that assign `found` and `exact`: the result that was wrong, by the kernel and by the reference."""
    match failure.result:
        case "o" | "state":
            index = ("o", "state").index(failure.result)
            calls = (f"attn{method}(**inputs, return_state=True)[{index}]" for method in ("", ".reference"))
            return "found = {}\nexact = {}".format(*calls)
        case gradient:
            return f"""\
leaf = inputs[{gradient.removeprefix("d")!r}].requires_grad_()


def gradient_by(run):
    results = run(**inputs, return_state=True)
    upstream = [gradient_of_o(x, seed={failure.case.seed}) for x in results]
    return torch.autograd.grad(results, leaf, upstream, materialize_grads=True)[0]


found, exact = gradient_by(attn), gradient_by(attn.reference)"""
