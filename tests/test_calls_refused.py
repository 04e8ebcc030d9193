"""What calls are refused for, and in which words."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from call_support import F64, INTERPRETED, built, operands
from torch import Tensor

from attncc import AttnError, BuildError, CallError, build
from attncc.diagnostics import Diagnostic
from attncc.runtime import errors
from attncc.runtime.targets import resolve


@dataclass(frozen=True)
class Refusal:
    """A call that is refused: the specification, what differs from a call that is right, the codes, and words of the
    message."""

    spec: str
    changes: dict[str, Any]
    codes: tuple[str, ...]
    words: tuple[str, ...]


def refusal(spec: str, *codes: str, words: tuple[str, ...], **changes: Any) -> Refusal:
    return Refusal(spec, changes, codes, words)


def _nested(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are a prototype
        return torch.nested.nested_tensor([x[0]])


_Q, _K, _V = operands()
_BIAS, _DOCS = torch.zeros(2, 5, 5), torch.zeros(1, 5, dtype=torch.int64)
_GOOD: dict[str, dict[str, Any]] = {
    "biased": {"bias": _BIAS, "docs": _DOCS},
    "required": {"window": 2},
    "capped": {"cap": 5.0},
    "chosen": {"key": 1},
    "rates": {"rate": torch.ones(1)},
}

REFUSALS = {
    "q is a list": refusal(
        "plain", "A0601", q=[[1.0]], words=("`q` must be a torch.Tensor, found list", "(B, H, M, D)")
    ),
    "k is an array": refusal("plain", "A0601", k=_K.numpy(), words=("`k`", "found ndarray", "(B, HKV, N, D)")),
    "bias is a list": refusal(
        "biased", "A0601", bias=[1.0], words=("`bias`", "found list", "(H, M, N)", "declared here")
    ),
    "q of three axes": refusal(
        "plain", "A0602", q=_Q[0], words=("`q` has shape (2, 5, 16), expected 4 axes", "(B, H, M, D)")
    ),
    "v of five axes": refusal("plain", "A0602", v=_V[None], words=("`v` has shape (1, 1, 2, 5, 8), expected 4 axes",)),
    "bias of two axes": refusal(
        "biased", "A0602", bias=_BIAS[0], words=("`bias` has shape (5, 5), expected 3 axes", "(H, M, N) = (2, 5, 5)")
    ),
    "cap of one axis": refusal(
        "capped", "A0602", cap=torch.ones(1), words=("`cap` has shape (1,), expected 0 axes", "the shape ()")
    ),
    "k of another width": refusal(
        "plain",
        "A0603",
        k=_K[..., :6],
        words=("axis 3 of `k` has size 6, expected D = 16", "(1, 2, 5, 6)", "as q does"),
    ),
    "k of another batch": refusal(
        "plain",
        "A0603",
        "A0603",
        k=_K.repeat(3, 1, 1, 1),
        v=_V.repeat(3, 1, 1, 1),
        words=("axis 0 of `k` has size 3, expected B = 1", "axis 0 of `v` has size 3, expected B = 1"),
    ),
    "v of another batch": refusal("plain", "A0603", v=_V[:0], words=("axis 0 of `v` has size 0, expected B = 1",)),
    "v of other heads": refusal(
        "plain", "A0603", v=_V[:, :1], words=("axis 1 of `v` has size 1, expected HKV = 2", "as k does")
    ),
    "v of another length": refusal(
        "plain", "A0603", v=_V[:, :, :4], words=("axis 2 of `v` has size 4, expected N = 5",)
    ),
    "bias of another length": refusal(
        "biased", "A0603", bias=_BIAS[:, :3], words=("axis 1 of `bias` has size 3, expected M = 5", "(2, 3, 5)")
    ),
    "docs that would broadcast": refusal(
        "biased", "A0603", docs=_DOCS[:, :1], words=("axis 1 of `docs` has size 1, expected N = 5",)
    ),
    "a table of another length": refusal(
        "table", "A0603", bias=torch.zeros(10), words=("axis 0 of `bias` has size 10, expected 2 * N - 1 = 9",)
    ),
    "a table for no keys": refusal(
        "table", "A0603", k=_K[:, :, :0], v=_V[:, :, :0], bias=torch.zeros(0), words=("expected 2 * N - 1 = -1",)
    ),
    "heads that do not divide": refusal(
        "plain",
        "A0604",
        q=operands(H=8)[0],
        k=operands(HKV=3)[1],
        v=operands(HKV=3)[2],
        words=("8 query heads cannot share 3 key/value heads",),
    ),
    "no key/value heads": refusal(
        "plain", "A0604", k=_K[:, :0], v=_V[:, :0], words=("2 query heads cannot share 0 key/value heads",)
    ),
    "more key/value heads": refusal("plain", "A0604", q=_Q[:, :1], words=("1 query heads cannot share 2",)),
    "operands of ints": refusal(
        "plain",
        "A0605",
        "A0605",
        "A0605",
        q=_Q.int(),
        k=_K.int(),
        v=_V.int(),
        words=("`v` has dtype int32, expected one of float32, bfloat16, float16, float64", "q.to(torch.float32)"),
    ),
    "complex operands": refusal("plain", "A0605", q=_Q.to(torch.complex64), words=("`q` has dtype complex64",)),
    "k of another type": refusal(
        "plain",
        "A0605",
        k=_K.half(),
        words=("`k` has dtype float16, expected float32 (that of q)", "k.to(torch.float32)"),
    ),
    "q is the odd one": refusal("plain", "A0605", q=_Q.int(), words=("`q` has dtype int32, expected one of float32",)),
    "bias of ints": refusal(
        "biased", "A0605", bias=_BIAS.int(), words=("`bias` has dtype int32, expected float16 or bfloat16 or float32",)
    ),
    "docs of floats": refusal(
        "biased",
        "A0605",
        docs=_DOCS.float(),
        words=("`docs` has dtype float32, expected int32 or int64", "torch.int64"),
    ),
    "slope of another width": refusal(
        "slopes", "A0605", slope=torch.ones(2, dtype=F64), words=("`slope` has dtype float64, expected float32",)
    ),
    "k elsewhere": refusal("plain", "A0606", k=_K.to("meta"), words=("`k` is on meta, q is on cpu", "k.to('cpu')")),
    "q elsewhere": refusal(
        "plain", "A0606", "A0606", q=_Q.to("meta"), words=("`k` is on cpu, q is on meta", "`v` is on cpu, q is on meta")
    ),
    "bias elsewhere": refusal("biased", "A0606", bias=_BIAS.to("meta"), words=("`bias` is on meta, q is on cpu",)),
    "window missing": refusal(
        "required", "A0607", window=None, words=("`window` is missing", "pass an int by keyword", "window=128")
    ),
    "docs missing": refusal(
        "biased", "A0607", docs=None, words=("`docs` is missing", "a tensor of shape (B, N)", "docs=docs")
    ),
    "misspelt": refusal("window", "A0608", windw=3, words=("`local` has no input `windw`", "did you mean `window`?")),
    "unlike any": refusal("window", "A0608", zzz=3, words=("no input `zzz`", "its inputs are `window`")),
    "where there are none": refusal("plain", "A0608", zzz=3, words=("no input `zzz`", "it takes q, k and v alone")),
    "an option misspelt": refusal("window", "A0608", qoffset=3, words=("did you mean `q_offset`?",)),
    "dropout as elsewhere": refusal("plain", "A0608", dropout=0.1, words=("did you mean `dropout_p`?",)),
    "a causal mask as elsewhere": refusal("window", "A0608", is_causal=True, words=("write `mask = causal` there",)),
    "a mask as elsewhere": refusal(
        "plain", "A0608", attn_mask=torch.ones(5, 5), words=("`keep: bool[B, M, N]`", "`mask = keep[b, q_row, kv_idx]`")
    ),
    "window of text": refusal("window", "A0609", window="3", words=("`window` must be an int, found str '3'",)),
    "window of a float": refusal("window", "A0609", window=3.0, words=("must be an int, found float 3.0", "pass 3")),
    "window of a fraction": refusal("window", "A0609", window=3.5, words=("found float 3.5", "declare it `float`")),
    "window of infinity": refusal(
        "window", "A0609", window=float("inf"), words=("int, found float inf", "whole number")
    ),
    "window of a bool": refusal("window", "A0609", window=True, words=("must be an int, found bool True",)),
    "window of two": refusal("window", "A0609", window=torch.ones(2), words=("an int, found a tensor of shape (2,)",)),
    "window of none": refusal("window", "A0609", window=torch.ones(0), words=("found a tensor of shape (0,)",)),
    "window on meta": refusal("window", "A0609", window=torch.tensor(1, device="meta"), words=("on meta",)),
    "window of an array": refusal("window", "A0609", window=np.ones(3), words=("an int, found ndarray",)),
    "window too large": refusal(
        "window", "A0609", window=2**31, words=("an int that fits 32 bits, found int 2147483648",)
    ),
    "window too small": refusal("window", "A0609", window=-(2**31) - 1, words=("an int that fits 32 bits",)),
    "window far too large": refusal("window", "A0609", window=10**5000, words=("an int of 16610 bits",)),
    "rate of text": refusal("biased", "A0609", rate="x" * 100, words=("`rate` must be a float, found str 'xxx", "...")),
    "rate of a bool": refusal("biased", "A0609", rate=False, words=("`rate` must be a float, found bool False",)),
    "rate complex": refusal("biased", "A0609", rate=1j, words=("must be a float, found complex",)),
    "rate too large": refusal("biased", "A0609", rate=10**400, words=("a float that fits 64 bits",)),
    "rate that is learned": refusal(
        "biased",
        "A0619",
        rate=torch.tensor(1.0, requires_grad=True),
        words=("`rate` is a run-time scalar and has no gradient", "declare it `rate: float[]`", "pass rate.item()"),
    ),
    "flag of an int": refusal("biased", "A0609", flag=1, words=("`flag` must be a bool, found int 1",)),
    "cap of text": refusal("capped", "A0609", cap="5", words=("`cap` must be a float that fits float32, found str",)),
    "cap too large": refusal("capped", "A0609", cap=1e300, words=("a float that fits float32, found float 1e+300",)),
    "cap of a list": refusal("capped", "A0609", cap=[5.0], words=("0-d tensor",)),
    "key of a float": refusal(
        "chosen", "A0609", key=1.5, words=("`key` must be an int that fits int64, found float 1.5",)
    ),
    "key too large": refusal("chosen", "A0609", key=2**64, words=("an int that fits int64",)),
    "offset of a float": refusal("plain", "A0609", q_offset=1.5, words=("`q_offset` must be an int, found float 1.5",)),
    "offset of a bool": refusal("plain", "A0609", q_offset=True, words=("`q_offset` must be an int, found bool",)),
    "offset of each sequence": refusal(
        "plain", "A0609", q_offset=torch.tensor([1, 2]), words=("a tensor of shape (2,)", "`lengths[b] - M + q_row`")
    ),
    "offset too large": refusal(
        "plain", "A0609", q_offset=2**30, words=("an int from -1073741824 to 1073741819, found int 1073741824",)
    ),
    "offset too small": refusal("plain", "A0609", q_offset=-(2**30) - 1, words=("an int from -1073741824",)),
    "too many queries": refusal(
        "plain",
        "A0610",
        q=_Q[:, :, :1].expand(1, 2, 2**30 + 1, 16),
        words=("`q` has 1073741825 rows, more than 1073741824",),
    ),
    "too many keys": refusal(
        "plain",
        "A0610",
        "A0610",
        k=_K[:, :, :1].expand(1, 2, 2**30 + 1, 16),
        v=_V[:, :, :1].expand(1, 2, 2**30 + 1, 8),
        words=("`k` has 1073741825 rows", "`v` has 1073741825 rows"),
    ),
    "lse of weights that are not divided": refusal(
        "sigmoid", "A0612", return_lse=True, words=("`gated` has no lse", "normalize = sum")
    ),
    "statistics of weights that are no softmax": refusal(
        "sigmoid", "A0617", stats=("max",), words=("`gated` has no statistics: it is no softmax",)
    ),
    "rows of width 0": refusal(
        "plain",
        "A0613",
        "A0613",
        q=_Q[..., :0],
        k=_K[..., :0],
        words=("`q` has rows of width 0", "`k` has rows of width 0"),
    ),
    "values of width 0": refusal("plain", "A0613", v=_V[..., :0], words=("`v` has rows of width 0",)),
    "sparse q": refusal("plain", "A0614", q=_Q.to_sparse(), words=("`q` is a sparse_coo tensor", "q.to_dense()")),
    "sparse bias": refusal("biased", "A0614", bias=_BIAS.to_sparse(), words=("`bias` is a sparse_coo tensor",)),
    "nested k": refusal("plain", "A0614", k=_nested(_K), words=("`k` is a nested tensor",)),
    "a shape that divides by 0": refusal(
        "rates", "A0615", k=_K[:, :, :0], v=_V[:, :, :0], words=("`rate` has no shape in this call", "(M // N,)")
    ),
}


def called(spec: str, changes: dict[str, Any]) -> Callable[[], Any]:
    """A call that is right but for `changes`; None leaves an argument out."""
    arguments = {"q": _Q, "k": _K, "v": _V, **_GOOD.get(spec, {}), **changes}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    return lambda: built(spec)(**arguments)


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS)
def test_refused(case: Refusal) -> None:
    with pytest.raises(CallError) as caught:
        called(case.spec, case.changes)()
    assert tuple(d.code for d in caught.value.diagnostics) == case.codes
    for words in case.words:
        assert words in str(caught.value)


@pytest.mark.parametrize("spec", _GOOD)
def test_the_call_that_refusals_differ_from_is_right(spec: str) -> None:
    assert called(spec, {})().shape == (1, 2, 5, 8)


def test_every_reason_to_refuse_a_call_is_tested() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Diagnostic)]
    codes = {kind.code for kind in kinds if kind.code.startswith("A06")}
    elsewhere = {"A0611", "A0618"}  # second derivatives, and in tests/test_torch_operator.py
    assert codes == {code for case in REFUSALS.values() for code in case.codes} | elsewhere


def test_second_derivatives_are_refused() -> None:
    q = _Q.clone().requires_grad_()
    (dq,) = torch.autograd.grad(built("causal")(q, _K, _V).sum(), q, create_graph=True)
    with pytest.raises(CallError) as caught:
        dq.square().sum().backward()
    assert [d.code for d in caught.value.diagnostics] == ["A0611"]
    assert "`masked` has no second derivatives" in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "shapes", "named", "calls"),
    [
        # A step of decoding, 8 heads over 2.
        ("plain", ((1, 1, 8, 16), (1, 30, 2, 16), (1, 30, 2, 8)), {}, "q.transpose(1, 2), k.transpose(1, 2), v"),
        ("plain", ((1, 8, 1, 16), (1, 30, 2, 16), (1, 30, 2, 8)), {}, "pass k.transpose(1, 2), v.transpose(1, 2)"),
        ("plain", ((1, 5, 2, 16), (1, 2, 7, 16), (1, 2, 7, 8)), {}, "pass q.transpose(1, 2)"),
        ("plain", ((1, 2, 7, 16), (1, 2, 7, 16), (1, 7, 2, 8)), {}, "pass v.transpose(1, 2)"),
        # Only the captured tensor tells which axis is which.
        ("slopes", ((1, 9, 2, 16),) * 3, {"slope": torch.ones(2)}, "q.transpose(1, 2), k.transpose(1, 2), v"),
    ],
)
def test_heads_after_rows(spec: str, shapes: tuple[Any, ...], named: dict[str, Any], calls: str) -> None:
    q, k, v = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(CallError) as caught:
        built(spec)(q, k, v, **named)
    assert str(caught.value).count("the order is (batch, heads, rows, width)") == 1
    assert calls in str(caught.value)


def test_no_order_of_axes_is_blamed_for_what_it_does_not_explain() -> None:
    with pytest.raises(CallError) as caught:
        built("plain")(_Q, _K[..., :6], _V)
    assert "transpose" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "extra", "named", "words"),
    [
        ("window", (128,), {}, "write attn(q, k, v, window=128)"),
        ("biased", (_BIAS, _DOCS, 2.0), {}, "write attn(q, k, v, bias=bias, docs=docs, rate=2.0)"),
        ("biased", (_DOCS,), {"bias": _BIAS}, "write attn(q, k, v, docs=docs)"),
        ("window", (128, 0), {}, "its inputs are `window`"),
        ("plain", (None,), {}, "it takes q, k and v alone"),
    ],
)
def test_inputs_without_their_names(spec: str, extra: tuple[Any, ...], named: dict[str, Any], words: str) -> None:
    for function in (built(spec), built(spec).reference):
        with pytest.raises(CallError) as caught:
            function(_Q, _K, _V, *extra, **named)
        assert [d.code for d in caught.value.diagnostics] == ["A0616"]
        assert "takes q, k and v by position, and all else by keyword" in str(caught.value)
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (16, "write attncc.build(spec, block=16)"),
        ("cpp:avx2", "write attncc.build(spec, target='cpp:avx2')"),
        ("blocks", "write attncc.build(spec, name='blocks')"),
        (None, "name, target, templates and the `const` parameters"),
    ],
)
def test_options_of_a_build_without_their_names(value: object, words: str) -> None:
    spec = "attention blocks(block: const int):\n    mask = q_idx // block == kv_idx // block\n"
    with pytest.raises(CallError) as caught:
        build(spec, value)
    assert [d.code for d in caught.value.diagnostics] == ["A0616"]
    assert words in str(caught.value)


@pytest.mark.parametrize(("target", "code"), [("cuda", "A0543"), ("cpp:avx3", "A0552"), ("triton:sm_1", "A0552")])
def test_a_target_that_is_not_known_is_refused_by_the_build(target: str, code: str) -> None:
    with pytest.raises(BuildError) as caught:
        build("attention plain():\n    mask = true\n", target=target)
    assert [d.code for d in caught.value.diagnostics] == [code]


def test_the_text_of_a_compiled_attention_says_how_to_call_it() -> None:
    assert repr(built("plain")) == "<CompiledAttention plain(q, k, v) for the device of q>"
    assert repr(built("biased", "cpp")) == (
        "<CompiledAttention biased(q, k, v, *, bias, docs, rate=1.0, flag=True) for cpp>"
    )


# The reference computes no statistics.
REFUSED_BY_THE_REFERENCE = {name: case for name, case in REFUSALS.items() if "stats" not in case.changes}


@pytest.mark.parametrize("case", REFUSED_BY_THE_REFERENCE.values(), ids=REFUSED_BY_THE_REFERENCE)
def test_the_reference_refuses_the_same(case: Refusal) -> None:
    arguments = {"q": _Q, "k": _K, "v": _V, **_GOOD.get(case.spec, {}), **case.changes}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    with pytest.raises(CallError) as caught:
        built(case.spec).reference(**arguments)
    assert tuple(d.code for d in caught.value.diagnostics) == case.codes


def test_all_independent_reasons_come_at_once() -> None:
    with pytest.raises(CallError) as caught:
        built("biased")(
            _Q,
            _K[:, :1].half(),
            _V[..., 0],
            q_offset="0",
            bias=_BIAS.int(),
            dcs=_DOCS,
            rate="fast",
            flag=1,
        )
    codes = [d.code for d in caught.value.diagnostics]
    assert sorted(codes) == ["A0602", "A0605", "A0605", "A0607", "A0608", "A0609", "A0609", "A0609"]
    for name in ("`v`", "`k`", "`q_offset`", "`bias`", "`docs`", "`dcs`", "`rate`", "`flag`"):
        assert name in str(caught.value)


def test_shapes_of_captured_tensors_are_not_blamed_for_those_of_the_operands() -> None:
    """Where q, k and v disagree nobody knows which sizes the captured tensors should have."""
    with pytest.raises(CallError) as caught:
        built("biased")(_Q, _K[:, :, :3], _V, bias=_BIAS, docs=_DOCS)
    assert [d.code for d in caught.value.diagnostics] == ["A0603"]
    assert "`v` has size 5, expected N = 3" in str(caught.value)


@pytest.mark.parametrize("target", [None, "cpp", INTERPRETED])
def test_a_device_without_kernels_is_refused(target: str | None) -> None:
    with pytest.raises(BuildError) as caught:
        resolve(target, torch.device("xpu"), ())
    assert [d.code for d in caught.value.diagnostics] == ["A0551"]
    assert "no kernel for xpu" in str(caught.value)


# Whose example needs a GPU, or 2**31 keys.
@pytest.mark.parametrize(
    ("code", "spec"),
    [
        ("A0601", "plain"),
        ("A0602", "plain"),
        ("A0603", "plain"),
        ("A0604", "plain"),
        ("A0605", "plain"),
        ("A0607", "slopes"),
        ("A0608", "window"),
        ("A0609", "window"),
        ("A0611", "plain"),
        ("A0612", "sigmoid"),
        ("A0613", "plain"),
        ("A0614", "plain"),
        ("A0615", "rates"),
        ("A0617", "sigmoid"),
        ("A0619", "scaled"),
    ],
)
def test_the_example_of_a_code(code: str, spec: str) -> None:
    kind = next(kind for _, kind in inspect.getmembers(errors, inspect.isclass) if getattr(kind, "code", None) == code)
    names: dict[str, Any] = {"torch": torch, "attn": built(spec), "slope": torch.ones(8), "rate": torch.ones(1)}

    def fits(example: str) -> dict[str, Any]:
        """Operands of the sizes that an example leaves to the reader."""
        length = 1 if "[[" in example else 16 if "16" in example or "8, 16" in example else 8
        width = 2 if "[[" in example else 1 if ", 1)" in example else 64
        heads = 1 if width < 3 or "1, 1, 8, 64" in example else 8
        q, k, v = (torch.randn(1, heads, length, width) for _ in "qkv")
        return {**names, "q": q, "k": k, "v": v}

    with pytest.raises(AttnError) as caught:
        exec(kind.bad, fits(kind.bad))
    assert code in {d.code for d in caught.value.diagnostics}
    exec(kind.good, fits(kind.good))


# --- what is accepted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [2, np.int32(2), np.int64(2), torch.tensor(2), torch.tensor([2], dtype=torch.int32)])
def test_an_int_may_come_in_a_tensor_or_an_array(window: Any) -> None:
    assert torch.equal(built("window")(_Q, _K, _V, window=window), built("window")(_Q, _K, _V, window=2))
    assert torch.equal(built("causal")(_Q, _K, _V, q_offset=window), built("causal")(_Q, _K, _V, q_offset=2))


@pytest.mark.parametrize("rate", [2, 2.0, np.float32(2), torch.tensor(2), torch.tensor([2.0], dtype=F64)])
def test_a_float_may_be_an_int_or_come_in_a_tensor(rate: Any) -> None:
    inputs = _GOOD["biased"]
    assert torch.equal(
        built("biased")(_Q, _K, _V, rate=rate, **inputs), built("biased")(_Q, _K, _V, rate=2.0, **inputs)
    )


@pytest.mark.parametrize("cap", [5, 5.0, np.float64(5), np.int64(5), torch.tensor(5.0), torch.tensor(5.0, dtype=F64)])
def test_a_number_may_stand_for_a_tensor_without_axes(cap: Any) -> None:
    torch.testing.assert_close(built("capped")(_Q, _K, _V, cap=cap), built("capped")(_Q, _K, _V, cap=5.0))


def test_the_default_of_a_scalar_is_taken_where_it_is_left_out() -> None:
    assert torch.equal(built("window")(_Q, _K, _V), built("window")(_Q, _K, _V, window=3))


def test_gradients_are_no_matter_where_none_are_recorded() -> None:
    q = _Q.clone().requires_grad_()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert not built("plain")(q, _K, _V).requires_grad


def test_a_learned_scalar_is_taken_where_no_gradients_are_recorded() -> None:
    inputs, rate = _GOOD["biased"], torch.tensor(2.0, requires_grad=True)
    with torch.no_grad():
        o = built("biased")(_Q, _K, _V, rate=rate, **inputs)
    assert torch.equal(o, built("biased")(_Q, _K, _V, rate=rate.item(), **inputs))


def test_a_learned_scalar_trains_as_a_tensor_without_axes() -> None:
    cap = torch.tensor(5.0, requires_grad=True)
    built("capped")(_Q, _K, _V, cap=cap).square().sum().backward()
    assert cap.grad is not None
    assert cap.grad != 0


def test_the_reference_says_what_is_read_outside_a_tensor() -> None:
    with pytest.raises(CallError) as caught:
        built("documents").reference(_Q, _K, _V, docs=_DOCS, q_offset=2)
    assert [d.code for d in caught.value.diagnostics] == ["A0639"]
    assert "`docs` is read outside its axis 1: index 5 of 5" in str(caught.value)
    assert "docs[b, q_idx]" in str(caught.value)
