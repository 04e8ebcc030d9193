"""Simplification: constants folded, what says nothing dropped.

Before: score = where(true, qk * 1.0, 0.0)     mask = not (kv_idx > q_idx) and 64 // 8 > (N + 1) - N
After:  score = qk                             mask = kv_idx <= q_idx

What an expression evaluates to never changes; see `simplify_arithmetic` for what that means of floats.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from attncc.ir.nodes import Apply, Attention, Constant, Expr
from attncc.ir.operators import OPERATORS
from attncc.ir.rewrite import map_children, map_clauses
from attncc.passes.simplify_arithmetic import ARITHMETIC
from attncc.passes.simplify_logic import LOGIC

_RULES = {**ARITHMETIC, **LOGIC}


def simplify(attention: Attention) -> Attention:
    """`attention` with every clause simplified."""
    return map_clauses(attention, simplify_expr)


def simplify_expr(expr: Expr) -> Expr:
    """`expr`, simplified from the leaves up."""
    expr = map_children(expr, simplify_expr)
    if not isinstance(expr, Apply):
        return expr
    result = _folded(expr)
    if result is None and expr.op in _RULES:
        result = _RULES[expr.op](*expr.args)
    if result is None:
        return expr
    if isinstance(result, Apply | Constant) and result.span is None:
        result = replace(result, span=expr.span)
    return simplify_expr(result)


def _folded(expr: Apply) -> Constant | None:
    """The value of an operator whose arguments are constants, by its meaning; None where that is NaN."""
    values = [argument.value for argument in expr.args if isinstance(argument, Constant)]
    if len(values) < len(expr.args):
        return None
    value = OPERATORS[expr.op].torch(*(_tensor(value) for value in values)).item()
    return None if isinstance(value, float) and math.isnan(value) else Constant(value)


def _tensor(value: bool | float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
