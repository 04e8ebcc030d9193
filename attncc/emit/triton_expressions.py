"""IR expressions in Triton: scalars, vectors along one axis of a tile, matrices over both.

In a matrix, vectors are turned into columns (`x[:, None]`, first axis) and rows (`x[None, :]`, second axis), so that
everything broadcasts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from attncc.emit.triton_facts import Axis
from attncc.emit.triton_names import name_of
from attncc.ir.errors import IRError
from attncc.ir.nodes import Apply, Constant, Expr, Load, Parameter, Size, Variable
from attncc.ir.operators import OPERATORS
from attncc.ir.rewrite import kind_of
from attncc.ir.types import DType, Kind
from attncc.passes.ranges import Range, fits_int32, int_range

# How tightly Python binds, loosest first.
COMPARE, OR, XOR, AND, SHIFT, SUM, PRODUCT, SIGN, ATOM = range(9)

_LEVELS = {
    **dict.fromkeys(("<", "<=", ">", ">=", "==", "!="), COMPARE),
    "|": OR,
    "^": XOR,
    "&": AND,
    "<<": SHIFT,
    ">>": SHIFT,
    "+": SUM,
    "-": SUM,
    **dict.fromkeys(("*", "/", "//", "%"), PRODUCT),
}
_INFIX = re.compile(r"\(?\{0\} (\S+) (\{1\}|0)\)?")
_PREFIX = re.compile(r"\(?([-~])\{0\}\)?")
# Where both operands are known not to be negative, truncation is the floor.
_TRUNCATING = {"floordiv": "{0} // {1}", "mod": "{0} % {1}"}
# In f64, where rows are of another type.
_OUTER = {"sin": "attn_sin({0})", "cos": "attn_cos({0})", "to_float": "{0}.to(tl.float64)"}


@dataclass(frozen=True, slots=True)
class Text:
    """Printed source and how tightly its outermost operator binds."""

    source: str
    level: int = ATOM

    def at(self, level: int) -> str:
        """The source, in parentheses where its operator binds less tightly than `level`."""
        return self.source if self.level >= level else f"({self.source})"


class Expressions:
    """Prints expressions over variables.

    double      floats are f64
    keys_first  a matrix has its keys along the first axis, not its queries
    dtypes      of captured tensors
    axes        along which each variable varies; ranges: of those that are ints; wide: ints of 64 bits
    mixed       at some levels of the kernel (`outer`) floats are f64, elsewhere not; doubles: variables of those
    """

    def __init__(self, *, double: bool, keys_first: bool = False) -> None:
        self.double = double
        self.keys_first = keys_first
        self.dtypes: Mapping[str, DType] = {}
        self.axes: dict[str, Axis] = {}
        self.ranges: dict[str, Range] = {}
        self.wide: set[str] = set()
        self.mixed, self.outer, self._float = False, False, "FLOAT"
        self.doubles: set[str] = set()

    def print(self, expr: Expr, *, matrix: bool, wide: bool = False) -> Text:
        """`expr` as Triton. wide: ints are computed in 64 bits, because some result on the way may need them."""
        if not wide and kind_of(expr) is Kind.INT:
            wide = not self._fits(expr)
        match expr:
            case Constant(value=value):
                return _literal(value)
            case Size(name=name):
                return self._leaf(name, Axis.NONE, matrix, wide)
            case Parameter(name=name, kind=kind):
                leaf = self._leaf(name_of(name), Axis.NONE, matrix, wide and kind is Kind.INT)
                return self._as_float(leaf, double=True) if kind is Kind.FLOAT else leaf
            case Variable(name=name, kind=kind):
                leaf = self._leaf(name_of(name), self.axes[name], matrix, wide and kind is Kind.INT)
                return self._as_float(leaf, double=name in self.doubles) if kind is Kind.FLOAT else leaf
            case Apply(op=op, args=args):
                return self._apply(op, args, matrix, wide)
            case _:
                return self.read(expr, matrix=matrix, wide=wide)

    def read(self, expr: Expr, *, matrix: bool, wide: bool) -> Text:
        """What a kernel reads from memory, sums up or is told by its place: the business of a plan."""
        del matrix, wide
        raise IRError(f"{expr} cannot be printed")

    def _fits(self, expr: Expr) -> bool:
        return fits_int32(expr, self.dtypes, self.ranges)

    def _is_wide(self, expr: Expr) -> bool:
        """Whether an int is printed as a 64-bit value."""
        match expr:
            case Variable(name=name):
                return name in self.wide
            case Load(tensor=tensor):
                return self.dtypes[tensor] is DType.I64
            case Apply(args=args):
                spelled = OPERATORS[expr.op].spelling("triton", kind_of(args[-1]))
                inner = any(kind_of(arg) is Kind.INT and self._is_wide(arg) for arg in args)
                return inner or not self._fits(expr) or spelled.startswith(("attn_shl", "attn_shr"))
            case _:
                return False

    def _leaf(self, name: str, axis: Axis, matrix: bool, wide: bool) -> Text:
        source = name
        if matrix and axis in (Axis.FIRST, Axis.SECOND):
            source += "[:, None]" if (axis is Axis.FIRST) != self.keys_first else "[None, :]"
        return Text(f"{source}.to(tl.int64)" if wide else source)

    def _as_float(self, leaf: Text, *, double: bool) -> Text:
        """A float, kept as f64 or as FLOAT, in the type of the level at hand."""
        return Text(f"tl.cast({leaf.source}, {self._float})") if self.mixed and double != self.outer else leaf

    # --- operators --------------------------------------------------------------------------------------------------

    def _apply(self, op: str, args: tuple[Expr, ...], matrix: bool, wide: bool) -> Text:
        spelling = OPERATORS[op].spelling("triton", kind_of(args[-1]))
        if op in _TRUNCATING and self._never_negative(args):
            spelling = _TRUNCATING[op]
        if self.outer:
            spelling = _OUTER.get(op, spelling)
        ints = [arg for arg in args if kind_of(arg) is Kind.INT]
        wide = bool(ints) and (wide or not all(self._fits(arg) for arg in ints))
        texts = [self.print(arg, matrix=matrix, wide=wide and kind_of(arg) is Kind.INT) for arg in args]
        if infix := _INFIX.fullmatch(spelling):
            symbol, right = infix.groups()
            level = _LEVELS[symbol]
            # Comparisons do not associate, and neither do sums of floats.
            left_text = texts[0].at(level + (level == COMPARE))
            right_text = texts[1].at(level + 1) if right == "{1}" else right
            return Text(f"{left_text} {symbol} {right_text}", level)
        if prefix := _PREFIX.fullmatch(spelling):
            return Text(prefix[1] + texts[0].at(SIGN), SIGN)
        if spelling.startswith("{0}."):
            return Text(spelling.format(texts[0].at(ATOM)))
        return Text(spelling.format(*self._arguments(spelling, args, texts)))

    def _never_negative(self, args: tuple[Expr, ...]) -> bool:
        dividend, divisor = (int_range(arg, self.dtypes, self.ranges) for arg in args)
        return dividend.lo >= 0 and divisor.lo >= 1

    def _arguments(self, spelling: str, args: tuple[Expr, ...], texts: Iterable[Text]) -> list[str]:
        """Arguments of a function call. A literal float takes the type of what it meets, and f32 where it meets
        nothing; where that is not enough it is given its type."""
        literals = [isinstance(arg, Constant) and isinstance(arg.value, float) for arg in args]
        alone = all(literal or kind_of(arg) is not Kind.FLOAT for literal, arg in zip(literals, args, strict=True))
        typed = self.double or self.outer or alone or spelling.startswith("attn_")
        return [
            f"tl.full((), {text.source}, {self._float})" if literal and typed else text.source
            for literal, text in zip(literals, texts, strict=True)
        ]


# --- literals --------------------------------------------------------------------------------------------------------


def _literal(value: bool | int | float) -> Text:
    if isinstance(value, float) and not math.isfinite(value):
        return Text(f'float("{value}")')
    return Text(repr(value), SIGN if not isinstance(value, bool) and value < 0 else ATOM)
