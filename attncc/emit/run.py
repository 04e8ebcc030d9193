"""The Python side of a program: a module that allocates, passes arguments and launches, written out for reading.

The same text runs the kernels within attncc and in a standalone file, so it imports nothing of attncc.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from attncc.emit.cpp_machine import CLASSIFIED_KEYS, argument_fields
from attncc.emit.render import fill
from attncc.emit.triton_facts import block_rows
from attncc.ir.blocks import BlockStructure
from attncc.ir.nodes import Summary
from attncc.passes.variance import variance
from attncc.plan.nodes import GROUP_SIZE, KernelPlan, Program, RowsPlan, TilesPlan


def render_run(program: Program, templates: Sequence[Path] = ()) -> str:
    """The source of the Python module that launches the kernels of a program."""
    return fill("run.py.jinja", program, f"{program.spec.name}_run", program.target, _filters(program), templates)


def _filters(program: Program) -> Mapping[str, Callable[..., object]]:
    return {
        "struct_format": lambda plan: "".join(form for _, form in _slots(plan)),
        "arguments": lambda plan: cpp_arguments(program, plan),
        "first_line": first_line,
        "captured_arguments": triton_captured,
        "block_rows": block_rows,
        "tables": tables,
        "classified_keys": lambda _: CLASSIFIED_KEYS,
        "lists": lambda blocks: _product(*_list_heads(blocks), "tiles_q"),
        "list_batch_and_heads": _list_heads,
        "table_heads": lambda summary: _batch_and_head(variance(summary.load)),
    }


def _slots(plan: KernelPlan) -> list[tuple[str, str]]:
    return [slot for field in argument_fields(plan) for slot in field.slots]


def cpp_arguments(program: Program, plan: KernelPlan) -> list[str]:
    """Python expressions, over the locals of `run`, for the 8-byte slots of a kernel's arguments: one per field."""
    captured = {scalar.name: f'inputs["{scalar.name}"]' for scalar in plan.scalars} | {GROUP_SIZE: "H // HKV"}
    for tensor in plan.tensors:
        name = f'inputs["{tensor.name}"]'
        captured[tensor.name] = f"{name}.data_ptr()" + (f", *{name}.shape, *{name}.stride()" if tensor.rank else "")
    own = _operands(plan) | _sizes(program, plan)
    # The specification may use a name that the kernel uses too.
    return [(captured if field.captured else own)[field.slots[0][0]] for field in argument_fields(plan)]


def _operands(plan: KernelPlan) -> dict[str, str]:
    if isinstance(plan, RowsPlan):
        return {"x": _operand(plan.row), "y": f"{plan.row}_rows.data_ptr()"}
    statistics = {name: f"{name}.data_ptr()" for name in ("row_max", "entropy")}
    return {name: _operand(name) for name in "qkvo"} | {"lse": "0 if lse is None else lse.data_ptr()"} | statistics


def _operand(name: str) -> str:
    return f"{name}.data_ptr(), *{name}.stride()[:3]"


def _sizes(program: Program, plan: KernelPlan) -> dict[str, str]:
    heads_kv = "HKV" if isinstance(plan, RowsPlan) else program.operand_heads
    expressions = {"B": f"B, H, {heads_kv}, M, N, q_offset", "num_threads": "num_threads"}
    if not isinstance(plan, RowsPlan):
        for number, summary in enumerate(plan.blocks.summaries):
            batches, heads = _batch_and_head(variance(summary.load))
            expressions[f"summary_{number}"] = f"summary_{number}, {_strides(batches, heads, _entries(summary))}"
        expressions |= {name: name for name in ("list_offsets", "list_entries", "list_counted")}
        expressions["list_stride_b"] = _strides(*_list_heads(plan.blocks), "tiles_q")
    return expressions


def triton_captured(plan: KernelPlan) -> str:
    """The captured tensors and scalars that a Triton kernel takes, as Python over the locals of `run`."""
    tensors = [f'*captured(inputs["{tensor.name}"]), ' for tensor in plan.tensors]
    scalars = [f'inputs["{s.name}"], ' if s.name != GROUP_SIZE else "H // HKV, " for s in plan.scalars]
    return "".join((*tensors, *scalars)).rstrip()


def first_line(text: str) -> str:
    """The first line of a docstring."""
    return text.strip().split("\n", 1)[0]


def tables(plan: TilesPlan) -> list[tuple[str, str]]:
    """What a kernel fills for C++, in the order in memory: the name of a pointer, and how many entries, as Python."""
    summaries = plan.blocks.summaries
    sizes = [_product(*_batch_and_head(variance(summary.load)), _entries(summary)) for summary in summaries]
    result = [(f"summary_{number}", size) for number, size in enumerate(sizes)]
    if plan.blocks.strategy == "list":
        result += [("list_offsets", "lists + 1"), ("list_entries", "at_once * most_entries")]
    return result


def _entries(summary: Summary) -> str:
    """How many entries a table has per head."""
    return "parts_kv" if summary.axis == "kv" else "tiles_q"


def _batch_and_head(varies: frozenset[str]) -> tuple[str, str]:
    return ("B" if "b" in varies else "1", "H" if "h" in varies else "1")


def _list_heads(blocks: BlockStructure) -> tuple[str, str]:
    return ("B" if blocks.per_batch else "1", "H" if blocks.per_head else "1")


def _strides(batches: str, heads: str, entries: str) -> str:
    """The strides of batch and head of an array (batches, heads, entries); 0 along an axis where one serves all."""
    return f"{'0' if batches == '1' else _product(heads, entries)}, {'0' if heads == '1' else entries}"


def _product(*factors: str) -> str:
    return " * ".join(factor for factor in factors if factor != "1")
