"""The training example at a small size: what compiled attention learns is what the dense formula learns."""

from __future__ import annotations

import copy
import importlib.util
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "examples" / "train_lm.py"
STEPS, LENGTH, WIDTH = 20, 96, 32


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, with a window that cuts sequences as short as those of tests."""
    spec = importlib.util.spec_from_file_location("train_lm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "WINDOW", 40)
    return module


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Command line of a small, checked run; the path of its plot."""
    path = tmp_path / "curves.png"
    options = {"--steps": STEPS, "--length": LENGTH, "--width": WIDTH, "--out": path}
    words = [str(word) for option in options.items() for word in option]
    monkeypatch.setattr(sys, "argv", ["train_lm.py", "--check", *words])
    return path


def test_models_learn_the_same(example) -> None:
    torch.manual_seed(0)
    model = example.Model(WIDTH)
    before = copy.deepcopy(model)
    compiled = example.Learner("compiled", model, example.compiled())
    dense = example.Learner("dense", copy.deepcopy(model), example.dense)
    example.train([compiled, dense], example.find_text()[1], STEPS, LENGTH)
    assert compiled.losses == pytest.approx(dense.losses, rel=0, abs=1e-3)
    assert compiled.losses[-1] < compiled.losses[0] - 1
    for name, parameter in compiled.model.named_parameters():
        other = dense.model.get_parameter(name)
        assert not torch.equal(parameter, before.get_parameter(name)), name
        torch.testing.assert_close(parameter, other, rtol=0, atol=1e-3)
        # AdamW would hide a gradient that is wrong by a factor.
        largest = other.grad.abs().max().item()
        torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=1e-3 * largest)


def test_checked_run(example, arguments, capsys) -> None:
    pytest.importorskip("matplotlib")
    example.main()
    assert arguments.read_bytes().startswith(b"\x89PNG")
    assert f"median step at N = {LENGTH}" in capsys.readouterr().out


@pytest.mark.parametrize("spoil", [torch.detach, lambda v: v * math.nan], ids=["no gradient", "nan"])
def test_check_fails_where_curves_part(example, arguments, spoil, monkeypatch) -> None:
    right = example.dense
    monkeypatch.setattr(example, "dense", lambda q, k, v, bias: right(q, k, spoil(v), bias))
    with pytest.raises(SystemExit, match=r"apart; the bound is 0\.001"):
        example.main()


def test_runs_without_matplotlib(example, arguments, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    example.main()
    assert "pip install matplotlib" in capsys.readouterr().out
    assert not arguments.exists()


@pytest.mark.parametrize("wrong", ["--width 30", "--steps 1", "--length 100000000", "--out none/plot.png"])
def test_options_that_do_not_fit(example, wrong, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["train_lm.py", *wrong.split()])
    with pytest.raises(SystemExit):
        example.main()
    assert re.search("it takes|there is no folder", capsys.readouterr().err)


def test_other_texts(example, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    title, text = example.find_text()
    assert "Python's help" not in title
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: glob(folder, pattern) if pattern == "*.py" else ())
    title, library = example.find_text()
    assert title == "the source of Python's library"
    assert min(len(text), len(library)) > 100_000
