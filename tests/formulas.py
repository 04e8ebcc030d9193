"""Every example as a formula in plain PyTorch, written by hand from its paper and sharing nothing with the compiler.

A formula is dense and takes any floating type: in float64 it is an oracle, in the type of a kernel it is what people
run today, whose error the error rule compares with (`tests/error_rule.py`). It gets

    q (B, H, M, D), k (B, H, N, D), v (B, H, N, E)      keys and values repeated for every query head
    i (M, 1), j (1, N)                                  positions of queries and keys
    the inputs of the specification by name

and returns o (B, H, M, E) and lse (B, H, M), or None for lse where weights are not a softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

Result: TypeAlias = tuple[Tensor, Tensor | None]
Inputs: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a call, named as in a specification."""

    B: int = 2
    H: int = 4
    HKV: int = 2
    M: int = 45
    N: int = 133
    D: int = 24
    E: int = 20


@dataclass(frozen=True)
class Problem:
    """A call: operands, inputs, and the `const` parameters that the kernel is compiled with."""

    q: Tensor
    k: Tensor
    v: Tensor
    inputs: Inputs
    constants: Mapping[str, int]
    q_offset: int | None = None


def _no_inputs(_: Sizes, __: torch.Generator) -> Inputs:
    return {}


def _same(sizes: Sizes) -> Sizes:
    return sizes


@dataclass(frozen=True)
class Variant:
    """An example: its formula, and how to draw inputs that suit it.

    inputs      the captured tensors and scalars of a call of these sizes
    fit         the nearest sizes that make sense for the variant
    constants   values of its `const` parameters, small enough for small tests
    """

    formula: Callable[..., Result]
    inputs: Callable[[Sizes, torch.Generator], Inputs] = _no_inputs
    fit: Callable[[Sizes], Sizes] = _same
    constants: Mapping[str, int] = field(default_factory=dict)

    def problem(self, sizes: Sizes, dtype: torch.dtype, seed: int = 0, q_offset: int | None = None) -> Problem:
        """Random operands of about these sizes. Floating inputs that take any type have that of the operands."""
        sizes = self.fit(sizes)
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        q = normal(sizes.B, sizes.H, sizes.M, sizes.D)
        k = normal(sizes.B, sizes.HKV, sizes.N, sizes.D)
        v = normal(sizes.B, sizes.HKV, sizes.N, sizes.E)
        inputs = {
            name: value.to(dtype) if isinstance(value, Tensor) and value.dtype == torch.float64 else value
            for name, value in self.inputs(sizes, generator).items()
        }
        return Problem(q, k, v, inputs, self.constants, q_offset)

    def evaluate(self, problem: Problem, dtype: torch.dtype | None = None) -> Result:
        """The formula, in the operands' own type or in `dtype`, which captured floating tensors then have too."""

        def cast(value: Any) -> Any:
            wanted = dtype is not None and isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if wanted else value

        group = problem.q.shape[1] // problem.k.shape[1]
        q, k, v = cast(problem.q), *(cast(x).repeat_interleave(group, 1) for x in (problem.k, problem.v))
        offset = k.shape[2] - q.shape[2] if problem.q_offset is None else problem.q_offset
        i = torch.arange(q.shape[2])[:, None] + offset
        j = torch.arange(k.shape[2])[None, :]
        inputs = {name: cast(value) for name, value in problem.inputs.items()}
        return self.formula(q, k, v, i, j, **inputs, **problem.constants)


# Pieces ---------------------------------------------------------------------------------------------------------------


