"""Compiles kernels ahead of time for a GPU that need not be there, and says what they take of it.

compile_ahead(plan, source, "sm_90")                 # {function: Resources}
compile_ahead(plan, source, "sm_90", out=folder)     # and writes cubin, ptx, source and a description to `folder`
compile_all(requests)                                # many at once, sharing a process
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attncc.diagnostics import BuildError
from attncc.plan.nodes import BackwardPlan, ForwardPlan, KernelPlan, RowsPlan, TilesPlan
from attncc.plan.recurrent import CorePlan
from attncc.plan.sequential import SequentialPlan
from attncc.runtime.cache import write_atomically
from attncc.runtime.triton import check_target
from attncc.runtime.triton_errors import NoTriton, TritonCompilationFailed
from attncc.runtime.triton_fields import Function, Variant, functions_of, itemsize_of

_WORKER = Path(__file__).with_name("aot_worker.py")


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled function takes of its GPU.

    registers   per thread
    spilled     bytes of registers that went to memory and back, per thread
    stack       bytes per thread
    shared      bytes of shared memory per program
    products    matrix instructions
    warnings    of the assembler
    """

    registers: int
    spilled: int
    stack: int
    shared: int
    products: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """A kernel to compile for `arch`. `out`: a folder for what comes out, or None."""

    plan: KernelPlan | CorePlan | SequentialPlan
    source: str
    arch: str
    variant: Variant | None = None
    out: Path | None = None


def compile_ahead(
    plan: KernelPlan | CorePlan | SequentialPlan,
    source: str,
    arch: str,
    *,
    variant: Variant | None = None,
    out: Path | None = None,
) -> dict[str, Resources]:
    """Compiles every function of a kernel for `arch`. Raises BuildError where one is refused or its compiler dies.

    variant: what the kernel may take for granted about the tensors; by default that they are aligned and contiguous.
    """
    (result,) = compile_all([Request(plan, source, arch, variant, out)])
    if isinstance(result, BuildError):
        raise result
    return result


def compile_all(requests: Sequence[Request]) -> list[dict[str, Resources] | BuildError]:
    """What `compile_ahead` returns or raises, for each request."""
    with tempfile.TemporaryDirectory(prefix="attncc-aot-") as folder:
        jobs = [job for number, request in enumerate(requests) for job in _jobs(number, request, Path(folder))]
        answers = _answers([line for _, _, line in jobs])
    results: list[dict[str, Resources] | BuildError] = [{} for _ in requests]
    for (number, function, _), answer in zip(jobs, answers, strict=True):
        request, result = requests[number], results[number]
        if isinstance(result, BuildError):
            continue
        if "error" in answer:
            reason = str(answer["error"])
            results[number] = BuildError(TritonCompilationFailed(None, function.label, request.arch, reason))
            continue
        found = Resources(
            registers=answer["registers"],
            spilled=answer["spilled"],
            stack=answer["stack"],
            shared=answer["shared"],
            products=answer["products"],
            warnings=tuple(answer["warnings"]),
        )
        result[function.label] = found
        if request.out is not None:
            _describe(request, function, answer, found, request.out)
    return results


def default_variant(plan: KernelPlan | CorePlan | SequentialPlan) -> Variant:
    """Tensors as they usually come: contiguous, and so aligned where the rows are whole 16-byte units."""
    aligned = isinstance(plan, TilesPlan) or all(width * plan.dtype.bytes % 16 == 0 for width in _widths(plan))
    tensors = () if isinstance(plan, CorePlan | SequentialPlan) else plan.tensors
    return Variant(aligned=aligned, wide=False, packed=True, unit=tuple(True for tensor in tensors if tensor.rank))


def _widths(plan: ForwardPlan | BackwardPlan | RowsPlan | CorePlan | SequentialPlan) -> tuple[int, ...]:
    match plan:
        case RowsPlan(width=width):
            return (width,)
        case CorePlan() | SequentialPlan():
            return (plan.key_width, plan.value_width)
        case _:
            return (plan.head_dim_qk, plan.head_dim_v)


def _jobs(number: int, request: Request, folder: Path) -> Iterator[tuple[int, Function, dict[str, Any]]]:
    plan, arch = request.plan, request.arch
    check_target(plan, arch)
    path = folder / f"{plan.name}_{number}.py"
    path.write_text(request.source, encoding="utf-8")
    if request.out is not None:
        request.out.mkdir(parents=True, exist_ok=True)
        write_atomically(request.out / f"{plan.name}.py", request.source.encode())
    variant = request.variant or default_variant(plan)
    for function in functions_of(plan):
        line = {
            "path": str(path),
            "function": function.name,
            "arch": arch,
            "signature": function.signature(variant),
            "constants": function.constexprs(variant),
            "divisors": function.divisors(variant, itemsize_of(plan)),
            "options": function.options,
            "out": None if request.out is None else str(request.out),
            "stem": f"{_stem(function)}.{arch}",
        }
        yield number, function, line


def _answers(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worker's answers. Where it dies, the request that it was at has failed and a new one takes the rest."""
    answers: list[dict[str, Any]] = []
    while len(answers) < len(lines):
        text = "".join(json.dumps(line) + "\n" for line in lines[len(answers) :])
        command = [sys.executable, "-P", str(_WORKER)]
        run = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        spoken = [json.loads(line) for line in run.stdout.splitlines()]
        last = " | ".join(run.stderr.strip().splitlines()[-3:])
        if not spoken:
            raise BuildError(NoTriton(None, last))
        answers += spoken[1:]
        if len(answers) < len(lines):
            answers.append({"error": f"the compiler ended with status {run.returncode}: {last}"})
    return answers


def _stem(function: Function) -> str:
    return function.label.replace("[", ".").replace("]", "").lower()


def _describe(request: Request, function: Function, answer: dict[str, Any], resources: Resources, out: Path) -> None:
    """Writes what a launcher must know of a compiled function."""
    plan = request.plan
    variant = request.variant or default_variant(plan)
    tile = None if isinstance(plan, RowsPlan | CorePlan | SequentialPlan) else asdict(plan.tile)
    description = {
        "kernel": answer["name"],
        "arch": request.arch,
        "specification": plan.name if isinstance(plan, CorePlan | SequentialPlan) else plan.spec.name,
        "arguments": [{"name": n, "type": t} for n, t in function.signature(variant).items()],
        "constants": function.constexprs(variant),
        "options": function.options,
        "tile": tile,
        "variant": asdict(variant),
        "resources": asdict(resources),
        "files": answer["files"],
        "source": f"{plan.name}.py",
    }
    text = json.dumps(description, indent=2) + "\n"
    write_atomically(out / f"{_stem(function)}.{request.arch}.json", text.encode())
