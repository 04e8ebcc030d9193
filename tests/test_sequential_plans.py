"""Plans of sequential kernels: what is an operand, what is a step; random statements; what cannot be compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Golden
from hypothesis import given, settings
from hypothesis import strategies as st
from sequential_cases import CASES
from test_normal_form import GIVEN, STATE, D, E, H, K, N, Q, V, recurrence_of
from test_templates import TEMPLATES, documented, used_filters
from tiers import by_tier

import attncc
from attncc.diagnostics import BuildError
from attncc.emit.sequential_cpp import SequentialCppPrinter
from attncc.emit.sequential_cpp import source_of as cpp_source_of
from attncc.emit.sequential_triton import SequentialTritonPrinter, layout_of, source_of
from attncc.error_rule import compare
from attncc.ir.recurrence import Recurrence
from attncc.ir.recurrence_verify import verify_recurrence
from attncc.ir.text import to_text
from attncc.ir.types import DType
from attncc.plan.nodes import Target
from attncc.plan.sequential import SequentialPlan, plan_sequential
from attncc.recurrent_reference import _token, at_token, evaluate, token_scope
from attncc.runtime.arguments import Signature
from attncc.runtime.recurrent_arguments import GivenToRecurrence, bind_recurrence
from attncc.runtime.sequential import SequentialKernels
from attncc.runtime.triton_aot import compile_ahead

F32 = torch.float32


def plan(*lines: str, target: str = "cpp:avx2", dtype: DType = DType.F32, widths: tuple[int, int] = (D, E)):
    return plan_sequential(recurrence_of(*lines), Target(*target.split(":")), dtype, *widths)


def steps(found: SequentialPlan) -> list[str]:
    """`name[channels] = value`, and what it is summed over."""
    texts = []
    for step in found.steps:
        over = "" if step.over is None else f"{step.op} over {step.over.channel} of "
        channels = "".join(axis.channel for axis in step.axes)
        texts.append(f"{step.name}[{channels}] = {over}{to_text(step.value)}".replace("%", ""))
    return texts


def operands(found: SequentialPlan) -> list[str]:
    return [f"{x.name}[{''.join(a.channel for a in x.axes)}] = {to_text(x.source)}" for x in found.operands]


def test_statements_are_operands_and_steps() -> None:
    found = plan("S = tanh(S) + outer(k, v - k @ S)", "out = sigmoid(g[b, h, t]) * (q @ S)")
    assert operands(found) == [
        "x0[d] = k[b, h, t, d]",
        "x1[e] = v[b, h, t, e]",
        "x2[] = sigmoid(g[b, h, t])",
        "x3[d] = q[b, h, t, d]",
    ]
    assert steps(found) == [
        "z0[e] = sum over d of x0 * S",
        "z1[e] = x1 - z0",
        "S[de] = tanh(S) + x0 * z1",
        "z2[e] = sum over d of x3 * S",
        "out[e] = x2 * z2",
    ]


@pytest.mark.parametrize("target", ["cpp:avx512", "triton:sm_90"])
def test_sources_are_as_recorded(target: str, golden: Golden) -> None:
    found = plan(
        "S = tanh(S) + outer(k, v - k @ S)", "out = sigmoid(g[b, h, t]) * (q @ S)", target=target, widths=(64, 60)
    )
    source, extension = (cpp_source_of, "cpp") if found.target.family == "cpp" else (source_of, "py")
    name = f"sequential-{target.replace(':', '-')}.{extension}.expected"
    golden(Path(__file__).parent / "sources" / name, source(found))


def test_what_is_read_of_the_state_holds_until_it_changes() -> None:
    found = plan("let z = k @ S", "S = S * (1.0 + sum(k @ S))", "out = z + k @ S")
    assert steps(found) == [
        "z0[e] = sum over d of x0 * S",
        "z1[] = sum over e of z0",
        "z2[] = 1.0 + z1",
        "S[de] = S * z2",
        "z3[e] = sum over d of x0 * S",
        "out[e] = z0 + z3",
    ]


def test_products_of_both_channels_are_taken_in_the_kernel_unless_tokens_share_them() -> None:
    of_token = plan("S *= exp(outer(a[b, h, t, :], w[b, h, t, :]))", "out = q @ S")
    assert operands(of_token)[:2] == ["x0[d] = a[b, h, t, d]", "x1[e] = w[b, h, t, e]"]
    shared = plan("S = tanh(S) * exp(-outer(a[b, h, 0, :], w[b, h, 0, :]))", "out = q @ S").operands[0]
    assert (to_text(shared.source), len(shared.axes), shared.per_token) == (
        "exp(-(a[b, h, 0, d] * w[b, h, 0, e]))",
        2,
        False,
    )


def test_what_a_choice_leaves_out_stays_within_it() -> None:
    found = plan("let m = max(k @ S)", "S = (log(m) * S if m > 0.0 else -S) + outer(k, v)", "out = q @ S")
    assert "S[de] = where(z2, log(z1) * S, -S) + x0 * x1" in steps(found)


def test_value_channels_that_depend_on_each_other() -> None:
    for name, case in CASES.items():
        attention = attncc.build(case.source).attention
        assert isinstance(attention, Recurrence)
        found = plan_sequential(attention, Target("triton", "sm_90"), DType.F32, 64, 64)
        assert found.couples_values is case.coupled, name
        layout = layout_of(found)
        assert layout.blocks == (1 if case.coupled else 8)
        assert layout.num_warps == (8 if case.coupled else 1)


def test_a_read_that_depends_on_the_state_is_refused() -> None:
    with pytest.raises(BuildError, match="A0571"):
        plan("S = tanh(S) * g[b, h, int(max(k @ S))]", "out = q @ S")


def test_a_state_too_large_for_a_program_is_refused() -> None:
    coupled = plan("S += outer(S @ v, v)", "out = q @ S", target="triton:sm_90", widths=(256, 256))
    with pytest.raises(BuildError, match=r"A0572.*256 x 256"):
        source_of(coupled)
    apart = plan("S = tanh(S) + outer(k, v)", "out = q @ S", target="triton:sm_90", widths=(256, 256))
    assert layout_of(apart).value_block == 2


def test_explain_says_what_prevents_a_normal_form_and_what_runs_instead() -> None:
    text = attncc.build(CASES["bounded"].source).explain()
    assert "none: `tanh` of what depends on the state is no linear function of it" in text
    assert "Kernel\n  forward    the statements as they stand, token by token" in text
    assert "  backward   the same statements in PyTorch" in text


@pytest.mark.representative(2)
@pytest.mark.parametrize("name", ["bounded", "by_value_channels", "softmax_of_keys", "squared"])
def test_it_compiles_for_a_gpu(name: str) -> None:
    attention = attncc.build(CASES[name].source).attention
    assert isinstance(attention, Recurrence)
    found = plan_sequential(attention, Target("triton", "sm_90"), DType.BF16, 64, 64)
    resources = compile_ahead(found, source_of(found), "sm_90")
    assert set(resources) == {"drawn_sequential", "drawn_sequential[PACKED]"}
    assert all(function.spilled == 0 for function in resources.values())


@pytest.mark.parametrize(
    ("target", "file", "printer"),
    [
        ("cpp:avx2", "cpp/sequential.cpp.jinja", SequentialCppPrinter),
        ("triton:sm_90", "triton/sequential.py.jinja", SequentialTritonPrinter),
    ],
)
def test_every_filter_of_a_template_is_documented_and_used(target: str, file: str, printer: Any) -> None:
    found = plan("S = tanh(S) + outer(k, v)", "out = q @ S", target=target)
    names = set(printer(found).filters())
    assert documented(f"Filters of `{file}`") == names
    files = (TEMPLATES / found.target.family).rglob("*.jinja")
    used = used_filters("\n".join(path.read_text(encoding="utf-8") for path in files))
    assert names <= used, names - used


# Random statements, under which states do not explode: rounding errors would too.

SCALARS = st.sampled_from(
    [
        "s[b, h, t]",
        "sigmoid(g[b, h, t])",
        "0.5",
        "-0.25",
        "sin(sum(k @ S))",
        "tanh(max(S @ v))",
        "sin(dot(q, k))",
        "float(t % 2)",
    ]
)
KEYS = st.sampled_from(
    ["k", "q", "a[b, h, t, :]", "(k * a[b, h, t, :])", "tanh(S @ v)", "(k - sin(S @ v))", "(c[b, h, 0, :] * sum(v))"]
)
VALUES = st.sampled_from(
    ["v", "w[b, h, t, :]", "(v + y[b, h, t, :])", "sin(k @ S)", "(v - q @ S)", "(v * tanh(max(q @ S)))"]
)
MATRICES = st.sampled_from(
    [
        "S",
        "tanh(S)",
        "sin(S) * S",
        "S * sigmoid(a[b, h, t, :])[:, None]",
        "S * sigmoid(w[b, h, t, :])[None, :]",
        "S * exp(-outer(k ** 2, v ** 2))",
        "(S if s[b, h, t] > 0.0 else -S)",
        "(tanh(S) if sum(k @ S) > 0.0 else 0.5 * S)",
        "min(S, 1.0)",
    ]
)


@st.composite
def recurrences(draw: st.DrawFn) -> list[str]:
    lines, names = [], []
    for i in range(draw(st.integers(1, 3))):
        key, value, scalar = draw(KEYS), draw(VALUES), draw(SCALARS)
        match draw(st.sampled_from(["update", "change", "vector", "key", "matrix"])):
            case "update":
                lines.append(f"S += 0.3 * outer({scalar} * {key}, {value})")
            case "change":
                lines.append(f"S = 0.5 * {draw(MATRICES)} + 0.2 * outer({key}, {value})")
            case "vector":
                lines.append(f"let z{i} = {draw(KEYS)} @ S")
                names.append(f"z{i}")
            case "key":
                lines.append(f"let z{i} = tanh(S @ {value})")
                names.append(f"(z{i} @ S)")
            case "matrix":
                lines.append(f"let z{i} = 0.5 * {draw(MATRICES)}")
                names.append(f"({key} @ z{i})")
    output = draw(st.sampled_from(["q @ S", "sigmoid(g[b, h, t]) * (q @ S) + v", "sin(k @ S) * sum(q @ S)", "v"]))
    return [*lines, "out = " + " + ".join([output, *names])]


def in_f32(recurrence: Recurrence) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's own evaluation in the type of the call."""
    scope = token_scope(recurrence, Q.to(F32), K.to(F32), V.to(F32), narrowed(GIVEN), 0)
    inputs = {n: x.to(F32) if x.is_floating_point() else x for n, x in scope.inputs.items()}
    scope, state, outputs = replace(scope, inputs=inputs, floating=F32), STATE.to(F32), []
    for t in range(N):
        o, state = _token(recurrence.statements, at_token(scope, t), state)
        outputs.append(o)
    return torch.stack(outputs, 2), state


