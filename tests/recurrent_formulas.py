"""The recurrences under examples/recurrent, written by hand with PyTorch's own operations, one step of a token each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import elu, relu, silu

# As many features as the specifications with a number of them have without another one.
R = 64

# The rows of one token and the inputs at it: all (B, H, …). Returns the output and the state after the token.
Step = Callable[..., tuple[Tensor, Tensor]]


def outer(x: Tensor, y: Tensor) -> Tensor:
    return x[..., :, None] * y[..., None, :]


def read(x: Tensor, state: Tensor) -> Tensor:
    return torch.einsum("bhd,bhde->bhe", x, state)


def l2norm(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def linear(S, q, k, v):
    S = S + outer(k, v)
    return read(q, S) / q.shape[-1] ** 0.5, S


def retnet(S, q, k, v, gamma):
    S = gamma[None, :, None, None] * S + outer(k, v)
    return read(q, S) / q.shape[-1] ** 0.5, S


def lightning(S, q, k, v, slope):
    S = torch.exp(-slope)[None, :, None, None] * S + outer(silu(k), silu(v))
    return read(silu(q), S), S


def mamba2(S, q, k, v, dt, A, skip):
    S = torch.exp(A * dt)[..., None, None] * S + dt[..., None, None] * outer(k, v)
    return read(q, S) + skip[:, None] * v, S


def gla(S, q, k, v, g):
    S = torch.exp(g)[..., None] * S + outer(k, v)
    return read(q, S) / q.shape[-1] ** 0.5, S


def hgrn2(S, q, k, v, f):
    S = f[..., None] * S + outer(1 - f, v)
    return read(q, S), S


def rwkv6(S, q, k, v, w, u):
    kv = outer(k, v)
    return read(q, S + u[None, :, :, None] * kv), torch.exp(w)[..., None] * S + kv


def deltanet(S, q, k, v, beta):
    q, k, beta = l2norm(q), l2norm(k), beta[..., None]
    S = S - outer(k, beta * read(k, S)) + outer(k, beta * v)
    return read(q, S) / q.shape[-1] ** 0.5, S


def gated_deltanet(S, q, k, v, g, beta):
    return deltanet(torch.exp(g)[..., None, None] * S, q, k, v, beta)


def kimi_delta(S, q, k, v, g, beta):
    return deltanet(torch.exp(g)[..., None] * S, q, k, v, beta)


def rwkv7(S, q, k, v, w, kappa, a):
    kappa = l2norm(kappa)
    transition = torch.diag_embed(torch.exp(w)) - outer(a * kappa, kappa)
    S = transition @ S + outer(k, v)
    return read(q, S), S


def gated_delta_product(S, q, k, v, g, beta, k2, v2):
    _, S = gated_deltanet(S, q, k, v, g, beta[..., 0])
    return deltanet(S, q, k2, v2, beta[..., 1])


# Features: the state has one more column, that of the sum of weights.


def weighted(S, q, k, v):
    """The state gains the product of features and (v, 1); what they read is divided by its last column, 0 where
    that is 0."""
    S = S + outer(k, torch.cat([v, torch.ones_like(v[..., :1])], -1))
    o = read(q, S)
    nothing = o[..., -1:] == 0
    return torch.where(nothing, 0, o[..., :-1]) / torch.where(nothing, 1, o[..., -1:]), S


def linear_attention(S, q, k, v):
    return weighted(S, elu(q) + 1, elu(k) + 1, v)


def performer(S, q, k, v, W, shift):
    def exponents(x):
        x = x / x.shape[-1] ** 0.25
        return torch.einsum("bhd,dr->bhr", x, W) - x.square().sum(-1, keepdim=True) / 2

    shift = shift.repeat_interleave(k.shape[1] // shift.shape[1], 1)
    of_q, of_k = exponents(q), exponents(k)
    return weighted(S, torch.exp(of_q - of_q.amax(-1, keepdim=True)), torch.exp(of_k - shift[..., None]), v)


def cosformer(S, q, k, v, length, t):
    angle = torch.tensor(math.pi / 2 * t / length, dtype=torch.float64)

    def features(x):
        return torch.cat([relu(x) * torch.cos(angle), relu(x) * torch.sin(angle)], -1)

    return weighted(S, features(q), features(k), v)


def based(S, q, k, v):
    def taylor(x):
        x = x / x.shape[-1] ** 0.25
        second = torch.einsum("bhi,bhj->bhij", x, x).flatten(2) / 2**0.5
        return torch.cat([torch.ones_like(x[..., :1]), x, second], -1)

    return weighted(S, taylor(q), taylor(k), v)


def hedgehog(S, q, k, v, Wq, Wk):
    def both(x, W):
        x = torch.einsum("bhd,hdr->bhr", x, W.repeat_interleave(x.shape[1] // W.shape[0], 0))
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)

    return weighted(S, both(q, Wq), both(k, Wk), v)


def _gate(*shape: int) -> Tensor:
    """Log-decays, from hardly any to e ** -4."""
    return -4 * torch.rand(shape, dtype=torch.float64) ** 3


def _share(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@dataclass(frozen=True)
class Formula:
    """step: what a token does. inputs: of each, how it is drawn and its axes; those with N are read at the token.
    form: (side of the decay, erases, writes, read) of its normal form. features: how many, of D, where the output is
    divided by their sum of weights. positional: whether `step` asks for the position t."""

    step: Step
    inputs: dict[str, tuple[Callable[..., Tensor | int], str]]
    form: tuple[str, int, int, str]
    features: Callable[[int], int] | None = None
    positional: bool = False

    def state_shape(self, B: int, H: int, D: int, E: int) -> tuple[int, int, int, int]:
        return (B, H, D, E) if self.features is None else (B, H, self.features(D), E + 1)

    def draw(self, B: int, H: int, N: int, D: int, E: int, HKV: int = 0) -> dict[str, Tensor | int]:
        sizes = {"B": B, "H": H, "K": HKV or H, "N": N, "D": D, "E": E, "2": 2, "R": R}
        return {name: make(*(sizes[axis] for axis in axes)) for name, (make, axes) in self.inputs.items()}

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: dict[str, Any], state: Tensor, q_offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        """o (B, H, N, E) and the last state; q, k and v may have fewer heads than the state."""
        heads = state.shape[1]
        q, k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (q, k, v))
        outputs = []
        for t in range(q.shape[2]):
            at = {name: x[:, :, t] if "N" in self.inputs[name][1] else x for name, x in inputs.items()}
            at |= {"t": t + q_offset} if self.positional else {}
            o, state = self.step(state, q[:, :, t], k[:, :, t], v[:, :, t], **at)
            outputs.append(o)
        return torch.stack(outputs, 2), state


FORMULAS = {
    "linear": Formula(linear, {}, ("none", 0, 1, "post")),
    "retnet": Formula(retnet, {"gamma": (_share, "H")}, ("scalar", 0, 1, "post")),
    "lightning": Formula(lightning, {"slope": (_share, "H")}, ("scalar", 0, 1, "post")),
    "mamba2": Formula(
        mamba2, {"dt": (_share, "BHN"), "A": (_gate, "H"), "skip": (_normal, "H")}, ("scalar", 0, 1, "post")
    ),
    "gla": Formula(gla, {"g": (_gate, "BHND")}, ("key", 0, 1, "post")),
    "hgrn2": Formula(hgrn2, {"f": (_share, "BHND")}, ("key", 0, 1, "post")),
    "rwkv6": Formula(rwkv6, {"w": (_gate, "BHND"), "u": (_normal, "HD")}, ("key", 0, 1, "pre")),
    "deltanet": Formula(deltanet, {"beta": (_share, "BHN")}, ("none", 1, 1, "post")),
    "gated_deltanet": Formula(gated_deltanet, {"g": (_gate, "BHN"), "beta": (_share, "BHN")}, ("scalar", 1, 1, "post")),
    "kimi_delta": Formula(kimi_delta, {"g": (_gate, "BHND"), "beta": (_share, "BHN")}, ("key", 1, 1, "post")),
    "rwkv7": Formula(
        rwkv7, {"w": (_gate, "BHND"), "kappa": (_normal, "BHND"), "a": (_share, "BHND")}, ("key", 1, 1, "post")
    ),
    "gated_delta_product": Formula(
        gated_delta_product,
        {"g": (_gate, "BHN"), "beta": (_share, "BHN2"), "k2": (_normal, "BHND"), "v2": (_normal, "BHNE")},
        ("scalar", 2, 2, "post"),
    ),
}

_LINEAR = ("none", 0, 1, "post")
# Those whose state has another shape than D x E, since their rows are features and their output is normalised.
FEATURE_FORMULAS = {
    "linear_attention": Formula(linear_attention, {}, _LINEAR, lambda D: D),
    "performer": Formula(performer, {"W": (_normal, "DR"), "shift": (_normal, "BK")}, _LINEAR, lambda _: R),
    "cosformer": Formula(cosformer, {"length": (lambda: 11, "")}, _LINEAR, lambda D: 2 * D, positional=True),
    "based": Formula(based, {}, _LINEAR, lambda D: 1 + D + D * D),
    "hedgehog": Formula(hedgehog, {"Wq": (_normal, "HDR"), "Wk": (_normal, "KDR")}, _LINEAR, lambda _: 2 * R),
}
