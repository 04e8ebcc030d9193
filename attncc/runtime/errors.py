"""Errors of calls (A06xx)."""

from __future__ import annotations

from dataclasses import dataclass

from attncc.diagnostics import Diagnostic


@dataclass(frozen=True, slots=True)
class NotATensor(Diagnostic):
    code = "A0601"
    title = "`{name}` must be a torch.Tensor, found {found}"
    label = "declared here"
    help = "pass {name} as a tensor of shape {expected}"
    explanation = "q, k, v and every captured tensor are passed as torch tensors."
    bad = "attn([[1.0, 2.0]], k, v)"
    good = "attn(torch.tensor([[[[1.0, 2.0]]]]), k, v)"

    name: str
    found: str
    expected: str


@dataclass(frozen=True, slots=True)
class WrongRank(Diagnostic):
    code = "A0602"
    title = "`{name}` has shape {found}, expected {expected} axes"
    label = "declared here"
    help = "give {name} the shape {shape}"
    explanation = (
        "q is (B, H, M, D), k (B, HKV, N, D), v (B, HKV, N, E); a captured tensor has the axes it was declared with."
    )
    bad = "attn(torch.randn(8, 64), k, v)"
    good = "attn(torch.randn(1, 1, 8, 64), k, v)"

    name: str
    found: str
    expected: int
    shape: str


@dataclass(frozen=True, slots=True)
class WrongSize(Diagnostic):
    code = "A0603"
    title = "axis {axis} of `{name}` has size {found}, expected {meaning} = {expected}"
    label = "declared here"
    help = "{name} has shape {shape}; it must have {meaning} = {expected} at axis {axis}{because}"
    explanation = (
        "The sizes of a call are read off q (B, H, M, D) and k (B, HKV, N, D); v (B, HKV, N, E) and every captured "
        "tensor must agree with them."
    )
    bad = "attn(torch.randn(1, 8, 16, 64), torch.randn(1, 8, 16, 32), v)"
    good = "attn(torch.randn(1, 8, 16, 64), torch.randn(1, 8, 16, 64), v)"

    name: str
    axis: int
    found: int
    expected: int
    meaning: str
    shape: str
    because: str = ""
    hint: str = ""

    def helps(self) -> tuple[str, ...]:
        return (*Diagnostic.helps(self), *filter(None, (self.hint,)))


@dataclass(frozen=True, slots=True)
class HeadsDoNotDivide(Diagnostic):
    code = "A0604"
    title = "{heads} query heads cannot share {heads_kv} key/value heads"
    help = "the number of query heads (axis 1 of q) must be a multiple of that of k and v"
    explanation = "In grouped-query attention each key/value head serves H / HKV query heads, so HKV must divide H."
    bad = "attn(torch.randn(1, 8, 16, 64), torch.randn(1, 3, 16, 64), torch.randn(1, 3, 16, 64))"
    good = "attn(torch.randn(1, 8, 16, 64), torch.randn(1, 2, 16, 64), torch.randn(1, 2, 16, 64))"

    heads: int
    heads_kv: int
    hint: str = ""

    def helps(self) -> tuple[str, ...]:
        return (*Diagnostic.helps(self), *filter(None, (self.hint,)))


@dataclass(frozen=True, slots=True)
class WrongDType(Diagnostic):
    code = "A0605"
    title = "`{name}` has dtype {found}, expected {expected}"
    label = "declared here"
    help = "convert it: {name}.to({suggestion})"
    explanation = (
        "q, k and v share one of float64, float32, bfloat16 and float16; a captured tensor has a dtype that its "
        "declaration admits (`float`: any floating type, `int`: int32 or int64)."
    )
    bad = "attn(q.half(), k, v)"
    good = "attn(q.half(), k.half(), v.half())"

    name: str
    found: str
    expected: str
    suggestion: str


@dataclass(frozen=True, slots=True)
class WrongDevice(Diagnostic):
    code = "A0606"
    title = "`{name}` is on {found}, {other} is on {expected}"
    label = "declared here"
    help = "move it: {name}.to({expected!r})"
    explanation = "All tensors of a call must lie on one device."
    bad = "attn(q.cuda(), k, v)"
    good = "attn(q.cuda(), k.cuda(), v.cuda())"

    name: str
    found: str
    expected: str
    other: str


@dataclass(frozen=True, slots=True)
class MissingInput(Diagnostic):
    code = "A0607"
    title = "`{name}` is missing"
    label = "declared here, without a default"
    help = "pass {what} by keyword: attn(q, k, v, {name}={example})"
    explanation = (
        "Every tensor that a specification declares, and every scalar without a default, is passed by keyword."
    )
    bad = "attn(q, k, v)                # for `attention alibi(slope: f32[H])`"
    good = "attn(q, k, v, slope=slope)"

    name: str
    what: str
    example: str


@dataclass(frozen=True, slots=True)
class UnknownInput(Diagnostic):
    code = "A0608"
    title = "`{attention}` has no input `{name}`"
    help = "{advice}"
    explanation = "The keywords of a call are the tensors and run-time scalars that the specification declares."
    bad = "attn(q, k, v, windw=128)"
    good = "attn(q, k, v, window=128)"

    attention: str
    name: str
    advice: str


@dataclass(frozen=True, slots=True)
class WrongScalar(Diagnostic):
    code = "A0609"
    title = "`{name}` must be {expected}, found {found}"
    label = "declared here"
    help = "{advice}"
    explanation = (
        "Run-time scalars are Python numbers (or 0-d tensors) of the declared kind; ints fit 32 bits, q_offset and "
        "lengths lie within 2**30."
    )
    bad = 'attn(q, k, v, window="128")'
    good = "attn(q, k, v, window=128)"

    name: str
    expected: str
    found: str
    advice: str