def narrowed(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.to(F32) for name, x in inputs.items()}


# Bools, ints, functions, choices, named states, outputs without a state: by their channels.
VALUES_OF_EVERY_KIND = [
    ("S = where(w[b, h, t, :][None, :] > 0.0, tanh(S), -S) + outer(k, v)", "out = q @ S"),
    ("S = where(a[b, h, t, :][:, None] > 0.0, tanh(S), -S) + outer(k, v)", "out = q @ S"),
    ("S = where(outer(a[b, h, t, :], w[b, h, t, :]) > 0.0, tanh(S), -S) + outer(k, v)", "out = q @ S"),
    ("S = where(S > w[b, h, t, :][None, :], 0.5 * S, -S)", "out = where(k @ S > 0.0 and v < 1.0, q @ S, v)"),
    ("S = where((S > 0.1) == (w[b, h, t, :] > 0.0)[None, :], 0.5 * S, -S) + outer(k, v)", "out = q @ S"),
    ("S = 0.25 * float(int(4.0 * S + 0.3) % 3 + t) + outer(k, v)", "out = q @ S"),
    ("S = 0.25 * float(int(4.0 * S) + int(w[b, h, t, :])[None, :]) + outer(k, v)", "out = q @ S"),
    ("S = 0.1 * float((int(4.0 * S) << 2) + popcount(int(a[b, h, t, :]))[:, None])", "out = q @ S"),
    ("S = 0.1 * (gelu(S) + erf(S) + softplus(S) - elu(S) + silu(S) + relu(S))", "out = exp2(q @ S)"),
    (
        "S = max(abs(S), 0.5) ** 0.3 + log(1.0 + S * S) + sign(S) + floor(S)",
        "out = log1p(abs(q @ S)) + cos(k @ S)",
    ),
    ("let P = S * 2.0", "let P2 = tanh(P)", "S = P2 * P", "out = q @ P2"),
    ("let P = S", "S = tanh(S)", "out = q @ P"),
    ("let m = sum(q @ S)", "S = tanh(S) * sigmoid(m)", "out = m * v"),
    ("S = min(S, sum(S @ v)) + tanh(max(S @ v)) * outer(k, v)", "out = max(q @ S) + sum(k @ S) + v"),
    ("S = 0.0 * S + 0.5", "out = q @ S"),
    ("S = tanh(S)", "out = 0.0 * v + 1.0"),
]


