"""Recurrences from text to reference: what is read and meant, what calls and commands say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import attncc
from attncc.cli import main
from attncc.diagnostics import CallError
from attncc.ir.errors import IRError
from attncc.ir.nodes import Constant, Index, ScalarParameter
from attncc.ir.recurrence import KEY, QUERY, STATE, VALUE, Bind, Output, Recurrence, Update
from attncc.ir.recurrence_verify import verify_recurrence
from attncc.ir.text import to_text
from attncc.ir.types import Kind
from attncc.source import Source
from attncc.syntax import format_source

EXAMPLES = Path(__file__).parent.parent / "examples" / "recurrent"
STATEMENTS = "    recurrence:\n        S += outer(k, v)\n        out = q @ S\n"
LINEAR = f"attention linear():\n{STATEMENTS}"
Q, K, V = torch.randn(3, 1, 2, 4, 3, dtype=torch.float64).unbind()


def checked(text: str) -> Recurrence:
    recurrence = attncc.check(text)
    assert isinstance(recurrence, Recurrence)
    verify_recurrence(recurrence)
    return recurrence


def statements(*lines: str, parameters: str = "") -> list[str]:
    body = "".join(f"        {line}\n" for line in lines)
    text = to_text(checked(f"attention a({parameters}):\n    recurrence:\n{body}"))
    return [line.strip() for line in text.split("for each token t:\n")[1].splitlines()]


# Meaning


def test_shapes_become_the_channels_that_an_expression_varies_with() -> None:
    assert statements(
        "S *= g[b, h, t, :][:, None] * w[b, h, t, :][None, :]",
        "S -= k[:, None] * (S @ v)[:, None]",
        "out = q @ S * dot(v, v)",
        parameters="g: float[B, H, N, D], w: float[B, H, N, E]",
    ) == [
        "S   = S[b, h, d, e] * (g[b, h, t, d] * w[b, h, t, e])",
        "S   = S[b, h, d, e] - k[b, h, t, d] * sum(e < E: S[b, h, d, e] * v[b, h, t, e])",
        "out = sum(d < D: q[b, h, t, d] * S[b, h, d, e]) * sum(e < E: v[b, h, t, e] * v[b, h, t, e])",
    ]  # fmt: skip


def test_a_let_that_reads_the_state_is_bound_where_it_stands_and_others_are_put_in_place() -> None:
    assert statements("let z = k @ S", "let u = 2 * v", "S += outer(k, u)", "out = z") == [
        "let z   = sum(d < D: k[b, h, t, d] * S[b, h, d, e])",
        "S   = S[b, h, d, e] + k[b, h, t, d] * (2.0 * v[b, h, t, e])",
        "out = z[b, h, e]",
    ]


def test_a_bound_let_keeps_the_state_of_its_place() -> None:
    attn = attncc.build(
        "attention late():\n    recurrence:\n        let z = q @ S\n        S += outer(k, v)\n        out = z\n"
    )
    early = attncc.build("attention early():\n    recurrence:\n        out = q @ S\n        S += outer(k, v)\n")
    assert torch.equal(attn.reference(Q, K, V), early.reference(Q, K, V))
    assert not attn.reference(Q, K, V)[:, :, 0].any()


def test_lets_beside_the_recurrence_are_seen_by_rows_and_statements() -> None:
    spec = (
        "attention shared(g: float[B, H, N]):\n    let gate = exp(g[b, h, t])\n    let turned = rope(v, kv_idx)\n"
        "    v = turned * gate\n    recurrence:\n        S += outer(k, v * gate)\n        out = q @ S\n"
    )
    text = to_text(checked(spec))
    assert "S   = S[b, h, d, e] + k[b, h, t, d] * (v[b, h, t, e] * exp(g[b, h, t]))" in text


def test_positions_are_those_of_the_token_and_are_moved_by_q_offset() -> None:
    attn = attncc.build("attention turned():\n    q = rope(q, q_idx)\n    k = rope(k, kv_idx)\n" + STATEMENTS)
    q, k, v = (torch.randn(1, 1, 6, 4, dtype=torch.float64) for _ in range(3))
    whole, state = attn.reference(q, k, v, return_state=True)
    _, middle = attn.reference(q[:, :, :4], k[:, :, :4], v[:, :, :4], return_state=True)
    rest, last = attn.reference(
        q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], initial_state=middle, q_offset=4, return_state=True
    )
    assert torch.allclose(rest, whole[:, :, 4:])
    assert torch.allclose(last, state)


def test_q_may_stand_in_an_update() -> None:
    attn = attncc.build(
        "attention own():\n    recurrence:\n        S += dot(q, k) * outer(q, v)\n        out = k @ S\n"
    )
    o = attn.reference(Q, K, V)
    weight = (Q * K).sum(-1)[..., None] * Q
    expected = torch.tril(K @ weight.mT) @ V
    assert torch.allclose(o, expected)


def test_an_integer_and_a_definition_go_where_numbers_go() -> None:
    text = (
        "define erased(x, y) = outer(x, y - x @ y)\n\nattention a(n: int):\n    recurrence:\n        S *= n\n"
        "        S += erased(k, v) if t > 0 else outer(k, v)\n        out = q @ S\n"
    )
    with pytest.raises(attncc.SpecError) as caught:
        attncc.check(text)
    assert [d.code for d in caught.value.diagnostics] == ["A0321"]
    assert "to_float(n)" in to_text(checked(text.replace("x @ y", "y")))


@pytest.mark.parametrize("sizes", [(0, 2, 4, 3), (1, 2, 0, 3), (1, 0, 4, 3)])
def test_empty_calls_give_empty_results(sizes: tuple[int, ...]) -> None:
    x = torch.randn(sizes)
    o, state = attncc.build(LINEAR).reference(x, x, x, return_state=True)
    assert o.shape == sizes
    assert state.shape == (*sizes[:2], 3, 3)
    assert not state.any()


def test_the_names_of_recurrences_are_free_elsewhere() -> None:
    attncc.check("attention a(t: int, S: float[H], out_: float):\n    let e = S[h] + t\n    score = qk + e\n")


# IR


@pytest.mark.parametrize(
    "broken",
    [
        (Update(STATE),),
        (Output(VALUE), Output(VALUE)),
        (Output(QUERY),),
        (Output(STATE),),
        (Output(Constant(1)),),
        (Bind("z", VALUE), Bind("z", VALUE), Output(VALUE)),
        (Output(VALUE), Bind("k", KEY)),
        (Output(Index("q_idx")),),
    ],
)
def test_what_is_malformed_is_refused(broken: tuple[Update | Bind | Output, ...]) -> None:
    good = checked(LINEAR)
    with pytest.raises(IRError):
        verify_recurrence(Recurrence("a", "", (), good.q, good.k, good.v, broken))


def test_a_parameter_cannot_be_called_as_the_state() -> None:
    good = checked(LINEAR)
    parameter = ScalarParameter("S", Kind.INT, None)
    with pytest.raises(IRError):
        verify_recurrence(Recurrence("a", "", (parameter,), good.q, good.k, good.v, good.statements))


# Layout


def test_comments_stay_beside_their_statements() -> None:
    text = (
        "attention a():\n    # before\n    recurrence:  # of the state\n        # forget\n        S *= 0.5  # half\n\n"
        "        # and write\n        S += outer(k, v)\n        out = q @ S\n    # after\n    scale = 2.0\n"
    )
    assert format_source(Source("a", text)) == text
    squeezed = text.replace(" *= ", "*=").replace("(k, v)", "( k,v )")
    assert format_source(Source("a", squeezed)) == text


# Calls


def test_its_inputs_are_shown() -> None:
    assert repr(attncc.build(LINEAR)) == "<RecurrentAttention linear(q, k, v)>"


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        ({"q": Q[:, :, 0]}, ["A0602"]),
        ({"q": "no"}, ["A0601"]),
        ({"k": K[:, :, :3]}, ["A0603"]),
        ({"v": V[:, :1].repeat(1, 3, 1, 1)}, ["A0620", "A0620"]),
        ({"v": V.float()}, ["A0605"]),
        ({"k": K[..., :2]}, ["A0603"]),
        ({"initial_state": torch.zeros(1, 2, 3, 4)}, ["A0603"]),
        ({"initial_state": torch.zeros(2, 3, 3)}, ["A0602"]),
        ({"initial_state": torch.zeros(1, 2, 3, 3, dtype=torch.int64)}, ["A0605"]),
        ({"initial_state": 0.0}, ["A0601"]),
        ({"q_offset": 1.5}, ["A0609"]),
        ({"g": torch.zeros(1, 2, 5)}, ["A0603"]),
        ({"g": None}, ["A0601"]),
        ({"beta": torch.zeros(1)}, ["A0608"]),
    ],
    ids=str,
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(change: dict[str, object], codes: list[str]) -> None:
    text = LINEAR.replace("linear()", "decayed(g: float[B, H, N])").replace("S +=", "S = exp(g[b, h, t]) * S +")
    arguments = {"q": Q, "k": K, "v": V, "g": torch.zeros(1, 2, 4, dtype=torch.float64), **change}
    q, k, v = (arguments.pop(name) for name in "qkv")
    with pytest.raises(CallError) as caught:
        attncc.build(text).reference(q, k, v, **arguments)
    assert [d.code for d in caught.value.diagnostics] == codes


def test_inputs_are_passed_by_name() -> None:
    with pytest.raises(CallError, match="A0616"):
        attncc.build(LINEAR).reference(Q, K, V, K)


def test_a_read_outside_a_tensor_is_an_error_of_the_reference() -> None:
    attn = attncc.build(
        LINEAR.replace("linear()", "late(g: float[B, H, N])").replace("(k, v)", "(k, g[b, h, t + 1] * v)")
    )
    with pytest.raises(CallError, match=r"A0639.*index 4 of 4"):
        attn.reference(Q, K, V, g=torch.zeros(1, 2, 4, dtype=torch.float64))


# Commands


def test_check_and_fmt_know_recurrences(capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(path) for path in sorted(EXAMPLES.glob("*.attn"))]
    assert main(["check", *paths]) == 0
    assert capsys.readouterr().out.count(": ok\n") == len(paths)
    assert main(["fmt", "--check", *paths]) == 0


def test_explain_prints_the_normal_form(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["explain", str(EXAMPLES / "gated_deltanet.attn")]) == 0
    lines = capsys.readouterr().out.split("Normal form\n")[1].split("\n\nKernel")[0].splitlines()
    assert lines == [
        "  decay   one number for the whole state: S~ = exp(g) * S, g = g[b, h, t]",
        "  erase   S' -= r (e . S~)",
        "          e = beta[b, h, t] * k[b, h, t, d]",
        "          r = k[b, h, t, d], the key of a write",
        "  write   S' += key value",
        "          key = k[b, h, t, d]",
        "          value = beta[b, h, t] * v[b, h, t, e]",
        "  read    query . S', after the update",
        "          query = 1.0 / sqrt(to_float(D)) * q[b, h, t, d]",
    ]
    path = tmp_path / "bounded.attn"
    path.write_text(LINEAR.replace("S += outer(k, v)", "S = tanh(S) + outer(k, v)"))
    assert main(["explain", str(path)]) == 0
    out = capsys.readouterr().out
    assert "none: `tanh` of what depends on the state is no linear function of it" in out
    assert "bounded.attn:3:13: tanh(S)" in out


@pytest.mark.parametrize(
    ("gate", "when"),
    [
        ("g[b, h, t]", "g[b, h, t] < 0, or is 0 and has a gradient"),
        ("(2 * g[b, h, t]) ** (0.125 * g[b, h, t])", "2.0 * g[b, h, t] <= 0"),
    ],
)
def test_explain_says_which_decays_are_slow(
    gate: str, when: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "gated.attn"
    statements = f"        S *= {gate}\n        S += outer(k, v)\n        out = q @ S\n"
    path.write_text(f"attention gated(g: float[B, H, N]):\n    recurrence:\n{statements}", encoding="utf-8")
    assert main(["explain", str(path)]) == 0
    assert f"token by token, slowly, where {when}\n" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["ast", "ir"])
def test_the_front_stages_are_printed(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["emit", str(EXAMPLES / "retnet.attn"), "--stage", stage]) == 0
    assert "retnet" in capsys.readouterr().out
