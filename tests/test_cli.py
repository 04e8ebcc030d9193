"""The command line: what each command prints and returns, and that a mistake of the user's is never a traceback."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from attncc.cli import main, parser
from attncc.commands.common import device_of
from attncc.timing import Timing

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
CAUSAL = str(EXAMPLES / "causal.attn")
WINDOW = str(EXAMPLES / "sliding_window.attn")
ALIBI = str(EXAMPLES / "alibi.attn")
SMALL = ("--shape", "1,2,1,9,9,8")


@pytest.fixture
def bad(tmp_path: Path) -> str:
    path = tmp_path / "bad.attn"
    path.write_text("attention bad(window: int):\n    mask = q_idx - kv_idx < windw\n", encoding="utf-8")
    return str(path)


def test_the_package_is_the_command() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "attncc", "check", CAUSAL], capture_output=True, text=True, check=True
    )
    assert found.stdout.endswith("ok\n")


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


def test_check_of_one_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "two.attn"
    path.write_text("attention one():\n    mask = causal\n\nattention two():\n    mask = oops\n", encoding="utf-8")
    assert main(["check", str(path), "--name", "one"]) == 0
    assert capsys.readouterr().out == f"{path}: one: ok\n"
    assert main(["check", str(path), "--name", "two"]) == 1
    assert main(["check", str(path), "--name", "on"]) == 1
    assert "did you mean `one`?" in capsys.readouterr().err


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


def test_emit_the_backward_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["emit", ALIBI, "--backward"]) == 0
    assert capsys.readouterr().out.startswith("// alibi_backward: ")
    assert main(["emit", ALIBI, "--backward", "--stage", "plan"]) == 0
    assert "part = slope[h]" in capsys.readouterr().out


def test_build_the_backward_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", ALIBI, "--backward", "--head-dim", "8", "-o", str(tmp_path)]) == 0
    assert "alibi_backward: " in capsys.readouterr().out
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".cpp", ".so"]


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


def test_a_standalone_source_of_two_files_is_not_put_into_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "one.py"
    assert main(["emit", ALIBI, "--standalone", "-o", str(path)]) == 1
    err = capsys.readouterr().err
    assert f"{path} names one file, and the standalone source is alibi.cpp and alibi.py" in err
    assert f"-o {tmp_path / 'one'}" in err
    assert not path.exists()
    assert main(["emit", ALIBI, "--standalone", "--target", "triton:sm_90", "-o", str(path)]) == 0
    assert path.is_file()


def test_build_cpp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", CAUSAL, "--target", "cpp", "--head-dim", "8", "-o", str(tmp_path)]) == 0
    assert "causal_forward" in capsys.readouterr().out
    assert list(tmp_path.glob("causal_forward*.so"))


@pytest.mark.parametrize("target", ["cpp", "triton:sm_90"])
def test_build_on_a_full_disk(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("compile_kernel", "compile_ahead"):
        monkeypatch.setattr(f"attncc.commands.compiling.{name}", full)
    assert main(["build", CAUSAL, "--target", target, "-o", str(tmp_path)]) == 1
    assert f"error[A0632]: cannot write {tmp_path}: no space left on device" in capsys.readouterr().err


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


def test_run_says_where_it_does_not_compare(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", CAUSAL, "--shape", "1,1,1,2048,2049,8"]) == 0
    assert "error      not computed above 4194304 pairs" in capsys.readouterr().out


def test_run_marks_a_time_that_was_disturbed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for undisturbed in (True, False):
        timing = Timing(median=0.5, best=0.5, samples=1, undisturbed=undisturbed)
        monkeypatch.setattr("attncc.commands.running._time", lambda *_, timing=timing: timing)
        assert main(["run", CAUSAL, *SMALL]) == 0
        marked = "" if undisturbed else ", disturbed by other work on the machine"
        assert f"time       500.000 ms, median of 1 call{marked}\n" in capsys.readouterr().out


def test_run_with_scalars(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", WINDOW, *SMALL, "--set", "window=3"]) == 0
    assert "window     3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", CAUSAL, *SMALL, "--set", "window=3"], "no parameter `window`"),
        (["run", WINDOW, *SMALL, "--set", "windw=3"], "did you mean `window`?"),
        (["run", ALIBI, *SMALL, "--set", "slope=1"], "`slope` is a tensor, and `--set` gives numbers"),
        (["run", str(EXAMPLES / "bigbird.attn"), *SMALL, "--set", "blk=16"], "did you mean `block`?"),
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
        ["run", CAUSAL, "--input", "in.safetensors", "--shape", "1,1,1,4,4,8"],
        ["run", CAUSAL, "--dtype", "bf16", "--input", "in.safetensors"],
        ["explain", CAUSAL, "--png", "a.png", "--input", "in.safetensors", "--shape", "1,1,1,4,4,8"],
        ["explain", CAUSAL, "--png", "a.png", "--head-dim", "64"],
        ["explain", CAUSAL, "--input", "in.safetensors"],
        ["emit", CAUSAL, "--backward", "--standalone"],
        ["explain", CAUSAL, "--head", "0"],
        ["explain", CAUSAL, "--png", "a.png", "--head", "-1"],
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


def test_explain_draws_what_it_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two batches one is a single document, the other has two: half of its tiles are skipped."""
    pytest.importorskip("matplotlib")
    given, path = tmp_path / "in.safetensors", tmp_path / "mask.png"
    q = torch.zeros(2, 2, 1024, 16, dtype=torch.bfloat16)
    doc = torch.zeros(2, 1024, dtype=torch.int64)
    doc[1, 512:] = 1
    save_file({"q": q, "k": q.clone(), "v": q.clone(), "doc": doc}, given)
    document = [str(EXAMPLES / "document.attn"), "--png", str(path), "--input", str(given)]
    skipped: list[int] = []
    for batch in ("0", "1"):
        assert main(["explain", *document, "--batch", batch, "--head", "1"]) == 0
        err = capsys.readouterr().err
        assert f"drew batch {batch}, head 1 of B=2 H=2 HKV=2 M=1024 N=1024 D=16 E=16" in err
        assert "not given" not in err
        found = re.search(r"of (\d+) tiles of .*, (\d+) are skipped", err)
        assert found is not None
        skipped.append(int(found[2]) * 2 // int(found[1]))
    assert skipped == [0, 1]
    for option, size in (("--batch", 2), ("--head", 2)):
        assert main(["explain", *document, option, str(size)]) == 1
        assert f"there is no {option[2:]} 2 to draw" in capsys.readouterr().err


def test_explain_writes_expressions_as_people_do(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("streaming_llm", "prefix_lm", "document_causal", "ragged_decode"):
        assert main(["explain", str(EXAMPLES / f"{name}.attn")]) == 0
    out = capsys.readouterr().out
    assert "keys from 0 to min(N, q_hi + 1, sinks)" in out
    assert "kv_lo <= q_hi and min_q(doc[b, q_idx]) <= max_kv(doc[b, kv_idx]) and min_kv" in out
    assert "min(min(" not in out
    assert "%" not in out


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


def test_where_tensors_lie_is_told_by_what_a_target_is_based_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, based_on in (("mine", "cpp"), ("cpp_on_gpu", "triton")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "target.toml").write_text(f'based_on = "{based_on}"\n', encoding="utf-8")
    devices = {target: device_of(target, [tmp_path]) for target in ("cpp", "mine:avx2", "triton:interpret")}
    assert set(devices.values()) == {"cpu"}
    assert {device_of(target, [tmp_path]) for target in (None, "triton", "cpp_on_gpu")} == {"cuda"}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["--version"], ["explain", "A0201"], ["fmt", "--check", CAUSAL]]
)
def test_what_needs_no_tensors_starts_without_pytorch(arguments: list[str]) -> None:
    program = "import sys; sys.modules['torch'] = None; from attncc.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
