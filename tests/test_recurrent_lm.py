"""The recurrent training example at a small size: it learns what a loop over tokens does, and steps as in chunks."""

from __future__ import annotations

import copy
import importlib
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

EXAMPLES = Path(__file__).parent.parent / "examples"
STEPS, LENGTH, WIDTH, BYTES = 20, 72, 32, 12


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; it finds train_lm.py beside it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("recurrent_lm")


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Command line of a small, checked run; the path of its plot."""
    path = tmp_path / "curves.png"
    options = {"--steps": 5, "--compare": 3, "--length": LENGTH, "--width": WIDTH, "--write": BYTES, "--out": path}
    words = [str(word) for option in options.items() for word in option]
    monkeypatch.setattr(sys, "argv", ["recurrent_lm.py", "--check", *words])
    return path


def test_models_learn_the_same(example) -> None:
    torch.manual_seed(0)
    model = example.Model(WIDTH, example.GatedDelta)
    before = copy.deepcopy(model)
    chunks = example.Learner("chunks", model, example.compiled())
    tokens = example.Learner("tokens", copy.deepcopy(model), example.token_loop)
    text = sys.modules["train_lm"].find_text()[1]
    example.train([chunks, tokens], text, STEPS, LENGTH)
    assert chunks.losses == pytest.approx(tokens.losses, rel=0, abs=1e-3)
    assert chunks.losses[-1] < chunks.losses[0] - 1
    for name, parameter in chunks.model.named_parameters():
        other = tokens.model.get_parameter(name)
        assert not torch.equal(parameter, before.get_parameter(name)), name
        torch.testing.assert_close(parameter, other, rtol=0, atol=1e-3)
        # AdamW would hide a gradient that is wrong by a factor.
        largest = other.grad.abs().max().item()
        torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=1e-3 * largest)


def test_writing_is_reading(example) -> None:
    torch.manual_seed(0)
    model = example.Model(WIDTH, example.GatedDelta)
    prompt = torch.randint(256, (1, 30))
    text, logits, _ = example.write(model, example.compiled(), prompt, BYTES)
    assert text.shape == (1, 30 + BYTES)
    assert torch.equal(text[:, :30], prompt)
    with torch.no_grad():
        # That the layers remember nothing of it, too.
        whole = model(text[:, :-1], example.token_loop)[:, 29:]
    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-4)
    assert whole.std() > 0.1


def test_checked_run(example, arguments, capsys) -> None:
    pytest.importorskip("matplotlib")
    example.main()
    assert arguments.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "losses of 3 steps are never more than" in printed
    assert re.search(rf"{BYTES} bytes, .* ms each", printed)


@pytest.mark.parametrize("spoil", [torch.detach, lambda v: v * math.nan], ids=["no gradient", "nan"])
def test_check_fails_where_curves_part(example, arguments, spoil, monkeypatch) -> None:
    right = example.token_loop
    monkeypatch.setattr(example, "token_loop", lambda q, k, v, *rest: right(q, k, spoil(v), *rest))
    with pytest.raises(SystemExit, match=r"losses are .* apart; the bound is 0\.001"):
        example.main()


def test_check_fails_where_logits_part(example, arguments, monkeypatch) -> None:
    right = example.compiled()

    def forgetful(*rows: Tensor) -> Tensor:
        *operands, state = rows
        o = right(*operands, state)
        if state is not None:
            state.zero_()
        return o

    monkeypatch.setattr(example, "compiled", lambda: forgetful)
    with pytest.raises(SystemExit, match=r"logits are .* apart; the bound is 0\.001"):
        example.main()


@pytest.mark.parametrize("wrong", ["--width 30", "--compare 0", "--steps 3 --compare 4", "--write 0"])
def test_options_that_do_not_fit(example, wrong, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["recurrent_lm.py", *wrong.split()])
    with pytest.raises(SystemExit):
        example.main()
    assert "it takes" in capsys.readouterr().err
