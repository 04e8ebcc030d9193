"""The oracle against formulas written by hand, and its rules for masked pairs, empty rows and reads."""

from __future__ import annotations

import math

import pytest
import torch

from attncc.ir.nodes import (
    Apply,
    Attention,
    Constant,
    Element,
    Elementwise,
    Expr,
    Hole,
    Index,
    Load,
    Parameter,
    Reduce,
    ScalarParameter,
    Size,
    Softmax,
    Sum,
    TensorParameter,
    identity_row,
)
from attncc.ir.types import FLOATS, INTS, DType, Kind
from attncc.ir.verify import verify
from attncc.reference import OutOfRange, evaluate
from attncc.source import Source, Span

QK = Hole("qk")
Q_IDX, KV_IDX, B, H, D_INDEX = Index("q_idx"), Index("kv_idx"), Index("b"), Index("h"), Index("d")
CAUSAL = Apply("ge", (Q_IDX, KV_IDX))
TRUE = Constant(True)


def op(name: str, *args: Expr) -> Apply:
    return Apply(name, args)


def spec(**clauses: object) -> Attention:
    """Plain softmax attention with some clauses replaced, verified."""
    plain = {
        "name": "spec",
        "doc": "",
        "parameters": (),
        "q": identity_row("q"),
        "k": identity_row("k"),
        "v": identity_row("v"),
        "scale": op("rsqrt", op("to_float", Size("D"))),
        "score": QK,
        "mask": TRUE,
        "normalizer": Softmax(),
    }
    attention = Attention(**{**plain, **clauses})  # type: ignore[arg-type]
    verify(attention)
    return attention


def qkv(b: int = 2, h: int = 4, hkv: int = 2, m: int = 5, n: int = 7, d: int = 3, e: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(b, h, m, d), (b, hkv, n, d), (b, hkv, n, e)]
    return [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes]


