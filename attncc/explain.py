"""`explain`: what the compiler found out about a specification, what it chose, and why not something else."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

from attncc.ir.nodes import Apply, Attention, Elementwise, Expr, Parameter, Softmax, Sum, Variable, identity_row
from attncc.ir.rewrite import map_children
from attncc.ir.text import to_text
from attncc.passes.reassociate import Refusal, recurrence_of
from attncc.passes.variance import variance
from attncc.plan.nodes import (
    BackwardPlan,
    Binding,
    BlockStructure,
    CppTile,
    ForwardPlan,
    KernelPlan,
    Program,
    RowsPlan,
    Tile,
    TilesPlan,
    TritonTile,
)

_WIDTH = 118  # beside two spaces
_COORDINATES = {"b": "batch", "h": "head", "q": "query", "kv": "key", "d": "element"}
_CORNERS = "a tile holds the positions q_lo to q_hi and the keys kv_lo to kv_hi"
_STRATEGIES = {
    "bounds": "closed form: outside the key ranges nothing is kept, inside the full part nothing is masked",
    "scan": "each tile within the key ranges is classified in the loop, by interval arithmetic",
    "list": "the live tiles of each tile of queries are listed before the kernel runs, by interval arithmetic over "
    "the least and greatest values per tile",
}


def explain(spec_text: str, attention: Attention, program: Program) -> str:
    """The specification, the facts derived from it, the kernels that they led to, and the alternatives."""
    forward = program.forward
    sections = [
        ("Specification", spec_text.strip().splitlines()),
        ("Clauses, and what each varies with", _wrapped(_clauses(attention))),
        ("Block structure of the mask", _wrapped(_blocks(forward.blocks))),
        ("Algorithm", _wrapped(_algorithm(attention))),
        (f"Kernels for {forward.target}, {forward.dtype.value}", _wrapped(_kernels(program))),
    ]
    return "\n\n".join(f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in sections) + "\n"


def _wrapped(lines: Iterable[str]) -> Iterator[str]:
    """The lines, long ones broken at spaces; what follows stands further in."""
    for line in lines:
        margin = " " * (len(line) - len(line.lstrip()) + 4)
        yield from textwrap.wrap(line, _WIDTH, subsequent_indent=margin, break_long_words=False, break_on_hyphens=False)


def _clauses(attention: Attention) -> Iterator[str]:
    for row in ("q", "k", "v"):
        transform: Expr = getattr(attention, row)
        if transform != identity_row(row):
            yield f"{row:<7}= {_text(transform)}   [{_varies(transform)}]"
    clauses: list[tuple[str, Expr]] = [
        ("scale", attention.scale),
        ("score", attention.score),
        ("mask", attention.mask),
    ]
    match attention.normalizer:
        case Softmax(sink=sink):
            clauses += [] if sink is None else [("sink", sink)]
        case Elementwise(weight=weight) | Sum(weight=weight):
            clauses.append(("weight", weight))
    for name, clause in clauses:
        yield f"{name:<7}= {_text(clause)}   [{_varies(clause)}]"


def _varies(expr: Expr) -> str:
    names = [text for coordinate, text in _COORDINATES.items() if coordinate in variance(expr)]
    return "varies with " + ", ".join(names) if names else "constant within a call"


def _blocks(blocks: BlockStructure) -> Iterator[str]:
    yield f"{blocks.strategy}: {_STRATEGIES[blocks.strategy]}"
    yield _CORNERS
    for number, key_range in enumerate(blocks.ranges, start=1):
        label = f"range {number}" if len(blocks.ranges) > 1 else "range"
        yield f"{label}: keys from {_text(key_range.lo)} to {_text(key_range.hi)}"
        if key_range.full_lo != key_range.full_hi:
            yield f"  full from {_text(key_range.full_lo)} to {_text(key_range.full_hi)}"
    if blocks.strategy != "bounds":
        yield f"a tile may keep a pair where {_text(blocks.possible)}"
        yield f"a tile keeps every pair where {_text(blocks.certain)}"
    for summary in blocks.summaries:
        side = "keys" if summary.axis == "kv" else "queries"
        yield f"table: {summary.op} of {_text(summary.load)} over each tile of {side}"


def _algorithm(attention: Attention) -> Iterator[str]:
    match attention.normalizer:
        case Softmax():
            yield "streaming softmax: running maximum, sum and weighted values per query; memory linear in M + N"
            yield "not a chunked recurrence: softmax does not separate into a product of a query's and a key's features"
            yield "not two passes: the sum of exponentials is a monoid, so tiles of keys merge as they come"
        case Sum():
            yield "streaming sum: running sum and weighted values per query; memory linear in M + N"
            yield from _reassociation(attention)
        case Elementwise():
            yield "streaming weights: weighted values per query, nothing to divide by; memory linear in M + N"
            yield from _reassociation(attention)
    if any(getattr(attention, row) != identity_row(row) for row in ("q", "k", "v")):
        yield "transformed rows are written out once: within the loop each would be computed again per tile of queries"


def _reassociation(attention: Attention) -> Iterator[str]:
    found = recurrence_of(attention)
    if isinstance(found, Refusal):
        place = "" if found.span is None else f", at {found.span}: {found.span.text.strip()}"
        yield f"not a recurrence: {found.why}{place}"
        return
    yield "with as many queries as keys it is this recurrence too, in time linear in N:"
    yield from (f"  {line.strip()}" for line in to_text(found).strip().splitlines()[1:] if not line.startswith("  doc"))


def _kernels(program: Program) -> Iterator[str]:
    for plan in program.kernels:
        yield f"{plan.name}: {_summary(plan)}"
        for level, bindings in _levels(plan):
            yield f"  once per {level}:"
            yield from (f"    {binding.name} = {_text(binding.value)}" for binding in bindings)


def _summary(plan: KernelPlan) -> str:
    match plan:
        case RowsPlan():
            return f"writes the transformed {plan.row} to a workspace, {plan.width} elements a row, {plan.heads} heads"
        case TilesPlan():
            return f"fills {len(plan.blocks.summaries)} tables" + (
                " and the lists of live tiles" if plan.blocks.strategy == "list" else ""
            )
        case BackwardPlan():
            parts = ", ".join(f"of {_text(adjoint.part)} along the {adjoint.along}" for adjoint in plan.adjoints)
            return f"gradients of q, k and v{'; ' + parts if parts else ''}; {_tile(plan.tile)}"
        case ForwardPlan():
            scale = "the exponential absorbs the scale" if plan.fold_scale else "scores are scaled before anything else"
            return f"head dims {plan.head_dim_qk} and {plan.head_dim_v}; {_tile(plan.tile)}; {scale}"


def _tile(tile: Tile) -> str:
    match tile:
        case CppTile():
            return f"{tile.block_m} queries ({tile.vectors} registers of {tile.lanes} lanes) x {tile.block_n} keys"
        case TritonTile():
            return f"{tile.block_m} queries x {tile.block_n} keys, {tile.num_warps} warps, {tile.num_stages} stages"


def _levels(plan: KernelPlan) -> Iterable[tuple[str, tuple[Binding, ...]]]:
    match plan:
        case RowsPlan():
            levels = (
                ("call", plan.call),
                ("position", plan.position),
                ("position and element", plan.position_element),
                ("row", plan.row_values),
            )
        case TilesPlan():
            levels = (("call", plan.call), ("head", plan.head))
        case ForwardPlan() | BackwardPlan():
            levels = (("call", plan.call), ("head", plan.head), ("query", plan.row), ("key", plan.key))
    return [(name, bindings) for name, bindings in levels if bindings]


def _text(expr: Expr) -> str:
    """`expr` for people, who need not know a variable of the plan by its mark, nor how a chain is nested."""
    return to_text(_plain(expr))


def _plain(expr: Expr) -> Expr:
    match map_children(expr, _plain):
        case Variable(name=name, kind=kind):
            return Parameter(name, kind)
        case Apply(op="min" | "max" as op, args=args):
            return Apply(op, tuple(part for arg in args for part in _chain(op, arg)))
        case Apply(op="and" | "or" as op) as chain:
            first, *others = _chain(op, chain)
            for other in others:
                first = Apply(op, (first, other))
            return first
        case other:
            return other


def _chain(op: str, expr: Expr) -> tuple[Expr, ...]:
    """The operands of nested applications of `op`, in reading order."""
    match expr:
        case Apply(op=found, args=args) if found == op:
            return tuple(part for arg in args for part in _chain(op, arg))
        case _:
            return (expr,)
