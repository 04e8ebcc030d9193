"""On a machine with a GPU: its tests, then the grid, forward and backward, beside SDPA and FlexAttention.

    python benchmarks/gpu.py [--minutes 9] [--skip-tests] [-o benchmarks/results/forward-gpu.json]
    python benchmarks/gpu.py --dry-run          # no GPU: plans, shapes, work, compilation ahead of time

Six variants at D 64 and 128, bf16 and f16, sequences of 512 to 16,384 positions: 16,384 positions in all, 2048 elements
of width over all heads. Tiles are chosen first, once per variant, D and type, at 4,096 positions. What has been
measured is in the file after every case and is not measured again: run it once more if it ran out of time. Use a Python
whose torch was built for the GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attncc
from attncc.diagnostics import BuildError
from attncc.ir.nodes import Attention
from attncc.plan.backward import plan_backward
from attncc.plan.nodes import TritonTile
from attncc.runtime.arguments import Bound, Signature
from attncc.runtime.cache import write_atomically
from attncc.runtime.triton import arch_of
from attncc.runtime.triton_aot import Request, compile_all
from attncc.runtime.triton_tuning import tiled_plans, tiled_programs

ROOT = Path(__file__).resolve().parent.parent
WINDOW, CAP, DOCUMENTS = 1024, 30.0, 8
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
TUNED_AT = 4096
POSITIONS, WIDTH = 16384, 2048
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
# FlexAttention takes many seconds to compile: at these lengths, in bf16.
FLEX_LENGTHS = (16384,)
# Of the time, at most, for the tests.
TEST_SHARE = 0.5

SPECS = {
    "full": "attention full():\n    score = qk\n",
    "causal": "attention causal():\n    mask = causal\n",
    "window": "attention window(window: int):\n    mask = causal and q_idx - kv_idx < window\n",
    "alibi": "attention alibi(slope: f32[H]):\n    score = qk - slope[h] * (q_idx - kv_idx)\n    mask = causal\n",
    "softcap": "attention softcap(cap: float):\n    score = cap * tanh(qk / cap)\n    mask = causal\n",
    "document": "attention document(doc: i32[B, N]):\n    mask = doc[b, q_idx] == doc[b, kv_idx]\n",
}


@dataclass(frozen=True)
class Case:
    """One row of the grid."""

    variant: str
    dtype: str
    head_dim: int
    length: int

    @property
    def key(self) -> str:
        return f"{self.variant} {self.dtype} D{self.head_dim} N{self.length}"

    @property
    def family(self) -> str:
        """What a tile is chosen for."""
        return f"{self.variant} {self.dtype} D{self.head_dim}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return max(POSITIONS // self.length, 1), WIDTH // self.head_dim, self.length, self.head_dim

    def flops(self) -> float:
        """Of both products of the forward pass, over the pairs that are kept; a backward pass has five."""
        batch, heads, n, width = self.shape
        w = min(WINDOW, n)
        kept = {
            "full": n * n,
            "window": w * (w + 1) // 2 + (n - w) * w,
            "document": sum(size * size for size in document_sizes(n)),
        }.get(self.variant, n * (n + 1) // 2)
        return 4.0 * batch * heads * kept * width

    def operands(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        dtype = DTYPES[self.dtype]
        return tuple(torch.randn(self.shape, device=device, dtype=dtype) for _ in "qkv")  # type: ignore[return-value]

    def inputs(self, device: str) -> dict[str, Any]:
        batch, heads, n, _ = self.shape
        ids = torch.repeat_interleave(torch.tensor(document_sizes(n)))
        return {
            "window": {"window": WINDOW},
            "softcap": {"cap": CAP},
            "alibi": {"slope": (2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)).to(device)},
            "document": {"doc": ids.to(torch.int32).expand(batch, n).contiguous().to(device)},
        }.get(self.variant, {})


def document_sizes(length: int) -> list[int]:
    """Documents of unequal lengths that fill a sequence."""
    weights = [2 + (5 * i) % 7 for i in range(DOCUMENTS)]
    ends = [length * sum(weights[: i + 1]) // sum(weights) for i in range(DOCUMENTS)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


CASES = [
    Case(variant, dtype, head_dim, length)
    for dtype in DTYPES
    for head_dim in (128, 64)
    for length in sorted(LENGTHS, reverse=True)
    for variant in SPECS
]


# --- contenders -----------------------------------------------------------------------------------------------------


def sdpa_contenders(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """PyTorch's own kernels, where they compute the variant."""
    if case.variant not in ("full", "causal"):
        return
    backends = {
        "sdpa flash": SDPBackend.FLASH_ATTENTION,
        "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    for name, backend in backends.items():

        def call(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                causal = case.variant == "causal"
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

        yield name, call


def flex_contender(case: Case, q: Tensor, k: Tensor, v: Tensor, inputs: dict[str, Any]) -> Callable[[], Tensor]:
    """Compiled FlexAttention, its block mask made beforehand."""
    masks: dict[str, Callable[..., Tensor]] = {
        "window": lambda _b, _h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < WINDOW),
        "document": lambda b, _h, q_idx, kv_idx: inputs["doc"][b, q_idx] == inputs["doc"][b, kv_idx],
    }
    scores: dict[str, Callable[..., Tensor]] = {
        "alibi": lambda score, _b, h, q_idx, kv_idx: score - inputs["slope"][h] * (q_idx - kv_idx),
        "softcap": lambda score, _b, _h, _q_idx, _kv_idx: CAP * torch.tanh(score / CAP),
    }
    block_mask = None
    if case.variant != "full":
        mask = masks.get(case.variant, lambda _b, _h, q_idx, kv_idx: kv_idx <= q_idx)
        batch = q.shape[0] if case.variant == "document" else None
        block_mask = create_block_mask(mask, batch, None, case.length, case.length, device=str(q.device))
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return lambda: compiled(q, k, v, score_mod=scores.get(case.variant), block_mask=block_mask)


def backward_call(call: Callable[[], Tensor], operands: tuple[Tensor, Tensor, Tensor]) -> Callable[[], object]:
    """The backward pass of `call`, whose forward pass is done here."""
    o = call()
    do = torch.randn_like(o)
    return lambda: torch.autograd.grad(o, operands, do, retain_graph=True)


def milliseconds(call: Callable[[], object]) -> float:
    """Median time on the device, its second-level cache cleared before each."""
    return float(triton.testing.do_bench(call, warmup=10, rep=50, return_mode="median"))


# --- the grid -------------------------------------------------------------------------------------------------------


class Results:
    """What has been measured: a JSON file that is whole after every case."""

    def __init__(self, path: Path, device: str) -> None:
        self.path = path
        self.data: dict[str, Any] = {"device": device, "tiles": {}, "cases": {}}
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored.get("device") == device:
                self.data = stored

    def save(self) -> None:
        write_atomically(self.path, (json.dumps(self.data, indent=1) + "\n").encode())


def best_program(case: Case, attention: Attention, results: Results, q: Tensor, k: Tensor, v: Tensor, bound: Bound):  # noqa: ANN201
    """The program with the tile that was fastest for this family, which is measured now if it has not been."""
    head_dim, arch = case.head_dim, arch_of(q.device)
    known = results.data["tiles"].get(case.family)
    times: dict[TritonTile, float] = {}
    programs = {}
    for program, tile in tiled_programs(attention, bound, q.dtype, head_dim, arch):
        if known is not None and asdict(tile) != known["tile"]:
            continue
        programs[tile] = program
        if known is None:
            try:
                times[tile] = milliseconds(lambda program=program: program.run(q, k, v, bound, return_total=False))
            except BuildError as error:
                print(f"{case.family} {tile}: {error}", file=sys.stderr)
    if known is None:
        tile = min(times, key=times.__getitem__)
        measured = [{**asdict(tile), "ms": ms} for tile, ms in times.items()]
        results.data["tiles"][case.family] = {"tile": asdict(tile), "measured": measured}
        results.save()
        return programs[tile]
    return next(iter(programs.values()))


def measure(case: Case, results: Results) -> None:
    """All contenders of one case, into the results."""
    attention = attncc.check(SPECS[case.variant])
    signature = Signature(attention)
    if case.family not in results.data["tiles"]:
        tuned = Case(case.variant, case.dtype, case.head_dim, TUNED_AT)
        q, k, v = tuned.operands("cuda")
        best_program(tuned, attention, results, q, k, v, signature.bind(q, k, v, None, tuned.inputs("cuda")))
    q, k, v = case.operands("cuda")
    inputs = case.inputs("cuda")
    bound = signature.bind(q, k, v, None, inputs)
    program = best_program(case, attention, results, q, k, v, bound)
    row: dict[str, float] = {"attncc": milliseconds(lambda: program.run(q, k, v, bound, return_total=False))}
    for name, call in sdpa_contenders(case, q, k, v):
        try:
            row[name] = milliseconds(call)
        except RuntimeError:
            continue  # this backend does not run here
    if case.dtype == "bf16" and case.length in FLEX_LENGTHS:
        row["flex"] = milliseconds(flex_contender(case, q, k, v, inputs))
    backward = backward_row(case, q, k, v, inputs)
    results.data["cases"][case.key] = {
        "ms": row,
        "tflops": {name: case.flops() / ms / 1e9 for name, ms in row.items()},
        "backward ms": backward,
        "backward tflops": {name: 2.5 * case.flops() / ms / 1e9 for name, ms in backward.items()},
    }
    results.save()


def backward_row(case: Case, q: Tensor, k: Tensor, v: Tensor, inputs: dict[str, Any]) -> dict[str, float]:
    """The times of the backward pass alone."""
    operands = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())
    attn = attncc.build(SPECS[case.variant])
    row = {"attncc": milliseconds(backward_call(lambda: attn(q, k, v, **inputs), operands))}
    for name, call in sdpa_contenders(case, q, k, v):
        try:
            row[name] = milliseconds(backward_call(call, operands))
        except RuntimeError:
            continue  # this backend does not run here
    if case.dtype == "bf16" and case.length in FLEX_LENGTHS:
        row["flex"] = milliseconds(backward_call(flex_contender(case, q, k, v, inputs), operands))
    return row