def close(found: torch.Tensor | None, expected: torch.Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def grouped(k: torch.Tensor, h: int) -> torch.Tensor:
    return k.repeat_interleave(h // k.shape[1], 1)


@pytest.mark.parametrize("q_offset", [None, 0, 3, -2])
def test_causal_softmax_with_grouped_heads(q_offset: int | None) -> None:
    q, k, v = qkv()
    o, lse = evaluate(spec(mask=CAUSAL), q, k, v, {}, q_offset)
    offset = 2 if q_offset is None else q_offset
    scores = q @ grouped(k, 4).mT / math.sqrt(3)
    kept = torch.arange(5)[:, None] + offset >= torch.arange(7)[None, :]
    scores = scores.masked_fill(~kept, -torch.inf)
    close(lse, scores.logsumexp(-1))
    close(o, scores.softmax(-1).nan_to_num(0) @ grouped(v, 4))


def test_rows_with_nothing_to_attend_to() -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    o, lse = evaluate(spec(mask=op("ge", KV_IDX, op("add", Q_IDX, Constant(1)))), q, k, v, {}, 2)
    assert lse is not None
    assert (o[:, :, -1] == 0).all() and (lse[:, :, -1] == -torch.inf).all()
    assert lse[:, :, :-1].isfinite().all()
    (o.sum() + lse[:, :, :-1].sum()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))
    assert (q.grad[:, :, -1] == 0).all()
    # The gradient of an lse of -inf is 0 too.
    q.grad = None
    evaluate(spec(mask=Constant(False)), q, k, v, {})[1].sum().backward()
    assert (q.grad == 0).all()


def test_kept_scores_of_minus_infinity_are_as_if_masked() -> None:
    q, k, v = qkv()
    o, lse = evaluate(spec(score=Constant(-math.inf)), q, k, v, {})
    assert (o == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_pairs_contribute_nothing(poison: float) -> None:
    """Poison what the last query alone may see: no other row changes."""
    q, k, v = qkv(m=7)
    clean, _ = evaluate(spec(mask=CAUSAL), q, k, v, {})
    k[:, :, -1], v[:, :, -1] = poison, poison
    o, _ = evaluate(spec(mask=CAUSAL), q, k, v, {})
    close(o[:, :, :-1], clean[:, :, :-1])
    assert not o[:, :, -1].isfinite().any()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_no_gradient_passes_a_masked_pair(poison: float) -> None:
    """A key that nobody sees, with a score that is infinite there, leaves every gradient as it is without that key."""
    q, k, v = qkv()
    k[:, :, -1], v[:, :, -1] = poison, poison
    mask = op("lt", KV_IDX, Constant(6))
    score = op("add", QK, op("mul", Constant(math.inf), op("to_float", op("ge", KV_IDX, Constant(6)))))
    score = op("where", op("ge", KV_IDX, Constant(6)), score, QK)
    for x in (q, k, v):
        x.requires_grad_()
    short = [q.detach().clone(), k.detach()[:, :, :6].clone(), v.detach()[:, :, :6].clone()]
    for x in short:
        x.requires_grad_()
    for attention, tensors in ((spec(score=score, mask=mask), (q, k, v)), (spec(), short)):
        o, lse = evaluate(attention, *tensors, {})
        assert lse is not None
        (o.square().sum() + lse.sum()).backward()
    for x, expected in zip((q, k, v), short, strict=True):
        assert x.grad is not None and expected.grad is not None
        close(x.grad[:, :, :6], expected.grad)
        assert (x.grad[:, :, 6:] == 0).all()


def test_sink_takes_weight_and_keeps_empty_rows_at_zero() -> None:
    q, k, v = qkv()
    sinks = torch.tensor([0.5, -1.0, 2.0, -torch.inf])
    a = spec(
        parameters=(TensorParameter("sinks", FLOATS, (Size("H"),)),),
        mask=op("lt", KV_IDX, Q_IDX),
        normalizer=Softmax(Load("sinks", (H,), Kind.FLOAT)),
    )
    o, lse = evaluate(a, q, k, v, {"sinks": sinks}, 0)
    scores = q @ grouped(k, 4).mT / math.sqrt(3)
    scores = scores.masked_fill(torch.arange(7) >= torch.arange(5)[:, None], -torch.inf)
    with_sink = torch.cat([scores, sinks[:, None, None].expand(2, 4, 5, 1)], -1)
    close(lse, with_sink.logsumexp(-1))
    close(o, with_sink.softmax(-1).nan_to_num(0)[..., :-1] @ grouped(v, 4))
    assert (o[:, :, 0] == 0).all()


def test_a_sink_of_infinity_takes_all_weight() -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    sinks = torch.tensor([torch.inf, 1e300, -1e300, 0.0], dtype=torch.float64, requires_grad=True)
    a = spec(
        parameters=(TensorParameter("sinks", FLOATS, (Size("H"),)),),
        normalizer=Softmax(Load("sinks", (H,), Kind.FLOAT)),
    )
    o, lse = evaluate(a, q, k, v, {"sinks": sinks})
    assert lse is not None
    assert (o[:, :2] == 0).all()
    assert torch.equal(lse[:, :2], sinks[:2, None].expand(2, 2, 5))
    scores = q @ grouped(k, 4).mT / math.sqrt(3)
    close(lse[:, 2], scores[:, 2].logsumexp(-1))
    (o.sum() + lse[:, 1:].sum()).backward()
    for x in (q, k, v, sinks):
        assert x.grad is not None and x.grad.isfinite().all()


def test_elementwise_and_sum() -> None:
    q, k, v = qkv()
    weight = op("sub", op("sigmoid", Hole("score")), Constant(0.25))
    expected = (torch.sigmoid(q @ grouped(k, 4).mT / math.sqrt(3)) - 0.25) * (torch.arange(7) < 6)
    mask = op("lt", KV_IDX, Constant(6))
    o, lse = evaluate(spec(mask=mask, normalizer=Elementwise(weight)), q, k, v, {})
    assert lse is None
    close(o, expected @ grouped(v, 4))
    o, lse = evaluate(spec(mask=mask, normalizer=Sum(weight)), q, k, v, {})
    close(o, expected @ grouped(v, 4) / expected.sum(-1, keepdim=True))
    close(lse, expected.sum(-1).log())


def test_a_sum_of_zero_gives_zero() -> None:
    q, k, v = qkv(n=4)
    alternating = op("sub", op("mul", Constant(2.0), op("to_float", op("mod", KV_IDX, Constant(2)))), Constant(1.0))
    o, lse = evaluate(spec(normalizer=Sum(alternating)), q, k, v, {})
    assert (o == 0).all() and (lse == -torch.inf).all()


def test_row_transforms() -> None:
    """l2norm of q, a gain and a rotation of pairs by position on k, a shift of v by head."""
    q, k, v = qkv(d=4)
    squares = Reduce("sum", op("mul", Element("q", D_INDEX), Element("q", D_INDEX)), Size("D"))
    even = op("eq", op("mod", D_INDEX, Constant(2)), Constant(0))
    angle = op("to_float", KV_IDX)
    own = op("mul", Element("k", D_INDEX), op("cos", angle))
    after, before = Element("k", op("add", D_INDEX, Constant(1))), Element("k", op("sub", D_INDEX, Constant(1)))
    rotated = op(
        "where",
        even,
        op("sub", own, op("mul", after, op("sin", angle))),
        op("add", own, op("mul", before, op("sin", angle))),
    )
    a = spec(
        parameters=(TensorParameter("gain", FLOATS, (Size("H"), Size("D"))), ScalarParameter("shift", Kind.FLOAT, 0.5)),
        q=op("mul", Element("q", D_INDEX), op("rsqrt", squares)),
        k=op("mul", rotated, Load("gain", (H, D_INDEX), Kind.FLOAT)),
        v=op("add", Element("v", D_INDEX), op("mul", Parameter("shift", Kind.FLOAT), op("to_float", Index("hkv")))),
        scale=Constant(2.0),
    )
    gain = torch.rand(4, 4, dtype=torch.float64)
    o, _ = evaluate(a, q, k, v, {"gain": gain})
    c, s = torch.arange(7.0, dtype=torch.float64).cos()[:, None], torch.arange(7.0, dtype=torch.float64).sin()[:, None]
    k0, k1 = k[..., 0::2], k[..., 1::2]
    k_rotated = torch.stack([k0 * c - k1 * s, k1 * c + k0 * s], -1).flatten(-2)
    k_all = grouped(k_rotated, 4) * gain[:, None, :]
    q_all = q / q.norm(dim=-1, keepdim=True)
    v_all = grouped(v + 0.5 * torch.arange(2)[:, None, None], 4)
    close(o, (2 * q_all @ k_all.mT).softmax(-1) @ v_all)


def test_max_reduction_and_nested_d() -> None:
    """The d of a reduction is its own; a maximum is over the whole row."""
    q, k, v = qkv(d=4)
    peak = Reduce("max", op("abs", Element("q", D_INDEX)), Size("D"))
    centred = Reduce("sum", op("div", Element("q", D_INDEX), peak), Size("D"))
    a = spec(q=op("add", op("mul", centred, Element("q", D_INDEX)), op("to_float", D_INDEX)))
    o, _ = evaluate(a, q, k, v, {})
    total = (q / q.abs().amax(-1, keepdim=True)).sum(-1, keepdim=True)
    close(o, ((total * q + torch.arange(4)) @ grouped(k, 4).mT / 2).softmax(-1) @ grouped(v, 4))


@pytest.mark.parametrize(
    "shape", [(0, 4, 2, 5, 7), (2, 0, 0, 5, 7), (2, 4, 2, 0, 7), (2, 4, 2, 5, 0), (1, 1, 1, 0, 0), (1, 1, 1, 1, 1)]
)
@pytest.mark.parametrize("normalizer", [Softmax(), Softmax(Constant(1.0)), Sum(Hole("score")), Elementwise(QK)])
def test_empty_sizes(shape: tuple[int, int, int, int, int], normalizer: Softmax | Sum | Elementwise) -> None:
    if isinstance(normalizer, Elementwise):
        normalizer = Elementwise(Hole("score"))
    b, h, _, m, n = shape
    o, lse = evaluate(spec(mask=CAUSAL, normalizer=normalizer), *qkv(*shape), {})
    assert o.shape == (b, h, m, 6) and o.dtype == torch.float64
    if lse is not None:
        assert lse.shape == (b, h, m)
    if n == 0:
        assert (o == 0).all()


SOURCE = Source("bad.attn", "score = qk + bias[q_idx - kv_idx]")
BIAS = Load("bias", (op("sub", Q_IDX, KV_IDX),), Kind.FLOAT, Span(SOURCE, 13, 33))
WITH_BIAS = (TensorParameter("bias", FLOATS, (Size("N"),)),)


def test_a_kept_pair_reading_outside_a_tensor_is_an_error() -> None:
    q, k, v = qkv(m=7)
    bias = torch.rand(7)
    a = spec(parameters=WITH_BIAS, score=op("add", QK, BIAS))
    with pytest.raises(OutOfRange) as caught:
        evaluate(a, q, k, v, {"bias": bias})
    error = caught.value
    assert error.span is not None and error.span.text == "bias[q_idx - kv_idx]"
    assert (error.tensor, error.axis, error.index, error.size) == ("bias", 0, -1, 7)
    assert error.at == {"b": 0, "h": 0, "q_row": 0, "q_idx": 0, "kv_idx": 1}
    assert "bad.attn:1:14" in str(error) and "kv_idx = 1" in str(error)


def test_a_masked_pair_reads_nothing() -> None:
    q, k, v = qkv(m=7)
    bias = torch.rand(7, dtype=torch.float64)
    masked = spec(parameters=WITH_BIAS, score=op("add", QK, BIAS), mask=CAUSAL)
    chosen = spec(parameters=WITH_BIAS, score=op("where", CAUSAL, op("add", QK, BIAS), Constant(-math.inf)))
    distance = torch.arange(7)[:, None] - torch.arange(7)[None, :]
    scores = q @ grouped(k, 4).mT / math.sqrt(3) + bias[distance.clamp(0)]
    expected = scores.masked_fill(distance < 0, -torch.inf).softmax(-1) @ grouped(v, 4)
    for a in (masked, chosen):
        close(evaluate(a, q, k, v, {"bias": bias})[0], expected)


def test_a_mask_may_guard_its_own_reads() -> None:
    q, k, v = qkv(m=7)
    positive = op("gt", BIAS, Constant(0.0))
    bias = torch.tensor([1.0, -1, 1, 1, -1, 1, 1])
    guarded = spec(parameters=WITH_BIAS, mask=op("and", CAUSAL, positive))
    reverse = spec(parameters=WITH_BIAS, mask=op("and", positive, CAUSAL))
    unless = spec(parameters=WITH_BIAS, mask=op("not", op("or", op("not", CAUSAL), op("le", BIAS, Constant(0.0)))))
    results = [evaluate(a, q, k, v, {"bias": bias})[0] for a in (guarded, reverse, unless)]
    close(results[1], results[0])
    close(results[2], results[0])
    with pytest.raises(OutOfRange):
        evaluate(spec(parameters=WITH_BIAS, mask=positive), q, k, v, {"bias": bias})
    with pytest.raises(OutOfRange):
        evaluate(spec(parameters=WITH_BIAS, mask=op("or", positive, TRUE)), q, k, v, {"bias": bias})
    evaluate(spec(parameters=WITH_BIAS, mask=op("or", TRUE, positive)), q, k, v, {"bias": bias})


@pytest.mark.parametrize(
    ("clause", "tensor", "axis", "at"),
    [
        ({"scale": Load("t", (KV_IDX,), Kind.FLOAT)}, "t", 0, {"kv_idx": 3}),
        ({"normalizer": Softmax(Load("t", (Index("q_row"),), Kind.FLOAT))}, "t", 0, {"q_row": 3}),
        ({"normalizer": Sum(Load("t", (Index("q_row"),), Kind.FLOAT))}, "t", 0, {"q_row": 3, "kv_idx": 0}),
        ({"v": op("mul", Element("v", D_INDEX), Load("t", (D_INDEX,), Kind.FLOAT))}, "t", 0, {"d": 3, "kv_idx": 0}),
        ({"q": Reduce("sum", Load("t", (D_INDEX,), Kind.FLOAT), Constant(5))}, "t", 0, {"d": 3, "q_row": 0}),
        ({"k": Element("k", op("add", D_INDEX, Constant(1)))}, "k", 1, {"d": 2, "kv_idx": 0}),
    ],
)
def test_every_clause_reports_its_reads(clause: dict[str, object], tensor: str, axis: int, at: dict[str, int]) -> None:
    a = spec(parameters=(TensorParameter("t", FLOATS, (Constant(3),)),), **clause)
    with pytest.raises(OutOfRange) as caught:
        evaluate(a, *qkv(), {"t": torch.rand(3)})
    assert (caught.value.tensor, caught.value.axis, caught.value.index, caught.value.size) == (tensor, axis, 3, 3)
    assert at.items() <= caught.value.at.items()


def test_rows_are_read_whatever_the_mask() -> None:
    """A row transform has no pair: its reads are errors though nothing is kept."""
    shifted = Element("k", op("sub", D_INDEX, Constant(1)))
    with pytest.raises(OutOfRange):
        evaluate(spec(k=shifted, mask=Constant(False)), *qkv(), {})


def test_ints_are_exact_and_scalars_take_their_defaults() -> None:
    q, k, v = qkv(n=9)
    ids = TensorParameter("ids", INTS, (Size("B"), Size("N")))
    big = op("add", Load("ids", (B, KV_IDX), Kind.INT), Constant(2**62))
    a = spec(
        parameters=(ids, ScalarParameter("r", Kind.INT, 1), ScalarParameter("on", Kind.BOOL, None)),
        mask=op("and", op("eq", op("mod", big, Constant(3)), Parameter("r", Kind.INT)), Parameter("on", Kind.BOOL)),
    )
    values = torch.arange(-9, 9, dtype=torch.int32).reshape(2, 9)
    for r in (None, 0, 2):
        inputs: dict[str, torch.Tensor | int | bool] = {"ids": values, "on": True}
        inputs |= {} if r is None else {"r": r}
        kept = torch.tensor([[(2**62 + int(x)) % 3 == (1 if r is None else r) for x in row] for row in values])
        scores = (q @ grouped(k, 4).mT / math.sqrt(3)).masked_fill(~kept[:, None, None, :], -torch.inf)
        close(evaluate(a, q, k, v, inputs)[0], scores.softmax(-1) @ grouped(v, 4))
    assert (evaluate(a, q, k, v, {"ids": values, "on": False})[0] == 0).all()


def test_half_inputs_are_widened_first() -> None:
    q, k, v = (x.to(torch.bfloat16) for x in qkv())
    close(evaluate(spec(), q, k, v, {})[0], evaluate(spec(), q.double(), k.double(), v.double(), {})[0])


def test_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(b=1, h=2, hkv=1, m=3, n=4))
    bias = torch.rand(4, dtype=torch.float64, requires_grad=True)
    sink = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    a = spec(
        parameters=(*WITH_BIAS, TensorParameter("sink", (DType.F64,), ())),
        score=op("mul", Constant(3.0), op("tanh", op("add", QK, BIAS))),
        mask=CAUSAL,
        normalizer=Softmax(Load("sink", (), Kind.FLOAT)),
    )

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return evaluate(a, *tensors[:3], {"bias": tensors[3], "sink": tensors[4]})

    assert torch.autograd.gradcheck(run, (q, k, v, bias, sink))
