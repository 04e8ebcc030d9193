"""Property tests of a user's own specification: its kernels on every backend at hand, against the reference.

Hypothesis draws shapes, types, scalars and inputs; what fails is shrunk to a case as small as it can be, and printed
as a snippet that runs.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

import hypothesis
import torch
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from torch import Tensor

from attncc.diagnostics import AttnError, BuildError, render
from attncc.eager import eager
from attncc.error_rule import compare
from attncc.gradients import wrong_gradient
from attncc.inputs import captured_tensors, operands
from attncc.ir.nodes import Attention, Load, ScalarParameter
from attncc.ir.rewrite import walk
from attncc.ir.types import Kind
from attncc.reference import OutOfRange, evaluate
from attncc.runtime.arguments import Sizes
from attncc.runtime.refusals import reads_outside

DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f64": torch.float64,
}

# A kernel is compiled per type and pair of widths: few of them, and no two of a kind (small, odd and unequal, usual).
WIDTHS = ((8, 8), (7, 5), (64, 64))
# Wide ones take longest to compile: in the types that models run in.
WIDE = {"f32": ((80, 96), (128, 128)), "bf16": ((80, 96), (128, 128))}

_KERNEL = Callable[..., tuple[Tensor, Tensor | None]]
AnyCase = TypeVar("AnyCase")


@dataclass(frozen=True, slots=True)
class Case:
    """Everything that a call is made from."""

    sizes: Sizes
    dtype: str
    seed: int
    scalars: Mapping[str, bool | int | float]
    q_offset: int | None
    strided: bool

    def arguments(self, attention: Attention) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """q, k, v and the captured tensors. Raises ValueError where the sizes leave a tensor no shape."""
        generator = torch.Generator().manual_seed(self.seed)
        dtype = DTYPES[self.dtype]
        q, k, v = operands(self.sizes, dtype, generator)
        tensors = captured_tensors(attention, self.sizes, dtype, generator, document_length=8)
        if self.strided:
            # As a projection leaves them: (batch, token, head, width) in memory.
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        return q, k, v, tensors


@dataclass(frozen=True, slots=True)
class Failure:
    """A case that went wrong, as small as it could be made. result: o, lse, or what has a wrong gradient: `dq`, say."""

    target: str
    case: Any
    result: str
    message: str


@dataclass(slots=True)
class Report:
    """What was tried on one target. `refused`: what the compiler or the call would not take, and why."""

    target: str
    tried: Counter[str] = field(default_factory=Counter[str])
    largest: dict[str, int] = field(default_factory=dict[str, int])
    discarded: int = 0
    refused: dict[str, str] = field(default_factory=dict[str, str])
    failure: Failure | None = None


def verify(
    attention: Attention,
    target: str,
    kernel: _KERNEL,
    *,
    dtypes: Sequence[str] = tuple(DTYPES),
    examples: int = 50,
    longest: int = 300,
    seed: int = 0,
    scalars: Mapping[str, bool | int | float] = MappingProxyType({}),
    gradients: bool = True,
    tick: Callable[[], object] = lambda: None,
) -> Report:
    """Tries `kernel` (called as a compiled attention with return_lse=True is, returning o and lse or None), and its
    gradients if they are asked for.

    The examples are shared out among the types; the first type that fails ends it. At most `longest` keys. Run-time
    scalars are drawn, but for those in `scalars`. `tick` is called once per example; shrinking calls it too.
    """
    report = Report(target)
    strategies = [cases(attention, dtype, longest, scalars) for dtype in dtypes]
    search(report, strategies, lambda case: _try(attention, kernel, case, report, gradients), examples, seed, tick)
    return report


def search(
    report: Report,
    strategies: Sequence[st.SearchStrategy[AnyCase]],
    attempt: Callable[[AnyCase], tuple[str, str] | None],
    examples: int,
    seed: int,
    tick: Callable[[], object],
) -> None:
    """Tries cases of each strategy in turn, which share the examples, up to the first that has one that fails.

    attempt: which result of a case is wrong, and what is wrong with it; None where nothing is.
    """
    for i, drawn in enumerate(strategies):
        share = examples // len(strategies) + (i < examples % len(strategies))
        if share and report.failure is None:
            _search(report, drawn, attempt, share, seed, tick)


def _search(
    report: Report,
    drawn: st.SearchStrategy[AnyCase],
    attempt: Callable[[AnyCase], tuple[str, str] | None],
    examples: int,
    seed: int,
    tick: Callable[[], object],
) -> None:
    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large],
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        verbosity=hypothesis.Verbosity.quiet,
    )
    @hypothesis.given(drawn)
    def holds(case: AnyCase) -> None:
        tick()
        wrong = attempt(case)
        if wrong is not None:
            # The last one to fail is the smallest.
            report.failure = Failure(report.target, case, *wrong)
            raise _CaseFailed

    # Where every case was refused or discarded, the report says so.
    with contextlib.suppress(_CaseFailed, Unsatisfiable):
        holds()


class _CaseFailed(Exception):
    """Tells hypothesis that a case failed."""


def _try(attention: Attention, kernel: _KERNEL, case: Case, report: Report, gradients: bool) -> tuple[str, str] | None:
    """Which of the kernel's results is wrong, and what is wrong with it; None where nothing is."""
    try:
        q, k, v, tensors = case.arguments(attention)
    except ValueError:
        report.discarded += 1
        hypothesis.reject()
    inputs = {**tensors, **case.scalars}
    try:
        oracle = evaluate(attention, q, k, v, inputs, case.q_offset)
    except OutOfRange as error:
        if _is_due_to_inputs(error, attention, case):
            report.discarded += 1
            hypothesis.reject()
        return "o", render(reads_outside(error))
    try:
        o, lse = kernel(q, k, v, q_offset=case.q_offset, **inputs)
    except BuildError as error:
        return "o", f"no kernel can be made of it: {error}"
    except AttnError as error:
        diagnostic = error.diagnostics[0]
        report.refused.setdefault(diagnostic.code, f"{diagnostic.fill(diagnostic.title)} ({_sizes_text(case)})")
        hypothesis.reject()
    report.tried[case.dtype] += 1
    for name in ("B", "H", "HKV", "M", "N", "D", "E"):
        report.largest[name] = max(report.largest.get(name, 0), getattr(case.sizes, name))
    floating = torch.promote_types(q.dtype, torch.float32)
    wide = {
        name: x.to(floating) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()
    }
    plain = eager(attention, q, k, v, wide, case.q_offset)
    if message := compare("o", o, oracle[0], plain):
        return "o", message
    if lse is not None and oracle[1] is not None:
        # The plain formula's lse has the rounding of its scores, of which a kernel makes none.
        rounded = evaluate(attention, q, k, v, inputs, case.q_offset, rounded_rows=True)[1]
        assert rounded is not None
        if message := compare("lse", lse, oracle[1], oracle[1].to(q.dtype), rounded):
            return "lse", message
    if not gradients:
        return None
    wrong = wrong_gradient(
        attention, lambda *args, **keywords: kernel(*args, **keywords)[0], q, k, v, inputs, case.q_offset, case.seed
    )
    return None if wrong is None else (f"d{wrong[0]}", wrong[1])


