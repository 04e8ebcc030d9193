"""Pairwise attention as a recurrence, where sums over keys can be made before any query is known.

Before: weight = qk * gamma[h] ** (q_idx - kv_idx), under the mask `causal`
After:  S = S * gamma[h];  S = S + k[d] * v[e];  out = sum(d: q[d] * S[d, e])

A weight is a product of qk and of factors of the query, of the key, and of both where those are decays: powers of
G(query) - G(key), which is what the differences from token to token between the two add up to. No exponential of G
itself is taken, which may be beyond every float where the difference is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Never

from attncc.ir.nodes import (
    Apply,
    Attention,
    Constant,
    Elementwise,
    Expr,
    Hole,
    Index,
    Load,
    Size,
    Softmax,
    TensorParameter,
)
from attncc.ir.recurrence import KEY, QUERY, STATE, Recurrence, Update, linear_statements, map_expressions
from attncc.ir.rewrite import contains, has_free, map_children, map_clauses, substitute
from attncc.passes.algebra import Linear, expr_of, linear
from attncc.passes.normal_form import Sequential, normal_form
from attncc.passes.simplify import simplify_expr
from attncc.source import Span

_AT_MOST = {"ge": (0, 1, 0), "gt": (0, 1, 1), "le": (1, 0, 0), "lt": (1, 0, 1)}
_QUERY, _KEY, _TOKEN = Index("q_idx"), Index("kv_idx"), Index("t")
_DISTANCE = linear(Apply("sub", (_QUERY, _KEY)))
_ONE = Constant(1.0)
# As many queries as keys, the first of them at position 0.
_SQUARE: dict[Expr, Expr] = {Index("q_row"): _QUERY, Size("q_offset"): Constant(0), Size("M"): Size("N")}
_AT_TOKEN: dict[Expr, Expr] = {_QUERY: _TOKEN, _KEY: _TOKEN}


@dataclass(frozen=True, slots=True)
class Refusal:
    """There is no such recurrence. why: which term prevents it; span: where."""

    why: str
    span: Span | None


class _Refused(Exception):
    def __init__(self, why: str, span: Span | None) -> None:
        super().__init__(why)
        self.why, self.span = why, span


def recurrence_of(attention: Attention) -> Recurrence | Refusal:
    """The recurrence with the same output, or the term that prevents one.

    It is the same for calls with as many queries as keys and q_offset = 0, that do not ask for lse; any other call is
    the pairwise kernel's. Its own q_offset is 0, and it has no initial state. It always has a normal form, whose decays
    are taken to be no less than 0: powers of elements of tensors that are negative are NaN.
    """
    try:
        made = _recurrence(attention)
    except _Refused as refused:
        return Refusal(refused.why, refused.span)
    form = normal_form(made)  # A decay of a negative constant has none.
    return Refusal(form.why, form.span) if isinstance(form, Sequential) else made


def is_true(mask: Expr) -> bool:
    """Whether a mask keeps every pair."""
    return simplify_expr(mask) == Constant(True)


def is_causal(mask: Expr) -> bool:
    """Whether a mask keeps exactly the keys up to the query's own, however that is written."""
    match simplify_expr(mask):
        case Apply(op=op, args=args) if op in _AT_MOST:
            larger, smaller, strictly = _AT_MOST[op]
            return (linear(args[larger]) - linear(args[smaller])).plus(-strictly) == _DISTANCE
        case _:
            return False


def _recurrence(attention: Attention) -> Recurrence:
    if isinstance(attention.normalizer, Softmax):
        raise _Refused("the weight is a softmax of the score", None)
    if attention.dropout is not None:
        raise _Refused("dropout differs from pair to pair", None)
    square = map_clauses(attention, lambda expr: substitute(expr, _SQUARE))
    assert not isinstance(square.normalizer, Softmax)
    causal = is_causal(square.mask)
    if not causal and not is_true(square.mask):
        raise _Refused("the mask keeps other pairs than those with kv_idx <= q_idx", attention.mask.span)
    score = substitute(square.score, {Hole("qk"): Apply("mul", (square.scale, Hole("dot")))})
    weight = substitute(square.normalizer.weight, {Hole("score"): score})
    summed = {p.name: p.summed for p in attention.tensors if p.summed is not None}
    separated = _separated(_distances(weight) if causal else weight, causal=causal)
    size = Size("D")
    statements = linear_statements(separated.times(separated.query, QUERY), size, separated.times(separated.key, KEY))
    if separated.decays:
        statements = (Update(reduce(_times, separated.decays, STATE)), *statements)
    made = Recurrence(
        attention.name,
        attention.doc,
        tuple(replace(p, summed=None) if isinstance(p, TensorParameter) else p for p in attention.parameters),
        square.q,
        square.k,
        square.v,
        statements,
        normalizer="none" if isinstance(square.normalizer, Elementwise) else "sum",
        bidirectional=not causal,
    )
    return map_expressions(made, lambda expr: simplify_expr(_unsummed(substitute(expr, _AT_TOKEN), summed)))


