"""Trains a small language model on bytes of text, through compiled kernels and through the dense formula in turn.

    python examples/train_lm.py [--steps 300] [--length 1024] [--width 128] [--out train_lm.png] [--check]

Two models start from the same weights and see the same text, a step each by turns, and differ in nothing but their
attention. Shown are both losses, how far they ever are apart, and the median time of a step; `--check` fails where
losses are more than 1e-3 apart.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import rich
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import attncc

SPEC = '''
attention local_bias(bias: f32[H, window], window: const int, cap: float):
    """A learned bias by distance, soft-capped scores, a causal sliding window."""
    let distance = q_idx - kv_idx
    score = cap * tanh((qk + bias[h, distance]) / cap)
    mask  = 0 <= distance < window
'''
WINDOW, CAP = 256, 20.0
LAYERS, HEADS, KV_HEADS, SEQUENCES = 2, 4, 2, 2
BOUND = 1e-3

# What a layer's attention does with its rows and gates.
Attend: TypeAlias = Callable[..., Tensor]


def compiled() -> Attend:
    attention = attncc.build(SPEC, window=WINDOW)
    return lambda q, k, v, bias: attention(q, k, v, bias=bias, cap=CAP)


def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The specification as one writes it by hand in PyTorch."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    position = torch.arange(q.shape[2])
    distance = position[:, None] - position
    score = q @ k.mT / math.sqrt(q.shape[-1]) + bias[:, distance.clamp(0, WINDOW - 1)]
    kept = (distance >= 0) & (distance < WINDOW)
    return torch.softmax((CAP * torch.tanh(score / CAP)).masked_fill(~kept, -math.inf), -1) @ v


class Attention(nn.Module):
    """Heads that share keys and values, and a learned bias by distance."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * KV_HEADS * width // HEADS, bias=False)
        # Learned from that of ALiBi, where every head looks back a distance of its own.
        self.bias = nn.Parameter(-(2.0 ** -torch.arange(HEADS))[:, None] * torch.arange(WINDOW))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2 * KV_HEADS, -1)).transpose(1, 2).chunk(2, 1)
        return self.out(attend(q, k, v, self.bias).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = x + self.attention(self.before_attention(x), attend)
        return x + self.mlp(self.before_mlp(x))


class Model(nn.Module):
    def __init__(self, width: int, attention: Callable[[int], nn.Module] = Attention) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.layers = nn.ModuleList(Layer(width, attention(width)) for _ in range(LAYERS))
        self.head = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 256, bias=False))

    def forward(self, text: Tensor, attend: Attend) -> Tensor:
        x = self.embedding(text)
        for layer in self.layers:
            x = layer(x, attend)
        return self.head(x)


