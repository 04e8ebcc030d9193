"""A specification's kernel beside what else computes it, in one process and in turn."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from attncc.emit.core_machine import core_machine
from attncc.emit.recurrent_backward_cpp import chunk_tokens
from attncc.emit.recurrent_triton import layout_of
from attncc.ir.nodes import Attention
from attncc.ir.recurrence import Recurrence
from attncc.peak import peak
from attncc.peers import Call, NotApplicable, Peer, count_kept_pairs, eager_formula, flex, sdpa
from attncc.plan.recurrent import CorePlan, gradient_of
from attncc.recurrent_eager import plain_recurrence
from attncc.runtime.arguments import DTYPES
from attncc.runtime.recurrent import RecurrentAttention
from attncc.runtime.recurrent_arguments import sizes_of, state_shape
from attncc.runtime.recurrent_kernels import RecurrentKernels
from attncc.runtime.targets import resolve
from attncc.timing import Timing, alternate

PEERS: dict[str, tuple[str, Callable[[Attention, Call], Peer]]] = {
    "eager": ("PyTorch, eager formula", eager_formula),
    "sdpa": ("PyTorch SDPA", sdpa),
    "flex": ("FlexAttention, compiled", flex),
}
OWN = "attncc"


def _tokens(recurrence: Recurrence, call: Call) -> Peer:
    return lambda: plain_recurrence(recurrence, call.q, call.k, call.v, call.inputs)[0]


def _softmax(recurrence: Recurrence, call: Call) -> Peer:
    """Softmax attention of the same rows, for orientation: what a recurrence is there to avoid."""
    heads, heads_k, heads_v = (x.shape[1] for x in (call.q, call.k, call.v))
    if heads_k != heads_v or heads % max(heads_k, 1):
        return NotApplicable("it takes as many heads of k as of v, and a multiple of q")
    options: dict[str, Any] = {"is_causal": not recurrence.bidirectional, "enable_gqa": heads != heads_k}
    return lambda: functional.scaled_dot_product_attention(call.q, call.k, call.v, **options)


RECURRENT_PEERS: dict[str, tuple[str, Callable[[Recurrence, Call], Peer]]] = {
    "eager": ("PyTorch, token by token", _tokens),
    "sdpa": ("SDPA: another function", _softmax),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One contender. Times in seconds; `ratio` is its time over attncc's."""

    name: str
    title: str
    timing: Timing | None
    ratio: float | None
    gflops: float | None
    peak_share: float | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """A comparison at one shape. `pairs`: kept by the mask, over all batches and heads, None of a recurrence;
    `peak_gflops`: of the machine's registers, measured in the same run; `counted`: what GFLOP/s are of."""

    attention: str
    shape: dict[str, int]
    dtype: str
    threads: int
    pairs: int | None
    backward: bool
    peak_gflops: float | None
    machine: str
    torch_version: str
    rows: tuple[Row, ...]
    counted: str = "unmasked pairs"

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def bench(
    attention: Attention,
    kernel: Callable[[], Tensor],
    call: Call,
    *,
    against: Sequence[str] = tuple(PEERS),
    repeat: int = 9,
    pairs: int | None = None,
    backward: bool = False,
    compiler: str | None = None,
    tick: Callable[[str], object] = lambda _: None,
) -> Result:
    """Times `kernel`, a call of the compiled attention with the arguments of `call`, beside the peers named.

    pairs: how many the mask keeps; counted if not given. backward: each call is followed by its backward pass, to q, k
    and v, which `call` then has as leaves that require a gradient. compiler: of C++, to measure the machine's peak.
    """
    peers = {name: (PEERS[name][0], partial(PEERS[name][1], attention, call)) for name in against}
    timings, notes = _timed(kernel, peers, call, repeat, backward, tick)
    pairs = count_kept_pairs(attention, call) if pairs is None else pairs
    operations = 2 * pairs * (call.q.shape[3] + call.v.shape[3])
    if backward:
        operations = operations * 7 // 2  # of seven products two are of the forward pass
    top = _peak(call, compiler)
    rows = _rows(peers, timings, notes, dict.fromkeys((OWN, *peers), operations), top)
    return _result(attention.name, call, rows, backward, top, pairs)


