"""The normal form of a recurrence, from which chunked and one-token kernels follow.

    S̃ = decay ⊙ S          S′ = S̃ + Σ key valueᵀ − Σ r (eᵀ S̃)          o = gate ⊙ (queryᵀ S′) + bonus

S is the state before the token, S′ after it; vectors are those of the token. `e` may read S instead of S̃, and `query`
S instead of S′. Statements are composed symbolically, so the form does not depend on the order and the shape in which
an update is written.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, TypeVar

from attncc.ir.nodes import Apply, Constant, Expr, Load
from attncc.ir.recurrence import Bind, Output, Recurrence, Statement, Update, map_expressions
from attncc.ir.rewrite import contains, map_children
from attncc.passes.affine import ELEMENT, STATE_BEFORE, Affine, NotAffine, affine
from attncc.passes.separable import Factors, Monomial, Polynomial, expr_of, product, total
from attncc.passes.simplify import simplify_expr
from attncc.source import Span

_Key = TypeVar("_Key", bound=Hashable)
# Each step of the delta rule within a token doubles the terms; no kernel is made of more than a few steps.
_MAX_TERMS = 256

Side: TypeAlias = Literal["none", "scalar", "key", "value"]


@dataclass(frozen=True, slots=True)
class Write:
    """key (over d) times value (over e) is added to the state."""

    key: Expr
    value: Expr


@dataclass(frozen=True, slots=True)
class Erase:
    """r (over d) times what e (over d) reads is taken from the state; `before`: e reads it before the decay."""

    e: Expr
    r: Expr
    before: bool


@dataclass(frozen=True, slots=True)
class NormalForm:
    """decay: over no channel, d or e as `side` says. read: whether query sees the state before or after the update.
    gate (None: 1) and bonus (None: 0) are over e."""

    decay: Expr
    side: Side
    erases: tuple[Erase, ...]
    writes: tuple[Write, ...]
    query: Expr
    read: Literal["pre", "post"]
    gate: Expr | None
    bonus: Expr | None

    @property
    def log_decay(self) -> Expr:
        """What kernels sum up."""
        return simplify_expr(logarithm(self.decay))


@dataclass(frozen=True, slots=True)
class Sequential:
    """There is no normal form: such a recurrence runs token by token. why: which term prevents it; span: where."""

    why: str
    span: Span | None


def normal_form(recurrence: Recurrence) -> NormalForm | Sequential:
    """The normal form, or the term that prevents it."""
    statements = map_expressions(recurrence, simplify_expr).statements
    place: Span | None = None
    try:
        known: dict[str, Affine] = {"S": STATE_BEFORE}
        last = max((i for i, statement in enumerate(statements) if isinstance(statement, Update)), default=-1)
        output: Affine | None = None
        for statement in statements:
            place = statement.span
            value = affine(statement.value, known)
            _refuse_too_many_terms(value)
            match statement:
                case Update():
                    _refuse_unwritable(value)
                    known["S"] = value
                case Bind(name=name):
                    known[name] = value
                case Output():
                    output = value
        assert output is not None
        place = None  # What is wrong with the whole update is no single statement's fault.
        after = _output_after(statements[last + 1 :], known) if last >= 0 else None
        return _form(known["S"], output if after is None else after, read="pre" if after is None else "post")
    except NotAffine as error:
        return Sequential(error.why, error.span or place)


def _output_after(statements: tuple[Statement, ...], known: dict[str, Affine]) -> Affine | None:
    """The output as a function of the state after the update; None where it reads the one before."""
    names = {"S": STATE_BEFORE}
    for statement in statements:
        earlier = known.keys() - names.keys()
        if isinstance(statement, Bind) and not _reads(statement.value, earlier):
            names[statement.name] = affine(statement.value, names)
        if isinstance(statement, Output):
            return None if _reads(statement.value, earlier) else affine(statement.value, names)
    return None


def _reads(expr: Expr, names: set[str]) -> bool:
    return contains(expr, lambda node: isinstance(node, Load) and node.tensor in names)


def _form(state: Affine, output: Affine, read: Literal["pre", "post"]) -> NormalForm:
    _refuse_unwritable(output)
    decay, side = _decay(state.terms.get(ELEMENT, ()))
    query, gate = _query(output)
    return NormalForm(
        decay=expr_of(decay),
        side=side,
        erases=tuple(Erase(_rooted(x.e), _rooted(x.r), x.before) for x in _erases(state, decay, side)),
        writes=tuple(Write(_rooted(x.key), _rooted(x.value)) for x in _writes(state.constant)),
        query=_rooted(query),
        read=read,
        gate=None if gate is None else _rooted(gate),
        bonus=_rooted(expr_of(output.constant)) if output.constant else None,
    )


def _refuse_too_many_terms(value: Affine) -> None:
    count = len(value.constant) + sum(len(coefficient) for coefficient in value.terms.values())
    if count > _MAX_TERMS:
        raise NotAffine(f"it has {count} terms when it is multiplied out, more than {_MAX_TERMS}", None)


def _refuse_unwritable(value: Affine) -> None:
    """Raises `NotAffine` for what no later statement makes fit the form."""
    for coefficient in (value.constant, *value.terms.values()):
        mixed = next((monomial.mixed[0] for monomial in coefficient if monomial.mixed), None)
        if mixed is not None:
            why = "a factor varies with key channel and value channel, and is no product of a key and a value vector"
            raise NotAffine(why, mixed.span)
    if any(term.values is not None for term in value.terms):
        raise NotAffine("the state is read along value channels (`S @ y`)", None)


def _decay(terms: Polynomial) -> tuple[Polynomial, Side]:
    if not terms:
        raise NotAffine("nothing is kept of the state", None)
    by_key, by_value = any(term.key for term in terms), any(term.value for term in terms)
    if by_key and by_value:
        raise NotAffine("the state decays by key channel and by value channel at once", None)
    if len(terms) == 1 and terms[0].number < 0:
        raise NotAffine("the state changes its sign, so that its decay has no logarithm", None)
    if terms == (Monomial(),):
        return terms, "none"
    return terms, "key" if by_key else "value" if by_value else "scalar"


def _writes(terms: Polynomial) -> tuple[Write, ...]:
    """One write for each distinct key vector; fewer where values agree."""
    by_key = _grouped((term.key, _without_key(term).expr()) for term in terms)
    by_value = _grouped((total(values), product(key)) for key, values in by_key)
    return tuple(Write(total(keys), value) for value, keys in by_value)


def _without_key(term: Monomial) -> Monomial:
    return Monomial(term.number, term.scalar, (), term.value)


def _erases(state: Affine, decay: Polynomial, side: Side) -> tuple[Erase, ...]:
    terms = [
        (read.keys or (), term) for read, coefficient in state.terms.items() if read != ELEMENT for term in coefficient
    ]
    if any(term.value for _, term in terms):
        raise NotAffine("what is erased varies with the value channel", None)
    if terms and side == "value":
        raise NotAffine("the state decays by value channel, and is read along key channels to erase from it", None)
    stripped = [_stripped(keys, term, decay) for keys, term in terms]
    before = side != "none" and any(found is None for found in stripped)
    kept = terms if before else [found for found in stripped if found is not None]
    # Equal r with one e, or equal e with one r: whatever leaves fewer.
    by_r = _grouped((term.key, Monomial(-term.number, term.scalar, keys).expr()) for keys, term in kept)
    by_e = _grouped((keys, Monomial(-term.number, term.scalar, term.key).expr()) for keys, term in kept)
    if len(by_e) < len(by_r):
        return tuple(Erase(product(e), total(r), before) for e, r in by_e)
    return tuple(Erase(total(e), product(r), before) for r, e in by_r)


def _stripped(keys: Factors, term: Monomial, decay: Polynomial) -> tuple[Factors, Monomial] | None:
    """An erasing term without the factors of the decay: what reads the decayed state; None where they are not there."""
    if len(decay) != 1:
        return None
    rest_keys, rest_scalar = _minus(keys, decay[0].key), _minus(term.scalar, decay[0].scalar)
    if rest_keys is None or rest_scalar is None:
        return None
    return rest_keys, Monomial(term.number / decay[0].number, rest_scalar, term.key)


def _minus(factors: Factors, taken: Factors) -> Factors | None:
    rest = list(factors)
    for factor in taken:
        if factor not in rest:
            return None
        rest.remove(factor)
    return tuple(rest)


def _query(output: Affine) -> tuple[Expr, Expr | None]:
    terms = [(read.keys or (), term) for read, coefficient in output.terms.items() for term in coefficient]
    by_gate = _grouped((term.value, Monomial(term.number, term.scalar, keys).expr()) for keys, term in terms)
    if len(by_gate) > 1:
        raise NotAffine("the state is read more than once, with different factors by value channel", None)
    if not by_gate:
        return Constant(0.0), None
    ((gate, queries),) = by_gate
    return total(queries), product(gate) if gate else None


def _rooted(expr: Expr) -> Expr:
    """`expr` with its roots of exponentials and sigmoids as exponentials, like decays: where what such a root is taken
    of underflows, the root does not, nor has its gradient a 0 to divide by."""
    expr = map_children(expr, _rooted)
    match expr:
        case Apply(op="pow", args=(base, Constant(value=float() as exponent))) if 0 < exponent < 1:
            pass
        case Apply(op="sqrt", args=(base,)):
            exponent = 0.5
        case _:
            return expr
    if any(logged(base)):
        return expr
    return simplify_expr(Apply("exp", (Apply("mul", (Constant(exponent), logarithm(base))),)))


def _grouped(pairs: Iterable[tuple[_Key, Expr]]) -> list[tuple[_Key, list[Expr]]]:
    groups: dict[_Key, list[Expr]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return list(groups.items())


_LOGARITHMS: dict[str, Callable[[Expr], Expr]] = {
    "exp": lambda x: x,
    "exp2": lambda x: Apply("mul", (x, Apply("log", (Constant(2.0),)))),
    "sigmoid": lambda x: Apply("neg", (Apply("softplus", (Apply("neg", (x,)),)),)),
}


def logarithm(expr: Expr) -> Expr:
    """log(expr), of products, quotients and exponentials without taking one.

    `expr` is taken to be no less than 0; the logarithm of a factor below is NaN, of one that is 0 it is -inf, whose
    exponential is 0.
    """
    match expr:
        case Apply(op="mul", args=(a, b)):
            return Apply("add", (logarithm(a), logarithm(b)))
        case Apply(op="div", args=(Constant(value=1.0), b)):
            return Apply("neg", (logarithm(b),))
        case Apply(op="div", args=(a, b)):
            return Apply("sub", (logarithm(a), logarithm(b)))
        case Apply(op="where", args=(condition, a, b)):
            return Apply("where", (condition, logarithm(a), logarithm(b)))
        case Apply(op="sub", args=(Constant(value=1.0), b)):  # what is forgotten, to all its digits where it is small
            return Apply("log1p", (Apply("neg", (b,)),))
        case Apply(op="pow", args=(a, b)):
            return Apply("mul", (b, logarithm(a)))
        case Apply(op="sqrt", args=(a,)):
            return Apply("mul", (Constant(0.5), logarithm(a)))
        case Apply(op=op, args=(a,)) if op in _LOGARITHMS:
            return _LOGARITHMS[op](a)
        case _:
            return Apply("log", (expr,))


@dataclass(frozen=True, slots=True)
class Logged:
    """Something that a logarithm is taken of, which must not be less than 0.

    used: the same where it counts, 1 elsewhere. base: it is that of a power and must not be 0 either; the exponent 0
    makes 1 of it, but NaN of its logarithm.
    """

    value: Expr
    used: Expr
    base: bool = False


def logged(expr: Expr) -> Iterator[Logged]:
    """Everything that `logarithm(expr)` takes the logarithm of, but for numbers that have one."""
    match expr:
        case Constant(value=value) if value >= 0:
            return
        case Apply(op="mul" | "div", args=(a, b)):
            yield from (*logged(a), *logged(b))
        case Apply(op="where", args=(condition, a, b)):
            for choice, args in ((condition, logged(a)), (Apply("not", (condition,)), logged(b))):
                for arg in args:
                    yield replace(arg, used=Apply("where", (choice, arg.used, Constant(1.0))))
        case Apply(op="pow", args=(Constant(value=a), _)) if a > 0:
            return
        case Apply(op="pow", args=(a, Constant(value=exponent))) if exponent > 0 and not list(logged(a)):
            return  # The base is above 0 where numbers of a type underflow, too.
        case Apply(op="pow", args=(a, _)):
            yield Logged(a, a, base=True)
        case Apply(op="sqrt", args=(a,)):
            yield from logged(a)
        case Apply(op=op) if op in _LOGARITHMS:
            return
        case _:
            yield Logged(expr, expr)
