"""What a user may have meant by a name that means nothing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from attncc.check.functions import BUILTINS
from attncc.check.world import WORLD
from attncc.source import Span
from attncc.syntax import nodes

if TYPE_CHECKING:
    from attncc.check.expressions import Scope

# What other languages and libraries call things.
_VALUES = {
    "True": "true",
    "False": "false",
    "i": "q_idx",
    "j": "kv_idx",
    "q_index": "q_idx",
    "k_idx": "kv_idx",
    "k_index": "kv_idx",
    "head": "h",
    "batch": "b",
    "scores": "score",
    "seqlen": "N",
    "seqlen_q": "M",
    "seqlen_kv": "N",
    "head_dim": "D",
    "num_heads": "H",
    "num_heads_kv": "HKV",
    "infinity": "inf",
}
_OF_VECTORS = ("outer", "concat")
_TRANSPOSES = ("T", "mT", "H", "mH", "t", "transpose")
_FUNCTIONS = {
    "logit": "log",
    "ln": "log",
    "maximum": "max",
    "minimum": "min",
    "fabs": "abs",
    "power": "pow",
    "logistic": "sigmoid",
    "swish": "silu",
    "normalize": "l2norm",
    "rms_norm": "rmsnorm",
    "select": "where",
    "rotary": "rope",
    "clip": "clamp",
}
_LOG_SIGMOID = "write `log(sigmoid(x))`; and `sigmoid(x)` for the exponential of that"
# What is written otherwise, and how.
_WRITTEN = {
    "diag": "in a recurrence `diag(x) @ S` is `x[:, None] * S`, x a key vector; `S @ diag(y)` is `S * y[None, :]`",
    "log_sigmoid": _LOG_SIGMOID,
    "logsigmoid": _LOG_SIGMOID,
}


def nearest(name: str, candidates: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(candidates), n=1)
    return f"did you mean `{near[0]}`?" if near else ""


def value(name: str, scope: Scope) -> tuple[str, tuple[str, Span] | None]:
    """A help line for an unknown value, and the place where what it suggests is declared."""
    if name in _VALUES:
        return f"write `{_VALUES[name]}`", None
    defines = [define.name for define in scope.module.names() if define.parameters is None]
    near = difflib.get_close_matches(name, [*scope.values, *scope.pending, *defines, *WORLD], n=1)
    if not near:
        return "", None
    declared = scope.declared.get(near[0])
    return f"did you mean `{near[0]}`?", None if declared is None else (near[0], declared)


def function(name: str, scope: Scope) -> str:
    """A help line for an unknown function."""
    if name in _FUNCTIONS:
        return f"write `{_FUNCTIONS[name]}`"
    if name in _WRITTEN:
        return _WRITTEN[name]
    defines = {define.name: define for define in scope.module.names() if define.parameters is not None}
    return nearest(name, [*defines, *BUILTINS, *_OF_VECTORS])


def attribute(name: str) -> str:
    """A help line for an attribute."""
    if name in _TRANSPOSES:
        return "nothing is transposed: exchange the indices; in a recurrence `outer(k, v)` is a column times a row"
    return "functions are called by their bare names, such as `tanh(x)`"


def define_signature(define: nodes.Define) -> str:
    parameters = [p.name if p.default is None else f"{p.name}={p.default.span.text}" for p in define.parameters or ()]
    return f"{define.name}({', '.join(parameters)})"
