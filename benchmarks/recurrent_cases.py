"""What the benchmarks of recurrences measure: examples, inputs of the published kind, and what a call takes.

Useful operations of a token and head, at a state of D x E and chunks of C tokens; a multiplication and an addition are
two. What pads, what makes operands, decays and exponentials are not counted.

    forward, without erasing    4DE  the state is read and written      + C(D + E)   half of two C x C products,
                                                                                     none where tokens stream: C is 0
    forward, with               6DE  and read once more, for erases     + 2C(D + E)  and two more, for what is written
    backward, without          10DE  the state again, its gradient, and what rows get of both     + C(3D + 2E)
    backward, with             16DE  likewise, with twice the rows that read                      + C(6D + 5E)
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import recurrent_peers as peers
import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional

import attncc
from attncc.bench import chunk_of as products_of
from attncc.peak import current_peak
from attncc.plan.recurrent import gradient_of
from attncc.runtime.cpp import CppKernel
from attncc.runtime.cpp_toolchain import find_compiler
from attncc.runtime.targets import resolve

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "recurrent"
# Of its best speeds, those of a core that nobody shares: a neighbour's thread on the same core takes a third and more
# of the registers' rate, or of what the caches bring, while clocks alone vary by a sixth.
ALONE = 0.78
COPIES = 20
HEADS, LENGTH = 8, 8192
LIMIT = 240.0  # seconds spent on calls that had the core to themselves
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# The kind of state update of each variant that is compared with others.
VARIANTS = {
    "retnet": "a decay by head",
    "mamba2": "a decay by token",
    "gla": "a decay by channel",
    "deltanet": "the delta rule",
    "gated_deltanet": "decay and delta rule",
}


def erases(variant: str) -> bool:
    return "delta" in variant


def inputs_of(variant: str, B: int, H: int, N: int, D: int, generator: torch.Generator) -> dict[str, Tensor]:
    """As models begin with them."""

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    match variant:
        case "retnet":
            return {"gamma": 1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float32))}
        case "mamba2":
            # Steps of 0.001 to 0.1 and rates of -1 to -16.
            return {"dt": 10 ** (-3 + 2 * random(B, H, N)), "A": -1 - 15 * random(H), "skip": torch.ones(H)}
        case "gla":
            return {"g": functional.logsigmoid(torch.randn(B, H, N, D, generator=generator)) / 16}
        case "deltanet":
            return {"beta": random(B, H, N)}
        case "gated_deltanet":
            rate = -1 - 15 * random(1, H, 1)
            return {"g": rate * 10 ** (-3 + 2 * random(B, H, N)), "beta": random(B, H, N)}
        case _:
            raise ValueError(variant)


def operations(variant: str, backward: bool, chunk: int, D: int, E: int) -> int:
    """Useful ones, of a token and head."""
    if backward:
        return 16 * D * E + chunk * (6 * D + 5 * E) if erases(variant) else 10 * D * E + chunk * (3 * D + 2 * E)
    return 6 * D * E + 2 * chunk * (D + E) if erases(variant) else 4 * D * E + chunk * (D + E)


@dataclass
class Case:
    """An example and the arguments of a call."""

    variant: str
    dtype: str
    q: Tensor
    k: Tensor
    v: Tensor
    inputs: dict[str, Tensor]
    attn: attncc.RecurrentAttention = field(init=False)

    def __post_init__(self) -> None:
        self.attn = attncc.build(EXAMPLES / f"{self.variant}.attn")

    @staticmethod
    def draw(variant: str, dtype: str, B: int, H: int, N: int, D: int, gradients: bool = False) -> Case:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(B, H, N, D, generator=generator).to(DTYPES[dtype]) for _ in range(3))
        case = Case(variant, dtype, q, k, v, inputs_of(variant, B, H, N, D, generator))
        for leaf in case.leaves:
            leaf.requires_grad_(gradients)
        return case

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What has a gradient."""
        return self.q, self.k, self.v, *self.inputs.values()

    def call(self) -> Tensor:
        return self.attn(self.q, self.k, self.v, **self.inputs)

    def sdpa(self) -> Tensor:
        """Softmax attention of the same rows."""
        return functional.scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True)

    def peer(self, core: Callable[..., Tensor], *setting: peers.Setting) -> Tensor:
        """`peers.chunked` or `peers.token_loop`, and what an example has before and after it."""
        operands = peers.operands(self.variant, self.q, self.k, self.v, self.inputs)
        return peers.finished(self.variant, core(*operands, *setting), self.v, self.inputs)

    def chunked(self, setting: peers.Setting) -> Tensor:
        return self.peer(peers.chunked, setting)

    def token_loop(self) -> Tensor:
        return self.peer(peers.token_loop)

    def check(self, setting: peers.Setting) -> None:
        """Contenders compute the same. Raises SystemExit where they do not."""
        with torch.no_grad():
            own, *others = (x.double() for x in (self.call(), self.chunked(setting), self.token_loop()))
        for other in others:
            apart = ((own - other).norm() / other.norm()).item()
            if not apart < (1e-4 if self.dtype == "f32" else 2e-2):
                raise SystemExit(f"{self.variant}, {self.dtype}: attncc and PyTorch are {apart:.1e} apart")