def products(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / math.sqrt(q.shape[-1])


def softmax(score: Tensor, v: Tensor, mask: Tensor | None = None, sink: Tensor | None = None) -> Result:
    """Softmax over the kept pairs; a row that keeps none gives 0. The sink takes its share of each row's sum."""
    if mask is not None:
        score = score.masked_fill(~mask, -math.inf)
    if sink is not None:
        score = torch.cat([score, sink.to(score.dtype).expand(*score.shape[:-1], 1)], -1)
    lse = score.logsumexp(-1)
    weight = torch.softmax(score, -1).masked_fill(lse.isneginf()[..., None], 0.0)
    if sink is not None:
        weight = weight[..., :-1]
    return weight.to(v.dtype) @ v, lse


def per_head(x: Tensor) -> Tensor:
    """(H,) beside (B, H, M, N)"""
    return x[:, None, None]


# Dense scores ---------------------------------------------------------------------------------------------------------


def full(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor) -> Result:
    return softmax(products(q, k), v)


def causal(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor) -> Result:
    return softmax(products(q, k), v, i >= j)


def alibi(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, slope: Tensor) -> Result:
    return softmax(products(q, k) - per_head(slope) * (i - j), v, i >= j)


def softcap(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, cap: float) -> Result:
    return softmax(cap * torch.tanh(products(q, k) / cap), v, i >= j)


def forgetting_transformer(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, log_forget: Tensor) -> Result:
    # The logs of the gates of tokens j + 1 to i.
    between = (torch.arange(k.shape[2]) > j[..., None]) & (torch.arange(k.shape[2]) <= i[..., None])
    forgotten = torch.einsum("ijn,bhn->bhij", between.to(log_forget.dtype), log_forget)
    return softmax(products(q, k) + forgotten, v, i >= j)


def t5_bucket(relative: Tensor, buckets: int, reach: int) -> Tensor:
    """The bidirectional buckets of T5, by `relative` = position of the key - position of the query."""
    side = buckets // 2
    exact = side // 2
    distance = relative.abs()
    logarithmic = torch.log(distance.double() / exact) / math.log(reach / exact) * (side - exact)
    far = (exact + logarithmic.clamp(min=0).long()).clamp(max=side - 1)
    return (relative > 0).long() * side + torch.where(distance < exact, distance, far)


def t5_bias(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, bias: Tensor, buckets: int, reach: int) -> Result:
    return softmax(q @ k.mT + bias[t5_bucket(j - i, buckets, reach)].permute(2, 0, 1), v)


def relative_bias(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, bias: Tensor) -> Result:
    return softmax(products(q, k) + bias[:, i - j + k.shape[2] - 1], v)


# Masks ----------------------------------------------------------------------------------------------------------------


def sliding_window(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, window: int) -> Result:
    return softmax(products(q, k), v, (j <= i) & (j > i - window))


def prefix_lm(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, prefix: Tensor) -> Result:
    return softmax(products(q, k), v, (j <= i) | (j < prefix[:, None, None, None]))


def same_document(doc: Tensor, i: Tensor) -> Tensor:
    return (doc[:, i[:, 0], None] == doc[:, None, :])[:, None]


def document(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, doc: Tensor) -> Result:
    return softmax(products(q, k), v, same_document(doc, i))


def document_causal(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, doc: Tensor) -> Result:
    return softmax(products(q, k), v, same_document(doc, i) & (i >= j))


def dilated_window(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, window: int, dilation: int) -> Result:
    seen = sum((j == i - step * dilation).int() for step in range(window))
    return softmax(products(q, k), v, torch.as_tensor(seen).bool())


def strided(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, stride: int) -> Result:
    local = (j <= i) & (j > i - stride)
    summary = (j <= i) & ((i - j).remainder(stride) == 0)
    return softmax(products(q, k), v, local | summary)


def bigbird(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, random: Tensor, block: int) -> Result:
    heads, blocks, picks = random.shape
    pattern = torch.zeros(heads, blocks, blocks, dtype=torch.bool)
    pattern[:, :1, :] = pattern[:, :, :1] = True
    for offset in (-1, 0, 1) if blocks else ():
        here = torch.arange(max(0, -offset), min(blocks, blocks - offset))
        pattern[:, here, here + offset] = True
    for pick in range(picks):
        pattern.scatter_(2, random[:, :, pick, None].long(), True)
    return softmax(products(q, k), v, pattern[:, i // block, j // block])


def longformer(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, is_global: Tensor, window: int) -> Result:
    chosen = is_global[:, None, i[:, 0], None] | is_global[:, None, None, :]
    return softmax(products(q, k), v, ((i - j).abs() <= window // 2) | chosen)


def natten_2d(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, width: int, size: int) -> Result:
    """As NATTEN: a window that would stand out over a border is moved inwards, so that each query sees size x size."""
    height = k.shape[2] // width
    mask = torch.zeros(i.numel(), j.numel(), dtype=torch.bool)
    for query, position in enumerate(i[:, 0].tolist()):
        row, column = divmod(position, width)
        top = min(max(row - size // 2, 0), max(height - size, 0))
        left = min(max(column - size // 2, 0), max(width - size, 0))
        image = torch.zeros(height, width, dtype=torch.bool)
        image[top : top + size, left : left + size] = True
        mask[query] = image.flatten()
    return softmax(products(q, k), v, mask)


def block_diffusion(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, block: int) -> Result:
    """The three masks of BD3-LM: within a block, from noised blocks to clean ones before, among clean blocks."""
    n = k.shape[2] // 2
    clean_i, clean_j = i >= n, j >= n
    block_i = torch.where(clean_i, i - n, i) // block
    block_j = torch.where(clean_j, j - n, j) // block
    diagonal = (block_i == block_j) & (clean_i == clean_j)
    offset_causal = (block_i > block_j) & clean_j & ~clean_i
    block_causal = (block_i >= block_j) & clean_j & clean_i
    return softmax(products(q, k), v, diagonal | offset_causal | block_causal)


def tree(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, ancestor: Tensor) -> Result:
    context = ancestor.new_ones(q.shape[0], q.shape[2], k.shape[2] - q.shape[2])
    return softmax(products(q, k), v, torch.cat([context, ancestor], -1)[:, None])


def ragged_decode(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, lengths: Tensor) -> Result:
    """Causal attention of each sequence by itself, its cache cut to its length."""
    o, lse = v.new_zeros(*q.shape[:3], v.shape[3]), q.new_zeros(q.shape[:3])
    for b, length in enumerate(lengths.tolist()):
        last = torch.arange(length - q.shape[2], length)[:, None]
        o[b], lse[b] = causal(q[b], k[b, :, :length], v[b, :, :length], last, j[:, :length])
    return o, lse


def streaming_llm(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, sinks: int, window: int) -> Result:
    return softmax(products(q, k), v, (j <= i) & ((j < sinks) | (j > i - window)))


def block_sparse(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, layout: Tensor, block: int) -> Result:
    pattern = layout.repeat_interleave(block, 1).repeat_interleave(block, 2)
    return softmax(products(q, k), v, pattern[:, i[:, 0]][:, :, : k.shape[2]])


# Weights --------------------------------------------------------------------------------------------------------------


def attention_sink(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, sinks: Tensor, window: int) -> Result:
    return softmax(products(q, k), v, (j <= i) & (j > i - window), sink=per_head(sinks))


def softmax_off_by_one(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor) -> Result:
    return softmax(products(q, k), v, sink=torch.zeros(1))


def sigmoid(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor) -> Result:
    return torch.sigmoid(products(q, k) - math.log(max(k.shape[2], 1))) @ v, None


def relu_squared(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor) -> Result:
    return torch.relu(products(q, k)).square() @ v / max(k.shape[2], 1), None


# Row transforms -------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], gain.to(x.dtype), eps=1e-6)


def qk_norm(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, q_gain: Tensor, k_gain: Tensor) -> Result:
    return softmax(products(rms_norm(q, q_gain), rms_norm(k, k_gain)), v)


def unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def cosine(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, tau: Tensor) -> Result:
    cosines = unit(q) @ unit(k).mT
    return softmax(cosines / per_head(tau).clamp(min=0.01), v)


def rotate(x: Tensor, positions: Tensor, frequencies: Tensor, magnitude: float = 1.0) -> Tensor:
    """Rotary embedding of the halves of a row (the layout of GPT-NeoX and Llama), by angles of float32 at least."""
    precise = torch.promote_types(x.dtype, torch.float32)
    angle = positions.to(precise)[:, None] * frequencies.to(precise)
    cos, sin = ((magnitude * f(angle)).to(x.dtype) for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def inverse_frequencies(width: int, base: float = 10000.0) -> Tensor:
    return base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


def rope(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, base: float) -> Result:
    frequencies = inverse_frequencies(q.shape[-1], base)
    return softmax(products(rotate(q, i[:, 0], frequencies), rotate(k, j[0], frequencies)), v, i >= j)


def yarn(q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, factor: float, original: int) -> Result:
    """Frequencies that turn more than 32 times in the original context stay, those that turn less than once are
    stretched by the factor, with a ramp between; the paper's temperature is on cos and sin."""
    width, base = q.shape[-1], 10000.0

    def dimension(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), width - 1)
    ramp = ((torch.arange(width // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    plain = inverse_frequencies(width, base)
    frequencies = plain / factor * ramp + plain * (1 - ramp)
    magnitude = 0.1 * math.log(factor) + 1
    rotated = rotate(q, i[:, 0], frequencies, magnitude), rotate(k, j[0], frequencies, magnitude)
    return softmax(products(*rotated), v, i >= j)


def longrope(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, factors: Tensor, factor: float, original: int
) -> Result:
    frequencies = inverse_frequencies(q.shape[-1]) / factors
    magnitude = math.sqrt(1 + math.log(factor) / math.log(original))
    rotated = rotate(q, i[:, 0], frequencies, magnitude), rotate(k, j[0], frequencies, magnitude)
    return softmax(products(*rotated), v, i >= j)


# Inputs ---------------------------------------------------------------------------------------------------------------
# Drawn in float64 where the specification takes any floating type (`Variant.problem` then rounds them to that of the
# operands), in float32 where it asks for f32.


def _fixed(**inputs: Any) -> Callable[[Sizes, torch.Generator], Inputs]:
    return lambda _, __: dict(inputs)


def _slopes(sizes: Sizes, _: torch.Generator) -> Inputs:
    return {"slope": 2.0 ** (-8.0 * torch.arange(1, sizes.H + 1, dtype=torch.float32) / max(sizes.H, 1))}


def _documents(sizes: Sizes, g: torch.Generator) -> Inputs:
    """Documents of 30 tokens on average."""
    starts = torch.rand(sizes.B, sizes.N, generator=g) < 1 / 30
    return {"doc": starts.int().cumsum(1, dtype=torch.int32)}


def _normal(*shape: int, g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _bigbird(sizes: Sizes, g: torch.Generator) -> Inputs:
    blocks = -(-sizes.N // 16)
    return {"random": torch.randint(0, max(blocks, 1), (sizes.H, blocks, 3), generator=g, dtype=torch.int32)}


def _layout(sizes: Sizes, g: torch.Generator) -> Inputs:
    blocks = -(-sizes.N // 16)
    return {"layout": torch.rand(sizes.H, blocks, blocks, generator=g) < 0.3}


def _ancestors(sizes: Sizes, g: torch.Generator) -> Inputs:
    """Random trees: draft i hangs from an earlier one, or from the root."""
    ancestor = torch.eye(sizes.M, dtype=torch.bool).repeat(sizes.B, 1, 1)
    for batch in range(sizes.B):
        for draft in range(1, sizes.M):
            parent = int(torch.randint(-1, draft, (), generator=g))
            if parent >= 0:
                ancestor[batch, draft] |= ancestor[batch, parent]
    return {"ancestor": ancestor}


def _image(sizes: Sizes) -> Sizes:
    """A whole number of image rows of 12 tokens, and no more queries than keys."""
    keys = max(sizes.N // 12, 1) * 12 if sizes.N else 0
    return replace(sizes, N=keys, M=min(sizes.M, keys))


def _even_width(sizes: Sizes) -> Sizes:
    return replace(sizes, D=sizes.D + sizes.D % 2)


def _queries_within_keys(sizes: Sizes) -> Sizes:
    return replace(sizes, M=min(sizes.M, sizes.N))


def _two_halves(sizes: Sizes) -> Sizes:
    keys = sizes.N - sizes.N % 2
    return replace(sizes, N=keys, M=min(sizes.M, keys))


VARIANTS: dict[str, Variant] = {
    "full": Variant(full),
    "causal": Variant(causal),
    "sliding_window": Variant(sliding_window, _fixed(window=37)),
    "alibi": Variant(alibi, _slopes),
    "softcap": Variant(softcap, _fixed(cap=2.0)),
    "forgetting_transformer": Variant(
        forgetting_transformer,
        lambda s, g: {"log_forget": torch.nn.functional.logsigmoid(_normal(s.B, s.H, s.N, g=g) + 2)},
        _queries_within_keys,
    ),
    "prefix_lm": Variant(
        prefix_lm, lambda s, g: {"prefix": torch.randint(0, s.N + 1, (s.B,), generator=g, dtype=torch.int32)}
    ),
    "document": Variant(document, _documents, _queries_within_keys),
    "document_causal": Variant(document_causal, _documents, _queries_within_keys),
    "t5_bias": Variant(
        t5_bias,
        lambda s, g: {"bias": _normal(32, s.H, g=g)},
        constants={"buckets": 32, "reach": 128},
    ),
    "relative_bias": Variant(
        relative_bias,
        lambda s, g: {"bias": _normal(s.H, max(2 * s.N - 1, 0), g=g)},
        _queries_within_keys,
    ),
    "dilated_window": Variant(dilated_window, _fixed(window=9, dilation=3)),
    "strided": Variant(strided, _fixed(stride=11)),
    "bigbird": Variant(bigbird, _bigbird, _queries_within_keys, {"block": 16}),
    "longformer": Variant(
        longformer,
        lambda s, g: {"is_global": torch.rand(s.B, s.N, generator=g) < 0.05, "window": 24},
        _queries_within_keys,
    ),
    "natten_2d": Variant(natten_2d, _fixed(width=12, size=5), _image),
    "block_diffusion": Variant(block_diffusion, _fixed(block=8), _two_halves),
    "tree": Variant(tree, _ancestors, _queries_within_keys),
    "ragged_decode": Variant(
        ragged_decode, lambda s, g: {"lengths": torch.randint(0, s.N + 1, (s.B,), generator=g, dtype=torch.int32)}
    ),
    "streaming_llm": Variant(streaming_llm, _fixed(sinks=4, window=29)),
    "attention_sink": Variant(attention_sink, lambda s, g: {"sinks": _normal(s.H, g=g), "window": 33}),
    "softmax_off_by_one": Variant(softmax_off_by_one),
    "qk_norm": Variant(
        qk_norm, lambda s, g: {"q_gain": 1 + 0.2 * _normal(s.D, g=g), "k_gain": 1 + 0.2 * _normal(s.D, g=g)}
    ),
    "rope": Variant(rope, _fixed(base=10000.0), _even_width),
    "yarn": Variant(yarn, _fixed(factor=8.0, original=64), _even_width),
    "longrope": Variant(
        longrope,
        lambda s, g: {"factors": 1 + 4 * torch.rand(s.D // 2, generator=g), "factor": 6.0, "original": 64},
        _even_width,
    ),
    "cosine": Variant(cosine, lambda s, g: {"tau": 0.1 * torch.rand(s.H, generator=g, dtype=torch.float64)}),
    "sigmoid": Variant(sigmoid),
    "relu_squared": Variant(relu_squared),
    "block_sparse": Variant(block_sparse, _layout, _queries_within_keys, {"block": 16}),
}
