"""What is said to someone who writes what something else is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from attncc import SpecError, build
from attncc.cli import main

EXAMPLES = Path(__file__).parent.parent / "examples"
CAUSAL = str(EXAMPLES / "causal.attn")
WINDOW = str(EXAMPLES / "sliding_window.attn")
ALIBI = str(EXAMPLES / "alibi.attn")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["run", CAUSAL, "name=other"], "unrecognized arguments: name=other (did you mean --name other?)"),
        (["run", WINDOW, "window=3"], "(did you mean --set window=3?)"),
        (["run", WINDOW, "--window=3"], "(did you mean --set window=3?)"),
        (["run", WINDOW, "--set", "name=other"], "an attention is chosen by --name other"),
        (["run", ALIBI, "--set", "slope=slopes.safetensors"], "tensors come with q, k and v from a file: --input FILE"),
    ],
)
def test_wrong_usage_is_told_what_to_write(arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert hint in capsys.readouterr().err


def test_a_word_that_is_neither_a_path_nor_a_specification() -> None:
    with pytest.raises(SpecError) as caught:
        build("nope")
    assert "cannot read nope: it is neither a path that ends in `.attn` nor the text of a spec" in str(caught.value)