def with_gradients(function: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """`function`, and the gradients of leaves that it depends on from a gradient of its output."""
    with torch.no_grad():
        upstream = torch.randn_like(function())

    def both() -> Tensor:
        o = function()
        torch.autograd.grad(o, leaves, upstream, allow_unused=True)
        return o

    return both


@dataclass(frozen=True, slots=True)
class Sample:
    """A call: its seconds, those within compiled kernels, and the lower of the core's speeds before and after it."""

    call: float
    kernels: float
    peak: float  # operations per second of registers
    copy: float  # bytes per second within the second cache


class KernelTime:
    """How long calls take, and how much of it passes within compiled kernels, by the clock of `attncc.timing`.

    dtype: of the operands, where the speed of the core around calls is wanted. first: the first kernel of a call that
    counts.
    """

    def __init__(self, function: Callable[[], object], dtype: torch.dtype | None = None, first: int = 0) -> None:
        self.function, self.dtype, self.first = function, dtype, first
        self.samples: list[Sample] = []

    def __call__(self) -> None:
        before = self._speeds()
        start = _clock()
        with _timed_launches() as seconds:
            self.function()
        call = _clock() - start
        peak, copy = map(min, zip(before, self._speeds(), strict=True))
        self.samples.append(Sample(call, sum(seconds[self.first :]), peak, copy))

    def _speeds(self) -> tuple[float, float]:
        if self.dtype is None:
            return math.nan, math.nan
        return current_peak(self.dtype, find_compiler().command[0]), _copy_speed()

    def undisturbed(self, best: Best) -> list[Sample]:
        """Calls that had the core to themselves, but for the first, which compiles."""
        peak, copy = best[self.dtype]
        return [x for x in self.samples[1:] if x.peak > ALONE * peak and x.copy > ALONE * copy]


# The best of `peak` and `copy`, by the type of operands.
Best = Mapping[torch.dtype | None, tuple[float, float]]


def until_undisturbed(times: Collection[KernelTime], count: int, limit: float, what: str) -> Best:
    """Further calls, all in turn, until of each at least `count` were undisturbed, or for `limit` seconds."""
    end = time.monotonic() + limit
    with Progress() as progress:
        task = progress.add_task(f"{what}: undisturbed calls", total=len(times))
        done = 0
        while done < len(times) and time.monotonic() < end:
            for own in times:
                own()
            best = _best(times)
            done = sum(len(own.undisturbed(best)) >= count for own in times)
            progress.update(task, completed=done)
    if done < len(times):
        few = f"{len(times) - done} of {len(times)}"
        print(f"{what}: {few} had fewer than {count} undisturbed calls in {limit:.0f} s, and where there was none, all")
        print("count. On a quieter machine, --only measures this section again.")
    return _best(times)


def _best(times: Collection[KernelTime]) -> Best:
    copy = max(sample.copy for own in times for sample in own.samples)
    return {
        dtype: (max(sample.peak for own in times if own.dtype == dtype for sample in own.samples), copy)
        for dtype in {own.dtype for own in times}
    }


def _copy_speed() -> float:
    """Bytes per second from one place in the second cache to another."""
    source, target = _buffers()
    target.copy_(source)
    start = _clock()
    for _ in range(COPIES):
        target.copy_(source)
    return COPIES * source.nbytes / (_clock() - start)


@contextlib.contextmanager
def quietest_core() -> Iterator[None]:
    """With one torch thread, where the system can: on the core that copies within its cache most quickly just now."""
    if torch.get_num_threads() > 1 or not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    speeds: dict[int, float] = {}
    for core in allowed:
        os.sched_setaffinity(0, {core})
        speeds[core] = statistics.median(_copy_speed() for _ in range(2000))
    os.sched_setaffinity(0, {max(speeds, key=speeds.__getitem__)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


@functools.cache
def _buffers() -> tuple[Tensor, Tensor]:
    return torch.ones(2**16), torch.empty(2**16)


def _clock() -> float:
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


@contextlib.contextmanager
def _timed_launches() -> Iterator[list[float]]:
    launch, seconds = CppKernel.launch_packed, list[float]()

    def timed(kernel: CppKernel, block: bytes) -> None:
        start = _clock()
        launch(kernel, block)
        seconds.append(_clock() - start)

    CppKernel.launch_packed = timed
    try:
        yield seconds
    finally:
        CppKernel.launch_packed = launch


def keep_memory() -> None:
    """Memory that tensors gave back stays with the process, for all contenders alike. Otherwise the system takes every
    tensor above 32 MiB back, and clears the next one page by page, which lasts longer than a kernel does."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)  # none


def large_pages() -> bool:
    """Whether large tensors lie in pages of 2 MiB. In those of 4 KiB, where a tensor happens to lie is worth up to 15%
    of what a kernel takes, since looking pages up costs more or less, above all beside busy neighbours."""
    system = Path("/proc/self/smaps_rollup")
    if not system.exists():
        return False
    tensor = torch.ones(2**24)
    given = next(line for line in system.read_text(encoding="ascii").splitlines() if line.startswith("AnonHugePages"))
    if int(given.split()[1]) * 1024 >= tensor.nbytes // 2:
        return True
    print("The system has no large pages for tensors: times vary with where they lie.")
    return False


def chunk_of(case: Case, backward: bool) -> int:
    """Tokens whose rows its kernel multiplies with one another."""
    target = resolve(None, case.q.device, ())
    plan = case.attn.kernels.plan(target, case.q.dtype, case.q.shape[3], case.v.shape[3])
    return products_of(gradient_of(plan) if backward else plan)
