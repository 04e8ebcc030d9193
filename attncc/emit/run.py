"""The Python side of a program: a module that allocates, passes arguments and launches, written out for reading.

The same text runs the kernels within attncc and in a standalone file, so it imports nothing of attncc.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from attncc.emit.cpp_machine import CLASSIFIED_KEYS, argument_fields
from attncc.emit.render import fill
from attncc.ir.nodes import Summary
from attncc.ir.types import Kind
from attncc.passes.variance import variance
from attncc.plan.nodes import KernelPlan, Program, RowsPlan, TensorArgument


def render_run(program: Program, templates: Sequence[Path] = ()) -> str:
    """The source of the Python module that launches the kernels of a program."""
    return fill("run.py.jinja", program, f"{program.spec.name}_run", program.target, _filters(program), templates)


def _filters(program: Program) -> Mapping[str, Callable[..., object]]:
    return {
        "struct_format": lambda plan: "".join(form for _, form in _slots(plan)),
        "arguments": lambda plan: cpp_arguments(program, plan),
        "first_line": lambda text: text.strip().split("\n", 1)[0],
        "table_tiles": table_tiles,
        "table_dtype": lambda summary: "float64" if summary.load.kind is Kind.FLOAT else "int64",
        "table_heads": lambda summary: _batch_and_head(variance(summary.load)),
    }


def _slots(plan: KernelPlan) -> list[tuple[str, str]]:
    return [slot for field in argument_fields(plan) for slot in field.slots]


def cpp_arguments(program: Program, plan: KernelPlan) -> list[str]:
    """A Python expression, over the locals of `run`, for each 8-byte slot of a kernel's arguments."""
    known = _operand_expressions(plan) | _common_expressions(program, plan)
    captured: dict[str, str] = {scalar.name: f'inputs["{scalar.name}"]' for scalar in plan.scalars}
    captured["group_size"] = "H // HKV"
    for tensor in plan.tensors:
        captured |= _tensor_expressions(tensor)
    expressions: list[str] = []
    for field in argument_fields(plan):
        # Names of the specification and of the kernel may be the same; the captured ones have their own fields.
        own = known if field.slots[0][0] in known and not _is_captured(field.slots[0][0], field.declaration) else captured
        expressions += [own[name] for name, _ in field.slots]
    return expressions


def _is_captured(name: str, declaration: str) -> bool:
    return declaration.startswith("Tensor<") or declaration.split(" ", 1)[0] in ("double", "int64") and (
        "," not in declaration and name != "num_threads"
    )


def _operand_expressions(plan: KernelPlan) -> dict[str, str]:
    operands = {"x": plan.row, "y": f"{plan.row}_rows"} if isinstance(plan, RowsPlan) else {n: n for n in "qkvo"}
    expressions: dict[str, str] = {"lse": "0 if lse is None else lse.data_ptr()"}
    for slot, local in operands.items():
        expressions[slot] = f"{local}.data_ptr()"
        for axis, name in enumerate(("b", "h", "row")):
            expressions[f"{slot}_stride_{name}"] = f"{local}.stride({axis})"
    return expressions


def _common_expressions(program: Program, plan: KernelPlan) -> dict[str, str]:
    names = ("B", "H", "HKV", "M", "N", "q_offset", "num_threads", "list_stride_b", "list_stride_h")
    expressions = {name: name for name in names}
    if not isinstance(plan, RowsPlan):
        expressions["HKV"] = program.operand_heads
        for number in range(len(plan.blocks.summaries)):
            table = f"summary_{number}"
            expressions[table] = f"{table}.data_ptr()"
            for axis, name in enumerate(("b", "h")):
                # One entry for all batches or heads: every one reads the same.
                expressions[f"{table}_stride_{name}"] = f"{table}.stride({axis}) if {table}.shape[{axis}] > 1 else 0"
    return expressions | {name: f"{name}.data_ptr()" for name in ("list_offsets", "list_entries")}


def _tensor_expressions(tensor: TensorArgument) -> dict[str, str]:
    name = f'inputs["{tensor.name}"]'
    return {
        tensor.name: f"{name}.data_ptr()",
        **{f"{tensor.name}_size_{axis}": f"{name}.shape[{axis}]" for axis in range(tensor.rank)},
        **{f"{tensor.name}_stride_{axis}": f"{name}.stride({axis})" for axis in range(tensor.rank)},
    }


def table_tiles(summary: Summary, program: Program) -> str:
    """How many entries a table has per head, as Python."""
    block_m = program.forward.tile.block_m
    return f"-(-N // {CLASSIFIED_KEYS})" if summary.axis == "kv" else f"-(-M // {block_m})"


def _batch_and_head(varies: frozenset[str]) -> tuple[str, str]:
    return ("B" if "b" in varies else "1", "H" if "h" in varies else "1")
