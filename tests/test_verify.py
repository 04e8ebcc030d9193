"""`verify` finds what is wrong, makes it small, and says nothing of what is right."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from attncc.build import build, check
from attncc.cli import main
from attncc.diagnostics import CallError
from attncc.runtime.errors import NoLse
from attncc.verify import Failure, Report, snippet, verify

WINDOW = "attention windowed(window: int = 64):\n    mask = causal and q_idx - kv_idx < window\n"


def reference_kernel(spec: str, break_it: Any = None) -> Any:
    """A kernel that is right, but for what `break_it` does to its output."""
    attn = build(spec)

    def kernel(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
        o, lse = attn.reference(q, k, v, return_lse=True, **keywords)
        if break_it is not None:
            o, lse = break_it(q, k, o, lse, keywords)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        return o.to(q.dtype), lse.to(wide)

    return kernel


def run(spec: str, break_it: Any = None, **options: Any) -> Report:
    options = {"examples": 24, "longest": 60} | options
    return verify(check(spec), "test", reference_kernel(spec, break_it), **options)


def test_a_right_kernel_passes() -> None:
    ticks: list[int] = []
    report = run(WINDOW, tick=lambda: ticks.append(1))
    assert report.failure is None
    assert set(report.tried) == {"f32", "bf16", "f16", "f64"}
    assert sum(report.tried.values()) >= 20
    assert len(ticks) >= 24
    assert report.largest["N"] > 30


def test_an_off_by_one_is_found_and_made_small() -> None:
    def last_key_doubled(q: Tensor, k: Tensor, o: Tensor, lse: Tensor, _: object) -> tuple[Tensor, Tensor]:
        return (o * 2 if k.shape[2] > 10 else o), lse

    failure = run(WINDOW, last_key_doubled).failure
    assert failure is not None
    assert failure.case.sizes.N == 11
    assert failure.case.sizes.B == 1
    assert "o[" in failure.message


@pytest.mark.parametrize(
    "is_wrong", [lambda q, o: q.shape[3] > 100, lambda q, o: 64 < q.shape[3] < o.shape[3]], ids=["wide", "unequal"]
)
def test_a_mistake_at_wide_rows_is_found(is_wrong: Any) -> None:
    def wrong(q: Tensor, k: Tensor, o: Tensor, lse: Tensor, _: object) -> tuple[Tensor, Tensor]:
        return (o + 1 if is_wrong(q, o) else o), lse

    for dtype in ("f32", "bf16"):
        failure = run(WINDOW, wrong, dtypes=(dtype,), examples=60).failure
        assert failure is not None
        assert failure.case.sizes.D > 64


def test_a_wrong_lse_is_found() -> None:
    failure = run(WINDOW, lambda q, k, o, lse, _: (o, lse + 0.01)).failure
    assert failure is not None
    assert failure.message.startswith("lse[")


def test_a_nan_is_found() -> None:
    failure = run(WINDOW, lambda q, k, o, lse, _: (o.fill_(float("nan")), lse)).failure
    assert failure is not None
    assert "nan" in failure.message


def test_a_wrong_use_of_q_offset_is_found() -> None:
    attn = build(WINDOW)

    def kernel(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
        keywords["q_offset"] = None
        o, lse = attn.reference(q, k, v, return_lse=True, **keywords)
        return o.to(q.dtype), lse.to(torch.float64 if q.dtype == torch.float64 else torch.float32)

    failure = verify(attn.attention, "test", kernel, examples=40, longest=40).failure
    assert failure is not None
    assert failure.case.q_offset is not None


def test_a_read_outside_a_tensor_is_the_specification_s_fault() -> None:
    failure = run("attention shifted(bias: f32[N]):\n    score = qk + bias[kv_idx + 1]\n").failure
    assert failure is not None
    assert "A0639" in failure.message
    assert failure.case.sizes.N == 1


def test_made_up_indices_are_not_its_fault() -> None:
    report = run("attention gather(bias: f32[N], at: int[B, M, 2]):\n    score = qk + bias[at[b, q_row, 0] + 1]\n")
    assert report.failure is None
    assert report.discarded > 0


def test_refusals_are_told() -> None:
    def refusing(*_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        raise CallError(NoLse(None, "windowed"))

    report = verify(check(WINDOW), "test", refusing, examples=8, longest=10)
    assert report.failure is None
    assert not report.tried
    assert list(report.refused) == [NoLse.code]


def test_the_snippet_runs() -> None:
    failure = run(WINDOW, lambda q, k, o, lse, _: (o + 1, lse)).failure
    assert failure is not None
    program = snippet(Failure("cpp", failure.case, failure.message), WINDOW, None, {})
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tensor" in done.stdout


def test_the_command(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "windowed.attn"
    path.write_text(WINDOW, encoding="utf-8")
    arguments = ["verify", str(path), "--target", "cpp", "--dtype", "f32", "--examples", "12", "--longest", "80"]
    assert main(arguments) == 0
    assert "12 f32" in capsys.readouterr().out