@st.composite
def cases(
    draw: st.DrawFn, attention: Attention, dtype: str, longest: int, scalars: Mapping[str, bool | int | float]
) -> Case:
    """Calls of every kind: grouped heads, decoding, lengths that no tile divides, empty ones, strided operands."""
    heads_kv = draw(st.integers(1, 2))
    keys = draw(st.one_of(st.integers(0, 40), st.integers(0, longest)))
    rows = draw(st.one_of(st.just(keys), st.integers(0, keys), st.integers(0, longest)))
    seed = draw(st.integers(0, 2**16))
    # By the seed, which takes many values: a choice of its own would come out the same in most of a few examples.
    widths = (*WIDTHS, *WIDE.get(dtype, ()))
    width_qk, width_v = widths[seed % len(widths)]
    sizes = Sizes(
        B=draw(st.integers(1, 2)),
        H=heads_kv * draw(st.integers(1, 3)),
        HKV=heads_kv,
        M=rows,
        N=keys,
        D=width_qk,
        E=width_v,
    )
    return Case(
        sizes,
        dtype=dtype,
        seed=seed,
        scalars={s.name: scalars.get(s.name, draw(scalar_values(s, keys))) for s in attention.scalars},
        q_offset=draw(st.one_of(st.none(), st.integers(0, max(keys - rows, 0)))),
        strided=draw(st.booleans()),
    )


