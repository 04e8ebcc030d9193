"""What the functions of the Triton modules of recurrent cores take, in order."""

from __future__ import annotations

from collections.abc import Sequence

from attncc.emit.recurrent_triton import launch_of, operand_names, slots_of
from attncc.plan.recurrent import CorePlan
from attncc.runtime.triton_fields import TYPES, Field, Function, Role

# Numbers of tokens and chunks; sums and states; whatever else is no operand is stored like one.
_WHOLE = frozenset({"chunks", "first_chunks", "offsets"})
_WIDE = frozenset({"log_decay", "erase_pairs", "decays", "initial_state", "final_state"})
# Their first bytes are the caller's.
_UNALIGNED = frozenset({"initial_state", "final_state", *_WHOLE})


def core_functions(plan: CorePlan) -> tuple[Function, ...]:
    """The functions of the module that `plan` renders to."""
    return _forward_functions(plan)


def _forward_functions(plan: CorePlan) -> tuple[Function, ...]:
    names, values = operand_names(plan), tuple(name for _, name in slots_of(plan, "value"))
    by_value = plan.side == "value"
    log_decay, decays = (["log_decay"], ["decays"]) if plan.side != "none" else ([], [])
    corrected = ["updates"] if plan.erasing or by_value else []

    def function(name: str, pointers: Sequence[str], strided: Sequence[str], *sizes: str) -> Function:
        return _function(plan, name, pointers, strided, sizes)

    paired = names if by_value else tuple(name for name in names if name not in values)
    pairs = [*paired, *log_decay, "query_pairs", "queries", "keys"]
    pairs += ["erase_pairs", "erases"] if plan.erasing else []
    pairs += [*(["updates"] if by_value else []), *decays, "chunks"]
    states = [*([] if by_value else values), "keys", *(["erases", "inverses"] if plan.erasing else [])]
    states += [*corrected, *decays, "initial_state", "states", "final_state", "chunks", "first_chunks"]
    outputs = [*([] if plan.erasing else values), "queries", "query_pairs", *(["updates"] if plan.erasing else [])]
    outputs += ["states", *(log_decay if by_value else []), "o", "chunks"]
    step = [*names, *log_decay, "initial_state", "o", "final_state", "offsets"]
    solve = (function("solve", ["erase_pairs", "inverses"], ()),) if plan.erasing else ()
    return (
        function("pairs", pairs, paired, "H", "N", "chunk_count"),
        *solve,
        function("states", states, () if by_value else values, "H", "N", "chunk_count", "sequences"),
        function("outputs", outputs, () if plan.erasing else values, "H", "N", "chunk_count", "sequences"),
        function("step", step, names, "H", "N", "sequences"),
    )


def _function(
    plan: CorePlan, name: str, pointers: Sequence[str], strided: Sequence[str], sizes: Sequence[str]
) -> Function:
    fields = [Field(pointer, _pointer(plan, pointer), _role(pointer)) for pointer in pointers]
    for operand in strided:
        width = plan.value_width if operand.startswith("value") else plan.key_width
        fields.append(Field(f"stride_{operand}_b", "i64", Role.OUTER_STRIDE))
        fields.append(Field(f"stride_{operand}_h", "i64", Role.OUTER_STRIDE))
        fields.append(Field(f"stride_{operand}_n", "i32", Role.ROW_STRIDE, width))
    fields += [Field(size, "i32") for size in sizes]
    return Function(f"{plan.name}_{name}", tuple(fields), (), *launch_of(plan, name))


def _pointer(plan: CorePlan, name: str) -> str:
    if name in _WHOLE:
        return "*i32"
    return f"*{TYPES[plan.state_dtype if name in _WIDE else plan.dtype]}"


def _role(name: str) -> Role:
    return Role.OTHER if name in _UNALIGNED else Role.OPERAND
