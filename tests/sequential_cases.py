"""Recurrences that have no normal form, with what a token does written by hand in PyTorch's own operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# The state (B, H, D, E) and what the token has by name, (B, H, …); returns the output and the state after it.
Step = Callable[..., tuple[Tensor, Tensor]]

PARAMETERS = {
    "g": "B, H, N",
    "s": "B, H, N",
    "a": "B, H, N, D",
    "c": "B, H, N, D",
    "w": "B, H, N, E",
    "y": "B, H, N, E",
    "A": "H, D",
}


@dataclass(frozen=True)
class Case:
    """lines: statements. step: the same by hand. beside: lines beside `recurrence:`. coupled: value channels depend on
    each other."""

    lines: tuple[str, ...]
    step: Step
    beside: tuple[str, ...] = ()
    coupled: bool = False
    parameters: dict[str, str] = field(default_factory=lambda: PARAMETERS)

    @property
    def source(self) -> str:
        parameters = ", ".join(f"{name}: float[{axes}]" for name, axes in self.parameters.items())
        beside = "".join(f"    {line}\n" for line in self.beside)
        lines = "".join(f"        {line}\n" for line in self.lines)
        return f"attention drawn({parameters}):\n{beside}    recurrence:\n{lines}"

    def run(self, q: Tensor, k: Tensor, v: Tensor, inputs: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        """o (B, H, N, E) and the last state, in the types that PyTorch's operations give."""
        heads = state.shape[1]
        q, k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (q, k, v))
        outputs = []
        for t in range(q.shape[2]):
            at = {n: x[:, :, t] if "N" in self.parameters[n] else x for n, x in inputs.items()}
            o, state = self.step(state, q=q[:, :, t], k=k[:, :, t], v=v[:, :, t], t=t, **at)
            outputs.append(o)
        o = torch.stack(outputs, 2) if outputs else state.new_zeros(*state.shape[:2], 0, state.shape[3])
        return o.to(q.dtype), state


def outer(x: Tensor, y: Tensor) -> Tensor:
    return x[..., :, None] * y[..., None, :]


def read(x: Tensor, S: Tensor) -> Tensor:
    """x @ S."""
    return (x[..., :, None] * S).sum(-2)


def along(S: Tensor, y: Tensor) -> Tensor:
    """S @ y."""
    return (S * y[..., None, :]).sum(-1)


def sign_changing(S, q, k, v, **_):
    S = -0.5 * S + outer(k, v)
    return read(q, S), S


def both_channels(S, q, k, v, a, w, **_):
    S = S * a.sigmoid()[..., None] * w.sigmoid()[..., None, :] + outer(k, v)
    return read(q, S), S


def both_in_an_exponent(S, q, k, v, A, w, **_):
    S = S * torch.exp(-outer(A.exp(), w.square())) + outer(k, v)
    return read(q, S), S


def by_value_channels(S, q, k, v, g, **_):
    S = 0.5 * S + 0.2 * outer(along(S, v), v) + outer(k, v)
    return read(q, S) + torch.sigmoid(g)[..., None] * along(S, v).sum(-1, keepdim=True), S


def bounded(S, q, k, v, **_):
    S = torch.tanh(S) + outer(k, v)
    return read(q, S), S


def value_decay_and_erasure(S, q, k, v, w, s, **_):
    S = S * w.sigmoid()[..., None, :]
    S = S + outer(0.2 * k, v - read(k, S))
    return s[..., None] * read(q, S), S


def read_twice(S, q, k, v, w, y, g, **_):
    S = torch.exp(-g.square())[..., None, None] * S + outer(k, v)
    return w * read(q, S) + y.sigmoid() * read(k, S), S


def softmax_of_keys(S, q, k, v, **_):
    p = torch.softmax(along(S, v), -1)
    S = 0.9 * S + outer(p, v)
    return read(q, S), S


