"""What the functions of the Triton modules of recurrent cores take, in order."""

from __future__ import annotations

from collections.abc import Sequence

from attncc.emit.recurrent_triton import launch_of, operand_names, slots_of
from attncc.plan.recurrent import CorePlan
from attncc.runtime.triton_fields import TYPES, Field, Function, Role

# Numbers of tokens and chunks; sums and states; whatever else is no operand is stored like one.
_WHOLE = frozenset({"chunks", "first_chunks", "offsets"})
_STATES = frozenset({"initial_state", "final_state", "d_initial_state", "d_final_state"})
_DECAYS = frozenset({"decays", "read_decays", "erase_decays", "update_decays", "last_decays"})
_WIDE = _STATES | _DECAYS | {"log_decay", "d_log_decay", "erase_pairs"}


def core_functions(plan: CorePlan) -> tuple[Function, ...]:
    """The functions of the module that `plan` renders to, in the order of launch."""
    return _backward_functions(plan) if plan.kernel == "recurrent_backward" else _forward_functions(plan)


def _forward_functions(plan: CorePlan) -> tuple[Function, ...]:
    names, values = operand_names(plan), names_of(plan, "value")
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


def _backward_functions(plan: CorePlan) -> tuple[Function, ...]:
    keys, values, erases = (names_of(plan, kind) for kind in ("key", "value", "erase"))
    by_key, by_value = plan.side in {"scalar", "key"}, plan.side == "value"
    decays = ["decays"] if plan.side != "none" else []
    own_values = [] if plan.erasing else values

    def function(name: str, pointers: Sequence[str], strided: Sequence[str], *sizes: str) -> Function:
        return _function(plan, name, pointers, strided, sizes)

    def where(condition: bool, *pointers: str) -> list[str]:
        return list(pointers) if condition else []

    reverse = [*(["d_outputs"] if by_value else ["d_o", "query_pairs", "keys"]), "queries"]
    reverse += [*where(plan.erasing, "erases", "inverses", "d_updates"), *decays]
    reverse += ["d_final_state", "d_states", "d_initial_state", *([] if by_value else gradients(values))]
    reverse += ["chunks", "first_chunks"]
    pairs = ["d_o", *where(plan.erasing, "updates", "d_updates", "d_erase_pairs"), "d_query_pairs", "chunks"]
    pairs += own_values
    reads = ["query", *keys, *(erases if by_key else [])]
    read = [*reads, *where(by_key, "log_decay"), "d_outputs" if by_value else "d_o", "states", "d_query_pairs"]
    read += [*where(plan.erasing, "d_updates", "d_erase_pairs"), "d_query", *gradients(erases)]
    read += [*where(by_key, "read_decays"), *where(by_key and plan.erasing, "erase_decays"), "chunks"]
    reads_of_update = ["query", *(keys if by_key else []), *erases, *([] if by_value else own_values)]
    update = [*reads_of_update, *where(by_key, "log_decay"), *where(plan.erasing or by_value, "updates"), "d_states"]
    update += ["d_query_pairs", *where(plan.erasing, "d_erase_pairs"), *gradients(keys)]
    update += [*where(by_key, "update_decays", "last_decays"), "chunks"]
    of_pairs = function("pair_gradients", pairs, own_values, "H", "N", "chunk_count")
    of_values: list[Function] = []
    if by_value:
        pairs = [*values, "log_decay", "queries", "query_pairs", "states", "d_o", "d_query_pairs", "d_outputs"]
        pairs += ["read_decays", "chunks"]
        of_pairs = function("pair_gradients", pairs, values, "H", "N", "chunk_count", "sequences")
        value = [*values, "log_decay", "keys", "query_pairs", "d_o", "d_states", *gradients(values)]
        value += ["update_decays", "last_decays", "chunks"]
        of_values = [function("value_gradients", value, values, "H", "N", "chunk_count")]
    of_states = function("reverse", reverse, (), "H", "N", "chunk_count", "sequences")
    functions = [
        *((of_pairs, of_states) if by_value else (of_states, of_pairs)),
        function("read_gradients", read, reads, "H", "N", "chunk_count", "sequences"),
        function("update_gradients", update, reads_of_update, "H", "N", "chunk_count"),
        *of_values,
    ]
    if plan.side != "none":
        decay = ["initial_state", "states", "d_final_state", "d_states", "decays"]
        decay += ["read_decays", *where(plan.erasing, "erase_decays"), "update_decays", "last_decays"]
        pointers = [*decay, "d_log_decay", "chunks", "first_chunks"]
        functions.append(function("decay_gradients", pointers, (), "H", "N", "chunk_count", "sequences"))
    return tuple(functions)


def names_of(plan: CorePlan, kind: str) -> list[str]:
    """The operands of one kind of updates."""
    return [name for _, name in slots_of(plan, kind)]


def gradients(names: Sequence[str]) -> list[str]:
    """The parameters that gradients of operands are written to."""
    return [f"d_{name}" for name in names]


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
    # What the state is made of: with decays in it, it has more digits than rows.
    exact = plan.exact_state and name == ("updates" if plan.side == "value" else "keys")
    return f"*{TYPES[plan.state_dtype if exact or name in _WIDE else plan.dtype]}"


def _role(name: str) -> Role:
    # Where a state begins is up to the caller.
    return Role.OTHER if name in _WHOLE | _STATES else Role.OPERAND
