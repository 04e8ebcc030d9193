"""Every example under examples/recurrent against its recurrence by hand, as it stands and by its normal form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from normal_form_interpreter import run
from recurrent_formulas import FEATURE_FORMULAS
from recurrent_formulas import FORMULAS as PLAIN_FORMULAS

import attncc
from attncc.ir.recurrence import Recurrence
from attncc.ir.recurrence_verify import verify_recurrence
from attncc.passes.normal_form import NormalForm, normal_form

EXAMPLES = Path(__file__).parent.parent / "examples" / "recurrent"
FORMULAS = {**PLAIN_FORMULAS, **FEATURE_FORMULAS}
VARIANT = pytest.mark.parametrize("name", FORMULAS)
# Heads of q, k and v: as many of each; fewer keys and values; fewer queries and keys; one of each sort.
HEADS = [(2, 2, 2), (4, 2, 2), (2, 2, 4), (1, 2, 4)]
B, N, D, E = 2, 7, 5, 3


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-11, atol=1e-11)


def problem(name: str, heads: tuple[int, int, int] = (2, 2, 2)):
    torch.manual_seed(0)
    H = max(heads)
    q, k, v = (torch.randn(B, h, N, width, dtype=torch.float64) for h, width in zip(heads, (D, D, E), strict=True))
    formula = FORMULAS[name]
    state = torch.randn(formula.state_shape(B, H, D, E), dtype=torch.float64)
    # No sum of weights lies near 0.
    state = state if formula.features is None else state.abs() + 0.5
    return q, k, v, formula.draw(B, H, N, D, E, heads[1]), state


def test_every_example_has_a_formula() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.attn")} == set(FORMULAS)


@VARIANT
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_the_reference_is_the_recurrence_by_hand(name: str, heads: tuple[int, int, int]) -> None:
    q, k, v, inputs, state = problem(name, heads)
    attn = attncc.build(EXAMPLES / f"{name}.attn")
    o, last = attn.reference(q, k, v, initial_state=state, return_state=True, **inputs)
    expected, expected_last = FORMULAS[name].run(q, k, v, inputs, state)
    assert close(o, expected)
    assert close(last, expected_last)
    zero = attn.reference(q, k, v, **inputs)
    assert close(zero, FORMULAS[name].run(q, k, v, inputs, torch.zeros_like(state))[0])


@VARIANT
def test_a_sequence_may_be_split_and_resumed(name: str) -> None:
    q, k, v, inputs, state = problem(name)
    attn = attncc.build(EXAMPLES / f"{name}.attn")
    whole, last = attn.reference(q, k, v, initial_state=state, return_state=True, **inputs)
    parts = []
    for tokens in (slice(0, 3), slice(3, 4), slice(4, 4), slice(4, None)):
        of_part = {n: x[:, :, tokens] if "N" in FORMULAS[name].inputs[n][1] else x for n, x in inputs.items()}
        rows = (x[:, :, tokens] for x in (q, k, v))
        o, state = attn.reference(*rows, initial_state=state, return_state=True, q_offset=tokens.start, **of_part)
        parts.append(o)
    assert close(torch.cat(parts, 2), whole)
    assert close(state, last)


@VARIANT
def test_gradients_are_those_of_the_recurrence_by_hand(name: str) -> None:
    q, k, v, inputs, state = problem(name, (2, 2, 4))
    leaves = [x.requires_grad_() for x in (q, k, v, state, *inputs.values()) if isinstance(x, torch.Tensor)]

    def gradients(o: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = (o * torch.arange(o.numel()).reshape(o.shape).cos()).sum() + last.square().sum()
        return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)

    attn = attncc.build(EXAMPLES / f"{name}.attn")
    found = gradients(*attn.reference(q, k, v, initial_state=state, return_state=True, **inputs))
    expected = gradients(*FORMULAS[name].run(q, k, v, inputs, state))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-10) for a, b in zip(found, expected, strict=True))


@VARIANT
@pytest.mark.parametrize("by_logarithm", [False, True])
def test_the_normal_form_is_the_recurrence_by_hand(name: str, by_logarithm: bool) -> None:
    q, k, v, inputs, state = problem(name, (2, 2, 4))
    recurrence = attncc.check(EXAMPLES / f"{name}.attn")
    assert isinstance(recurrence, Recurrence)
    verify_recurrence(recurrence)
    form = normal_form(recurrence)
    assert isinstance(form, NormalForm)
    assert (form.side, len(form.erases), len(form.writes), form.read) == FORMULAS[name].form
    o, last = run(form, recurrence, q, k, v, inputs, state, by_logarithm=by_logarithm)
    expected, expected_last = FORMULAS[name].run(q, k, v, inputs, state)
    assert close(o, expected)
    assert close(last, expected_last)


@VARIANT
def test_every_example_says_where_it_is_from_and_is_formatted(name: str) -> None:
    from attncc.source import Source
    from attncc.syntax import format_source

    text = (EXAMPLES / f"{name}.attn").read_text()
    assert format_source(Source(name, text)) == text
    recurrence = attncc.check(EXAMPLES / f"{name}.attn")
    assert recurrence.name == name
    assert "20" in recurrence.doc


def test_published_versions_that_read_before_and_after_the_decay_are_told_apart() -> None:
    forms = {name: normal_form(attncc.check(EXAMPLES / f"{name}.attn")) for name in ("rwkv7", "kimi_delta")}
    assert {name: form.erases[0].before for name, form in forms.items()} == {"rwkv7": True, "kimi_delta": False}


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet", "kimi_delta"])
def test_the_delta_rule_erases_along_the_key_that_it_writes(name: str) -> None:
    form = normal_form(attncc.check(EXAMPLES / f"{name}.attn"))
    assert form.erases[0].r == form.writes[0].key
