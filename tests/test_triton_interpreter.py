"""The interpreter, as attncc runs it: what Triton's own gets wrong, and that nothing of it is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton.language as tl
from triton.language import standard
from triton.runtime import interpreter as triton_interpreter
from triton_support import elementwise, module, run

DOT = """

@triton.jit
def kernel(a_ptr, b_ptr, out_ptr):
    rows = tl.arange(0, 16)[:, None]
    columns = tl.arange(0, 16)[None, :]
    a = tl.load(a_ptr + rows * 16 + columns)
    b = tl.load(b_ptr + rows * 16 + columns)
    tl.store(out_ptr + rows * 16 + columns, tl.dot(a, b, input_precision="ieee"))
"""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype)
    out = torch.empty(16, 16)
    run(module(tmp_path, DOT), "kernel", 1, {"a_ptr": a, "b_ptr": b, "out_ptr": out})
    torch.testing.assert_close(out, a.float() @ b.float())


def test_bfloat16_rounds_to_the_nearest(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(60), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, torch.nan, torch.inf])])
    found = elementwise(tmp_path, "x0.to(tl.bfloat16)", [x], torch.bfloat16)
    assert torch.equal(found.nan_to_num(nan=7.0), x.bfloat16().nan_to_num(nan=7.0))
    widened = elementwise(tmp_path, "x0.to(tl.float32)", [found], torch.float32)
    assert torch.equal(widened.nan_to_num(nan=7.0), found.float().nan_to_num(nan=7.0))


def test_bfloat16_arithmetic_rounds_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    assert torch.equal(elementwise(tmp_path, "x0 * x1", [x, y], torch.bfloat16), x * y)
    assert torch.equal(elementwise(tmp_path, "x0 + x1", [x, y], torch.bfloat16), x + y)
    assert torch.equal(elementwise(tmp_path, "x0 < x1", [x, y], torch.bool), x < y)
    assert torch.equal(elementwise(tmp_path, "tl.where(x0 < x1, x0, 0.5)", [x, y], torch.bfloat16), x.where(x < y, 0.5))


def test_greatest_of_numbers_drops_nan_and_the_other_one_keeps_it(tmp_path: Path) -> None:
    x, y = torch.tensor([1.0, torch.nan, 3.0, torch.nan]), torch.tensor([torch.nan, 2.0, 4.0, torch.nan])
    plain = elementwise(tmp_path, "tl.maximum(x0, x1)", [x, y], torch.float32)
    torch.testing.assert_close(plain, torch.fmax(x, y), equal_nan=True)
    kept = elementwise(tmp_path, "tl.maximum(x0, x1, propagate_nan=tl.PropagateNan.ALL)", [x, y], torch.float32)
    torch.testing.assert_close(kept, torch.maximum(x, y), equal_nan=True)


def test_loops_with_bounds_known_at_run_time(tmp_path: Path) -> None:
    kernel = """

@triton.jit
def kernel(begin_ptr, n, out_ptr):
    total = 0
    begin = tl.load(begin_ptr)
    for i in tl.range(begin, tl.cdiv(n, 4)):
        total += i
    tl.store(out_ptr + tl.program_id(0), total)
"""
    out = torch.empty(3, dtype=torch.int32)
    begin = torch.tensor([2], dtype=torch.int32)
    run(module(tmp_path, kernel), "kernel", 3, {"begin_ptr": begin, "n": 21, "out_ptr": out})
    assert out.tolist() == [2 + 3 + 4 + 5] * 3


def test_triton_is_as_before_afterwards(tmp_path: Path) -> None:
    def state() -> list[object]:
        scopes = [vars(tl), vars(tl.core), vars(tl.math), vars(standard), vars(tl.tensor), vars(triton_interpreter)]
        return [dict(scope) for scope in scopes]

    before = state()
    elementwise(tmp_path, "tl.exp2(x0)", [torch.zeros(4)], torch.float32)
    after = state()
    for scope, same in zip(before, after, strict=True):
        changed = {name for name in same if scope.get(name) is not same[name]}
        # `property` objects and bound lambdas of the interpreter would show here.
        assert not changed
    with pytest.raises(NameError):
        elementwise(tmp_path, "x0 + unknown", [torch.zeros(4)], torch.float32)
    assert all(scope.get(name) is same[name] for scope, same in zip(before, state(), strict=True) for name in same), (
        "a kernel that fails leaves something behind"
    )


@pytest.mark.parametrize("switch", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_whatever_the_process_was_started_with(switch: str, tmp_path: Path) -> None:
    program = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}
from pathlib import Path
import torch
from triton_support import elementwise
x = torch.tensor([1.0, 2.0, 3.0, 4.0])
found = elementwise(Path({str(tmp_path)!r}), "tl.exp2(x0) / tl.sum(x0, 0)", [x], torch.float32)
torch.testing.assert_close(found, torch.tensor([.2, .4, .8, 1.6]))
"""
    environment = {**os.environ, "TRITON_INTERPRET": switch}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