def normalized_read(S, q, k, v, c, **_):
    z = read(q, S)
    S = S + outer(k * c, v)
    return z / (z.square().sum(-1, keepdim=True) + 0.1).sqrt(), S


def squared(S, q, k, v, a, **_):
    P = S * S
    S = 0.3 * torch.sin(P) + outer(k, v)
    return read(a, P) + read(q, S), S


def chosen(S, q, k, v, **_):
    likes = read(k, S).amax(-1)[..., None, None] > 0
    S = 0.5 * torch.where(likes, torch.atan(S.abs()), -S) + outer(k, v)
    return read(q, S), S


def by_position(S, q, k, v, t, **_):
    S = torch.tanh(S) * (1.0 if t % 3 == 0 else 0.5) + outer(k, v)
    return read(q, S) * (t + 3), S


def normalized_rows(S, q, k, v, **_):
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    S = torch.tanh(S + outer(k, torch.nn.functional.silu(v)))
    return read(q, S) / q.shape[-1] ** 0.5, S


CASES = {
    "sign_changing": Case(("S *= -0.5", "S += outer(k, v)", "out = q @ S"), sign_changing),
    "both_channels": Case(
        ("S *= sigmoid(a[b, h, t, :])[:, None] * sigmoid(w[b, h, t, :])[None, :]", "S += outer(k, v)", "out = q @ S"),
        both_channels,
    ),
    "both_in_an_exponent": Case(
        ("S *= exp(-outer(exp(A[h, :]), w[b, h, t, :] ** 2))", "S += outer(k, v)", "out = q @ S"), both_in_an_exponent
    ),
    "by_value_channels": Case(
        (
            "S = 0.5 * S + 0.2 * outer(S @ v, v) + outer(k, v)",
            "out = q @ S + sigmoid(g[b, h, t]) * sum(S @ v)",
        ),
        by_value_channels,
        coupled=True,
    ),
    "bounded": Case(("S = tanh(S) + outer(k, v)", "out = q @ S"), bounded),
    "value_decay_and_erasure": Case(
        (
            "S *= sigmoid(w[b, h, t, :])[None, :]",
            "S += outer(0.2 * k, v - k @ S)",
            "out = s[b, h, t] * (q @ S)",
        ),
        value_decay_and_erasure,
    ),
    "read_twice": Case(
        (
            "S *= exp(-g[b, h, t] ** 2)",
            "S += outer(k, v)",
            "out = w[b, h, t, :] * (q @ S) + sigmoid(y[b, h, t, :]) * (k @ S)",
        ),
        read_twice,
    ),
    "softmax_of_keys": Case(
        (
            "let u = S @ v",
            "let p = exp(u - max(u))",
            "S = 0.9 * S + outer(p / sum(p), v)",
            "out = q @ S",
        ),
        softmax_of_keys,
        coupled=True,
    ),
    "normalized_read": Case(
        ("let z = q @ S", "S += outer(k * c[b, h, t, :], v)", "out = z / sqrt(sum(z * z) + 0.1)"),
        normalized_read,
        coupled=True,
    ),
    "squared": Case(("let P = S * S", "S = 0.3 * sin(P) + outer(k, v)", "out = a[b, h, t, :] @ P + q @ S"), squared),
    "chosen": Case(
        ("S = 0.5 * (sqrt(abs(S)) if max(k @ S) > 0.0 else -S)", "S += outer(k, v)", "out = q @ S"),
        chosen,
        coupled=True,
    ),
    "by_position": Case(
        ("S = tanh(S) * (1.0 if t % 3 == 0 else 0.5)", "S += outer(k, v)", "out = (q @ S) * (t + 3)"), by_position
    ),
    "normalized_rows": Case(
        ("S = tanh(S + outer(k, v))", "out = scale * (q @ S)"),
        normalized_rows,
        beside=("q = l2norm(q)", "k = l2norm(k)", "v = silu(v)"),
    ),
}
