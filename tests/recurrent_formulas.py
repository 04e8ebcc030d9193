"""The recurrences under examples/recurrent, written by hand with PyTorch's own operations, one step of a token each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

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
    form: (side of the decay, erases, writes, read) of its normal form."""

    step: Step
    inputs: dict[str, tuple[Callable[..., Tensor], str]]
    form: tuple[str, int, int, str]

    def draw(self, B: int, H: int, N: int, D: int, E: int) -> dict[str, Tensor]:
        sizes = {"B": B, "H": H, "N": N, "D": D, "E": E, "2": 2}
        return {name: make(*(sizes[axis] for axis in axes)) for name, (make, axes) in self.inputs.items()}

    def run(self, q: Tensor, k: Tensor, v: Tensor, inputs: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        """o (B, H, N, E) and the last state; q, k and v may have fewer heads than the state."""
        heads = state.shape[1]
        q, k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (q, k, v))
        outputs = []
        for t in range(q.shape[2]):
            at = {name: x[:, :, t] if "N" in self.inputs[name][1] else x for name, x in inputs.items()}
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
