"""Trains the language model of train_lm.py with gated DeltaNet layers in chunks, then lets it write token by token.

    python examples/recurrent_lm.py [--steps 300] [--compare 10] [--write 200] [--out recurrent_lm.png] [--check]

A second model starts from the same weights and sees the same text for a few steps; it computes with the recurrence
written as a loop over tokens in PyTorch. What the first has learnt then writes: the beginning of a text is read in
chunks, and each byte after it is one step of the states, whose logits are compared with those of the whole text in
chunks. `--check` fails where losses or logits are more than 1e-3 apart.
"""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional
from train_lm import BOUND, HEADS, Attend, Learner, Model, parse, report, seconds, train

import attncc

SPEC = Path(__file__).parent / "recurrent" / "gated_deltanet.attn"
TAPS = 4  # of the convolution
PROMPT = 64  # bytes
TEMPERATURE = 0.7


@dataclass
class Memory:
    """What a layer keeps of the tokens so far: the rows that its convolution still sees, and the state."""

    rows: Tensor
    state: Tensor


class GatedDelta(nn.Module):
    """Gated DeltaNet (Yang et al. 2024): a short convolution, gates from the input, a gated norm of each head."""

    memory: Memory | None = None  # where tokens come a few at a time

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.convolution = nn.Conv1d(3 * width, 3 * width, TAPS, groups=3 * width, bias=False)
        # A head forgets by exp(-rate * time); both begin as those of Mamba 2 do.
        self.log_rate = nn.Parameter(torch.empty(HEADS).uniform_(1, 16).log())
        self.time, self.beta = nn.Linear(width, HEADS), nn.Linear(width, HEADS)
        nn.init.constant_(self.time.bias, -4)
        self.norm, self.gate = nn.RMSNorm(width // HEADS), nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        rows = functional.silu(self.convolution(self.with_past(self.qkv(x)).mT).mT)
        q, k, v = rows.unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).chunk(3, 1)
        g = -self.log_rate.exp()[:, None] * functional.softplus(self.time(x)).mT
        beta = self.beta(x).sigmoid().mT
        o = attend(q, k, v, g, beta, None if self.memory is None else self.memory.state)
        o = self.norm(o).transpose(1, 2).flatten(2)
        return self.out(o * functional.silu(self.gate(x)))

    def with_past(self, rows: Tensor) -> Tensor:
        """`rows` after those that the convolution of the first of them sees."""
        if self.memory is None:
            return functional.pad(rows, (0, 0, TAPS - 1, 0))
        rows = torch.cat([self.memory.rows, rows], 1)
        self.memory.rows = rows[:, 1 - TAPS :]
        return rows


def compiled() -> Attend:
    attention = attncc.build(SPEC)

    def attend(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None) -> Tensor:
        if state is None:
            return attention(q, k, v, g=g, beta=beta)
        return attention.step(q, k, v, state=state, g=g, beta=beta)

    return attend


def token_loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, _: Tensor | None = None) -> Tensor:
    """The specification as one writes it by hand in PyTorch."""
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    decay, beta, outputs = g.exp()[..., None, None], beta[..., None, None], []
    for t in range(q.shape[2]):
        row, key, value = (x[:, :, t, None] for x in (q, k, v))
        state = decay[:, :, t] * state
        state = state + key.mT @ (beta[:, :, t] * (value - key @ state))
        outputs.append(row @ state)
    return torch.cat(outputs, 2) / q.shape[-1] ** 0.5


@torch.no_grad()
def write(model: Model, attend: Attend, prompt: Tensor, count: int) -> tuple[Tensor, Tensor, float]:
    """The text (1, PROMPT + count) that follows a prompt, the logits (1, count, 256) that its bytes were drawn with,
    and the seconds of a byte. What came before is never read again."""
    generator = torch.Generator().manual_seed(2)
    layers = [module for module in model.modules() if isinstance(module, GatedDelta)]
    for layer in layers:
        width = layer.out.in_features
        rows, state = torch.zeros(1, TAPS - 1, 3 * width), torch.zeros(1, HEADS, width // HEADS, width // HEADS)
        layer.memory = Memory(rows, state)
    text, logits = prompt, [model(prompt, attend)[:, -1:]]
    start = seconds()
    for _ in track(range(count), description="writing"):
        chances = (logits[-1][0] / TEMPERATURE).softmax(-1)
        token = torch.multinomial(chances, 1, generator=generator)
        text = torch.cat([text, token], 1)
        logits.append(model(token, attend))
    taken = seconds() - start
    for layer in layers:
        layer.memory = None
    return text, torch.cat(logits[:count], 1), taken / count


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a small recurrent language model and lets it write.")
    parser.add_argument("--compare", type=int, default=10, help="steps that the loop over tokens takes too")
    parser.add_argument("--write", type=int, default=200, help="bytes to write")
    options, text = parse(parser, "recurrent_lm.png")
    if not (0 < options.compare <= options.steps and options.write > 0):
        parser.error("it takes a step to compare or more, up to all, and a byte to write or more")
    torch.manual_seed(0)
    model = Model(options.width, GatedDelta)
    attend = compiled()
    learners = [
        Learner("compiled, in chunks", model, attend),
        Learner("PyTorch, token by token", copy.deepcopy(model), token_loop, most=options.compare),
    ]
    try:
        train(learners, text, options.steps, options.length)
        report(learners, options)
        prompt = torch.frombuffer(bytearray(text[:PROMPT]), dtype=torch.uint8).long()[None]
        written, logits, each = write(model, attend, prompt, options.write)
        with torch.no_grad():
            whole = model(written[:, :-1], attend)[:, PROMPT - 1 :]
    except attncc.AttnError as error:
        sys.exit(str(error))
    print(bytes(written[0].tolist()).decode(errors="replace"))
    apart = (logits - whole).abs().max().item()
    print(
        f"{options.write} bytes, {1e3 * each:.1f} ms each; the logits of steps and those of the whole text in "
        f"chunks are never more than {apart:.1e} apart"
    )
    if options.check and not apart <= BOUND:
        sys.exit(f"logits are {apart:.1e} apart; the bound is {BOUND}")


if __name__ == "__main__":
    main()
