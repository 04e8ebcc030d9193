"""The operator table: one row per scalar builtin.

A row says everything that the compiler knows of a builtin; nothing else in the project branches on an operator's
name to find out its type, meaning, bounds or spelling. Where overloads differ, a column holds a mapping by the kind of
the last argument (which tells the overloads of every operator apart).

Spellings are format strings over the printed arguments. C++: names ending in `_` are defined in the C++ templates, for
scalars and lane vectors alike. Triton: names starting with `attn_` are jit functions of the Triton templates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from attncc.ir import derivatives as d
from attncc.ir import interval_rules as rules
from attncc.ir import torch_meaning as meaning
from attncc.ir.derivatives import Derivative
from attncc.ir.errors import IRError
from attncc.ir.interval_rules import Bounds, IntervalRule
from attncc.ir.nodes import Apply
from attncc.ir.types import Kind

T = TypeVar("T")
ByKind: TypeAlias = T | Mapping[Kind, T]
Family = Literal["cpp", "triton"]


@dataclass(frozen=True, slots=True)
class Signature:
    """Kinds of the arguments and of the result."""

    arguments: tuple[Kind, ...]
    result: Kind


@dataclass(frozen=True, slots=True)
class Operator:
    """One builtin.

    overloads   its signatures, told apart by their last argument
    torch       its meaning over float64, int64 and bool tensors
    interval    bounds of the result from bounds of the arguments; None: known at points only
    cpp, triton spelling, over {0}, {1}, … the printed arguments
    derivative  of the overload that takes and returns floats; None where there is no such overload, and for `where`,
                whose branches `attncc.passes.differentiate` keeps apart
    doc         one line for people
    """

    name: str
    overloads: tuple[Signature, ...]
    torch: Callable[..., Tensor]
    interval: ByKind[IntervalRule | None]
    cpp: ByKind[str]
    triton: ByKind[str]
    doc: str
    derivative: Derivative | None = None

    @property
    def arity(self) -> int:
        return len(self.overloads[0].arguments)

    def result(self, kinds: tuple[Kind, ...]) -> Kind | None:
        """The kind of the result for arguments of `kinds`; None where no overload takes them."""
        return next((overload.result for overload in self.overloads if overload.arguments == kinds), None)

    def result_of_last(self, kind: Kind) -> Kind:
        """The kind of the result where the last argument is of `kind` (and the others fit it)."""
        for overload in self.overloads:
            if overload.arguments[-1] is kind:
                return overload.result
        raise IRError(f"`{self.name}` has no overload whose last argument is {kind.value}")

    def spelling(self, family: Family, kind: Kind) -> str:
        """The format string for a target family, where the last argument is of `kind`."""
        return _pick(self.cpp if family == "cpp" else self.triton, kind)

    def bounds(self, kind: Kind, arguments: tuple[Bounds, ...]) -> Bounds | None:
        """Bounds of the result, where the last argument is of `kind`; None where nothing is known."""
        if all(rules.is_point(bounds) for bounds in arguments):
            value = Apply(self.name, tuple(bounds[0] for bounds in arguments))
            return value, value
        rule = _pick(self.interval, kind)
        return None if rule is None else rule(*arguments)


def _pick(column: ByKind[T], kind: Kind) -> T:
    if isinstance(column, Mapping):
        return cast("Mapping[Kind, T]", column)[kind]
    return column


B, I, F = Kind.BOOL, Kind.INT, Kind.FLOAT  # noqa: E741 - the letters of signatures


def _signatures(text: str) -> tuple[Signature, ...]:
    """`"II>I FF>F"`: the overloads, one letter per kind."""
    kinds = {"B": B, "I": I, "F": F}
    pairs = (overload.split(">") for overload in text.split())
    return tuple(Signature(tuple(kinds[a] for a in arguments), kinds[result]) for arguments, result in pairs)


def _row(
    name: str,
    overloads: str,
    function: Callable[..., Tensor],
    interval: ByKind[IntervalRule | None],
    cpp: ByKind[str],
    triton: ByKind[str],
    doc: str,
    *,
    derivative: Derivative | None = None,
) -> Operator:
    return Operator(name, _signatures(overloads), function, interval, cpp, triton, doc, derivative)


_EQUAL: ByKind[IntervalRule | None] = {B: rules.bool_eq, I: rules.number_eq, F: rules.number_eq}
_UNEQUAL: ByKind[IntervalRule | None] = {
    B: rules.negated(rules.bool_eq),
    I: rules.negated(rules.number_eq),
    F: rules.negated(rules.number_eq),
}
_up = rules.increasing

# fmt: off
_ROWS = (
    # Arithmetic.
    _row("neg", "I>I F>F", torch.neg, rules.falling("neg"), "(-{0})", "(-{0})", "-x", derivative=d.linear(-1.0)),
    _row("add", "II>I FF>F", torch.add, _up("add"), "({0} + {1})", "({0} + {1})", "x + y",
         derivative=d.linear(1.0, 1.0)),
    _row("sub", "II>I FF>F", torch.sub, rules.sub, "({0} - {1})", "({0} - {1})", "x - y",
         derivative=d.linear(1.0, -1.0)),
    _row("mul", "II>I FF>F", torch.mul, {I: rules.int_mul, F: rules.float_mul}, "({0} * {1})", "({0} * {1})", "x * y",
         derivative=d.product),
    _row("div", "FF>F", torch.div, None, "({0} / {1})", "({0} / {1})", "x / y, of floats", derivative=d.quotient),
    _row("floordiv", "II>I", meaning.floordiv, rules.floordiv, "floordiv_({0}, {1})", "attn_floordiv({0}, {1})",
         "x // y: rounds down; 0 where y is 0"),
    _row("mod", "II>I", meaning.mod, rules.mod, "mod_({0}, {1})", "attn_mod({0}, {1})",
         "x % y: has the sign of y; 0 where y is 0"),
    _row("pow", "FF>F", torch.pow, None, "pow_({0}, {1})", "attn_pow({0}, {1})", "x ** y, of floats",
         derivative=d.power),
    # Comparisons.
    _row("lt", "II>B FF>B", torch.lt, {I: rules.int_lt, F: rules.float_lt}, "({0} < {1})", "({0} < {1})", "x < y"),
    _row("le", "II>B FF>B", torch.le, {I: rules.int_le, F: rules.float_le}, "({0} <= {1})", "({0} <= {1})", "x <= y"),
    _row("gt", "II>B FF>B", torch.gt, {I: rules.flipped(rules.int_lt), F: rules.flipped(rules.float_lt)},
         "({0} > {1})", "({0} > {1})", "x > y"),
    _row("ge", "II>B FF>B", torch.ge, {I: rules.flipped(rules.int_le), F: rules.flipped(rules.float_le)},
         "({0} >= {1})", "({0} >= {1})", "x >= y"),
    _row("eq", "II>B FF>B BB>B", torch.eq, _EQUAL, "({0} == {1})", "({0} == {1})", "x == y"),
    _row("ne", "II>B FF>B BB>B", torch.ne, _UNEQUAL, "({0} != {1})", "({0} != {1})", "x != y"),
    # Logic and choice.
    _row("and", "BB>B", torch.logical_and, _up("and"), "and_({0}, {1})", "({0} & {1})",
         "both; y is not read where x is false"),
    _row("or", "BB>B", torch.logical_or, _up("or"), "or_({0}, {1})", "({0} | {1})",
         "either; y is not read where x is true"),
    _row("not", "B>B", torch.logical_not, rules.not_, "not_({0})", "({0} == 0)", "not x"),
    _row("where", "BBB>B BII>I BFF>F", torch.where,
         {B: rules.bool_where, I: rules.int_where, F: rules.float_where},
         "where_({0}, {1}, {2})", "tl.where({0}, {1}, {2})", "x if c else y; the other one is not read"),
    _row("min", "II>I FF>F", torch.minimum, {I: _up("min"), F: None}, "min_({0}, {1})",
         {I: "tl.minimum({0}, {1})", F: "attn_min({0}, {1})"},
         "the smaller", derivative=d.extreme("lt")),
    _row("max", "II>I FF>F", torch.maximum, {I: _up("max"), F: None}, "max_({0}, {1})",
         {I: "tl.maximum({0}, {1})", F: "attn_max({0}, {1})"},
         "the greater", derivative=d.extreme("gt")),
    _row("abs", "I>I F>F", torch.abs, {I: rules.absolute, F: None}, "abs_({0})", "tl.abs({0})", "|x|",
         derivative=d.absolute),
    _row("sign", "I>I F>F", torch.sign, {I: _up("sign"), F: None}, "sign_({0})", "attn_sign({0})", "-1, 0 or 1",
         derivative=d.flat),
    # Exponentials and their kin.
    _row("exp", "F>F", torch.exp, None, "exp_({0})", "tl.exp({0})", "e ** x", derivative=d.exp),
    _row("exp2", "F>F", torch.exp2, None, "exp2_({0})", "tl.exp2({0})", "2 ** x", derivative=d.exp2),
    _row("log", "F>F", torch.log, None, "log_({0})", "tl.log({0})", "natural logarithm", derivative=d.log),
    _row("log2", "F>F", torch.log2, None, "log2_({0})", "tl.log2({0})", "logarithm to base 2", derivative=d.log2),
    _row("log1p", "F>F", torch.log1p, None, "log1p_({0})", "attn_log1p({0})", "log(1 + x), exact near 0",
         derivative=d.log1p),
    _row("sqrt", "F>F", torch.sqrt, None, "sqrt_({0})", "tl.sqrt({0})", "square root", derivative=d.sqrt),
    _row("rsqrt", "F>F", torch.rsqrt, None, "rsqrt_({0})", "tl.rsqrt({0})", "1 / sqrt(x)", derivative=d.rsqrt),
    _row("tanh", "F>F", torch.tanh, None, "tanh_({0})", "attn_tanh({0})", "hyperbolic tangent", derivative=d.tanh),
    _row("sigmoid", "F>F", torch.sigmoid, None, "sigmoid_({0})", "attn_sigmoid({0})", "1 / (1 + exp(-x))",
         derivative=d.sigmoid),
    _row("relu", "I>I F>F", meaning.relu, {I: _up("relu"), F: None}, "relu_({0})", "attn_relu({0})", "max(x, 0)",
         derivative=d.relu),
    _row("gelu", "F>F", meaning.gelu, None, "gelu_({0})", "attn_gelu({0})", "x times the normal distribution function",
         derivative=d.gelu),
    _row("silu", "F>F", torch.nn.functional.silu, None, "silu_({0})", "attn_silu({0})", "x * sigmoid(x)",
         derivative=d.silu),
    _row("elu", "F>F", meaning.elu, None, "elu_({0})", "attn_elu({0})", "x, or exp(x) - 1 where x < 0",
         derivative=d.elu),
    _row("softplus", "F>F", meaning.softplus, None, "softplus_({0})", "attn_softplus({0})", "log(1 + exp(x))",
         derivative=d.softplus),
    _row("sin", "F>F", torch.sin, None, "sin_({0})", "tl.sin({0})", "sine", derivative=d.sin),
    _row("cos", "F>F", torch.cos, None, "cos_({0})", "tl.cos({0})", "cosine", derivative=d.cos),
    _row("erf", "F>F", torch.erf, None, "erf_({0})", "tl.erf({0})", "error function", derivative=d.erf),
    _row("floor", "F>F", torch.floor, _up("floor"), "floor_({0})", "tl.floor({0})", "greatest whole number <= x",
         derivative=d.flat),
    _row("ceil", "F>F", torch.ceil, _up("ceil"), "ceil_({0})", "tl.ceil({0})", "least whole number >= x",
         derivative=d.flat),
    _row("round", "F>F", torch.round, _up("round"), "round_({0})", "attn_round({0})",
         "nearest whole number, ties to even", derivative=d.flat),
    # Bits of ints.
    _row("bit_and", "II>I", torch.bitwise_and, rules.bit_and, "({0} & {1})", "({0} & {1})", "x & y"),
    _row("bit_or", "II>I", torch.bitwise_or, None, "({0} | {1})", "({0} | {1})", "x | y"),
    _row("bit_xor", "II>I", torch.bitwise_xor, None, "({0} ^ {1})", "({0} ^ {1})", "x ^ y"),
    _row("bit_not", "I>I", torch.bitwise_not, rules.falling("bit_not"), "(~{0})", "(~{0})", "~x, that is -x - 1"),
    _row("shl", "II>I", meaning.shl, rules.shift("shl"), "shl_({0}, {1})", "attn_shl({0}, {1})",
         "x << y; y is clamped to 0..63"),
    _row("shr", "II>I", meaning.shr, rules.shift("shr"), "shr_({0}, {1})", "attn_shr({0}, {1})",
         "x >> y; y is clamped to 0..63"),
    _row("popcount", "I>I", meaning.popcount, None, "popcount_({0})", "attn_popcount({0})", "set bits of |x|"),
    _row("bit_length", "I>I", meaning.bit_length, None, "bit_length_({0})", "attn_bit_length({0})",
         "bits needed for |x|"),
    # Conversions.
    _row("to_float", "I>F B>F", meaning.to_float, _up("to_float"), "to_float_({0})", "{0}.to(FLOAT)",
         "the same number as a float; 0.0 or 1.0"),
    _row("to_int", "F>I B>I", meaning.to_int, {F: rules.float_to_int, B: _up("to_int")},
         "to_int_({0})", "attn_to_int({0})",
         "without its fraction, within ±2**30 (NaN: 0); 0 or 1"),
    # Random numbers by counter. No specification names them; passes do.
    _row("random_key", "II>I", meaning.random_key, None, "random_key_({0}, {1})", "attn_random_key({0}, {1})",
         "a key in [0, 2**31) for a stream of a seed"),
    _row("uniform", "III>F", meaning.uniform, None, "uniform_({0}, {1}, {2})", "attn_uniform({0}, {1}, {2})",
         "number (a, b) of a key: a multiple of 2**-24 in [0, 1)"),
)
# fmt: on

OPERATORS: dict[str, Operator] = {row.name: row for row in _ROWS}
