"""The parameters of an attention: what is declared, and what names mean because of it."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping
from typing import TypeAlias

from attncc.check import suggest
from attncc.check.expressions import Evaluator
from attncc.check.kinds import KIND_NAMES, is_static
from attncc.check.name_errors import Duplicate, MissingConstant, ReservedName, UnknownConstant
from attncc.check.reporter import Reporter
from attncc.check.type_errors import BadConstant, BadDefault, BadShape, BadType
from attncc.check.values import UNKNOWN, Tensor, Unknown, Value, constant
from attncc.check.world import WORLD, reserved
from attncc.diagnostics import Label
from attncc.ir.nodes import Constant, Expr, Parameter, ScalarParameter, TensorParameter
from attncc.ir.types import FLOATS, INTS, DType, Kind
from attncc.syntax import nodes

ConstantValue: TypeAlias = bool | int | float

SCALAR_KINDS = {"int": Kind.INT, "float": Kind.FLOAT, "bool": Kind.BOOL}
ELEMENT_TYPES: dict[str, tuple[DType, ...]] = {
    "int": INTS,
    "float": FLOATS,
    **{dtype.value: (dtype,) for dtype in DType},
}

# Other names of types.
_TYPES = {
    "float16": "f16",
    "half": "f16",
    "bfloat16": "bf16",
    "float32": "f32",
    "single": "f32",
    "float64": "f64",
    "double": "f64",
    "int32": "i32",
    "int64": "i64",
    "long": "i64",
    "boolean": "bool",
    "tensor": "float[H]",
    "Tensor": "float[H]",
}

# Run-time ints must fit the 32 bits that kernels pass them in.
INT_PARAMETER_LIMIT = 2**31


class Declarations:
    """Declares the parameters of one attention into its evaluator's scope."""

    def __init__(self, evaluator: Evaluator, reporter: Reporter) -> None:
        self.evaluator = evaluator
        self.reporter = reporter
        self.scope = evaluator.scope
        self.declared: list[ScalarParameter | TensorParameter] = []

    def declare(self, attention: nodes.Attention, constants: Mapping[str, object]) -> None:
        """Every parameter; those that are constants first, since shapes and defaults may use them."""
        accepted: list[nodes.Parameter] = []
        for parameter in attention.parameters:
            if self._accept(parameter):
                accepted.append(parameter)
                # Until it is declared, nothing that mentions it is blamed.
                self.scope.values[parameter.name] = UNKNOWN
        self._refuse_unknown(attention, constants)
        for parameter in accepted:
            if parameter.const:
                self._constant(parameter, constants)
        for parameter in accepted:
            if not parameter.const:
                self._run_time(parameter)

    def _accept(self, parameter: nodes.Parameter) -> bool:
        name = parameter.name
        why = reserved(name)
        if why:
            self.reporter.report(ReservedName(parameter.name_span, name, why))
            if name not in WORLD:
                # Its uses are not to blame.
                self.scope.values[name] = UNKNOWN
            return False
        if name in self.scope.declared:
            first = Label(self.scope.declared[name], "the first one")
            mend = "give each parameter its own name"
            self.reporter.report(Duplicate(parameter.name_span, "parameter", name, mend, related=(first,)))
            return False
        self.scope.declared[name] = parameter.name_span
        return True

    def _refuse_unknown(self, attention: nodes.Attention, constants: Mapping[str, object]) -> None:
        declared = {p.name: p for p in attention.parameters}
        known = [p.name for p in attention.parameters if p.const]
        for name in constants:
            if name in known:
                continue
            if name in declared:
                span, why = declared[name].name_span, "this is given at each call"
                hint = f"pass `{name}` to the call, or declare it `{name}: const {declared[name].type.name}`"
            else:
                span, why = attention.name_span, "this attention"
                listed = ", ".join(f"`{n}`" for n in known)
                hint = suggest.nearest(name, known) or (f"it has {listed}" if known else "it has no constants")
            self.reporter.report(UnknownConstant(span, name, attention.name, why, hint))

    def _constant(self, parameter: nodes.Parameter, constants: Mapping[str, object]) -> None:
        kind = self._scalar_kind(parameter)
        if kind is None:
            return
        name = parameter.name
        if name in constants:
            value = _converted(constants[name], kind)
            if value is None:
                found = f"{constants[name]!r}"
                diagnostic = BadConstant(parameter.name_span, name, KIND_NAMES[kind], found[:60])
                self.reporter.report(diagnostic)
            else:
                self.scope.values[name] = constant(value, parameter.name_span)
        elif parameter.default is None:
            self.reporter.report(MissingConstant(parameter.name_span, name, parameter.type.name))
        else:
            value = self._default(parameter, kind)
            if value is not None:
                self.scope.values[name] = constant(value, parameter.name_span)

    def _run_time(self, parameter: nodes.Parameter) -> None:
        if parameter.type.shape is not None:
            self._tensor(parameter, parameter.type.shape)
            return
        kind = self._scalar_kind(parameter)
        if kind is None:
            return
        default = None
        if parameter.default is not None:
            default = self._default(parameter, kind)
            if default is None:
                return
            if kind is Kind.INT and not -INT_PARAMETER_LIMIT <= default < INT_PARAMETER_LIMIT:
                hint = "run-time ints have 32 bits"
                self.reporter.report(BadDefault(parameter.default.span, parameter.name, "is too large", hint))
                return
        self.declared.append(ScalarParameter(parameter.name, kind, default, parameter.name_span))
        self.scope.values[parameter.name] = Value(Parameter(parameter.name, kind, parameter.name_span), kind)

    def _scalar_kind(self, parameter: nodes.Parameter) -> Kind | None:
        name = parameter.type.name
        what = "a constant" if parameter.const else "a scalar"
        if parameter.type.shape is not None:
            hint = f"write `{parameter.name}: {parameter.type.span.text}`: tensors are given at each call"
            self.reporter.report(BadType(parameter.type.span, "a tensor cannot be a constant", hint))
            return None
        if name in SCALAR_KINDS:
            return SCALAR_KINDS[name]
        if name in ELEMENT_TYPES:
            kind = ELEMENT_TYPES[name][0].kind.value
            hint = f"write `{kind}`" + ("" if parameter.const else f", or `{name}[]` for a tensor of no axis")
            self.reporter.report(BadType(parameter.type.span, f"`{name}` is the type of elements, not of {what}", hint))
            return None
        self.reporter.report(BadType(parameter.type.span, f"unknown type `{name}`", _type_hint(name)))
        return None

    def _default(self, parameter: nodes.Parameter, kind: Kind) -> ConstantValue | None:
        """The value of a default; None where it is none, which is reported."""
        assert parameter.default is not None
        span, name = parameter.default.span, parameter.name
        meaning = self.evaluator.evaluate(parameter.default)
        if isinstance(meaning, Unknown):
            return None
        if not isinstance(meaning, Value) or not isinstance(meaning.expr, Constant):
            hint = "write a literal, or arithmetic on literals and `const` parameters"
            self.reporter.report(BadDefault(span, name, "is no constant", hint))
            return None
        value = _converted(meaning.expr.value, kind)
        if value is None:
            problem = f"must be {KIND_NAMES[kind]}, found {KIND_NAMES[meaning.kind]}"
            hint = f"declare `{name}: {meaning.kind.value}`, or change the default"
            self.reporter.report(BadDefault(span, name, problem, hint))
        return value

    def _tensor(self, parameter: nodes.Parameter, axes: tuple[nodes.Expression, ...]) -> None:
        name, type_ = parameter.name, parameter.type
        dtypes = ELEMENT_TYPES.get(type_.name)
        if dtypes is None:
            self.reporter.report(BadType(type_.span, f"unknown type `{type_.name}`", _type_hint(type_.name)))
        if parameter.default is not None:
            hint = "pass the tensor at each call"
            self.reporter.report(BadDefault(parameter.default.span, name, "is a value, but it is a tensor", hint))
        shape = [self._axis(name, axis) for axis in axes]
        if dtypes is None or None in shape:
            return
        declared = TensorParameter(name, dtypes, tuple(axis for axis in shape if axis is not None), parameter.name_span)
        self.declared.append(declared)
        self.scope.values[name] = Tensor(declared, type_.span)

    def _axis(self, tensor: str, axis: nodes.Expression) -> Expr | None:
        meaning = self.evaluator.evaluate(axis)
        if isinstance(meaning, Unknown):
            return None
        problem = ""
        if not isinstance(meaning, Value) or meaning.is_row or meaning.kind is not Kind.INT:
            problem = "an axis must be an int"
        elif not is_static(meaning.expr):
            problem = "the size of an axis must be known before the call"
        elif isinstance(meaning.expr, Constant) and meaning.expr.value < 0:
            problem = "an axis cannot have fewer than 0 elements"
        if problem:
            self.reporter.report(BadShape(axis.span, problem, tensor))
            return None
        assert isinstance(meaning, Value)
        return meaning.expr


def _converted(value: object, kind: Kind) -> ConstantValue | None:
    """A value as a constant of a kind; None where it does not fit."""
    if isinstance(value, bool):
        return value if kind is Kind.BOOL else None
    if kind is Kind.INT and isinstance(value, numbers.Integral):
        whole = operator.index(value)
        return whole if -(2**63) <= whole < 2**63 else None
    if kind is Kind.FLOAT and isinstance(value, numbers.Real):
        try:
            real = float(value)
        except OverflowError:
            return None
        return None if math.isnan(real) else real
    return None


def _type_hint(name: str) -> str:
    if name in _TYPES:
        return f"write `{_TYPES[name]}`"
    listed = "types are `int`, `float`, `bool`, and for tensors also `f16 bf16 f32 f64 i32 i64`"
    return suggest.nearest(name, ELEMENT_TYPES) or listed