def show(results: Results) -> None:
    names = ["attncc", "sdpa flash", "sdpa cudnn", "sdpa efficient", "flex"]
    for title, field in (("forward", "tflops"), ("backward", "backward tflops")):
        table = Table(*["TFLOP/s", *names], title=f"{results.data['device']}, {title}")
        for key, case in results.data["cases"].items():
            table.add_row(key, *(f"{case[field][name]:.0f}" if name in case[field] else "" for name in names))
        Console().print(table)


def dry_run() -> None:
    """Everything but the device: inputs and work of every case, plans and sources of every tile, compilation of the
    default tiles for sm_90."""
    requests = []
    for case in CASES:
        assert case.flops() > 0
        batch, heads, n, width = case.shape
        assert (batch * n, heads * width) == (POSITIONS, WIDTH)
        attention = attncc.check(SPECS[case.variant])
        small = Case(case.variant, case.dtype, case.head_dim, TUNED_AT)
        if case.length != TUNED_AT:
            continue
        q, k, v = (torch.empty(small.shape, dtype=DTYPES[case.dtype]) for _ in "qkv")
        bound = Signature(attention).bind(q, k, v, None, small.inputs("cpu"))
        plans = list(tiled_plans(attention, bound, q.dtype, case.head_dim, "sm_90"))
        tiles = [f"{t.block_m}x{t.block_n}, {t.num_warps} warps, {t.num_stages} stages" for _, t in plans]
        print(f"{case.family}: {'; '.join(tiles)}")
        if case.dtype == "bf16":
            from attncc.emit.printers import printer_of
            from attncc.emit.render import render

            program = plans[0][0]
            backward = plan_backward(attention, program.specialization, program.target, frozenset())
            kernels = (*program.kernels, *backward.kernels)
            requests += [Request(plan, render(plan, printer_of(plan)), "sm_90") for plan in kernels]
    for request, found in zip(requests, compile_all(requests), strict=True):
        if isinstance(found, BuildError):
            raise found
        for name, resources in found.items():
            print(f"{request.plan.name}: {name}: {resources}")
    with tempfile.TemporaryDirectory() as folder:
        results = Results(Path(folder) / "results.json", "no device")
        rate = {"attncc": CASES[0].flops() / 1e9}
        results.data["cases"][CASES[0].key] = {"ms": {"attncc": 1.0}, "tflops": rate, "backward tflops": rate}
        results.save()
        assert Results(results.path, "no device").data == results.data
        show(results)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="stop after so long, tests included")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="everything that needs no GPU")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "forward-gpu.json")
    options = parser.parse_args()
    if options.dry_run:
        dry_run()
        return 0
    if not torch.cuda.is_available():
        print("there is no GPU here; --dry-run does what needs none", file=sys.stderr)
        return 1
    start, seconds, failed = time.monotonic(), 60 * options.minutes, 0
    if not options.skip_tests:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests")]
        try:
            failed = subprocess.run(command, check=False, timeout=seconds * TEST_SHARE).returncode
        except subprocess.TimeoutExpired:
            print("the tests took too long", file=sys.stderr)
            failed = 1
    results = Results(options.output, torch.cuda.get_device_name())
    results.data |= {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "tests": "failed" if failed else "passed",
    }
    remaining = [case for case in CASES if case.key not in results.data["cases"]]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("grid", total=len(remaining))
        for case in remaining:
            if time.monotonic() - start > seconds:
                progress.console.print(f"out of time: run again for the other {len(remaining)} cases")
                break
            progress.update(task, description=case.key)
            measure(case, results)
            progress.advance(task)
    show(results)
    return failed


if __name__ == "__main__":
    sys.exit(main())
