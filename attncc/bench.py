"""A specification's kernel beside what else computes it, in one process and in turn."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from attncc.ir.nodes import Attention
from attncc.peak import peak
from attncc.peers import Call, NotApplicable, Peer, count_kept_pairs, eager_formula, flex, sdpa
from attncc.runtime.arguments import DTYPES
from attncc.timing import Timing, alternate

PEERS: dict[str, tuple[str, Callable[[Attention, Call], Peer]]] = {
    "eager": ("PyTorch, eager formula", eager_formula),
    "sdpa": ("PyTorch SDPA", sdpa),
    "flex": ("FlexAttention, compiled", flex),
}
OWN = "attncc"


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
    """A comparison at one shape. `pairs`: kept by the mask, over all batches and heads; `peak_gflops`: of the machine's
    registers, measured in the same run."""

    attention: str
    shape: dict[str, int]
    dtype: str
    threads: int
    pairs: int
    backward: bool
    peak_gflops: float | None
    machine: str
    torch_version: str
    rows: tuple[Row, ...]

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
    runnable: dict[str, Callable[[], Tensor]] = {OWN: kernel}
    notes: dict[str, str] = {}
    for name in against:
        tick(PEERS[name][0])
        peer = PEERS[name][1](attention, call)
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
    timings = alternate(_synchronized(runnable, call.q.device), repeat, tick=tick)
    pairs = count_kept_pairs(attention, call) if pairs is None else pairs
    operations = 2 * pairs * (call.q.shape[3] + call.v.shape[3])
    if backward:
        operations = operations * 7 // 2  # of seven products two are of the forward pass
    on_cpu = call.q.device.type == "cpu"
    top = peak(call.q.dtype, compiler) if compiler is not None and on_cpu else None
    own = timings[OWN].median
    rows = [_row(name, timings.get(name), own, operations, top, notes.get(name, "")) for name in (OWN, *against)]
    batch, heads, queries, width = call.q.shape
    _, heads_kv, keys, width_v = call.v.shape
    shape = {"B": batch, "H": heads, "HKV": heads_kv, "M": queries, "N": keys, "D": width, "E": width_v}
    return Result(
        attention=attention.name,
        shape=shape,
        dtype=DTYPES[call.q.dtype].value,
        threads=torch.get_num_threads(),
        pairs=pairs,
        backward=backward,
        peak_gflops=None if top is None else top / 1e9,
        machine=machine() if on_cpu else torch.cuda.get_device_name(),
        torch_version=torch.__version__,
        rows=tuple(rows),
    )


def _with_backward(function: Callable[[], Tensor], call: Call) -> Callable[[], Tensor]:
    """`function`, and the gradients of q, k and v from a gradient of its output."""
    leaves = (call.q, call.k, call.v)
    do = torch.randn((*call.q.shape[:3], call.v.shape[3]), generator=torch.Generator().manual_seed(0))
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


def _row(name: str, timing: Timing | None, own: float, operations: int, top: float | None, note: str) -> Row:
    title = OWN if name == OWN else PEERS[name][0]
    if timing is None:
        return Row(name, title, None, None, None, None, note)
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
        share = "" if row.peak_share is None else f"{row.peak_share:.0%}"
        ratio = "" if row.name == OWN else f"{row.ratio:.2f}x the time"
        milliseconds = f"{mark}{row.timing.median * 1e3:.3f}"
        style = "bold" if row.name == OWN else ""
        out.add_row(row.title, milliseconds, ratio, f"{row.gflops:.1f}", share, *note, style=style)
    remarks = ["GFLOP/s of unmasked pairs"]
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
