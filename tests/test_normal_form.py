"""The normal form computes what the statements do, whatever order and shape they are written in; or says what prevents
it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from normal_form_interpreter import run
from tiers import by_tier

from attncc.check.specification import check_source
from attncc.ir.nodes import Apply, Expr, Load, Reduce
from attncc.ir.recurrence import Bind, Recurrence
from attncc.ir.recurrence_verify import verify_recurrence
from attncc.ir.rewrite import contains, map_children
from attncc.ir.text import to_text
from attncc.passes.normal_form import NormalForm, Sequential, normal_form
from attncc.recurrent_reference import evaluate
from attncc.source import Source

B, H, N, D, E = 2, 2, 5, 3, 4
INPUTS = {"g": (B, H, N), "s": (B, H, N), "a": (B, H, N, D), "c": (B, H, N, D), "w": (B, H, N, E), "y": (B, H, N, E)}
HEADER = (
    "attention drawn(g: float[B, H, N], s: float[B, H, N], a: float[B, H, N, D], c: float[B, H, N, D], "
    "w: float[B, H, N, E], y: float[B, H, N, E]):\n    recurrence:\n"
)


def recurrence_of(*lines: str) -> Recurrence:
    found = check_source(Source("drawn.attn", HEADER + "".join(f"        {line}\n" for line in lines)))
    assert isinstance(found, Recurrence)
    return found


def problem():
    torch.manual_seed(1)
    q, k, v = (torch.randn(B, H, N, width, dtype=torch.float64) for width in (D, D, E))
    inputs = {name: torch.randn(shape, dtype=torch.float64) for name, shape in INPUTS.items()}
    return q, k, v, inputs, torch.randn(B, H, D, E, dtype=torch.float64)


Q, K, V, GIVEN, STATE = problem()


def reference(recurrence: Recurrence) -> tuple[torch.Tensor, torch.Tensor]:
    return evaluate(recurrence, Q, K, V, GIVEN, STATE)


def assert_computes(form: NormalForm, recurrence: Recurrence, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    for found, right in zip(run(form, recurrence, Q, K, V, GIVEN, STATE), expected, strict=True):
        assert torch.allclose(found, right, rtol=1e-9, atol=1e-9), to_text(recurrence)


def kernel(form: NormalForm) -> tuple[object, ...]:
    """What a kernel is chosen by."""
    same_key = [any(erase.r == write.key for write in form.writes) for erase in form.erases]
    befores = [erase.before for erase in form.erases]
    return form.side, befores, len(form.writes), same_key, form.read, form.gate is None, form.bonus is None


# Random recurrences.

SCALARS = st.sampled_from(["s[b, h, t]", "sigmoid(s[b, h, t])", "0.5", "-s[b, h, t]", "dot(k, k)", "(1 - s[b, h, t])"])
KEYS = st.sampled_from(["k", "q", "a[b, h, t, :]", "c[b, h, t, :]", "(k * a[b, h, t, :])", "(k - c[b, h, t, :])"])
VALUES = st.sampled_from(["v", "w[b, h, t, :]", "(v + y[b, h, t, :])", "silu(w[b, h, t, :])"])
DECAYS = {
    "none": [],
    "scalar": ["exp(-g[b, h, t] ** 2)", "sigmoid(g[b, h, t])", "0.9", "exp2(-abs(s[b, h, t]))"],
    "key": ["exp(-a[b, h, t, :] ** 2)[:, None]", "sigmoid(c[b, h, t, :])[:, None]", "exp(-abs(g[b, h, t]))"],
    "value": ["exp(-w[b, h, t, :] ** 2)[None, :]", "sigmoid(y[b, h, t, :])[None, :]"],
}


@st.composite
def recurrences(draw: st.DrawFn) -> list[str]:
    side = draw(st.sampled_from(list(DECAYS)))
    reads = draw(st.lists(st.just("read"), max_size=2)) if side != "value" else []
    kinds = draw(st.permutations(["write", *reads, *(["decay"] if side != "none" else []), *draw(_MORE)]))
    lines: list[str] = []
    for i, kind in enumerate(kinds):
        key, value, scalar = draw(KEYS), draw(VALUES), draw(SCALARS)
        match kind:
            case "decay":
                decay = draw(st.sampled_from(DECAYS[side]))
                lines.append(draw(st.sampled_from([f"S *= {decay}", f"S = {decay} * S", f"S = S * {decay}"])))
            case "write":
                lines.append(
                    draw(
                        st.sampled_from(
                            [
                                f"S += outer({scalar} * {key}, {value})",
                                f"S -= {scalar} * outer({key}, {value})",
                                f"S = S + {key}[:, None] * {value}[None, :]",
                                f"S += where(s[b, h, t] > 0.0, outer({key}, {value}), {scalar} * outer(k, v))",
                            ]
                        )
                    )
                )
            case _:
                other = draw(KEYS)
                lines += draw(
                    st.sampled_from(
                        [
                            [f"S += outer({key}, {scalar} * ({value} - {other} @ S))"],
                            [f"S -= {scalar} * outer({key}, {other} @ S)"],
                            [f"let z{i} = {other} @ S", f"S += outer({key}, {value} - {scalar} * z{i})"],
                            [f"S -= outer({scalar} * {key}, ({other} + {key}) @ S / 2.0)"],
                        ]
                    )
                )
    output = draw(st.sampled_from(["q @ S", "scale * (q @ S)", "(q + k) @ S + v", "w[b, h, t, :] * (q @ S)"]))
    lines.insert(draw(st.integers(0, len(lines))), f"out = {output}")
    return lines


_MORE = st.lists(st.sampled_from(["write", "decay"]), max_size=1).map(lambda more: [m for m in more if m == "write"])


@given(recurrences())
@settings(deadline=None, max_examples=by_tier(60))
def test_random_recurrences_are_their_normal_forms(lines: list[str]) -> None:
    recurrence = recurrence_of(*lines)
    verify_recurrence(recurrence)
    form = normal_form(recurrence)
    assert isinstance(form, NormalForm), (form, lines)
    assert_computes(form, recurrence, reference(recurrence))


# Random rewritings.


def rewritten(expr: Expr, draw: st.DrawFn) -> Expr:
    """The same value, written otherwise: commuted, reassociated, multiplied out."""
    expr = map_children(expr, lambda child: rewritten(child, draw))
    if not isinstance(expr, Apply) or not draw(st.booleans()):
        return expr
    match expr:
        case Apply(op="mul", args=(a, Apply(op="add" | "sub" as op, args=(b, c)))):
            return Apply(op, (Apply("mul", (a, b)), Apply("mul", (a, c))))
        case Apply(op="mul", args=(a, Apply(op="mul", args=(b, c)))):
            return Apply("mul", (Apply("mul", (b, a)), c))
        case Apply(op="add" | "mul" as op, args=(a, b)):
            return Apply(op, (b, a))
        case Apply(op="sub", args=(a, b)):
            return Apply("add", (Apply("neg", (b,)), a))
        case _:
            return expr


def hoisted(recurrence: Recurrence) -> Recurrence:
    """What reads the state along an axis, named before the statement that it stands in."""
    statements = []
    for statement in recurrence.statements:
        binds: list[Bind] = []

        def name(expr: Expr, binds: list[Bind] = binds, at: int = len(statements)) -> Expr:
            if isinstance(expr, Reduce) and contains(expr, lambda n: isinstance(n, Load) and n.tensor == "S"):
                binds.append(Bind(f"h{at}_{len(binds)}", expr))
                return binds[-1].load
            return map_children(expr, name)

        value = name(statement.value)
        statements += [*binds, replace(statement, value=value)]
    return replace(recurrence, statements=tuple(statements))


UPDATES = {
    "gated delta": ("S *= exp(-g[b, h, t] ** 2)", "S += outer(k, s[b, h, t] * (v - k @ S))", "out = scale * q @ S"),
    "channel decay": ("S *= exp(a[b, h, t, :])[:, None]", "S += outer(k, v)", "out = q @ S"),
    "value decay": ("S *= exp(w[b, h, t, :])[None, :]", "S += outer(k, v)", "out = q @ S"),
    "removal before decay": (
        "let z = c[b, h, t, :] @ S",
        "S *= sigmoid(a[b, h, t, :])[:, None]",
        "S += outer(k, v) - outer(s[b, h, t] * c[b, h, t, :], z)",
        "out = q @ S",
    ),
    "bonus": ("out = q @ (S + a[b, h, t, :][:, None] * outer(k, v))", "S = 0.9 * S + outer(k, v)"),
    "two steps": (
        "S *= sigmoid(g[b, h, t])",
        "S += outer(k, s[b, h, t] * (v - k @ S))",
        "S += outer(c[b, h, t, :], w[b, h, t, :] - c[b, h, t, :] @ S)",
        "out = q @ S",
    ),
}


@pytest.mark.parametrize("name", UPDATES)
@given(data=st.data())
@settings(deadline=None, max_examples=by_tier(15))
def test_rewritings_bring_the_same_kernel(name: str, data: st.DataObject) -> None:
    recurrence = recurrence_of(*UPDATES[name])
    form = normal_form(recurrence)
    assert isinstance(form, NormalForm)
    other = replace(
        recurrence,
        statements=tuple(replace(s, value=rewritten(s.value, data.draw)) for s in recurrence.statements),
    )
    if data.draw(st.booleans()):
        other = hoisted(other)
    verify_recurrence(other)
    found = normal_form(other)
    assert isinstance(found, NormalForm), (found, to_text(other))
    assert kernel(found) == kernel(form), to_text(other)
    assert_computes(found, other, reference(recurrence))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (
            UPDATES["gated delta"],
            (
                "let d = exp(-g[b, h, t] ** 2)",
                "let z = k @ S",
                "S = d * S - outer(s[b, h, t] * k, d * z) + s[b, h, t] * outer(k, v)",
                "out = q @ S * scale",
            ),
        ),
        (("S += outer(k, v) + outer(k, y[b, h, t, :])",), ("S += outer(k, v + y[b, h, t, :])",)),
        (("S += outer(k, v) + outer(c[b, h, t, :], v)",), ("S += outer(k + c[b, h, t, :], v)",)),
        (("S -= outer(k, k @ S) + outer(k, c[b, h, t, :] @ S)",), ("S -= outer(k, (k + c[b, h, t, :]) @ S)",)),
        (("S -= outer(k, q @ S) + outer(c[b, h, t, :], q @ S)",), ("S -= outer(k + c[b, h, t, :], q @ S)",)),
        (("S += outer(k, v) + outer(q, v)", "S -= outer(q, v)"), ("S += outer(k, v)",)),
        (
            ("S *= exp(g[b, h, t] + a[b, h, t, :])[:, None]",),
            ("S *= exp(g[b, h, t])", "S *= exp(a[b, h, t, :])[:, None]"),
        ),
    ],
)
def test_two_ways_to_write_an_update(first: tuple[str, ...], second: tuple[str, ...]) -> None:
    one, two = (recurrence_of(*lines, *([] if len(lines) > 2 else ["out = q @ S"])) for lines in (first, second))
    forms = normal_form(one), normal_form(two)
    assert all(isinstance(form, NormalForm) for form in forms), forms
    assert kernel(forms[0]) == kernel(forms[1])
    assert [len(form.erases) for form in forms] == [len(forms[0].erases)] * 2
    for form, recurrence in zip(forms, (one, two), strict=True):
        assert_computes(form, recurrence, reference(one))


@pytest.mark.parametrize(
    ("lines", "why", "at"),
    [
        (("S = tanh(S) + outer(k, v)", "out = q @ S"), "`tanh`", "tanh(S)"),
        (("S *= S", "out = q @ S"), "multiplied", "S *= S"),
        (("S += outer(S @ v, v)", "out = q @ S"), "value channels", "S += outer(S @ v, v)"),
        (("S *= exp(outer(k, v))", "out = q @ S"), "no product of a key and a value", "exp(outer(k, v))"),
        (("S *= exp(-outer(k, v))", "out = q @ S"), "no product of a key and a value", "exp(-outer(k, v))"),
        (("S *= sigmoid(a[b, h, t, :])[:, None] * sigmoid(w[b, h, t, :])[None, :]", "out = q @ S"), "at once", None),
        (("S *= sigmoid(w[b, h, t, :])[None, :]", "S -= outer(k, k @ S)", "out = q @ S"), "value channel", None),
        (("S -= outer(k, v * (k @ S))", "out = q @ S"), "varies with the value channel", None),
        (("S = outer(k, v)", "out = q @ S"), "nothing is kept", None),
        (("S *= -0.5", "out = q @ S"), "sign", None),
        (("S += outer(k, v)", "out = q @ S + w[b, h, t, :] * (k @ S)"), "more than once", None),
        (("S += outer(k, v)", "let z = q @ S", "out = z * sum(z)"), "multiplied", "z * sum(z)"),
        (("S += outer(k, v / sum(k @ S))", "out = q @ S"), "divided", "v / sum(k @ S)"),
        (("S += outer(k, v) if max(k @ S) > 0.0 else 0.0 * S", "out = q @ S"), "`gt`", "max(k @ S) > 0.0"),
    ],
)  # fmt: skip
def test_what_prevents_a_normal_form_is_named(lines: tuple[str, ...], why: str, at: str | None) -> None:
    found = normal_form(recurrence_of(*lines))
    assert isinstance(found, Sequential), found
    assert why in found.why
    assert (found.span and found.span.text) == at


def test_too_many_steps_within_a_token_are_refused_soon() -> None:
    steps = [f"S += outer(a[b, {i}, t, :], v - a[b, {i}, t, :] @ S)" for i in range(12)]
    found = normal_form(recurrence_of(*steps, "out = q @ S"))
    assert isinstance(found, Sequential)
    assert "terms" in found.why


@pytest.mark.parametrize(
    ("decay", "logarithm"),
    [
        ("exp(g[b, h, t])", "g[b, h, t]"),
        ("1 / exp(g[b, h, t])", "-g[b, h, t]"),
        ("sigmoid(g[b, h, t])", "-softplus(-g[b, h, t])"),
        ("exp(g[b, h, t]) * sigmoid(s[b, h, t])", "g[b, h, t] - softplus(-s[b, h, t])"),
        ("(exp(g[b, h, t]) if t > 0 else 1.0)", "where(t > 0, g[b, h, t], 0.0)"),
        ("s[b, h, t]", "log(s[b, h, t])"),
        ("1.0", "0.0"),
        ("(1 - s[b, h, t])", "log1p(-s[b, h, t])"),
        ("s[b, h, t] ** g[b, h, t]", "g[b, h, t] * log(s[b, h, t])"),
    ],
)
def test_the_logarithm_of_a_decay_is_taken_symbolically(decay: str, logarithm: str) -> None:
    form = normal_form(recurrence_of(f"S *= {decay}", "S += outer(k, v)", "out = q @ S"))
    assert isinstance(form, NormalForm)
    assert to_text(form.log_decay) == logarithm


def test_a_recurrence_without_a_normal_form_still_runs() -> None:
    o, last = reference(recurrence_of("S = tanh(S) + outer(k, v)", "out = q @ S"))
    state = STATE
    for t in range(N):
        state = torch.tanh(state) + K[:, :, t, :, None] * V[:, :, t, None, :]
        assert torch.allclose(o[:, :, t], (Q[:, :, t, :, None] * state).sum(-2))
    assert torch.allclose(last, state)
