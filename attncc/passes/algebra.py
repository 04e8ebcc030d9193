"""Small constructors that fold as they build, and linear forms of int expressions.

Analyses compare, cancel and print int expressions; both are easiest on `Linear`: integer coefficients on atoms, which
are whatever is no sum itself. Int arithmetic of the IR is exact, so moving terms about changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, reduce

from attncc.ir.nodes import Apply, Constant, Expr, Index, Size
from attncc.ir.rewrite import kind_of, map_children
from attncc.ir.types import Kind

TRUE, FALSE = Constant(True), Constant(False)
ZERO = Constant(0)


def conjunction(*terms: Expr) -> Expr:
    """All of `terms`; true of none."""
    return _junction("and", terms, neutral=TRUE, absorbing=FALSE)


def disjunction(*terms: Expr) -> Expr:
    """Any of `terms`; false of none."""
    return _junction("or", terms, neutral=FALSE, absorbing=TRUE)


def _junction(op: str, terms: Iterable[Expr], neutral: Constant, absorbing: Constant) -> Expr:
    kept = [term for term in dict.fromkeys(terms) if term != neutral]
    if absorbing in kept:
        return absorbing
    return reduce(lambda a, b: Apply(op, (a, b)), kept) if kept else neutral


_OPPOSITE = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}


def negation(a: Expr) -> Expr:
    """Not `a`. Comparisons of ints turn round; those of floats do not, for the sake of NaN."""
    match a:
        case Constant(value=value):
            return Constant(not value)
        case Apply(op="not", args=(inner,)):
            return inner
        case Apply(op=op, args=args) if op in _OPPOSITE and kind_of(args[0]) is Kind.INT:
            return Apply(_OPPOSITE[op], args)
        case Apply(op="and", args=(x, y)):
            return disjunction(negation(x), negation(y))
        case Apply(op="or", args=(x, y)):
            return conjunction(negation(x), negation(y))
        case _:
            return Apply("not", (a,))


def choice(condition: Expr, a: Expr, b: Expr) -> Expr:
    """`a` where `condition` holds, else `b`."""
    match condition:
        case Constant(value=value):
            return a if value else b
        case _:
            return a if a == b else Apply("where", (condition, a, b))


def least(*terms: Expr) -> Expr:
    """The smallest of some ints."""
    return _extreme("min", min, terms)


def greatest(*terms: Expr) -> Expr:
    """The greatest of some ints."""
    return _extreme("max", max, terms)


def _extreme(op: str, fold: Callable[[Iterable[int]], int], terms: Iterable[Expr]) -> Expr:
    # Of terms that differ by a constant one decides.
    by_shape: dict[tuple[tuple[Expr, int], ...], list[int]] = {}
    for term in _operands(op, terms):
        form = linear(term)
        by_shape.setdefault(form.terms, []).append(form.constant)
    forms = [Linear(shape, fold(constants)) for shape, constants in by_shape.items()]
    kept: list[Expr] = []
    for term in map(expr_of, sorted(forms, key=lambda form: bool(form.terms))):
        if any(_decides(op, other, term) for other in kept):
            continue
        kept = [*(other for other in kept if not _decides(op, term, other)), term]
    return reduce(lambda a, b: Apply(op, (a, b)), kept)


def _decides(op: str, a: Expr, b: Expr) -> bool:
    """Whether `op` of two ints is always the first."""
    return at_most(b, a) if op == "max" else at_most(a, b)


def at_most(a: Expr, b: Expr) -> bool:
    """Whether `a` <= `b` for every tile, as far as the form of two ints tells."""
    if a == b:
        return True
    match a, b:
        case (Apply(op="where", args=(c, *parts)), Apply(op="where", args=(d, *others))) if c == d:
            return all(map(at_most, parts, others))
        case (Apply(op="max", args=parts), _) | (Apply(op="where", args=(_, *parts)), _):
            return all(at_most(part, b) for part in parts)
        case (_, Apply(op="min", args=parts)) | (_, Apply(op="where", args=(_, *parts))):
            return all(at_most(a, part) for part in parts)
        case (Apply(op="min", args=(x, y)), Apply(op="max", args=(z, w))):
            return at_most(x, b) or at_most(y, b) or at_most(a, z) or at_most(a, w)
        case (Apply(op="min", args=parts), _):
            return any(at_most(part, b) for part in parts)
        case (_, Apply(op="max", args=parts)):
            return any(at_most(a, part) for part in parts)
        case _:
            return never_positive(linear(a) - linear(b))


def _operands(op: str, terms: Iterable[Expr]) -> Iterator[Expr]:
    """`terms`, with those of nested applications of `op` in their place."""
    for term in terms:
        match term:
            case Apply(op=inner, args=args) if inner == op:
                yield from _operands(op, args)
            case _:
                yield term


# --- linear forms ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Linear:
    """constant + the sum of coefficient * atom. Atoms are distinct, in a fixed order; no coefficient is 0."""

    terms: tuple[tuple[Expr, int], ...] = ()
    constant: int = 0

    def __add__(self, other: Linear) -> Linear:
        coefficients = dict(self.terms)
        for atom, coefficient in other.terms:
            coefficients[atom] = coefficients.get(atom, 0) + coefficient
        return Linear(_ordered(coefficients), self.constant + other.constant)

    def __sub__(self, other: Linear) -> Linear:
        return self + other.times(-1)

    def times(self, factor: int) -> Linear:
        if factor == 0:
            return Linear()
        return Linear(tuple((atom, factor * c) for atom, c in self.terms), factor * self.constant)

    def plus(self, constant: int) -> Linear:
        return Linear(self.terms, self.constant + constant)

    def replaced(self, atom: Expr, value: Linear) -> Linear:
        """The form with `value` in the place of `atom`."""
        return self.without(atom) + value.times(dict(self.terms).get(atom, 0))

    def without(self, atom: Expr) -> Linear:
        return Linear(tuple(term for term in self.terms if term[0] != atom), self.constant)


def _ordered(coefficients: dict[Expr, int]) -> tuple[tuple[Expr, int], ...]:
    kept = [(atom, c) for atom, c in coefficients.items() if c != 0]
    return tuple(sorted(kept, key=lambda term: _rank(term[0])))


def _rank(atom: Expr) -> tuple[int, str]:
    """Coordinates first, sizes, then the rest; by text within each, which no hash seed changes."""
    kind = 0 if isinstance(atom, Index) else 1 if isinstance(atom, Size) else 2
    return kind, repr(atom)


@lru_cache(maxsize=2**14)  # analyses ask for the same few forms again and again
def linear(expr: Expr) -> Linear:
    """The linear form of an int expression. Its atoms are canonical, so that equal ones meet."""
    match expr:
        case Constant(value=value):
            return Linear((), int(value))
        case Index(name="q_row"):
            return Linear(((Index("q_idx"), 1), (Size("q_offset"), -1)))
        case Apply(op="add", args=(a, b)):
            return linear(a) + linear(b)
        case Apply(op="sub", args=(a, b)):
            return linear(a) - linear(b)
        case Apply(op="neg", args=(a,)):
            return linear(a).times(-1)
        case Apply(op="mul", args=(a, b)):
            return _product(linear(a), linear(b))
        case Apply(op="floordiv", args=(a, Constant(value=divisor))) if divisor > 0:
            multiple, rest = _divided(linear(a), int(divisor))
            return multiple + _quotient(rest, int(divisor))
        case Apply(op="mod", args=(a, Constant(value=divisor))) if divisor > 0:
            _, rest = _divided(linear(a), int(divisor))
            return _remainder(rest, int(divisor))
        case Apply(op="min" | "max" as op, args=args):
            extreme = (least if op == "min" else greatest)(*map(canonical, args))
            return Linear(((extreme, 1),)) if _is_operation(extreme, op) else linear(extreme)
        case _:
            return Linear(((map_children(expr, canonical), 1),))


def _is_operation(expr: Expr, op: str) -> bool:
    return isinstance(expr, Apply) and expr.op == op


def _product(a: Linear, b: Linear) -> Linear:
    if not a.terms:
        return b.times(a.constant)
    if not b.terms:
        return a.times(b.constant)
    left, right = sorted((expr_of(a), expr_of(b)), key=_rank)
    return Linear(((Apply("mul", (left, right)), 1),))


def _divided(form: Linear, divisor: int) -> tuple[Linear, Linear]:
    """`form` as divisor * multiple + rest, with the rest's constant in [0, divisor)."""
    multiple = tuple((atom, c // divisor) for atom, c in form.terms if c % divisor == 0)
    rest = tuple((atom, c) for atom, c in form.terms if c % divisor != 0)
    return Linear(multiple, form.constant // divisor), Linear(rest, form.constant % divisor)


def _quotient(form: Linear, divisor: int) -> Linear:
    if not form.terms:
        return Linear((), form.constant // divisor)
    return Linear(((Apply("floordiv", (expr_of(form), Constant(divisor))), 1),))


def _remainder(form: Linear, divisor: int) -> Linear:
    if not form.terms:
        return Linear((), form.constant % divisor)
    return Linear(((Apply("mod", (expr_of(form), Constant(divisor))), 1),))


def canonical(expr: Expr) -> Expr:
    """`expr` with each int subexpression in the form that `expr_of` gives it, and positions of queries as q_idx."""
    if kind_of(expr) is Kind.INT:
        return expr_of(linear(expr))
    return map_children(expr, canonical)


def expr_of(form: Linear) -> Expr:
    """The expression of a linear form: added terms, then subtracted ones, then the constant."""
    added = _sum([(atom, c) for atom, c in form.terms if c > 0])
    taken = [(atom, -c) for atom, c in form.terms if c < 0]
    if added is None:
        if not taken:
            return Constant(form.constant)
        total = Constant(form.constant) if form.constant or len(taken) > 1 else None
        constant = 0
    else:
        total, constant = added, form.constant
    for term in taken:
        total = Apply("neg", (_scaled(term),)) if total is None else Apply("sub", (total, _scaled(term)))
    assert total is not None
    return _shifted(total, constant)


def _sum(terms: list[tuple[Expr, int]]) -> Expr | None:
    return reduce(lambda a, b: Apply("add", (a, b)), map(_scaled, terms)) if terms else None


def _scaled(term: tuple[Expr, int]) -> Expr:
    atom, coefficient = term
    return atom if coefficient == 1 else Apply("mul", (atom, Constant(coefficient)))


def _shifted(expr: Expr, constant: int) -> Expr:
    if constant == 0:
        return expr
    return Apply("add", (expr, Constant(constant))) if constant > 0 else Apply("sub", (expr, Constant(-constant)))


def below(form: Linear) -> Expr:
    """`form < 0`, as a comparison of its added terms with its subtracted ones."""
    match form.terms:
        case ():
            return Constant(form.constant < 0)
        case ((Apply(op="floordiv", args=(a, Constant(value=n))), 1),) if n > 0:
            # a // n < t is a < t * n
            return below(linear(a).plus(form.constant * int(n)))
        case ((Apply(op="floordiv", args=(a, Constant(value=n))), -1),) if n > 0:
            # a // n >= t is a >= t * n
            return below(linear(a).times(-1).plus((form.constant + 1) * int(n) - 1))
        case _:
            pass
    left = _sum([(atom, c) for atom, c in form.terms if c > 0])
    right = _sum([(atom, -c) for atom, c in form.terms if c < 0])
    if left is None:
        assert right is not None, "a form with terms adds or subtracts"
        return Apply("gt", (right, Constant(form.constant)))
    if right is None:
        return Apply("lt", (left, Constant(-form.constant)))
    if form.constant == -1:
        return Apply("le", (left, right))
    if form.constant < 0:
        return Apply("lt", (left, _shifted(right, -form.constant)))
    return Apply("lt", (_shifted(left, form.constant), right))


def never_positive(form: Linear) -> bool:
    """Whether `form` <= 0 for every tile, as far as its signs tell: corners are in order, sizes are not negative."""
    slack = dict(form.terms)
    for low, high in ((Index("q_lo"), Index("q_hi")), (Index("kv_lo"), Index("kv_hi"))):
        # low = high - (something not negative)
        if slack.get(low, 0) > 0:
            slack[high] = slack.get(high, 0) + slack.pop(low)
    counted = ("B", "H", "HKV", "M", "N", "D", "E")
    signs = all(
        c == 0
        or (c < 0 and (atom in (Index("kv_lo"), Index("kv_hi")) or (isinstance(atom, Size) and atom.name in counted)))
        for atom, c in slack.items()
    )
    return signs and form.constant <= 0
