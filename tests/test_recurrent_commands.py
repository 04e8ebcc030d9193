"""`run` and `verify` of recurrences."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import attncc
from attncc.build import check
from attncc.cli import main
from attncc.ir.recurrence import Recurrence
from attncc.recurrent_reference import evaluate
from attncc.runtime.recurrent import RecurrentAttention
from attncc.verify_recurrent import recurrent_snippet, verify_recurrent

EXAMPLES = Path(__file__).parent.parent / "examples" / "recurrent"
# The state enters by a function that is not linear: there is no normal form.
BOUNDED = "attention bounded():\n    recurrence:\n        S = tanh(S) + outer(k, v)\n        out = q @ S\n"


@pytest.mark.parametrize("name", ["gated_deltanet", "linear_attention"])
def test_run_writes_output_and_state(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "o.safetensors"
    spec = EXAMPLES / f"{name}.attn"
    assert main(["run", str(spec), "--shape", "1,2,2,40,40,8", "-o", str(path)]) == 0
    out = capsys.readouterr().out
    assert "state      (1, 2, 8," in out
    assert "against the float64 reference" in out
    written = load_file(path)
    assert written["o"].shape == (1, 2, 40, 8)
    assert written["state"].shape[:3] == (1, 2, 8)


@pytest.mark.parametrize(("shape", "code"), [("1,4,2,4,5,8", "A0603"), ("1,8,3,5,5,8", "A0620")])
def test_run_of_a_shape_that_does_not_fit(
    shape: str, code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers for the decay are looked for before the call, with operands that are made of rows and inputs."""
    spec = tmp_path / "rows.attn"
    head = "attention rows(a: float[B, H, N], u: float[H]):\n    k = l2norm(k)\n    recurrence:\n"
    read, write = "out = q @ (S + u[h] * outer(k, v))", "S += outer(k, v)"
    spec.write_text(f"{head}        S *= sigmoid(a[b, h, t])\n        {read}\n        {write}\n", encoding="utf-8")
    assert main(["run", str(spec), "--shape", shape]) == 1
    assert f"error[{code}]" in capsys.readouterr().err


def test_run_does_not_wait_for_the_reference_of_many_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(EXAMPLES / "retnet.attn"), "--shape", "1,2,2,20000,20000,8"]) == 0
    assert "not computed above 16384 tokens" in capsys.readouterr().out


@pytest.mark.representative(1)
@pytest.mark.parametrize("name", ["retnet", "linear_attention", "based"])
def test_verify_finds_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--examples", "4", "--longest", "30", "--target", "cpp", "--dtype", "f32"]
    assert main(["verify", str(EXAMPLES / f"{name}.attn"), *arguments]) == 0
    assert "ok  4 f32" in capsys.readouterr().out


def test_verify_of_what_has_no_normal_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "bounded.attn"
    spec.write_text(BOUNDED, encoding="utf-8")
    assert main(["verify", str(spec), "--examples", "4", "--longest", "20", "--target", "cpp", "--dtype", "f32"]) == 0
    assert "ok  4 f32" in capsys.readouterr().out


def broken(attn: RecurrentAttention, result: str) -> Any:
    """A kernel whose output, or state, is wrong by a little at its last token."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        o, state = attn(q, k, v, return_state=True, **arguments)
        if result == "o" and o.numel():
            o = torch.cat([o[:, :, :-1], o[:, :, -1:] * 1.01], 2)
        return o, state * 1.01 if result == "state" else state

    return kernel


@pytest.mark.representative(1)
@pytest.mark.parametrize("result", ["o", "state"])
def test_verify_finds_a_fault_and_shows_it(result: str) -> None:
    spec = str(EXAMPLES / "retnet.attn")
    attn = attncc.build(spec)
    assert isinstance(attn, RecurrentAttention)
    report = verify_recurrent(
        attn.attention, "cpp", broken(attn, result), dtypes=["f32"], examples=20, longest=20, scalars={}
    )
    assert report.failure is not None
    assert report.failure.result == result
    program = recurrent_snippet(report.failure, spec, None, {})
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "off by" in done.stdout


def test_verify_finds_a_wrong_gradient() -> None:
    recurrence = check(EXAMPLES / "linear.attn")
    assert isinstance(recurrence, Recurrence)

    def kernel(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        half = k / 2 + k.detach() / 2
        o, state = evaluate(recurrence, q, half, v, {}, arguments.get("initial_state"), 0, offsets_of(arguments))
        return o.to(q.dtype), state.to(torch.float32)

    report = verify_recurrent(recurrence, "test", kernel, dtypes=["f32"], examples=20, longest=10, scalars={})
    assert report.failure is not None
    assert report.failure.result == "dk"


def offsets_of(arguments: dict[str, Any]) -> list[int] | None:
    return arguments["cu_seqlens"].tolist() if "cu_seqlens" in arguments else None
