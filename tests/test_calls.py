"""Calls of sizes and layouts out of the ordinary, and calls from several threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from call_support import BF16, F16, F32, F64, INTERPRETED, SLOW, SPECS, TARGETS, assert_right, built, captured, operands
from tiers import tiered
from torch import Tensor

import attncc

# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.representative(10)
@TARGETS
@pytest.mark.parametrize("spec", ["plain", "window", "documents", "sigmoid", "summed", "sink", "rows", "slopes"])
@pytest.mark.parametrize(
    "sizes", [{"M": 0}, {"N": 0}, {"B": 0}, {"H": 0}, {"H": 0, "HKV": 0}, {"M": 0, "N": 0}], ids=str
)
def test_empty(target: str, spec: str, sizes: dict[str, int]) -> None:
    q, k, v = operands(**sizes)
    attn, inputs = built(spec, target), captured(spec, q, k)
    assert_right(attn, q, k, v, **inputs)
    o = attn(q, k, v, **inputs)
    assert not o.any()
    if spec != "sigmoid":
        lse = attn(q, k, v, return_lse=True, **inputs)[1]
        expected = (
            inputs["sinks"][None, :, None].expand(lse.shape) if spec == "sink" else torch.full_like(lse, -math.inf)
        )
        torch.testing.assert_close(lse, expected)


@TARGETS
def test_no_keys_and_a_tensor_without_elements_that_every_row_reads(target: str) -> None:
    """`docs[b, q_idx]` of a tensor (B, 0) is read at no pair, so there is nothing to fail."""
    q, k, v = operands(M=70, N=0)
    o, lse = built("documents", target)(q, k, v, docs=torch.zeros(1, 0, dtype=torch.int64), return_lse=True)
    assert not o.any()
    assert (lse == -math.inf).all()


@pytest.mark.representative(5)
@TARGETS
@pytest.mark.parametrize(
    ("D", "E", "dtype"),
    [
        (1, 1, F32),
        (1, 1, BF16),
        (257, 257, F32),
        (257, 257, BF16),
        pytest.param(1, 40, BF16, marks=SLOW),
        pytest.param(40, 1, F32, marks=SLOW),
        pytest.param(257, 3, BF16, marks=SLOW),
        pytest.param(3, 500, F32, marks=SLOW),
    ],
    ids=str,
)
def test_widths(target: str, D: int, E: int, dtype: torch.dtype) -> None:
    assert_right(built("causal", target), *operands(M=33, N=40, D=D, E=E, HKV=1, dtype=dtype))


@TARGETS
@pytest.mark.parametrize("offset", [0, 1, 40, -1, -39, -40, -41, -(2**30), 2**30 - 33], ids=str)
def test_offsets(target: str, offset: int) -> None:
    q, k, v = operands(M=33, N=40)
    for spec in ("causal", "window", "sink"):
        assert_right(built(spec, target), q, k, v, q_offset=offset, **captured(spec, q, k))


@TARGETS
def test_a_row_with_nothing_to_attend_to(target: str) -> None:
    q, k, v = operands(M=33, N=40)
    o, lse = built("causal", target)(q, k, v, q_offset=-7, return_lse=True)
    assert not o[:, :, :7].any()
    assert (lse[:, :, :7] == -math.inf).all()
    assert o[:, :, 7:].ne(0).all()
    assert lse[:, :, 7:].isfinite().all()


@TARGETS
@pytest.mark.parametrize("window", [0, -5, 1, 2**31 - 1, -(2**31)], ids=str)
def test_windows_of_any_width(target: str, window: int) -> None:
    assert_right(built("window", target), *operands(M=33, N=40), window=window)


# --- layouts ---------------------------------------------------------------------------------------------------------


def _last_axis_apart(x: Tensor) -> Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def _every_other_element(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:3], 2 * x.shape[3]), math.nan, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def _heads_inside(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _one_head_for_all(x: Tensor) -> Tensor:
    return x[:, :1].expand(x.shape)


def _one_row_for_all(x: Tensor) -> Tensor:
    return x[:, :, :1].expand(x.shape)


def _one_element_for_all(x: Tensor) -> Tensor:
    return x[..., :1].expand(x.shape)


def _lazily_negated(x: Tensor) -> Tensor:
    return torch._neg_view(x)


def _not_aligned(x: Tensor) -> Tensor:
    wide = torch.full((x.numel() + 1,), math.nan, dtype=x.dtype)
    wide[1:] = x.flatten()
    return wide[1:].view(x.shape)


def _between_nan(x: Tensor) -> Tensor:
    """Rows that are far apart, with NaN between them and after the last one."""
    wide = torch.full((x.shape[0], x.shape[1] + 1, x.shape[2] + 3, x.shape[3] + 5), math.nan, dtype=x.dtype)
    wide[:, 1:, :-3, :-5] = x
    return wide[:, 1:, :-3, :-5]


LAYOUTS = [
    _last_axis_apart, _every_other_element, _heads_inside, _one_head_for_all, _one_row_for_all, _one_element_for_all,
    _lazily_negated, _not_aligned, _between_nan,
]  # fmt: skip


@pytest.mark.representative(4)
@pytest.mark.parametrize(
    ("target", "dtype"),
    tiered(lambda target, dtype: target == "cpp" or dtype == BF16, ("cpp", "triton:interpret"), (F32, BF16)),
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=[f.__name__.strip("_") for f in LAYOUTS])
def test_layouts(target: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    """What lies between elements is never read, and how they lie never matters."""
    x = operands(M=33, N=40, B=2, dtype=dtype)
    for spec in ("causal", "rows"):
        attn = built(spec, target)
        for number in range(3):
            laid_out = [layout(y) if i == number else y for i, y in enumerate(x)]
            plain = [y.resolve_neg().contiguous() for y in laid_out]
            assert torch.equal(attn(*laid_out), attn(*plain))


@TARGETS
@pytest.mark.parametrize("layout", LAYOUTS, ids=[f.__name__.strip("_") for f in LAYOUTS])
def test_layouts_of_captured_tensors(target: str, layout: Callable[[Tensor], Tensor]) -> None:
    q, k, v = operands(M=33, N=40)
    inputs = captured("biased", q, k)
    bias = layout(inputs["bias"][None])[0]
    attn = built("biased", target)
    plain = bias.resolve_neg().contiguous()
    assert torch.equal(attn(q, k, v, **{**inputs, "bias": bias}), attn(q, k, v, **{**inputs, "bias": plain}))


def _far_apart(x: Tensor, strides: tuple[int, ...], file: Path) -> Tensor:
    """The elements of a tensor at strides of gigabytes, in a file that takes no more room than they do."""
    span = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True)) + 1
    memory = torch.from_file(str(file), shared=True, size=span, dtype=x.dtype)
    file.unlink()
    return memory.as_strided(x.shape, strides).copy_(x)


@pytest.mark.representative(3)
@TARGETS
@pytest.mark.parametrize(
    "strides", [(1, 2**31 + 8, 64, 1), (1, 64, 2**27, 1), pytest.param((1, 2**32, 2**26, 1), marks=SLOW)], ids=str
)
def test_elements_that_are_far_apart(target: str, strides: tuple[int, ...], tmp_path: Path) -> None:
    """Offsets of more than 2**31 elements."""
    x = operands(M=33, N=40)
    expected = built("causal", target)(*x)
    for number in range(3):
        far = [_far_apart(y, strides, tmp_path / "memory") if i == number else y for i, y in enumerate(x)]
        assert torch.equal(built("causal", target)(*far), expected)
    bias = captured("biased", *x[:2])
    expected = built("biased", target)(*x, **bias)
    bias["bias"] = _far_apart(bias["bias"], strides[1:], tmp_path / "memory")
    assert torch.equal(built("biased", target)(*x, **bias), expected)


@TARGETS
def test_one_tensor_may_be_all_operands(target: str) -> None:
    x = operands()[0]
    assert torch.equal(built("causal", target)(x, x, x), built("causal", target)(x, x.clone(), x.clone()))


@pytest.mark.representative(5)
@TARGETS
@pytest.mark.parametrize("spec", ["biased", "rows", "documents", "sink"])
def test_arguments_are_not_modified(target: str, spec: str) -> None:
    q, k, v = operands(M=33, N=40, dtype=BF16)
    arguments = {"q": _last_axis_apart(q), "k": k, "v": v, **captured(spec, q, k)}
    before = {name: value.clone() for name, value in arguments.items()}
    built(spec, target)(**arguments)
    for name, value in arguments.items():
        assert torch.equal(value, before[name]), name


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [F32, BF16, pytest.param(F16, marks=SLOW), pytest.param(F64, marks=SLOW)], ids=str)
@pytest.mark.parametrize("spec", ["causal", "documents", "rows", "summed", "sink"])
def test_the_number_of_threads_changes_nothing(spec: str, dtype: torch.dtype) -> None:
    q, k, v = operands(M=300, N=333, B=2, dtype=dtype)
    attn, inputs = built(spec, "cpp"), captured(spec, q, k)
    two = attn(q, k, v, return_lse=True, **inputs)
    torch.set_num_threads(1)
    one = attn(q, k, v, return_lse=True, **inputs)
    for x, y in zip(one, two, strict=True):
        assert torch.equal(x, y)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("target", tiered(lambda target: target == "cpp", ("cpp", INTERPRETED)))
def test_calls_from_several_threads_at_once(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the first calls, which compile: several threads ask for the same kernels at the same time."""
    monkeypatch.setenv("ATTNCC_CACHE", str(tmp_path))
    specs = ("causal", "documents", "rows", "window")
    calls = 20 if target == "cpp" else 2
    problems = {name: operands(M=50 + 10 * i, N=90) for i, name in enumerate(specs)}
    fresh = {name: attncc.build(SPECS[name], target=target) for name in specs}
    found: dict[tuple[int, str], list[Tensor]] = {}
    failures: list[BaseException] = []
    barrier = threading.Barrier(4)

    def work(number: int) -> None:
        try:
            barrier.wait()
            for _ in range(calls):
                for name in specs[number:] + specs[:number]:
                    q, k, v = problems[name]
                    found.setdefault((number, name), []).append(fresh[name](q, k, v, **captured(name, q, k)))
        except Exception as error:  # noqa: BLE001 - every one of them fails the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(found) == 16
    for (_, name), results in found.items():
        q, k, v = problems[name]
        expected = fresh[name](q, k, v, **captured(name, q, k))
        assert len(results) == calls
        assert all(torch.equal(result, expected) for result in results)