def bench_recurrence(
    attn: RecurrentAttention,
    call: Call,
    *,
    against: Sequence[str] = tuple(RECURRENT_PEERS),
    repeat: int = 9,
    backward: bool = False,
    compiler: str | None = None,
    tick: Callable[[str], object] = lambda _: None,
) -> Result:
    """Times calls of a recurrence beside the peers named; arguments as for `bench`."""
    recurrence = attn.attention
    inputs: dict[str, Any] = dict(call.inputs)
    peers = {name: (RECURRENT_PEERS[name][0], partial(RECURRENT_PEERS[name][1], recurrence, call)) for name in against}

    def kernel() -> Tensor:
        return attn(call.q, call.k, call.v, **inputs)

    timings, notes = _timed(kernel, peers, call, repeat, backward, tick)
    operations, counted = _recurrent_operations(attn, call, backward)
    # Others do the same in another way, with other products, or something else.
    operations = {} if operations is None else {OWN: operations}
    top = _peak(call, compiler)
    return _result(recurrence.name, call, _rows(peers, timings, notes, operations, top), backward, top, None, counted)


def core_operations(plan: CorePlan, chunk: int) -> int:
    """The useful ones of a token and head, in products of so many tokens; a multiplication and an addition are two.

    Forward, the state is read by the query and by each erase, and written by each update; within a chunk rows meet in
    half of two products of matrices, in two more for what is erased, and in none where tokens stream (chunk 0).
    Backward, states are made again, and so are their gradients; rows get theirs from both. What pads, what makes
    operands, decays and exponentials are not counted.
    """
    D, E = plan.key_width, plan.value_width
    updates, erases = len(plan.updates), sum(update.erase for update in plan.updates)
    rows = chunk * updates
    if plan.kernel == "recurrent":
        return 2 * D * E * (1 + updates + erases) + rows * (1 + erases) * (D + E)
    return 2 * D * E * (2 + 3 * updates + 3 * erases) + rows * (3 * D + 2 * E + 3 * erases * (D + E))


def _recurrent_operations(attn: RecurrentAttention, call: Call, backward: bool) -> tuple[int | None, str]:
    """Those of a call and what they are of; None where no core runs."""
    kernels = attn.kernels
    if not isinstance(kernels, RecurrentKernels) or attn.attention.bidirectional:
        return None, ""
    sizes = sizes_of({"q": call.q, "k": call.k, "v": call.v})
    target = resolve(attn.target, call.q.device, attn.templates)
    *_, key_width, value_width = state_shape(attn.attention, sizes, sizes.B)
    forward = kernels.plan(target, call.q.dtype, key_width, value_width)
    plans = (forward, gradient_of(forward)) if backward else (forward,)
    of_token = sum(core_operations(plan, chunk_of(plan)) for plan in plans)
    chunks = " and ".join(str(chunk_of(plan)) for plan in plans if chunk_of(plan))
    of_rows = f", and of rows in chunks of {chunks} tokens" if chunks else ""
    return of_token * sizes.B * sizes.H * sizes.N, f"products with the state{of_rows}"


def chunk_of(plan: CorePlan) -> int:
    """Tokens whose rows a core multiplies with one another; 0 where they only meet the state."""
    if plan.target.backend == "triton":
        return layout_of(plan).chunk
    if plan.kernel != "recurrent":
        return chunk_tokens(plan)
    machine = core_machine(plan)
    return 0 if machine.streams else machine.chunk


# Name, title, and what makes the function to time.
_Peers: TypeAlias = Mapping[str, tuple[str, Callable[[], Peer]]]


def _timed(
    kernel: Callable[[], Tensor],
    peers: _Peers,
    call: Call,
    repeat: int,
    backward: bool,
    tick: Callable[[str], object],
) -> tuple[dict[str, Timing], dict[str, str]]:
    """The times of `kernel` and of those peers that run, and why others do not."""
    runnable: dict[str, Callable[[], Tensor]] = {OWN: kernel}
    notes: dict[str, str] = {}
    for name, (title, make) in peers.items():
        tick(title)
        peer = make()
        if isinstance(peer, NotApplicable):
            notes[name] = f"cannot express it: {peer.reason}"
        else:
            runnable[name] = peer
    if backward:
        runnable = {name: _with_backward(function, call) for name, function in runnable.items()}
    for name, function in list(runnable.items()):
        message = _does_not_run(function)
        if message is not None and name != OWN:
            notes[name] = message
            del runnable[name]
    return alternate(_synchronized(runnable, call.q.device), repeat, tick=tick), notes


def _peak(call: Call, compiler: str | None) -> float | None:
    return peak(call.q.dtype, compiler) if compiler is not None and call.q.device.type == "cpu" else None


def _rows(
    peers: _Peers,
    timings: Mapping[str, Timing],
    notes: Mapping[str, str],
    operations: Mapping[str, int],
    top: float | None,
) -> tuple[Row, ...]:
    """A row for each contender. operations: of those that GFLOP/s are given of."""
    own = timings[OWN].median
    titles = {OWN: OWN, **{name: title for name, (title, _) in peers.items()}}
    return tuple(
        _row(name, title, timings.get(name), own, operations.get(name), top, notes.get(name, ""))
        for name, title in titles.items()
    )


