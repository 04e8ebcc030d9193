"""The command line: what each command prints and returns, and that a mistake of the user's is never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from attncc.cli import main, parser

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
CAUSAL = str(EXAMPLES / "causal.attn")
ALIBI = str(EXAMPLES / "alibi.attn")
SMALL = ("--shape", "1,2,1,9,9,8")


@pytest.fixture
def bad(tmp_path: Path) -> str:
    path = tmp_path / "bad.attn"
    path.write_text("attention bad(window: int):\n    mask = q_idx - kv_idx < windw\n", encoding="utf-8")
    return str(path)


def test_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", CAUSAL, ALIBI]) == 0
    assert capsys.readouterr().out == f"{CAUSAL}: causal: ok\n{ALIBI}: alibi: ok\n"


def test_check_reports_every_file(bad: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", bad, "missing.attn", CAUSAL]) == 1
    out, err = capsys.readouterr()
    assert "causal: ok" in out
    assert "unknown name `windw`" in err
    assert "did you mean `window`" in err
    assert "cannot read missing.attn" in err


def test_check_takes_constants(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(EXAMPLES / "bigbird.attn"), "--set", "block=16"]) == 0
    assert main(["check", str(EXAMPLES / "bigbird.attn"), "--set", "blok=16"]) == 1
    assert "blok" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["ast", "ir", "plan", "source"])
def test_emit(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["emit", ALIBI, "--stage", stage]) == 0
    assert "slope" in capsys.readouterr().out


@pytest.mark.parametrize(("target", "word"), [("cpp", "GOMP"), ("triton:sm_90", "@triton.jit")])
def test_emit_source_for_a_target(target: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["emit", ALIBI, "--target", target, "--dtype", "bf16", "--head-dim", "64,32"]) == 0
    out = capsys.readouterr().out
    assert "alibi_forward" in out
    assert "D = 64, E = 32" in out
    assert word in out or target == "cpp"


def test_emit_standalone(tmp_path: Path) -> None:
    assert main(["emit", ALIBI, "--standalone", "--head-dim", "8", "-o", str(tmp_path)]) == 0
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import torch
from alibi import alibi
q = torch.ones(1, 1, 3, 8)
print(alibi(q, q, q, slope=torch.ones(1)).mean().item())
assert "attncc" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(1.0, abs=1e-6)


def test_build_cpp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", CAUSAL, "--target", "cpp", "--head-dim", "8", "-o", str(tmp_path)]) == 0
    assert "causal_forward" in capsys.readouterr().out
    assert list(tmp_path.glob("causal_forward*.so"))


@pytest.mark.slow
def test_build_triton(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", CAUSAL, "--target", "triton:sm_90", "--dtype", "bf16", "-o", str(tmp_path)]) == 0
    assert "registers" in capsys.readouterr().out
    assert list(tmp_path.glob("*.cubin"))


def test_run_says_what_it_made_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", ALIBI, *SMALL]) == 0
    out, err = capsys.readouterr()
    assert "`slope` is not given" in err
    assert "o          (1, 2, 9, 8) float32" in out
    assert "ms" in out
    error = next(line for line in out.splitlines() if line.startswith("error"))
    assert float(error.split()[1]) < 1e-5


def test_run_reads_and_writes_safetensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, taken = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 6)
    save_file({"q": q, "k": k, "v": v, "slope": torch.full((4,), 0.5), "other": q.clone()}, given)
    assert main(["run", ALIBI, "--input", str(given), "-o", str(taken)]) == 0
    assert "other" in capsys.readouterr().err
    saved = load_file(taken)
    assert saved["o"].shape == (1, 4, 5, 6)
    assert saved["lse"].shape == (1, 4, 5)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    distance = torch.arange(5)[:, None] + 2 - torch.arange(7)
    score = (q @ k.mT / 8**0.5 - 0.5 * distance).masked_fill(distance < 0, -torch.inf)
    torch.testing.assert_close(saved["o"], score.softmax(-1) @ v)


def test_run_with_scalars(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(EXAMPLES / "sliding_window.attn"), *SMALL, "--set", "window=3"]) == 0
    assert "window     3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", CAUSAL, *SMALL, "--set", "window=3"], "no parameter `window`"),
        (["run", str(EXAMPLES / "natten_2d.attn"), *SMALL], "`width` is missing"),
        (["run", CAUSAL, "--input", "missing.safetensors"], "cannot read missing.safetensors"),
        (["run", CAUSAL, "--shape", "1,3,2,4,4,8"], "3 query heads"),
        (["run", CAUSAL, *SMALL, "-o", "/no/such/folder/o.safetensors"], "cannot write"),
        (["run", CAUSAL, *SMALL, "--target", "cuda"], "no target `cuda`"),
        (["run", CAUSAL, *SMALL, "--templates", "/no/such/folder"], "no folder of templates"),
        (["run", str(EXAMPLES / "relative_bias.attn"), "--shape", "1,1,1,0,0,8"], "at these sizes"),
        (["bench", CAUSAL, "--against", "sppa"], "no peer `sppa`"),
        (["verify", CAUSAL, "--target", "cuda"], "no target `cuda`"),
        (["run", CAUSAL, "--shape", "1,1,1,100000000,100000000,100000"], "not enough memory"),
        (["explain", "A9999"], "no error code"),
        (["explain", "missing.attn"], "cannot read"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert message in err
    assert "error[A" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["compile"],
        ["run"],
        ["run", CAUSAL, "--shape", "1,2"],
        ["run", CAUSAL, "--set", "window"],
        ["run", CAUSAL, "--dtype", "int8"],
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_a_read_outside_a_tensor_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "shifted.attn"
    path.write_text("attention shifted(bias: f32[N]):\n    score = qk + bias[kv_idx + 1]\n", encoding="utf-8")
    assert main(["run", str(path), *SMALL]) == 1
    assert "`bias` is read outside its axis 0: index 9 of 9" in capsys.readouterr().err


def test_a_fault_of_attncc_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(_: object) -> int:
        raise RuntimeError("planted")

    monkeypatch.setattr("attncc.commands.specs.check", broken)
    assert main(["check", CAUSAL]) == 70
    err = capsys.readouterr().err
    assert "error[A0901]" in err
    assert "planted" in err
    monkeypatch.setenv("ATTNCC_DEBUG", "1")
    with pytest.raises(RuntimeError, match="planted"):
        main(["check", CAUSAL])


def test_fmt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.attn"
    path.write_text("attention a( ):\n  mask=causal   # the past\n", encoding="utf-8")
    assert main(["fmt", "--check", str(path)]) == 1
    assert "would be reformatted" in capsys.readouterr().err
    assert main(["fmt", str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    assert text == "attention a():\n    mask = causal  # the past\n"
    assert main(["fmt", "--check", str(path)]) == 0


def test_examples_are_formatted() -> None:
    assert main(["fmt", "--check", *map(str, sorted(EXAMPLES.glob("*.attn")))]) == 0


def test_explain_a_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "a0201"]) == 0
    out = capsys.readouterr().out
    assert "unknown name" in out
    assert "Wrong:" in out


def test_explain_a_specification(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", ALIBI]) == 0
    out = capsys.readouterr().out
    for heading in ("Specification", "Block structure", "Algorithm", "Kernels for cpp"):
        assert heading in out


def test_explain_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "mask.png"
    assert main(["explain", CAUSAL, "--png", str(path), "--shape", "1,1,1,256,256,64"]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "are skipped" in capsys.readouterr().err


def test_bench_writes_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", CAUSAL, "--shape", "1,1,1,64,64,16", "--against", "eager,sdpa", "--repeat", "3"]
    assert main([*arguments, "--dtype", "f32", "--threads", str(torch.get_num_threads()), "--json", "-"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["pairs"] == 64 * 65 // 2
    assert [row["name"] for row in result["rows"]] == ["attncc", "eager", "sdpa"]
    assert all(row["timing"]["median"] > 0 for row in result["rows"])
    assert 0 < result["rows"][0]["peak_share"] < 1.2


def test_bench_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    softcap = str(EXAMPLES / "softcap.attn")
    arguments = ["bench", softcap, "--shape", "1,1,1,32,32,16", "--against", "sdpa", "--repeat", "3", "--dtype", "f32"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "attncc" in out
    assert "cannot express it" in out


def test_every_command_has_help() -> None:
    text = parser().format_help()
    for command in ("check", "build", "emit", "run", "verify", "bench", "fmt", "explain"):
        assert command in text


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m attncc.cli emit {ALIBI} | head -1", shell=True, capture_output=True, text=True, check=True
    )
    assert "Traceback" not in done.stderr
    assert "Broken" not in done.stderr
