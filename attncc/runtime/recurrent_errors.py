"""Errors of calls of recurrences."""

from __future__ import annotations

from dataclasses import dataclass

from attncc.diagnostics import Diagnostic


@dataclass(frozen=True, slots=True)
class NoRecurrentKernel(Diagnostic):
    code = "A0547"
    title = "this works on pairs of queries and keys, and `{name}` is a recurrence"
    help = "for a recurrence there are run, verify, bench, build, emit without --standalone, and explain without --png"
    explanation = (
        "A recurrence has no scores of pairs, so there is no mask to draw. Its kernels take vectors that PyTorch makes "
        "of the inputs, or launch one after the other, which a file that runs without attncc cannot do in this version."
    )
    bad = "attncc emit examples/recurrent/retnet.attn --standalone"
    good = "attncc emit examples/recurrent/retnet.attn"

    name: str


@dataclass(frozen=True, slots=True)
class NoKernelOfItsOwn(Diagnostic):
    code = "A0548"
    title = "there is no kernel to compile for `{name}`: {why}"
    help = "`attncc run` and attncc.build(…) run it as it is"
    explanation = (
        "PyTorch computes some things as fast as a kernel would, and some that have none: where every query reads what "
        "all tokens leave, two products of matrices; the gradients of a recurrence that has no normal form, the same "
        "statements token by token."
    )
    bad = "attncc build features_of_all_keys.attn"
    good = "attncc run features_of_all_keys.attn"

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class RecurrentHeads(Diagnostic):
    code = "A0620"
    title = "`{name}` has {found} heads, which do not divide {heads}"
    help = "the greatest number of heads of q, k and v is that of the states; each of them must divide it"
    explanation = (
        "A recurrence has as many states as the one of q, k and v that has the most heads, H. The others may have "
        "fewer: head h of the state reads head h // (H // heads) of each."
    )
    bad = "attn.reference(torch.randn(1, 3, 16, 64), torch.randn(1, 3, 16, 64), torch.randn(1, 8, 16, 64))"
    good = "attn.reference(torch.randn(1, 4, 16, 64), torch.randn(1, 4, 16, 64), torch.randn(1, 8, 16, 64))"

    name: str
    found: int
    heads: int


@dataclass(frozen=True, slots=True)
class WrongOffsets(Diagnostic):
    code = "A0621"
    title = "`cu_seqlens` does not say where packed sequences lie: {why}"
    help = (
        "pass a 1-D int tensor that begins with 0, ascends, and ends with the number of tokens: one more than sequences"
    )
    explanation = (
        "Sequences of different lengths are packed one after the other along N. `cu_seqlens` has the place where each "
        "of them begins and, last, where the last one ends; each starts from a state of its own."
    )
    bad = "attn(q, k, v, cu_seqlens=torch.tensor([5, 11, 16]))"
    good = "attn(q, k, v, cu_seqlens=torch.tensor([0, 5, 16]))"

    why: str


@dataclass(frozen=True, slots=True)
class NoPacking(Diagnostic):
    code = "A0626"
    title = "`cu_seqlens` packs sequences, and every query of `{name}` reads all tokens"
    help = "call it once for each sequence, or keep a query from later tokens: `mask = causal`"
    explanation = (
        "Without a mask every query reads the state that all tokens have left. Packed sequences would each need a "
        "state of their own, which this version has for causal recurrences only."
    )
    bad = "attn(q, k, v, cu_seqlens=torch.tensor([0, 5, 16]))"
    good = "attn(q[:, :, :5], k[:, :, :5], v[:, :, :5])"

    name: str


@dataclass(frozen=True, slots=True)
class PackedBatch(Diagnostic):
    code = "A0622"
    title = "`cu_seqlens` packs sequences of a batch of {batch}"
    help = "pack everything into a batch of 1: q.transpose(0, 1).reshape(1, heads, batch * N, D), and so on"
    explanation = "Packed sequences take the place of a batch, whose rows would all have to be packed alike."
    bad = "attn(torch.randn(2, 4, 16, 64), k, v, cu_seqlens=torch.tensor([0, 5, 16]))"
    good = "attn(torch.randn(1, 4, 32, 64), k, v, cu_seqlens=torch.tensor([0, 5, 16, 21, 32]))"

    batch: int


@dataclass(frozen=True, slots=True)
class WrongState(Diagnostic):
    code = "A0623"
    title = "`state` cannot be updated in place: {why}"
    help = "pass what return_state=True has returned, or torch.zeros(B, H, D, E)"
    explanation = (
        "attn.step writes the state after its tokens to the memory of the one before. That memory must be contiguous, "
        "of the type that kernels keep states in (f32, f64 beside f64), and autograd must not need what it held."
    )
    bad = "attn.step(q, k, v, state=torch.zeros(1, 8, 64, 64, dtype=torch.bfloat16))"
    good = "attn.step(q, k, v, state=torch.zeros(1, 8, 64, 64))"

    why: str


@dataclass(frozen=True, slots=True)
class RecurrenceNotTraced(Diagnostic):
    code = "A0624"
    title = "recurrences run on tensors in memory only"
    help = "call it outside torch.export, torch.func, forward-mode differentiation, fake tensors and tensor subclasses"
    explanation = (
        "A recurrence is no operator of PyTorch: nothing that transforms a program, or records it without its data, "
        "sees what its kernels do. Gradients by autograd are; within torch.compile the call breaks the graph."
    )
    bad = "torch.vmap(lambda q: attn(q, k, v))(q[None])"
    good = "attn(q, k, v)"


@dataclass(frozen=True, slots=True)
class RecurrenceTwice(Diagnostic):
    code = "A0625"
    title = "the gradients of a recurrence are differentiated, and have no gradients in turn"
    help = "leave out create_graph=True, or take second derivatives of attn.reference"
    explanation = "There are kernels of a recurrence and of its gradients, and none of its second derivatives."
    bad = "torch.autograd.grad(torch.autograd.grad(attn(q, k, v).sum(), q, create_graph=True)[0].sum(), k)"
    good = "torch.autograd.grad(attn(q, k, v).sum(), q)"