def seconds() -> float:
    """What one thread takes is told by its own processor time, whatever else the machine does."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Learner:
    """A model, the attention that it computes with, what came of each step, and how many it takes at most."""

    def __init__(self, name: str, model: Model, attend: Attend, most: int | None = None) -> None:
        self.name, self.model, self.attend, self.most = name, model, attend, most
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, text: Tensor) -> None:
        start = seconds()
        logits = self.model(text[:, :-1], self.attend)
        loss = functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.seconds.append(seconds() - start)
        self.losses.append(loss.item())


def find_text() -> tuple[str, bytes]:
    """What it is and its bytes: some hundred KB that come with Python, or with the system."""
    with contextlib.suppress(ImportError):
        from pydoc_data.topics import topics

        return "the topics of Python's help()", "\n".join(topics[name] for name in sorted(topics)).encode()
    licences = [path for path in sorted(Path("/usr/share/common-licenses").glob("*")) if not path.is_symlink()]
    if licences:
        return "the licences of the system", b"\n".join(path.read_bytes() for path in licences)
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "the source of Python's library", b"\n".join(path.read_bytes() for path in library)


def train(learners: list[Learner], text: bytes, steps: int, length: int) -> None:
    generator = torch.Generator().manual_seed(1)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=steps)
        for step in range(steps):
            starts = torch.randint(len(data) - length, (SEQUENCES, 1), generator=generator)
            batch = data[starts + torch.arange(length + 1)]
            learning = [learner for learner in learners if learner.most is None or step < learner.most]
            for learner in learning:
                learner.step(batch)
            losses = ", ".join(f"{learner.name} {learner.losses[-1]:.4f}" for learner in learning)
            progress.update(task, advance=1, description=f"loss: {losses}")


def plot(learners: list[Learner], length: int, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path} is not drawn: matplotlib is missing, which `pip install matplotlib` brings")
        return
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    loss, milliseconds = figure.subplots(1, 2)
    for learner, style in zip(learners, ({"c": "C0"}, {"c": "C1", "lw": 4, "alpha": 0.5, "zorder": 1}), strict=True):
        loss.plot(range(1, len(learner.losses) + 1), learner.losses, label=learner.name, **style)
        # The first step compiles.
        times = [1e3 * taken for taken in learner.seconds[1:]]
        milliseconds.plot(range(2, len(times) + 2), times, ".", ms=3, c=style["c"], label=learner.name)
    loss.set(xlabel="step", ylabel="loss, nats per byte")
    milliseconds.set(xlabel="step", ylabel=f"ms per step, N = {length}", ylim=(0, None))
    loss.legend()
    milliseconds.legend()
    figure.savefig(path, dpi=110)
    print(f"drawn: {path}")


def parse(parser: argparse.ArgumentParser, picture: str) -> tuple[argparse.Namespace, bytes]:
    """The options of a run, and the text that it is about. picture: the name of its plot."""
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--length", type=int, default=1024, help="bytes in each of the two sequences of a step")
    parser.add_argument("--width", type=int, default=128, help=f"of the model, a multiple of {HEADS}")
    parser.add_argument("--out", type=Path, default=Path(picture), help="the plot")
    parser.add_argument("--check", action="store_true", help=f"fail where losses are more than {BOUND} apart")
    options = parser.parse_args()
    title, text = find_text()
    if options.steps < 2 or options.width < HEADS or options.width % HEADS or not 0 < options.length < len(text):
        parser.error(
            f"it takes 2 steps or more, a width that is a multiple of {HEADS}, a length from 1 to {len(text) - 1}"
        )
    if not options.out.parent.is_dir():
        parser.error(f"there is no folder {options.out.parent} for the plot")
    print(f"{len(text) // 1000} KB of text: {title}")
    return options, text


def report(learners: list[Learner], options: argparse.Namespace) -> None:
    """Losses and times of two learners, the plot, and, where it was asked for, whether losses are the same."""
    table = Table("attention", "steps", "first loss", "last loss", f"median step at N = {options.length}")
    for learner in learners:
        time_of_step = f"{1e3 * statistics.median(learner.seconds):.0f} ms"
        losses = f"{learner.losses[0]:.4f}", f"{learner.losses[-1]:.4f}"
        table.add_row(learner.name, str(len(learner.losses)), *losses, time_of_step)
    rich.print(table)
    both = min(len(learner.losses) for learner in learners)
    first, second = (torch.tensor(learner.losses[:both], dtype=torch.float64) for learner in learners)
    apart = (first - second).abs().max().item()
    print(f"losses of {both} steps are never more than {apart:.1e} apart; threads: {torch.get_num_threads()}")
    plot(learners, options.length, options.out)
    if options.check and not apart <= BOUND:
        sys.exit(f"losses are {apart:.1e} apart; the bound is {BOUND}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a small language model with and without attncc.")
    options, text = parse(parser, "train_lm.png")
    torch.manual_seed(0)
    model = Model(options.width)
    learners = [Learner("compiled", model, compiled()), Learner("dense", copy.deepcopy(model), dense)]
    try:
        train(learners, text, options.steps, options.length)
    except attncc.AttnError as error:
        sys.exit(str(error))
    report(learners, options)


if __name__ == "__main__":
    main()