def _unsummed(expr: Expr, summed: Mapping[str, int]) -> Expr:
    """Differences of a running sum from the token before are what is summed; nothing else is known of the sum."""
    match expr:
        case Apply(op="where", args=(_, Apply(op="sub", args=(Load(tensor=name, indices=indices) as load, _)), _)) if (
            name in summed and indices[summed[name]] == _TOKEN and expr == simplify_expr(_difference(load))
        ):
            return load
        case Load(tensor=name, span=span) if name in summed:
            raise _Refused("a running sum is read by itself, not its difference from key to query", span)
        case _:
            return map_children(expr, lambda child: _unsummed(child, summed))


def _distances(expr: Expr) -> Expr:
    """`expr` for kv_idx <= q_idx: the distance is what it is, without `abs`."""
    expr = map_children(expr, _distances)
    match expr:
        case Apply(op="abs", args=(x,)) if linear(x) in (_DISTANCE, _DISTANCE.times(-1)):
            return Apply("sub", (_QUERY, _KEY), expr.span)
        case _:
            return expr


@dataclass(slots=True)
class _Separated:
    """A weight but for qk: factors of the query, of the key, and what the state is multiplied by at each token."""

    query: list[Expr] = field(default_factory=list[Expr])
    key: list[Expr] = field(default_factory=list[Expr])
    decays: list[Expr] = field(default_factory=list[Expr])

    @staticmethod
    def times(factors: list[Expr], vector: Expr) -> Expr:
        return reduce(_times, [*factors, vector])


@dataclass(frozen=True, slots=True)
class _Term:
    """A term of an exponent, at the token; of_pair: the power that it is from varies with query and key."""

    sign: int
    value: Expr
    of_pair: bool


@dataclass(slots=True)
class _Powers:
    """What is multiplied of the same base, or by exp or exp2: the terms of the exponents."""

    span: Span | None
    query: list[_Term] = field(default_factory=list[_Term])
    key: list[_Term] = field(default_factory=list[_Term])


def _separated(weight: Expr, *, causal: bool) -> _Separated:
    result = _Separated()
    products = 0
    powers: dict[Expr | str, _Powers] = {}
    for factor, inverse in _factors(weight):
        if contains(factor, lambda node: node == Hole("dot")):
            if factor != Hole("dot") or inverse:
                raise _Refused("the weight is no multiple of qk", factor.span)
            products += 1
            continue
        value = simplify_expr(Apply("div", (_ONE, factor))) if inverse else factor
        base, exponent = _power(factor)
        if exponent is not None and causal:
            _add_terms(exponent, powers.setdefault(base, _Powers(factor.span)), -1 if inverse else 1, (), factor)
        elif not has_free(factor, "kv_idx"):
            result.query.append(value)
        elif not has_free(factor, "q_idx"):
            result.key.append(value)
        elif exponent is not None:
            raise _Refused("without a causal mask nothing decays from key to query", factor.span)
        else:
            _refuse_mixed(factor)
    if products != 1:
        raise _Refused(
            "the weight has no factor qk" if not products else "the weight is no multiple of qk", weight.span
        )
    for base, terms in powers.items():
        _use_powers(base, terms, result)
    return result


def _refuse_mixed(factor: Expr) -> Never:
    raise _Refused("a factor varies with query and key, and is no product of one of each", factor.span)


def _factors(expr: Expr, inverse: bool = False) -> Iterator[tuple[Expr, bool]]:
    """What is multiplied, or divided by where `inverse`."""
    match expr:
        case Apply(op="mul", args=(a, b)):
            yield from _factors(a, inverse)
            yield from _factors(b, inverse)
        case Apply(op="div", args=(a, b)):
            yield from _factors(a, inverse)
            yield from _factors(b, not inverse)
        case Apply(op="neg", args=(a,)):
            yield Constant(-1.0, expr.span), False
            yield from _factors(a, inverse)
        case _:
            yield expr, inverse