def _result(
    name: str,
    call: Call,
    rows: tuple[Row, ...],
    backward: bool,
    top: float | None,
    pairs: int | None,
    counted: str = "unmasked pairs",
) -> Result:
    batch, heads, queries, width = call.q.shape
    _, heads_kv, keys, width_v = call.v.shape
    shape = {"B": batch, "H": heads, "HKV": heads_kv, "M": queries, "N": keys, "D": width, "E": width_v}
    on_cpu = call.q.device.type == "cpu"
    return Result(
        attention=name,
        shape=shape,
        dtype=DTYPES[call.q.dtype].value,
        threads=torch.get_num_threads(),
        pairs=pairs,
        backward=backward,
        peak_gflops=None if top is None else top / 1e9,
        machine=machine() if on_cpu else torch.cuda.get_device_name(),
        torch_version=torch.__version__,
        rows=rows,
        counted=counted,
    )


def _with_backward(function: Callable[[], Tensor], call: Call) -> Callable[[], Tensor]:
    """`function`, and the gradients of q, k and v from a gradient of its output."""
    leaves = (call.q, call.k, call.v)
    heads = max(x.shape[1] for x in leaves)
    shape = (call.q.shape[0], heads, call.q.shape[2], call.v.shape[3])
    do = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    do = do.to(call.q.device, call.q.dtype)

    def both() -> Tensor:
        o = function()
        torch.autograd.grad(o, leaves, do)
        return o

    return both


def _does_not_run(function: Callable[[], Tensor]) -> str | None:
    """What a peer says when it is called; None if it runs."""
    try:
        function()
    except Exception as error:  # noqa: BLE001 - whatever a peer has to say is a result
        first = str(error).strip().splitlines()
        return f"fails: {type(error).__name__}: {first[0][:100] if first else ''}"
    return None


def _synchronized(
    functions: Mapping[str, Callable[[], Tensor]], device: torch.device
) -> dict[str, Callable[[], object]]:
    if device.type == "cpu":
        return dict(functions)

    def wrapped(function: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> None:
            function()
            torch.cuda.synchronize(device)

        return run

    return {name: wrapped(function) for name, function in functions.items()}


def _row(
    name: str, title: str, timing: Timing | None, own: float, operations: int | None, top: float | None, note: str
) -> Row:
    if timing is None:
        return Row(name, title, None, None, None, None, note)
    if operations is None:
        return Row(name, title, timing, timing.median / own, None, None, note)
    rate = operations / timing.median
    share = None if top is None else rate / top
    return Row(name, title, timing, timing.median / own, rate / 1e9, share, note)


def table(result: Result) -> Table:
    """The comparison as a person reads it."""
    shape = " ".join(f"{name}={size}" for name, size in result.shape.items())
    plural = "s" if result.threads > 1 else ""
    what = f"{result.attention}{', forward and backward' if result.backward else ''}"
    out = Table(title=f"{what}, {result.dtype}, {shape}, {result.threads} thread{plural}")
    out.add_column("")
    for heading in ("median ms", "against attncc", "GFLOP/s", "share of peak"):
        out.add_column(heading, justify="right")
    noted = any(row.note for row in result.rows)
    if noted:
        out.add_column("")
    for row in result.rows:
        note = (row.note,) if noted else ()
        if row.timing is None:
            out.add_row(row.title, "", "", "", "", *note, style="dim")
            continue
        mark = "" if row.timing.undisturbed else "* "  # before the digits, which stay below one another
        rate = "" if row.gflops is None else f"{row.gflops:.1f}"
        share = "" if row.peak_share is None else f"{row.peak_share:.0%}"
        ratio = "" if row.name == OWN else f"{row.ratio:.2f}x the time"
        milliseconds = f"{mark}{row.timing.median * 1e3:.3f}"
        style = "bold" if row.name == OWN else ""
        out.add_row(row.title, milliseconds, ratio, rate, share, *note, style=style)
    remarks = [f"GFLOP/s of {result.counted}"] if result.counted else []
    if result.peak_gflops is not None:
        remarks.append(f"peak of the registers: {result.peak_gflops:.0f} GFLOP/s")
    if any(row.timing is not None and not row.timing.undisturbed for row in result.rows):
        remarks.append("* disturbed by other work on the machine")
    out.caption = "; ".join(remarks)
    return out


def machine() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
