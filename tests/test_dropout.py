"""Calls with dropout on both targets: what the reference gives with the same weights dropped, gradients too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from call_support import BF16, F16, F32, F64, INTERPRETED, SLOW, SPECS, TARGETS, built, captured, operands
from cpp_support import NATIVE_ARCHS
from tiers import by_type, tiered
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attncc
from attncc.build import _variant_of
from attncc.diagnostics import CallError
from attncc.eager import eager
from attncc.error_rule import compare
from attncc.passes.dropout import dropout_scalars, with_dropout
from attncc.reference import evaluate
from attncc.runtime.dropout import recipe_with_dropout

DROPPED: dict[str, Any] = {"dropout_p": 0.3, "seed": 5}


def assert_by_the_error_rule(
    name: str, target: str, dtype: torch.dtype, *, gradients: bool = True, **sizes: int
) -> None:
    """o and the gradients of q, k, v and every captured tensor of floats."""
    attn = built(name, target)
    q, k, v = operands(**{"M": 37, "N": 53, "H": 4, "HKV": 2, "B": 2, **sizes}, dtype=dtype)
    inputs = {n: torch.as_tensor(x) for n, x in captured(name, q, k).items()}
    of_floats = {n: x for n, x in inputs.items() if x.is_floating_point()}
    do = torch.randn(*q.shape[:3], v.shape[3], generator=torch.Generator().manual_seed(3)).to(dtype)
    attention, scalars = with_dropout(attn.attention), dropout_scalars(DROPPED["dropout_p"], DROPPED["seed"])

    def results(run: Any, wide: bool) -> dict[str, Tensor]:
        leaves = {n: x.detach().clone() for n, x in {"q": q, "k": k, "v": v, **of_floats}.items()}
        leaves = {n: (x.double() if wide else x).requires_grad_(gradients) for n, x in leaves.items()}
        others = {n: leaves.get(n, x) for n, x in inputs.items()}
        o = run(leaves["q"], leaves["k"], leaves["v"], others)
        if not gradients:
            return {"o": o}
        found = torch.autograd.grad(o, list(leaves.values()), do.to(o.dtype))
        return {"o": o, **{f"d{n}": x for n, x in zip(leaves, found, strict=True)}}

    found = results(lambda q, k, v, others: attn(q, k, v, **DROPPED, **others), wide=False)
    oracle = results(lambda q, k, v, others: evaluate(attention, q, k, v, {**others, **scalars})[0], wide=True)
    plain = results(lambda q, k, v, others: eager(attention, q, k, v, {**others, **scalars}), wide=False)
    for n, x in found.items():
        assert (message := compare(n, x, oracle[n].detach(), plain[n].detach())) is None, message
    kept = attn.reference(q, k, v, **inputs)
    assert not torch.allclose(oracle["o"], kept, atol=1e-2), "nothing was dropped"


# As "capped" and "biased" are, but for one thing.
ALIKE = {"scaled", "documents"}
NAMES = [name for name in SPECS if name not in ("chosen", "rates", "required", "table", "window", "plain")]


@pytest.mark.representative(2)
@pytest.mark.parametrize(
    ("name", "dtype"),
    by_type(NAMES, (F32, BF16), representative=("biased", "summed"), alike=ALIKE),
    ids=str,
)
def test_cpp(name: str, dtype: torch.dtype) -> None:
    assert_by_the_error_rule(name, "cpp", dtype)


@pytest.mark.representative(1)
@pytest.mark.parametrize(
    ("name", "dtype"),
    tiered(lambda name, dtype: name == "causal", ("causal", "sigmoid", "summed"), (F16, F64)),
    ids=str,
)
def test_cpp_in_other_types(name: str, dtype: torch.dtype) -> None:
    assert_by_the_error_rule(name, "cpp", dtype)


@pytest.mark.representative(1)
@pytest.mark.parametrize(
    ("arch", "dtype"),
    tiered(lambda arch, dtype: dtype == F32 or arch == NATIVE_ARCHS[-1], NATIVE_ARCHS[1:], (F32, BF16)),
    ids=str,
)
def test_cpp_for_other_machines(arch: str, dtype: torch.dtype) -> None:
    assert_by_the_error_rule("causal", f"cpp:{arch}", dtype)


@pytest.mark.representative(5)
@pytest.mark.parametrize("name", NAMES)
def test_triton_forward(name: str) -> None:
    assert_by_the_error_rule(name, INTERPRETED, F32, gradients=False)


@pytest.mark.representative(2)
@pytest.mark.parametrize("name", ["causal", "biased", "sigmoid", "summed", "sink", "rows", "slopes"])
def test_triton_backward(name: str) -> None:
    assert_by_the_error_rule(name, INTERPRETED, F32)


# --- calls ------------------------------------------------------------------------------------------------------------


@TARGETS
def test_every_target_drops_what_the_reference_drops(target: str) -> None:
    """With scores of 0 and values that tell keys apart, o shows each multiplier: the same bits everywhere."""
    n = 64
    q, k, v = torch.zeros(2, 4, 19, 8), torch.zeros(2, 2, n, 8), torch.eye(n).expand(2, 2, n, n)
    for p, seed in ((0.5, 1), (0.1, -(2**63)), (1 - 2**-24, 2**63 - 1)):
        o = built("plain", target)(q, k, v, dropout_p=p, seed=seed) * n
        exact = built("plain").reference(q, k, v, dropout_p=p, seed=seed) * n
        assert torch.equal(o == 0, exact == 0)
        torch.testing.assert_close(o, exact.float())


@TARGETS
def test_a_call_for_some_queries_drops_what_the_whole_call_drops(target: str) -> None:
    attn = built("causal", target)
    q, k, v = operands(M=40, N=40)
    whole = attn(q, k, v, **DROPPED)
    torch.testing.assert_close(attn(q[:, :, 23:], k, v, **DROPPED), whole[:, :, 23:])
    first = attn(q[:, :, :7], k[:, :, :7], v[:, :, :7], q_offset=0, **DROPPED)
    torch.testing.assert_close(first, whole[:, :, :7])


def test_the_seed() -> None:
    attn = built("causal")
    q, k, v = operands(M=40, N=40)
    by_number = attn(q, k, v, dropout_p=0.5, seed=3)
    assert torch.equal(by_number, attn(q, k, v, dropout_p=torch.tensor(0.5), seed=torch.tensor(3)))
    assert not torch.equal(by_number, attn(q, k, v, dropout_p=0.5, seed=4))
    torch.manual_seed(0)
    one, two = (attn(q, k, v, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(one, two)
    torch.manual_seed(0)
    assert torch.equal(one, attn(q, k, v, dropout_p=0.5))
    assert torch.equal(two, attn(q, k, v, dropout_p=0.5))


def test_lse_is_that_of_all_weights() -> None:
    attn = built("causal")
    q, k, v = operands(M=40, N=40)
    _, lse = attn(q, k, v, return_lse=True)
    assert torch.equal(lse, attn(q, k, v, return_lse=True, **DROPPED)[1])


def test_nothing_dropped_is_the_plain_kernel() -> None:
    attn = attncc.build("attention undropped():\n    mask = causal\n")
    q, k, v = operands()
    o = attn(q, k, v)
    assert torch.equal(o, attn(q, k, v, dropout_p=0.0, seed=1))
    assert torch.equal(o, attn(q, k, v, dropout_p=1e-9, seed=1))
    assert "dropped" not in vars(attn)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dropout_p": 1.0}, "`dropout_p` must be a number of at least 0 and less than 1, found float 1.0"),
        ({"dropout_p": -0.1}, "found float -0.1"),
        ({"dropout_p": float("nan")}, "found float nan"),
        ({"dropout_p": "0.1"}, "found str '0.1'"),
        ({"dropout_p": True}, "found bool True"),
        ({"dropout_p": torch.zeros(2)}, "found a tensor of shape (2,)"),
        ({"dropout_p": 0.1, "seed": 2**63}, "`seed` must be an int that fits 64 bits"),
        ({"dropout_p": 0.1, "seed": 1.5}, "found float 1.5"),
    ],
)
def test_arguments_that_are_refused(arguments: dict[str, Any], words: str) -> None:
    for run in (built("causal"), built("causal").reference):
        with pytest.raises(CallError) as caught:
            run(*operands(), **arguments)
        assert words in str(caught.value)
        assert [d.code for d in caught.value.diagnostics] == ["A0609"]


@TARGETS
@pytest.mark.parametrize(("m", "n"), [(0, 5), (5, 0), (1, 1)])
def test_lengths_of_none_and_one(m: int, n: int, target: str) -> None:
    q, k, v = operands(M=m, N=n)
    o = built("plain", target)(q, k, v, dropout_p=0.5, seed=2)
    torch.testing.assert_close(o, built("plain").reference(q, k, v, dropout_p=0.5, seed=2).float())


@TARGETS
def test_infinite_and_missing_values(target: str) -> None:
    """At a masked key nothing is seen of them; a weight that is dropped is 0 times them."""
    attn = built("causal", target)
    q, k, v = operands(M=24, N=24)
    v[:, :, 9, 3], v[:, :, 20, 5] = float("inf"), float("nan")
    found, exact = attn(q, k, v, **DROPPED), attn.reference(q, k, v, **DROPPED)
    torch.testing.assert_close(found.double(), exact, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert exact[:, :, 9:, 3].isnan().any()
    assert (exact[:, :, 9:, 3] == float("inf")).any()


def test_gradients_are_the_same_in_every_run_and_on_any_number_of_threads() -> None:
    attn = built("causal")
    q, k, v = (x.requires_grad_() for x in operands(M=150, N=150, H=4, HKV=2))
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        o = attn(q, k, v, **DROPPED)
        found.append((o, *torch.autograd.grad(o.square().sum(), (q, k, v))))
    torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], others, strict=True))


def test_gradcheck() -> None:
    q, k, v = (x.requires_grad_() for x in operands(M=4, N=5, D=3, E=2, dtype=F64))
    assert torch.autograd.gradcheck(lambda *x: built("causal")(*x, **DROPPED), (q, k, v))


def test_checkpointing_draws_the_same_seed_again() -> None:
    attn = built("causal")
    q, k, v = (x.requires_grad_() for x in operands(M=40, N=40))
    torch.manual_seed(3)
    o = checkpoint(lambda *x: attn(*x, dropout_p=0.5), q, k, v, use_reentrant=False)
    (dq,) = torch.autograd.grad(o.sum(), q)
    torch.manual_seed(3)
    plain = attn(q, k, v, dropout_p=0.5)
    assert torch.equal(o, plain)
    assert torch.equal(dq, torch.autograd.grad(plain.sum(), q)[0])


@SLOW
def test_torch_compile() -> None:
    attn = built("causal")
    q, k, v = (x.requires_grad_() for x in operands(M=12, N=12))
    compiled = torch.compile(lambda *x, seed: attn(*x, dropout_p=0.5, seed=seed), fullgraph=True)
    for seed in (1, 2, -(2**40)):
        o, plain = compiled(q, k, v, seed=seed), attn(q, k, v, dropout_p=0.5, seed=seed)
        assert torch.equal(o, plain)
        assert torch.equal(torch.autograd.grad(o.sum(), q)[0], torch.autograd.grad(plain.sum(), q)[0])


def test_an_exported_program_finds_its_kernels() -> None:
    """From the recipe alone, in a process that has built nothing."""
    attn = built("causal")
    q, k, v = operands()
    o = attn(q, k, v, **DROPPED)
    again = _variant_of(recipe_with_dropout(attn.recipe))
    bound = again.signature.bind(q, k, v, None, dropout_scalars(DROPPED["dropout_p"], DROPPED["seed"]))
    assert torch.equal(again.kernels.forward(q, k, v, bound, False)[0], o)


def test_transforms_of_functions() -> None:
    attn = built("causal")
    q, k, v = operands(B=2)

    def loss(q: Tensor) -> Tensor:
        return attn(q, k, v, **DROPPED).square().sum()

    leaf = q.clone().requires_grad_()
    assert torch.equal(torch.func.grad(loss)(q), torch.autograd.grad(loss(leaf), leaf)[0])


@TARGETS
@pytest.mark.parametrize("name", ["causal", "summed"])
def test_gradients_through_lse(name: str, target: str) -> None:
    attn = built(name, target)
    operands_ = operands(M=21, N=33, H=4, HKV=2)
    scalars = dropout_scalars(DROPPED["dropout_p"], DROPPED["seed"])
    leaves = [x.requires_grad_() for x in operands_]
    o, lse = attn(*leaves, return_lse=True, **DROPPED)
    found = torch.autograd.grad(o.square().sum() + lse.sin().sum(), leaves)
    exact = [x.detach().double().requires_grad_() for x in operands_]
    o, lse = evaluate(with_dropout(attn.attention), *exact, scalars)
    expected = torch.autograd.grad(o.square().sum() + lse.sin().sum(), exact)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)