def _power(factor: Expr) -> tuple[Expr | str, Expr | None]:
    """The base and the exponent of a power that varies with its exponent only; no exponent for anything else."""
    match factor:
        case Apply(op="exp" | "exp2" as op, args=(exponent,)):
            return op, exponent
        case Apply(op="pow", args=(base, exponent)) if not _varies(base):
            return base, exponent
        case _:
            return "", None


def _varies(expr: Expr) -> bool:
    return has_free(expr, "q_idx") or has_free(expr, "kv_idx")


def _add_terms(expr: Expr, powers: _Powers, sign: int, scales: tuple[tuple[str, Expr], ...], whole: Expr) -> None:
    """Adds the terms of an exponent, each multiplied (or divided) by `scales`, which do not vary."""
    match expr:
        case Apply(op="add" | "sub" as op, args=(a, b)):
            _add_terms(a, powers, sign, scales, whole)
            _add_terms(b, powers, sign if op == "add" else -sign, scales, whole)
        case Apply(op="neg", args=(a,)):
            _add_terms(a, powers, -sign, scales, whole)
        case Apply(op="mul", args=(a, b)) if not _varies(a):
            _add_terms(b, powers, sign, (*scales, ("mul", a)), whole)
        case Apply(op="mul" | "div" as op, args=(a, b)) if not _varies(b):
            _add_terms(a, powers, sign, (*scales, (op, b)), whole)
        case Apply(op="to_float", args=(a,)):
            form = linear(a)
            for atom, count in (*form.terms, *([(Constant(1), form.constant)] if form.constant else [])):
                part = Apply("to_float", (expr_of(Linear(((atom, abs(count)),))),), expr.span)
                _add_term(part, powers, sign if count > 0 else -sign, scales, whole)
        case _:
            _add_term(expr, powers, sign, scales, whole)


def _add_term(expr: Expr, powers: _Powers, sign: int, scales: tuple[tuple[str, Expr], ...], whole: Expr) -> None:
    of_query, of_key = has_free(expr, "q_idx"), has_free(expr, "kv_idx")
    if of_query and of_key:
        raise _Refused("an exponent varies with query and key, and is no difference of one of each", whole.span)
    value = reduce(lambda value, scale: Apply(scale[0], (value, scale[1])), reversed(scales), expr)
    of_pair = has_free(whole, "q_idx") and has_free(whole, "kv_idx")
    term = _Term(sign, simplify_expr(substitute(value, _AT_TOKEN)), of_pair)
    (powers.key if of_key else powers.query).append(term)


def _use_powers(base: Expr | str, powers: _Powers, result: _Separated) -> None:
    """Terms of the query that are those of the key, taken away, are decays; the others are factors of either."""
    keys, queries = list(powers.key), list[_Term]()
    for term in powers.query:
        taken = next((key for key in keys if (key.sign, key.value) == (-term.sign, term.value)), None)
        if taken is None:
            queries.append(term)
        else:
            keys.remove(taken)
            result.decays.append(_raised(base, term.sign, _difference(term.value)))
    if any(has_free(term.value, "t") and term.of_pair for term in queries) and any(term.of_pair for term in keys):
        why = "an exponent is no difference of the same at query and key, and powers of its parts may leave all floats"
        raise _Refused(why, powers.span)
    result.query += [_raised(base, term.sign, term.value) for term in queries]
    result.key += [_raised(base, term.sign, term.value) for term in keys]


def _raised(base: Expr | str, sign: int, exponent: Expr) -> Expr:
    exponent = simplify_expr(exponent if sign > 0 else Apply("neg", (exponent,)))
    if isinstance(base, str):
        return Apply(base, (exponent,))
    return base if exponent == _ONE else Apply("pow", (base, exponent))


def _difference(expr: Expr) -> Expr:
    """`expr` at the token less `expr` at the one before it; 0 at the first one, before which nothing is read."""
    match expr:
        case Apply(op="mul", args=(a, b)) if not has_free(a, "t"):
            return Apply("mul", (a, _difference(b)))
        case Apply(op="mul" | "div" as op, args=(a, b)) if not has_free(b, "t"):
            return Apply(op, (_difference(a), b))
        case Apply(op="to_float", args=(a,)) if (form := linear(a)).without(_TOKEN) == Linear((), form.constant):
            return Constant(float(sum(count for _, count in form.terms)))
        case _:
            before = substitute(expr, {_TOKEN: Apply("sub", (_TOKEN, Constant(1)))})
            first = Apply("gt", (_TOKEN, Constant(0)))
            return Apply("where", (first, Apply("sub", (expr, before)), Constant(0.0)))


def _times(a: Expr, b: Expr) -> Expr:
    return Apply("mul", (a, b))
