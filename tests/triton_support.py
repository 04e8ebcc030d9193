"""Small Triton modules for tests: written to a file, imported, interpreted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from attncc.emit.triton_text import functions
from attncc.runtime.arguments import DTYPES
from attncc.runtime.interpreter import InterpretedModule, typed
from attncc.runtime.triton_fields import TYPES

HEADER = """import triton
import triton.language as tl

FLOAT = tl.constexpr(tl.{compute})
EXACT = tl.constexpr({exact})
"""


def module(folder: Path, kernel: str, *, compute: str = "float32", exact: bool = True) -> InterpretedModule:
    """The interpreted module of a kernel's source, with the builtins that it calls."""
    path = folder / f"kernel_{abs(hash((kernel, compute, exact)))}.py"
    path.write_text(HEADER.format(compute=compute, exact=exact) + functions(kernel) + kernel, encoding="utf-8")
    return InterpretedModule(path)


def run(interpreted: InterpretedModule, function: str, programs: int, arguments: dict[str, object]) -> None:
    """Launches with tensors as pointers, ints as i32 and floats as fp32."""

    def argument(value: object) -> object:
        match value:
            case Tensor():
                return typed(value, f"*{TYPES[DTYPES[value.dtype]]}")
            case bool():
                return typed(value, "i1")
            case int():
                return typed(value, "i32")
            case float():
                return typed(value, "fp32")
            case _:
                raise TypeError(value)

    interpreted.launch(function, programs, {name: argument(value) for name, value in arguments.items()})


def elementwise(folder: Path, expression: str, arguments: Sequence[Tensor], out: torch.dtype) -> Tensor:
    """`expression` over x0, x1, … of a power of two elements each, computed in f64 where an argument is."""
    names = [f"x{number}" for number in range(len(arguments))]
    (size,) = arguments[0].shape
    loads = "\n".join(f"    {name} = tl.load({name}_ptr + offs)" for name in names)
    double = any(argument.dtype == torch.float64 for argument in arguments)
    kernel = f"""

@triton.jit
def kernel({", ".join(f"{name}_ptr" for name in names)}, out_ptr):
    offs = tl.arange(0, {size})
{loads}
    tl.store(out_ptr + offs, {expression})
"""
    interpreted = module(folder, kernel, compute="float64" if double else "float32")
    result = torch.empty(size, dtype=out)
    pointers = {f"{name}_ptr": argument for name, argument in zip(names, arguments, strict=True)}
    run(interpreted, "kernel", 1, {**pointers, "out_ptr": result})
    return result
