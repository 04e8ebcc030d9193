"""What README and the documentation of the command line say works as printed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import tiered

import attncc
from attncc.cli import main
from attncc.ir.nodes import Attention
from attncc.ir.recurrence import Recurrence
from attncc.passes.reassociate import recurrence_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTORCH = (ROOT / "docs/pytorch.md").read_text(encoding="utf-8")
RECURRENCES = (ROOT / "docs/recurrences.md").read_text(encoding="utf-8")
CLI = (ROOT / "docs/cli.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    lines = [line for block in blocks(text, "console") for line in block.splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ attncc")]


def test_python_snippets_run() -> None:
    program = "\n".join(blocks(README, "python"))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # The last one prints an error, and README shows it.
    (shown,) = blocks(README, "text")
    assert shown.strip() in done.stdout


@pytest.mark.slow
def test_the_snippets_on_pytorch_run(tmp_path: Path) -> None:
    program = "\n".join(blocks(PYTORCH, "python"))
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_snippets_on_recurrences_run() -> None:
    program = "\n".join(blocks(RECURRENCES, "python"))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_specifications_of_recurrences_are_what_the_page_says() -> None:
    written, features, weights = blocks(RECURRENCES, "attn")
    (shown,) = blocks(RECURRENCES, "text")
    assert shown in attncc.build(written).explain()
    assert isinstance(attncc.check(features), Recurrence)
    pairwise = attncc.check(weights)
    assert isinstance(pairwise, Attention)
    assert isinstance(recurrence_of(pairwise), Recurrence)


def test_as_many_recurrences_are_published_as_the_page_says() -> None:
    numbers = {17: "Seventeen", 18: "Eighteen", 19: "Nineteen", 20: "Twenty"}
    count = len(list((ROOT / "examples/recurrent").glob("*.attn")))
    assert f"{numbers[count]} published ones" in RECURRENCES


def test_the_first_command_prints_what_is_shown(tmp_path: Path) -> None:
    spec, *_ = blocks(README, "attn")
    (tmp_path / "gemma2.attn").write_text(spec, encoding="utf-8")
    block = blocks(README, "console")[0]
    command, *shown = block.strip().splitlines()
    program = [sys.executable, "-m", "attncc.cli", *shlex.split(command.removeprefix("$ attncc"))]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=True)
    # All but the time, which is that of the machine.
    time = re.compile(r"time +\d+\.\d+ ms, median of \d+ calls?(, disturbed by other work on the machine)?$")
    assert [time.sub("time", line) for line in done.stdout.splitlines()] == [time.sub("time", line) for line in shown]


# `verify` compiles for every width that it draws; its own tests run it with fewer examples.
@pytest.mark.parametrize("command", tiered(lambda command: "verify" not in command, commands(CLI)))
def test_commands_run(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "path", ["README.md", "CONTRIBUTING.md", "docs/index.md", "docs/cli.md", "docs/pytorch.md", "docs/recurrences.md"]
)
def test_links_lead_somewhere(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or ((ROOT / path).parent / target).exists(), target


def test_every_path_that_contributing_names_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:attncc|grammar|templates|tests|docs|examples)/[\w./]*)`", text):
        if "NAME" not in name and "CODE" not in name:
            assert (ROOT / name).exists(), name


def test_every_variant_is_in_the_table() -> None:
    for path in (ROOT / "examples").glob("*.attn"):
        assert f"(examples/{path.name})" in README, path.name


def test_every_make_target_is_explained() -> None:
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("help", "setup", "demo", "test", "test-all", "lint", "train", "bench", "gpu"):
        assert f"make {target} " in text
