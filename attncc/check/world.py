"""The names that mean something in every spec."""

from __future__ import annotations

import keyword
import math

from attncc.check.values import Value, constant, element_index
from attncc.ir.nodes import Element, Hole, Index, RowName, Size, SizeName
from attncc.ir.types import Kind
from attncc.source import Span

COORDINATES = ("b", "h", "hkv", "q_row", "q_idx", "kv_idx")
SIZES = ("B", "H", "HKV", "M", "N", "D", "E")
# What runs over an axis of this size.
COORDINATE_OF: dict[SizeName, str] = {"B": "b", "H": "h", "HKV": "hkv", "M": "q_row", "N": "kv_idx"}
ROWS: dict[RowName, SizeName] = {"q": "D", "k": "D", "v": "E"}
HOLES = ("qk", "score")
CONSTANTS = {"inf": math.inf, "pi": math.pi}

WORLD = frozenset((*COORDINATES, *SIZES, *ROWS, *HOLES, *CONSTANTS))

# Arguments that every call has, or will have, besides those of its spec.
CALL_ARGUMENTS = frozenset(
    ("q_offset", "return_lse", "out", "dropout_p", "seed", "stats", "initial_state", "return_state")
)

# Clauses of forms that this version does not compile, with what to do instead.
LATER_CLAUSES = {
    "select": "write a `mask`; blocks that it leaves empty are skipped",
    "sort": "sort the rows of q, k and v before the call",
    "branch": "build each branch as its own attention and combine the outputs",
    "output": "combine the outputs of several attentions after their calls",
}

# Functions of those forms.
LATER_FUNCTIONS = {
    "concat": "it belongs to `feature`; concatenate the tensors before the call",
    "outer": "it belongs to `feature`, and to the statements under `recurrence:`",
    "cumsum": "it belongs to clauses of pairs; a state sums by itself, or pass the sums as a tensor",
    "pool": "pool k and v before the call",
    "project": "project k and v before the call",
    "argmax": "it belongs to `sort by`, which comes with a later version",
    "top": "it belongs to `select`, which comes with a later version",
    "merge": "call the attentions with return_lse=True and merge their outputs",
}


def named(name: str, span: Span) -> Value | None:
    """What a name of every spec means."""
    if name in COORDINATES:
        return Value(Index(name, span), Kind.INT)
    if name in SIZES:
        return Value(Size(name, span), Kind.INT)
    if name in HOLES:
        return Value(Hole(name, span), Kind.FLOAT)
    if name in ROWS:
        size = Size(ROWS[name])
        return Value(Element(name, element_index(), span=span), Kind.FLOAT, size)
    if name in CONSTANTS:
        return constant(CONSTANTS[name], span)
    return None


def reserved(name: str) -> str:
    """Why a parameter or a `let` cannot have this name; empty if it can."""
    if name in WORLD:
        return "this name has a meaning of its own"
    if name in CALL_ARGUMENTS:
        return "this is an argument of every call"
    if keyword.iskeyword(name):
        return "this is a keyword of Python, so it cannot be passed by name"
    if name.startswith("_"):
        return "names that begin with an underscore are the compiler's own"
    return ""


# What these names mean, in attentions with a recurrence only.
RECURRENT_NAMES = {
    "scale": "this is the clause `scale`",
    "t": "this is the token",
    "S": "this is the state",
    "out": "this is what a token gives",
}