def scalar_values(scalar: ScalarParameter, keys: int) -> st.SearchStrategy[bool | int | float]:
    """The default, and values of the size that lengths here have: windows and blocks then have edges to get wrong."""
    match scalar.kind:
        case Kind.BOOL:
            return st.booleans()
        case Kind.INT:
            near = st.integers(1, max(keys, 1) + 2)
            return near if scalar.default is None else st.one_of(near, st.just(scalar.default))
        case Kind.FLOAT:
            near = st.sampled_from([0.5, 1.0, 2.0, 30.0])
            return near if scalar.default is None else st.one_of(st.just(scalar.default), near)


def _is_due_to_inputs(error: OutOfRange, attention: Attention, case: Case) -> bool:
    """Whether a read outside a tensor says nothing about the specification: there are more queries than keys, so that
    positions are negative, or an index is itself read from a tensor that was made up."""
    if case.sizes.M + (case.q_offset or 0) > case.sizes.N:
        return True
    roots = (attention.q, attention.k, attention.v, attention.scale, attention.score, attention.mask)
    loads = [node for root in roots for node in walk(root) if isinstance(node, Load) and node.tensor == error.tensor]
    return any(isinstance(node, Load) for load in loads for index in load.indices for node in walk(index))


def snippet(
    failure: Failure,
    spec: str,
    name: str | None,
    constants: Mapping[str, bool | int | float],
    templates: Sequence[str] = (),
    device: str = "cpu",
) -> str:
    """A program that computes what was wrong, and the same by the reference. device: where the kernel runs."""
    case = failure.case
    named = {"name": name, "templates": list(templates) or None, **constants}
    options = "".join(f", {key}={value!r}" for key, value in named.items() if value is not None)
    scalars = {**case.scalars, **({} if case.q_offset is None else {"q_offset": case.q_offset})}
    numbers = f"inputs |= {scalars!r}\n" if scalars else ""
    move = "" if device == "cpu" else f"inputs = {{name: x.to({device!r}) for name, x in inputs.items()}}\n"
    return f"""\
import torch

import attncc
from attncc.gradients import gradient_of_o
from attncc.runtime.arguments import Sizes
from attncc.verify import Case

attn = attncc.build({spec!r}{options}, target={failure.target!r})
case = Case({case.sizes}, {case.dtype!r}, seed={case.seed}, scalars={{}}, q_offset=None, strided={case.strided})
q, k, v, tensors = case.arguments(attn.attention)
inputs = {{"q": q, "k": k, "v": v, **tensors}}
{move}{numbers}{_compared(failure)}
print(found, exact, sep="\\n")
print("off by", (found.double() - exact).abs().max().item())
"""


def _compared(failure: Failure) -> str:
    """Statements that assign `found` and `exact`: the result that was wrong, by the kernel and by the reference."""
    match failure.result:
        case "o":
            return "found = attn(**inputs)\nexact = attn.reference(**inputs)"
        case "lse":
            return "_, found = attn(**inputs, return_lse=True)\n_, exact = attn.reference(**inputs, return_lse=True)"
        case gradient:
            return f"""\
leaf = inputs[{gradient.removeprefix("d")!r}].requires_grad_()
o = attn(**inputs)
do = gradient_of_o(o, seed={failure.case.seed})
(found,) = torch.autograd.grad(o, leaf, do, materialize_grads=True)
(exact,) = torch.autograd.grad(attn.reference(**inputs), leaf, do.double(), materialize_grads=True)"""


def _sizes_text(case: Case) -> str:
    return ", ".join(f"{name}={getattr(case.sizes, name)}" for name in ("B", "H", "HKV", "M", "N", "D", "E"))