@dataclass(frozen=True, slots=True)
class TooLong(Diagnostic):
    code = "A0610"
    title = "`{name}` has {found} rows, more than {limit}"
    help = "split the call and merge the parts by their lse"
    explanation = "Positions are 32-bit in the kernels; a call takes at most 2**30 queries and as many keys."
    bad = "attn(q, k, v)                # with 2**31 keys"
    good = "attn(q, k[:, :, : 2**30], v[:, :, : 2**30])"

    name: str
    found: int
    limit: int


@dataclass(frozen=True, slots=True)
class NoDerivative(Diagnostic):
    code = "A0611"
    title = "`{attention}` has no {kind}"
    help = "where they are needed, write the formula with PyTorch's own operations"
    explanation = (
        "Kernels are derived for the backward pass: o and lse have gradients. These have none themselves, and nothing "
        "has derivatives in forward mode."
    )
    bad = (
        "q.requires_grad_()\n"
        "(dq,) = torch.autograd.grad(attn(q, k, v).sum(), q, create_graph=True)\n"
        "dq.norm().backward()"
    )
    good = "attn(q.requires_grad_(), k, v).norm().backward()"

    attention: str
    kind: str


@dataclass(frozen=True, slots=True)
class NoLse(Diagnostic):
    code = "A0612"
    title = "`{attention}` has no lse"
    help = "leave out return_lse=True, or write `normalize = sum`"
    explanation = (
        "lse is the logarithm of what the weights of a row are divided by: the sum of exp(score) for softmax, the sum "
        "of weights for `normalize = sum`. Elementwise weights without a normalizer are divided by nothing."
    )
    bad = "attn(q, k, v, return_lse=True)   # for `weight = sigmoid(score)`"
    good = "attn(q, k, v)"

    attention: str


@dataclass(frozen=True, slots=True)
class NoStatistics(Diagnostic):
    code = "A0617"
    title = "`{attention}` has no statistics: it is no softmax"
    help = "leave out stats, or write `weight = softmax(score)`"
    explanation = (
        "The greatest score, the entropy and the column sums of weights are those of a softmax, whose rows are "
        "probabilities."
    )
    bad = 'attn(q, k, v, stats=("entropy",))   # for `weight = sigmoid(score)`'
    good = "attn(q, k, v)"

    attention: str


@dataclass(frozen=True, slots=True)
class NotTraced(Diagnostic):
    code = "A0618"
    title = "statistics are computed of tensors in memory only"
    help = "leave out stats here: within torch.compile, torch.export, torch.func, fake tensors and tensor subclasses"
    explanation = (
        "What a call computes besides is no operator of PyTorch: nothing that traces or transforms a program sees it."
    )
    bad = 'torch.vmap(lambda q: attn(q, k, v, stats=("max",)))(q[None])'
    good = 'attn(q, k, v, stats=("max",))'


@dataclass(frozen=True, slots=True)
class EmptyWidth(Diagnostic):
    code = "A0613"
    title = "`{name}` has rows of width 0"
    help = "D (the last axis of q and k) and E (that of v) must be at least 1"
    explanation = (
        "B, H, M and N may be 0; a head dimension may not: a row without elements has no dot product to scale."
    )
    bad = "attn(torch.randn(1, 1, 8, 0), torch.randn(1, 1, 8, 0), v)"
    good = "attn(torch.randn(1, 1, 8, 1), torch.randn(1, 1, 8, 1), v)"

    name: str


@dataclass(frozen=True, slots=True)
class NotDense(Diagnostic):
    code = "A0614"
    title = "`{name}` is a {layout} tensor, expected a dense one"
    label = "declared here"
    help = "pass {name}.to_dense(), or pad a nested tensor and mask the padding"
    explanation = (
        "Kernels read elements from memory at strides. Sparse, nested and otherwise packed tensors keep theirs in "
        "another way; what a sparse layout leaves out is said by a mask."
    )
    bad = "attn(q.to_sparse(), k, v)"
    good = "attn(q, k, v)"

    name: str
    layout: str


@dataclass(frozen=True, slots=True)
class NoShape(Diagnostic):
    code = "A0615"
    title = "`{name}` has no shape in this call: {reason}"
    label = "declared here"
    help = "its shape is {shape}; call it with sizes that let it be computed"
    explanation = "An axis of a captured tensor may be declared as a quotient of sizes, and one of the divisors is 0."
    bad = "attn(q, k[:, :, :0], v[:, :, :0], rate=rate)     # for `rate: f32[M // N]`"
    good = "attn(q, k, v, rate=rate)"

    name: str
    reason: str
    shape: str


@dataclass(frozen=True, slots=True)
class LosesGradient(Diagnostic):
    code = "A0619"
    title = "`{name}` is a run-time scalar and has no gradient; the tensor passed for it requires one"
    label = "declared here"
    help = "declare it `{name}: float[]`, a 0-d tensor, and it trains; or pass {name}.item()"
    explanation = (
        "Only the number in a tensor is read where a run-time scalar is declared, so that a learned one would never "
        "change. Gradients reach q, k, v and captured tensors of floats. Under `torch.no_grad()` nothing is lost, and "
        "the tensor is taken."
    )
    bad = "attn(q, k, v, cap=torch.tensor(30.0, requires_grad=True))   # for `attention capped(cap: float)`"
    good = "attn(q, k, v, cap=30.0)"

    name: str