@pytest.mark.representative(10)
@pytest.mark.parametrize("target", ["cpp", "triton:interpret"])
@pytest.mark.parametrize("lines", VALUES_OF_EVERY_KIND, ids=str)
def test_values_of_every_kind(target: str, lines: tuple[str, ...]) -> None:
    assert_right(target, lines)


@pytest.mark.parametrize("target", ["cpp", "triton:interpret"])
@given(lines=recurrences())
@settings(deadline=None, max_examples=by_tier(12))
def test_random_statements(target: str, lines: list[str]) -> None:
    assert_right(target, lines)


def assert_right(target: str, lines: Sequence[str]) -> None:
    """Output and last state by the error rule."""
    recurrence = recurrence_of(*lines)
    verify_recurrence(recurrence)
    rows = {"q": Q.to(F32), "k": K.to(F32), "v": V.to(F32)}
    given_rows = GivenToRecurrence(*rows.values(), STATE.to(F32), None, 0, narrowed(GIVEN))
    bound = bind_recurrence(Signature(recurrence), given_rows)
    found = SequentialKernels(recurrence, target, ()).run(*rows.values(), bound)
    exact = evaluate(recurrence, *rows.values(), narrowed(GIVEN), STATE.to(F32))
    assert found[0].shape == (2, H, N, E)
    for what, *results in zip(("o", "state"), found, exact, in_f32(recurrence), strict=True):
        message = compare(what, *results)
        assert message is None, (message, lines)
