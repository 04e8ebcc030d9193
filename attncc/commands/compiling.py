"""`emit` and `build`: the stages of the compiler, and kernels ahead of time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from attncc.build import read
from attncc.commands.common import Loaded, load, load_checked
from attncc.commands.output import reason, say, write
from attncc.commands.tree import dump
from attncc.diagnostics import BuildError, CallError
from attncc.errors import CannotWrite, SeveralFiles
from attncc.inputs import element_type
from attncc.ir.recurrence import Recurrence
from attncc.ir.text import to_text
from attncc.ir.types import DType, Kind
from attncc.plan.nodes import BackwardProgram, KernelPlan, Program, Specialization, Target
from attncc.runtime.arguments import TORCH_DTYPES, stored_dtype
from attncc.runtime.call import CompiledAttention
from attncc.runtime.cpp import compile_kernel
from attncc.runtime.recurrent import RecurrentAttention
from attncc.runtime.recurrent_errors import NoKernelOfItsOwn
from attncc.runtime.recurrent_sources import RecurrentPlan, compile_library
from attncc.runtime.sequential import SequentialKernels
from attncc.runtime.targets import parse as parse_target
from attncc.runtime.triton_aot import Resources, compile_ahead
from attncc.syntax import parse


def emit(arguments: argparse.Namespace) -> int:
    """Prints a stage, or writes it to the file that -o names."""
    if not arguments.standalone and arguments.stage in ("ast", "ir"):
        _print(_front_stage(arguments), arguments.output)
        return 0
    loaded = load(arguments.file, arguments.name, dict(arguments.set))
    if arguments.standalone and arguments.backward:
        arguments.refuse("--standalone writes forward kernels only: leave out --backward")
    if arguments.standalone:
        from attncc.standalone import describe, standalone, widest_ints

        attn, specialization, target = chosen(loaded, arguments)
        specialization = widest_ints(loaded.pairwise, specialization)
        _put(standalone(attn, specialization, target), arguments.output)
        say(f"for {describe(specialization)}; --dtype and --head-dim choose others")
        return 0
    if isinstance(loaded.attention, Recurrence):
        kernels = _of_recurrence(loaded, arguments)
        plan, sources = "\n".join(dump(plan) for plan, _ in kernels), [text for _, text in kernels]
    else:
        attn, specialization, target = chosen(loaded, arguments)
        program, sources = _compiled(attn, specialization, target, backward=arguments.backward)
        plan = dump(program)
    _print(plan if arguments.stage == "plan" else "\n".join(sources), arguments.output)
    return 0


def _front_stage(arguments: argparse.Namespace) -> str:
    """The syntax tree or the IR, which every specification has that can be checked."""
    attention = load_checked(arguments.file, arguments.name, dict(arguments.set))
    return dump(parse(read(Path(arguments.file)))) if arguments.stage == "ast" else to_text(attention)


def _print(text: str, output: Path | None) -> None:
    if output is None:
        print(text.rstrip("\n"))
    else:
        write(output, text.rstrip("\n") + "\n")


def _compiled(
    attn: CompiledAttention, specialization: Specialization, target: Target, *, backward: bool
) -> tuple[Program | BackwardProgram, tuple[str, ...]]:
    """The plans of a pass and their sources; backward with the gradients of every captured tensor of floats."""
    if not backward:
        program, sources, _ = attn.sources(specialization, target)
        return program, sources
    learned = tuple(name for name, dtype in specialization.tensors if dtype.kind is Kind.FLOAT)
    return attn.kernels.backward_sources(specialization, learned, target)


def _of_recurrence(loaded: Loaded, arguments: argparse.Namespace) -> Sequence[tuple[RecurrentPlan, str]]:
    """The plan and the source of each kernel of a pass. Raises BuildError where there is none."""
    attn = loaded.built(arguments.target, arguments.templates)
    assert isinstance(attn, RecurrentAttention)
    target = parse_target(arguments.target, attn.templates)
    kernels = attn.kernels.sources(_specialization(loaded, arguments), target, backward=arguments.backward)
    if not kernels:
        by_tokens = isinstance(attn.kernels, SequentialKernels)
        why = "PyTorch goes back token by token" if by_tokens else "it is two products of matrices"
        raise BuildError(NoKernelOfItsOwn(None, attn.attention.name, why))
    return kernels


def _put(files: dict[str, str], output: Path | None) -> None:
    """Files of a standalone kernel: printed where there is one and no place to write it to."""
    if output is None and len(files) == 1:
        print(next(iter(files.values())).rstrip("\n"))
        return
    folder = output or Path()
    if len(files) > 1 and folder.suffix and not folder.is_dir():
        raise CallError(SeveralFiles(None, str(folder), " and ".join(files), str(folder.with_suffix(""))))
    for name, text in files.items():
        path = folder if len(files) == 1 and folder.suffix else folder / name
        write(path, text)
        say(f"wrote {path}")


def chosen(loaded: Loaded, arguments: argparse.Namespace) -> tuple[CompiledAttention, Specialization, Target]:
    """What the options --target, --dtype and --head-dim ask for."""
    attn = loaded.compiled(arguments.target, arguments.templates)
    return attn, _specialization(loaded, arguments), parse_target(arguments.target, attn.templates)


def _specialization(loaded: Loaded, arguments: argparse.Namespace) -> Specialization:
    dtype = DType(arguments.dtype)
    tensors = tuple((p.name, stored_dtype(p, element_type(p, TORCH_DTYPES[dtype]))) for p in loaded.attention.tensors)
    head_dim_qk, head_dim_v = arguments.head_dim
    return Specialization(dtype, head_dim_qk, head_dim_v, tensors)


def build(arguments: argparse.Namespace) -> int:
    """Compiles every kernel into a folder: a shared library for C++, cubin or hsaco with a description for Triton."""
    loaded = load(arguments.file, arguments.name, dict(arguments.set))
    folder: Path = arguments.output
    try:
        if isinstance(loaded.attention, Recurrence):
            for plan, source in _of_recurrence(loaded, arguments):
                _write_kernel(plan, source, folder)
        else:
            attn, specialization, target = chosen(loaded, arguments)
            program, sources = _compiled(attn, specialization, target, backward=arguments.backward)
            if not arguments.backward:
                write(folder / f"{loaded.attention.name}_run.py", attn.sources(specialization, target)[2])
            for plan, source in zip(program.kernels, sources, strict=True):
                _write_kernel(plan, source, folder)
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk, for one
        raise CallError(CannotWrite(None, str(folder), reason(error))) from error
    print(f"written to {folder}")
    return 0


def _write_kernel(plan: KernelPlan | RecurrentPlan, source: str, folder: Path) -> None:
    """Compiles a kernel into a folder, and says what became of it."""
    if plan.target.backend == "triton":
        for function, resources in compile_ahead(plan, source, plan.target.arch, out=folder).items():
            print(f"{function}: {_text(resources)}")
        return
    if isinstance(plan, RecurrentPlan):
        kernel = compile_library(plan, source, folder)
    else:
        kernel = compile_kernel(plan, source, folder)
    print(f"{plan.name}: {kernel.path}")


def _text(resources: Resources) -> str:
    text = f"{resources.registers} registers, {resources.shared} bytes of shared memory"
    return text + (f", {resources.spilled} bytes spilled" if resources.spilled else ", no spills")
