"""`verify` finds what is wrong, makes it small, and says nothing of what is right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attncc.build import build, check
from attncc.cli import main
from attncc.diagnostics import CallError
from attncc.runtime.errors import NoLse
from attncc.verify import Report, snippet, verify

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


@pytest.mark.representative(1)
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

    report = verify(check(WINDOW), "test", refusing, dtypes=["f32"], examples=2, longest=10)
    assert report.failure is None
    assert not report.tried
    assert list(report.refused) == [NoLse.code]


def _wrong_gradient(x: Tensor) -> Tensor:
    """`x`, with twice its gradient."""
    return 2 * x - x.detach()


def _no_more_than_a_gradient(x: Tensor) -> Tensor:
    return (x - x.detach()).sum()


@pytest.mark.parametrize(
    ("result", "break_it"),
    [
        ("o", lambda q, k, o, lse, _: (o + 1, lse)),
        ("lse", lambda q, k, o, lse, _: (o, lse + 1)),
        ("dv", lambda q, k, o, lse, _: (_wrong_gradient(o), lse)),
        ("dbias", lambda q, k, o, lse, inputs: (o + _no_more_than_a_gradient(inputs["bias"]), lse)),
    ],
)
def test_the_program_shows_what_is_wrong(
    result: str, break_it: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = WINDOW.replace("(window", "(bias: f32[H], window") + "    score = qk + bias[h]\n"
    failure = run(spec, break_it).failure
    assert failure is not None
    assert failure.result == result
    program = snippet(replace(failure, target="cpp"), spec, None, {})

    def off_by() -> float:
        exec(program, {})
        return float(capsys.readouterr().out.rsplit("off by ", 1)[1])

    # The kernel itself is right; the one that failed is not.
    assert off_by() < 0.05
    attn = build(spec)
    kernel = reference_kernel(spec, break_it)

    class Broken:
        attention, reference = attn.attention, attn.reference

        def __call__(self, return_lse: bool = False, **inputs: Any) -> Any:
            o, lse = kernel(**inputs)
            return (o, lse) if return_lse else o

    monkeypatch.setattr("attncc.build", lambda *_, **__: Broken())
    assert off_by() > 0.05


def test_the_program_of_another_device_moves_the_tensors() -> None:
    failure = run(WINDOW, lambda q, k, o, lse, _: (o + 1, lse)).failure
    assert failure is not None
    program = snippet(failure, WINDOW, None, {}, templates=["mine"], device="cuda")
    assert "x.to('cuda')" in program
    assert "templates=['mine']" in program


def test_scalars_that_are_given_are_not_drawn() -> None:
    found = set[int]()

    def noted(_q: Tensor, _k: Tensor, o: Tensor, lse: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        found.add(inputs["window"])
        return o, lse

    assert run(WINDOW, noted, scalars={"window": 3}).failure is None
    assert found == {3}


def test_the_command(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "windowed.attn"
    path.write_text(WINDOW, encoding="utf-8")
    arguments = ["verify", str(path), "--target", "cpp", "--dtype", "f32", "--examples", "6", "--longest", "80"]
    assert main(arguments) == 0
    assert "ok  6 f32" in capsys.readouterr().out
