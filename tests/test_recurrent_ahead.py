"""Kernels of recurrences ahead of time: what `emit` prints and `build` compiles is what calls run on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import attncc
from attncc.cli import main
from attncc.ir.types import DType
from attncc.plan.nodes import Specialization
from attncc.runtime.targets import parse

EXAMPLES = Path(__file__).parent.parent / "examples" / "recurrent"
RETNET = str(EXAMPLES / "retnet.attn")
PERFORMER = str(EXAMPLES / "performer.attn")
BOUNDED = """
attention bounded():
    recurrence:
        S = tanh(S + outer(k, v))
        out = q @ S
"""
# Every query reads what all tokens leave.
OF_ALL_KEYS = """
attention of_all_keys():
    feature   = elu(x) + 1
    normalize = sum
"""


@pytest.fixture
def bounded(tmp_path: Path) -> str:
    path = tmp_path / "bounded.attn"
    path.write_text(BOUNDED, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("backward", [False, True])
def test_emit_for_cpp(backward: bool, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["emit", RETNET, "--head-dim", "16,8", *(["--backward"] if backward else [])]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.count('extern "C" __attribute__((visibility("default"))) int attncc_run') == (1 if backward else 2)
    assert main([*arguments, "--stage", "plan"]) == 0
    plans = capsys.readouterr().out
    names = ["recurrent_backward"] if backward else ["recurrent", "recurrent_staged"]
    assert [line for line in plans.splitlines() if line.startswith("  name")] == [f"  name = {n!r}" for n in names]
    assert backward or "tensor = 'gamma'" in plans  # what operands are made of
    assert "key_width = 16\n  value_width = 8\n" in plans


@pytest.mark.parametrize("backward", [False, True])
def test_emit_for_triton(backward: bool, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["emit", PERFORMER, "--target", "triton:sm_90", "--dtype", "bf16", "--head-dim", "32"]
    assert main([*arguments, *(["--backward"] if backward else [])]) == 0
    out = capsys.readouterr().out
    # As many keys as random features, and a column of weights beside the values.
    assert "bf16, D = 64, E = 33" in out
    assert ("def recurrent_backward_reverse(" if backward else "def recurrent_step(") in out


@pytest.mark.parametrize(("target", "word"), [("cpp", "attncc_run"), ("triton:sm_90", "@triton.jit")])
def test_emit_a_sequential_kernel(target: str, word: str, bounded: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["emit", bounded, "--target", target]) == 0
    assert word in capsys.readouterr().out
    assert main(["emit", bounded, "--target", target, "--stage", "plan"]) == 0
    out = capsys.readouterr().out
    assert "spec = attention bounded" in out
    assert "value = tanh(" in out


def test_what_is_emitted_is_what_calls_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCC_CACHE", str(tmp_path))
    attn = attncc.build(RETNET, target="cpp")
    ahead = dict(attn.source(head_dim=16, head_dim_v=8))
    assert ahead.keys() == {"recurrent", "recurrent_staged"}
    q, k = torch.randn(2, 1, 2, 9, 16)
    v = torch.randn(1, 2, 9, 8)
    gamma = torch.tensor([0.5, 0.9])
    attn(q, k, v, gamma=gamma)
    assert attn.source(dtype=torch.float64) == {"recurrent_staged": ahead["recurrent_staged"]}, "what was compiled"
    attn(q.requires_grad_(), k, v, gamma=gamma).sum().backward()
    assert attn.source() == ahead
    compiled = {path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.cpp")}
    specialization = Specialization(DType.F32, 16, 8, (("gamma", DType.F32),))
    backward = attn.kernels.sources(specialization, parse("cpp"), backward=True)
    assert compiled == {*ahead.values(), *(text for _, text in backward)}


def test_what_is_emitted_of_a_sequential_kernel_is_what_calls_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNCC_CACHE", str(tmp_path))
    attn = attncc.build(BOUNDED, target="cpp")
    ahead = attn.source(head_dim=8)
    assert list(ahead) == ["bounded_sequential"]
    attn(*torch.randn(3, 1, 1, 4, 8))
    assert attn.source() == ahead
    assert [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.cpp")] == list(ahead.values())


@pytest.mark.parametrize(
    ("options", "libraries"),
    [((), ["recurrent-", "recurrent_staged-"]), (("--backward",), ["recurrent_backward-"])],
)
def test_build_for_cpp(
    options: tuple[str, ...], libraries: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", RETNET, "--head-dim", "8", "-o", str(tmp_path), *options]) == 0
    built = sorted(tmp_path.glob("*.so"))
    assert [path.name.split("-")[0] + "-" for path in built] == libraries
    assert all(f"{path}\n" in capsys.readouterr().out for path in built[:1])


def test_build_a_sequential_kernel(bounded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", bounded, "--head-dim", "8", "-o", str(tmp_path / "out")]) == 0
    (library,) = (tmp_path / "out").glob("*.so")
    assert f"bounded_sequential: {library}\n" in capsys.readouterr().out


def test_build_for_triton(bounded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", bounded, "--target", "triton:sm_90", "--head-dim", "16", "-o", str(tmp_path)]) == 0
    assert "bounded_sequential[PACKED]: " in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.cubin"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--backward",)])
def test_build_a_core_for_triton(options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["build", RETNET, "--target", "triton:sm_90", "--head-dim", "16", "-o", str(tmp_path), *options]
    assert main(arguments) == 0
    assert "registers" in capsys.readouterr().out
    assert list(tmp_path.glob("*.cubin"))


@pytest.mark.parametrize("options", [["emit", "--standalone"], ["explain", "--png", "mask.png"]])
def test_what_needs_pairs_says_that_there_are_none(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command, *rest = options
    assert main([command, RETNET, *rest]) == 1
    assert (
        "error[A0547]: this works on pairs of queries and keys, and `retnet` is a recurrence" in capsys.readouterr().err
    )


@pytest.mark.parametrize("command", ["emit", "build"])
def test_where_pytorch_does_everything_there_is_no_kernel(
    command: str, bounded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "of_all_keys.attn"
    path.write_text(OF_ALL_KEYS, encoding="utf-8")
    assert main([command, str(path)]) == 1
    assert "error[A0548]: there is no kernel to compile for `of_all_keys`: it is two" in capsys.readouterr().err
    assert attncc.build(path).source() == {}
    assert main([command, bounded, "--backward"]) == 1
    assert "for `bounded`: PyTorch goes back token by token" in capsys.readouterr().err
