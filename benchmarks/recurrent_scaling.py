"""How recurrences scale: with the length, in one step, with two threads, and beside softmax attention."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import recurrent_peers as peers
import torch
from recurrent_cases import EXAMPLES, Case, KernelTime
from rich.console import Console
from rich.progress import track
from rich.table import Table

import attncc
from attncc.ir.recurrence import Recurrence
from attncc.recurrent_inputs import recurrent_tensors
from attncc.timing import alternate

LENGTHS = (4096, 8192, 16_384, 32_768, 65_536)
HEADS, WIDTH = 8, 64
WIDTHS = {"based": 16}  # of q and k: its features have as many channels as the square
STEPPING = ("retnet", "gla", "gated_deltanet")
STATE_BYTES = 128 * 2**20
CROSSING = ("retnet", "mamba2", "gla", "gated_deltanet")


def lengths(quick: bool, repeat: int) -> list[dict[str, Any]]:
    """Time per token of every example, in f32: `drift` is the greatest over the least, less 1.

    An example's lengths follow one another within a second. Each turn counts by how its lengths compare, whatever the
    machine's mood is by then.
    """
    counts = LENGTHS[:3] if quick else LENGTHS
    names = sorted(path.stem for path in EXAMPLES.glob("*.attn"))
    functions = {
        name: {n: KernelTime(_call(attncc.build(EXAMPLES / f"{name}.attn"), n)) for n in counts}
        for name in track(names, description="lengths: inputs")
    }
    for _ in track(range(4 * repeat + 1), description="lengths"):
        for calls in functions.values():
            # What the example before has left to be written to memory is not this one's.
            calls[counts[0]].function()
            for call in calls.values():
                call()
    rows: list[dict[str, Any]] = []
    for name, calls in functions.items():
        # The first turn compiles.
        times = {n: [(x.call / n, x.kernels / n) for x in call.samples[1:]] for n, call in calls.items()}
        whole, kernels = (_per_token({n: [x[i] for x in turns] for n, turns in times.items()}) for i in range(2))
        rows.append({
            "attention": name, "microseconds": whole, "kernel_microseconds": kernels,
            "drift": _drift(whole), "kernel_drift": _drift(kernels),
        })  # fmt: skip
    headings = [f"{n:,}" for n in rows[0]["microseconds"]]
    out = Table(
        "", *headings, "drift", "of its kernel", title=f"Microseconds per token, B1 H{HEADS} D{WIDTH} f32, by length"
    )
    for row in rows:
        times = (f"{x:.2f}" for x in row["microseconds"].values())
        out.add_row(row["attention"], *times, f"{row['drift']:.0%}", f"{row['kernel_drift']:.0%}")
    Console(width=110).print(out)
    return rows


def _call(attn: attncc.Attention | attncc.RecurrentAttention, length: int) -> Callable[[], object]:
    assert isinstance(attn.attention, Recurrence)
    generator = torch.Generator().manual_seed(0)
    q, k, v = _rows(length, WIDTHS.get(attn.attention.name, WIDTH))
    scalars = {p.name: length for p in attn.attention.scalars}
    inputs = {**scalars, **recurrent_tensors(attn.attention, q, k, v, scalars, generator)}
    return lambda: attn(q, k, v, **inputs)


@functools.cache
def _rows(length: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v, which examples have in common, since there are many of them."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, HEADS, length, width, generator=generator) for _ in range(2))
    return q, k, torch.randn(1, HEADS, length, WIDTH, generator=generator)


def _per_token(seconds: dict[int, list[float]]) -> dict[int, float]:
    """Microseconds by length, of seconds by length and turn: the median turn, times how a length compares with it."""
    middle = [statistics.median(turn) for turn in zip(*seconds.values(), strict=True)]
    ratios = {n: statistics.median(x / m for x, m in zip(turns, middle, strict=True)) for n, turns in seconds.items()}
    return {n: ratio * statistics.median(middle) * 1e6 for n, ratio in ratios.items()}


def _drift(times: dict[int, float]) -> float:
    return max(times.values()) / min(times.values()) - 1


def copies() -> dict[str, Callable[[], object]]:
    """What memory can do, with as many bytes as states have: a copy, and a product in place."""
    x, y = torch.ones(STATE_BYTES // 4), torch.empty(STATE_BYTES // 4)
    return {"copy": lambda: y.copy_(x), "in place": lambda: x.mul_(1.0)}


def steps(quick: bool, repeat: int) -> dict[str, Any]:
    """One token for many heads, whose states fill 128 MB: each is read and written once. Beside it in turn, the quicker
    of two ways to copy as much."""
    yardsticks = copies()
    rows: list[dict[str, Any]] = []
    cells = list(itertools.product(STEPPING, (64,) if quick else (64, 128)))
    for variant, width in track(cells, description="step"):
        heads = 16
        batch = STATE_BYTES // (4 * width * width * heads)
        case = Case.draw(variant, "f32", batch, heads, 1, width)
        own, other = (torch.zeros(batch, heads, width, width) for _ in range(2))
        step, peer = _step(case, own), _peer_step(case, other)
        for _ in range(2):
            apart = (step() - peer()).abs().max().item()
            if not apart < 1e-4:
                raise SystemExit(f"{variant}: steps of attncc and PyTorch are {apart:.1e} apart")
        timed = KernelTime(step)
        timings = alternate({"attncc": timed, "PyTorch": peer, **yardsticks}, repeat)
        seconds, kernel = (
            statistics.median(getattr(x, what) for x in timed.samples[-repeat:]) for what in ("call", "kernels")
        )
        copied = min(timings[name].median for name in yardsticks)
        rows.append({
            "attention": variant, "D": width, "milliseconds": seconds * 1e3, "kernel_milliseconds": kernel * 1e3,
            "gigabytes_per_second": 2 * STATE_BYTES / seconds / 1e9,
            "copy_gigabytes_per_second": 2 * STATE_BYTES / copied / 1e9,
            "share_of_copy": copied / seconds,
            "kernel_share_of_copy": copied / kernel,
            "ratio": timings["PyTorch"].median / seconds,
        })  # fmt: skip
    columns = (
        "ms",
        "GB/s of state",
        "GB/s of a copy",
        "share of it",
        "that of its kernel",
        "faster than PyTorch's step",
    )
    out = Table("", "D", *columns, title="One step, states of 128 MB, f32")
    for row in rows:
        speeds = (f"{row[name]:.1f}" for name in ("gigabytes_per_second", "copy_gigabytes_per_second"))
        out.add_row(
            row["attention"], str(row["D"]), f"{row['milliseconds']:.2f}", *speeds,
            f"{row['share_of_copy']:.0%}", f"{row['kernel_share_of_copy']:.0%}", f"{row['ratio']:.1f}x",
        )  # fmt: skip
    Console(width=110).print(out)
    return {"state_bytes": STATE_BYTES, "rows": rows}


def _step(case: Case, state: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: case.attn.step(case.q, case.k, case.v, state=state, **case.inputs)


def _peer_step(case: Case, state: torch.Tensor) -> Callable[[], torch.Tensor]:
    def step() -> torch.Tensor:
        q, k, v, g, beta = peers.operands(case.variant, case.q, case.k, case.v, case.inputs)
        heads = q.shape[:3]
        g = None if g is None else g.expand(*heads, *g.shape[3:]).flatten(0, 2)
        beta = None if beta is None else beta.flatten()
        rows = (x.flatten(0, 2) for x in (q, k, v))
        return peers.finished(case.variant, peers.step(*rows, g, beta, state.flatten(0, 1)).view_as(v), v, case.inputs)

    return step


def two_threads(repeat: int) -> list[dict[str, Any]]:
    """One head: what two threads bring, by the wall clock, so only on a machine that has nothing else to do."""
    threads = torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    for variant in STEPPING:
        case = Case.draw(variant, "f32", 1, 1, 16_384, WIDTH)
        seconds: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(3 * repeat):
            for count, samples in seconds.items():
                torch.set_num_threads(count)
                start = time.perf_counter()
                case.call()
                samples.append(time.perf_counter() - start)
        # The best, since the first call compiles and other work can only slow down.
        one, two = (min(samples) for samples in seconds.values())
        rows.append({"attention": variant, "one_milliseconds": one * 1e3, "speedup": one / two})
        print(f"{variant}, B1 H1 N16384 D{WIDTH}: {one * 1e3:.2f} ms with one thread, {one / two:.2f}x faster with two")
    torch.set_num_threads(threads)
    return rows


def crossover(quick: bool, repeat: int, picture: Path) -> dict[str, Any]:
    """Time per token by length, recurrences beside softmax attention, and from which length on they are faster."""
    names = ["SDPA, causal", *CROSSING]
    times: dict[str, dict[int, float]] = {name: {} for name in names}
    for n in track([2**i for i in range(5, 13 if quick else 15)], description="crossover"):
        cases = {variant: Case.draw(variant, "f32", 1, HEADS, n, WIDTH) for variant in CROSSING}
        functions: dict[str, Callable[[], object]] = {variant: case.call for variant, case in cases.items()}
        functions[names[0]] = cases[CROSSING[0]].sdpa
        rounds = max(1, 4096 // n)  # short calls several times, for the clock's sake
        timings = alternate({name: _repeated(f, rounds) for name, f in functions.items()}, repeat, warmup=1)
        for name, timing in timings.items():
            times[name][n] = timing.median / rounds / n * 1e6
    softmax = times[names[0]]
    faster = {name: _faster_from(times[name], softmax) for name in CROSSING}
    for name, n in faster.items():
        print(f"{name} is faster than SDPA " + ("at no length measured" if n is None else f"from N = {n} on"))
    draw(times, picture)
    return {"microseconds": times, "faster_from": faster}


def _repeated(function: Callable[[], object], rounds: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(rounds):
            function()

    return run


def _faster_from(times: dict[int, float], softmax: dict[int, float]) -> int | None:
    """The least length from which on all are faster."""
    slower = [n for n in times if times[n] >= softmax[n]]
    return next((n for n in sorted(times) if n > max(slower, default=0)), None)


def draw(times: dict[str, dict[int, float]], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError:
        print(f"{path} is not drawn: matplotlib is missing, which `pip install matplotlib` brings")
        return
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in times.items():
        softmax = name not in CROSSING
        axes.plot(list(curve), list(curve.values()), "k.--" if softmax else ".-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set(xlabel="tokens", ylabel=f"µs per token, {HEADS} heads, D = E = {WIDTH}, f32")
    ticks = list(next(iter(times.values())))
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks], rotation=45)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    print(f"drawn: {path}")
