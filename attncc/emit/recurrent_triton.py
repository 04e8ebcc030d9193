"""What the templates of recurrent kernels in Triton print a plan with: layout of chunks, tiles, types."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from attncc.emit.render import fill
from attncc.emit.triton import DOT_OPTIONS, FLOAT_NAMES
from attncc.emit.triton_text import _version, tidy
from attncc.ir.types import DType
from attncc.plan.recurrent import CorePlan
from attncc.plan.triton_tiles import power_of_two

# Matrix products ask for 16 rows and columns at least.
_LEAST = 16
# Types whose products no tensor core takes.
_EXACT = (DType.F32, DType.F64)
# Key channels up to which shared memory holds what two steps of a loop over chunks load; all others fit.
_STAGED = {("gfx942", "states"): 128, ("gfx942", "reverse"): 64, ("sm_90", "reverse"): 128, ("sm_100", "reverse"): 128}


@dataclass(frozen=True, slots=True)
class CoreLayout:
    """How a core divides tokens and channels.

    slots         rows of updates that a token has: the number of updates, up to a power of two
    block         tokens of a block: within it, decays of channels are taken pair by pair
    chunk         tokens between two states that are stored
    key_padded    key channels, up to a power of two; value_padded: of values; decay_padded: of log_decay
    decay_width   numbers of log_decay for each token; 0 where there is none
    value_tile    value channels of a program of `states` and `reverse`; output_tile: of `outputs`; step_tile: of `step`
    gradient_keys key channels of a program of `read_gradients` and `update_gradients`
    gradient_tile, key_tile: value channels, and key channels, of a step of loops over all of them in a backward pass
                  (`decay_gradients` takes value_tile, since it has two states of f32 at a time)
    """

    slots: int
    block: int
    chunk: int
    key_padded: int
    value_padded: int
    decay_width: int
    decay_padded: int
    value_tile: int
    output_tile: int
    step_tile: int
    gradient_keys: int
    gradient_tile: int
    key_tile: int

    @property
    def rows(self) -> int:
        """Rows of updates of a chunk."""
        return self.chunk * self.slots

    @property
    def block_rows(self) -> int:
        return self.block * self.slots

    @property
    def blocks(self) -> int:
        """Blocks of a chunk."""
        return self.chunk // self.block

    @property
    def halves(self) -> int:
        """In how many parts the inverse of a chunk is taken: of more than 32 rows, products fill the registers."""
        return 2 if self.rows > 32 else 1

    @property
    def levels(self) -> int:
        """How often a block of one row doubles until it is such a part."""
        return (self.rows // self.halves).bit_length() - 1


def layout_of(plan: CorePlan) -> CoreLayout:
    slots = power_of_two(len(plan.updates))
    decay_width = {"none": 0, "scalar": 1, "key": plan.key_width, "value": plan.value_width}[plan.side]
    key_padded, value_padded = _padded(plan.key_width), _padded(plan.value_width)
    return CoreLayout(
        slots=slots,
        block=_LEAST,
        chunk=max(_rows_of_chunk(plan) // slots, _LEAST),
        key_padded=key_padded,
        value_padded=value_padded,
        decay_width=decay_width,
        decay_padded={"key": key_padded, "value": value_padded}.get(plan.side, 1),
        value_tile=min(value_padded, _value_tile(plan)),
        output_tile=value_padded if plan.side == "value" else min(value_padded, 16 if plan.dtype in _EXACT else 64),
        step_tile=min(value_padded, 32 if key_padded <= 128 else 16),
        gradient_keys=min(key_padded, _gradient_keys(plan)),
        gradient_tile=min(value_padded, 16 if plan.dtype in _EXACT else 64),
        key_tile=min(key_padded, 64),
    )


def core_filters() -> Mapping[str, Callable[..., object]]:
    """The filters of the templates `recurrent` and `recurrent_backward`."""
    return {
        "header": core_header,
        "tidy": tidy,
        "used": functions_used,
        "layout": layout_of,
        "operands": operand_names,
        "slots": slots_of,
        "triton_dtype": lambda dtype: f"tl.{FLOAT_NAMES[dtype]}",
        "dot_options": lambda dtype: DOT_OPTIONS.get(dtype, ""),
        "inverse_options": inverse_options,
        "compute_dtype": lambda dtype: "tl.float64" if dtype is DType.F64 else "tl.float32",
    }


def operand_names(plan: CorePlan) -> tuple[str, ...]:
    """The operands but log_decay, in the order of the parameters of kernels."""
    return ("query", *(name for kind in ("key", "value", "erase") for _, name in slots_of(plan, kind)))


def slots_of(plan: CorePlan, kind: str) -> tuple[tuple[int, str], ...]:
    """The updates that have a `key`, `value` or `erase`: their number, and the name of the operand."""
    return tuple((i, f"{kind}_{i}") for i, update in enumerate(plan.updates) if kind == "key" or getattr(update, kind))


def inverse_options(plan: CorePlan) -> str:
    """How products of triangular matrices in f32 are taken: with the tensor cores, in three products of TF32 that make
    up for its digits, where operands are shorter than f32 and the target has it."""
    if plan.dtype in DOT_OPTIONS:
        return DOT_OPTIONS[plan.dtype]
    precision = "tf32x3" if plan.target.arch.startswith("sm_") else "ieee"
    return f', input_precision="{precision}"'


def core_header(plan: CorePlan) -> str:
    """The docstring of a generated module."""
    direction = "gradient of a linear recurrence" if plan.kernel == "recurrent_backward" else "linear recurrence"
    decay = {"none": "no decay", "scalar": "a decay of tokens"}.get(plan.side, f"a decay of {plan.side} channels")
    kinds = {(True, True): "corrected", (True, False): "written", (False, True): "erased", (False, False): "none"}
    updates = ", ".join(kinds[update.value, update.erase] for update in plan.updates) or "none"
    before = " before the decay" if plan.erases_before and plan.erasing else ""
    lines = [
        f"{plan.name}: {direction}, {plan.dtype.value}, D = {plan.key_width}, E = {plan.value_width}.",
        "",
        f"Generated by attncc {_version()} for {plan.target}.",
        "",
        f"    {decay}; updates: {updates}{before}; reads the state {'before' if plan.read == 'pre' else 'after'} them",
    ]
    text = "\n".join(lines)
    return f'"""{text}\n"""'


def functions_used(source: str, plan: CorePlan) -> str:
    """Source of functions, less those that no kernel of `plan` calls."""
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    pending = [name for name in functions if name.startswith(f"{plan.name}_")]
    used: set[str] = set()
    while pending:
        name = pending.pop()
        used.add(name)
        names = {node.id for node in ast.walk(functions[name]) if isinstance(node, ast.Name)}
        pending += names & functions.keys() - used
    lines = source.splitlines()
    for name in functions.keys() - used:
        node = functions[name]
        first = min(decorator.lineno for decorator in node.decorator_list)
        assert node.end_lineno is not None
        lines[first - 1 : node.end_lineno] = [""] * (node.end_lineno - first + 1)
    return "\n".join(lines)


def _padded(width: int) -> int:
    return max(power_of_two(width), _LEAST)


def _rows_of_chunk(plan: CorePlan) -> int:
    """Rows of updates that a chunk should have: products with them take most of the registers."""
    if plan.dtype in _EXACT:
        return 16 if _padded(plan.key_width) > 64 else 32
    return 64


def _value_tile(plan: CorePlan) -> int:
    keys = _padded(plan.key_width)
    if plan.dtype in _EXACT:
        # Without tensor cores a thread holds whole rows of keys and whole columns of the state.
        return 8 if keys > 64 and len(plan.updates) > 1 else 16
    return max(min(4096 // keys, 32 if _is_crowded(plan) else 64), _LEAST)


def _gradient_keys(plan: CorePlan) -> int:
    """Where key channels decay each at its own rate, so do their gradients, and programs can divide them. Else they ask
    for sums over all channels."""
    if plan.side != "key":
        return _padded(plan.key_width)
    return max((64 if plan.dtype in _EXACT else 128) // power_of_two(len(plan.updates)), _LEAST)


def _is_crowded(plan: CorePlan) -> bool:
    """Whether inverses, or parts of f32 numbers, leave too few registers: on sm_80, all factors of products come from
    there."""
    return plan.target.arch == "sm_80" and (plan.erasing or plan.exact_state)


def launch_of(plan: CorePlan, function: str) -> tuple[int, int, int | None]:
    """Warps, stages and registers of a function. Compiled ahead of time up to D = E = 128, none then spills, but for
    three updates a token, decays of value channels in f32, and on gfx942 decays of tokens with two updates."""
    registers = 255 if plan.target.arch.startswith("sm_") else None
    if plan.dtype in _EXACT:
        return 8, 1, registers
    layout = layout_of(plan)
    wide = {
        "pairs": layout.key_padded * layout.slots > 128,
        "states": plan.exact_state and _is_crowded(plan),
        "reverse": layout.key_padded > (64 if _is_crowded(plan) else 128),
        "read_gradients": layout.gradient_keys * layout.slots > 128,
        "update_gradients": layout.gradient_keys * layout.slots > 128,
        "decay_gradients": layout.key_padded > 128,
    }.get(function, False)
    # In more stages, products of a step would wait for what the step before has accumulated.
    waits = function == "pair_gradients" or (wide and function.endswith("_gradients"))
    staged = layout.key_padded <= _STAGED.get((plan.target.arch, function), layout.key_padded)
    return 8 if wide else 4, 2 if staged and not waits else 1, registers


def render_core(plan: CorePlan, templates: Sequence[Path]) -> str:
    """The source of the kernels of a core. Raises BuildError where its template cannot be rendered."""
    return fill(f"{plan.kernel}.py.jinja", plan, plan.name, plan.target, core_filters(), templates)
