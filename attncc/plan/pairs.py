"""What is computed at pairs of a query and a key: the loop levels of its parts, and cheaper ways to say the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from attncc.ir.blocks import BlockStructure, KeyRange
from attncc.ir.nodes import Apply, Attention, Constant, Elementwise, Expr, Hole, Index, Softmax, Sum, Summary
from attncc.ir.rewrite import map_children, walk
from attncc.passes.variance import variance
from attncc.plan.reads import block_exprs
from attncc.plan.stage import Stager

PAIR_LEVELS = ("call", "head", "row", "key")
PAIR_SUFFIXES = ("c", "h", "q", "kv")


def folds_scale(attention: Attention, scale: Expr) -> bool:
    """Whether a kernel may leave the scores unscaled and multiply within the exponential.

    Not beside a sink: in the units of unscaled scores one of 1e38 would be infinite.
    """
    return (
        attention.normalizer == Softmax()
        and attention.score == Hole("qk")
        and isinstance(scale, Constant)
        and scale.value > 0
    )


def pair_level(expr: Expr) -> int:
    """The level of an expression within the forward kernel; tile corners and summaries stay where they stand."""
    if any(isinstance(node, Hole | Summary) or _is_corner(node) for node in walk(expr)):
        return len(PAIR_LEVELS)
    varies = variance(expr)
    if {"q", "kv"} <= varies:
        return len(PAIR_LEVELS)
    for coordinate, level in (("q", "row"), ("kv", "key")):
        if coordinate in varies:
            return PAIR_LEVELS.index(level)
    return PAIR_LEVELS.index("head" if varies else "call")


def _is_corner(expr: Expr) -> bool:
    return isinstance(expr, Index) and expr.name in ("q_lo", "q_hi", "kv_lo", "kv_hi")


def normalizer_parts(
    attention: Attention,
) -> tuple[Literal["softmax", "sum", "none"], Expr | None, Expr | None]:
    """The kind of normalizer, its weight and its sink."""
    match attention.normalizer:
        case Softmax(sink=sink):
            return "softmax", None, sink
        case Sum(weight=weight):
            return "sum", weight, None
        case Elementwise(weight=weight):
            return "none", weight, None


def cheapened(expr: Expr, *, exact_division: bool) -> Expr:
    """Small powers as products, and division by what does not vary within a pair as a product with its reciprocal.

    The reciprocal differs from the quotient by one rounding; f64 kernels keep the division.
    """
    expr = map_children(expr, lambda child: cheapened(child, exact_division=exact_division))
    match expr:
        case Apply(op="pow", args=(base, Constant(value=float(exponent)))) if exponent in (2.0, 3.0, 4.0):
            square = Apply("mul", (base, base))
            return {2.0: square, 3.0: Apply("mul", (square, base)), 4.0: Apply("mul", (square, square))}[exponent]
        case Apply(op="div", args=(dividend, divisor)) if (
            not exact_division and pair_level(dividend) > pair_level(divisor) and pair_level(divisor) < 2
        ):
            reciprocal = (
                Constant(1.0 / divisor.value)
                if isinstance(divisor, Constant) and divisor.value
                else Apply("div", (Constant(1.0), divisor))
            )
            return _scaled(dividend, reciprocal)
        case Apply(op="mul", args=(left, right)) if not exact_division and _is_factor(right) and not _is_factor(left):
            return _scaled(left, right)
        case _:
            return expr


def _is_factor(expr: Expr) -> bool:
    """Whether `expr` is constant within a head."""
    return pair_level(expr) < PAIR_LEVELS.index("row")


def _scaled(value: Expr, factor: Expr) -> Expr:
    """value * factor, with the factors that are constant within a head gathered: one product per pair. Differs from
    multiplying one by one by a rounding."""
    match value:
        case Apply(op="mul", args=(first, rest)) if _is_factor(first):
            if isinstance(first, Constant) and isinstance(factor, Constant):
                return Apply("mul", (Constant(first.value * factor.value), rest))
            return Apply("mul", (Apply("mul", (first, factor)), rest))
        case _:
            return Apply("mul", (value, factor))


def hoisted_blocks(blocks: BlockStructure, stager: Stager) -> BlockStructure:
    """Loads and arithmetic that do not depend on the tile move to the head and call levels."""

    def hoisted(key_range: KeyRange) -> KeyRange:
        return KeyRange(
            lo=stager.hoist(key_range.lo),
            hi=stager.hoist(key_range.hi),
            full_lo=stager.hoist(key_range.full_lo),
            full_hi=stager.hoist(key_range.full_hi),
        )

    varies = frozenset[str]().union(*map(variance, block_exprs(blocks)))
    return replace(
        blocks,
        per_batch="b" in varies,
        per_head="h" in varies,
        ranges=tuple(hoisted(key_range) for key_range in blocks.ranges),
        possible=stager.hoist(blocks.possible),
        certain=stager.hoist(blocks.certain),
    )
