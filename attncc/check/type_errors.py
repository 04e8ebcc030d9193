"""Errors of types and shapes (A03xx)."""

from __future__ import annotations

from dataclasses import dataclass

from attncc.diagnostics import Diagnostic


@dataclass(frozen=True, slots=True)
class WrongKind(Diagnostic):
    code = "A0301"
    title = "{role} must be {expected}, found {found}"
    label = "this is {found}"
    explanation = (
        "There are bools, ints and floats. An int becomes a float by itself where a float is needed; nothing else "
        "converts by itself. `int(x)` drops the fraction of a float and makes 0 or 1 of a bool, `float(x)` makes a"
        " float."
    )
    bad = "attention biased(doc: int[B, N]):\n    mask = causal and doc[b, kv_idx]\n"
    good = "attention biased(doc: int[B, N]):\n    mask = causal and doc[b, kv_idx] != 0\n"

    role: str
    expected: str
    found: str
    hint: str = ""

    def helps(self) -> tuple[str, ...]:
        return (self.hint,) if self.hint else ()


@dataclass(frozen=True, slots=True)
class WrongArguments(Diagnostic):
    code = "A0302"
    title = "{problem}"
    label = "in this call"
    help = "it is called as `{signature}`"
    explanation = (
        "A call gives each parameter of a function once, by place or by name; those with a default may be left out."
    )
    bad = "attention sliding():\n    mask = window(64, 32)\n"
    good = "attention sliding():\n    mask = window(64)\n"

    problem: str
    signature: str


@dataclass(frozen=True, slots=True)
class WrongIndexCount(Diagnostic):
    code = "A0303"
    title = "`{tensor}` has {axes}, found {found}"
    label = "read here"
    help = "its axes are {shape}: give one index for each"
    explanation = (
        "An element of a tensor takes one int for each axis. In a row transform one axis may be left whole: "
        "`gain[h, :]`, or `gain[h]` for the last one."
    )
    bad = "attention biased(bias: float[H, M, N]):\n    score = qk + bias[q_row]\n"
    good = "attention biased(bias: float[H, M, N]):\n    score = qk + bias[h, q_row, kv_idx]\n"

    tensor: str
    axes: str
    found: str
    shape: str


@dataclass(frozen=True, slots=True)
class NotIndexable(Diagnostic):
    code = "A0304"
    title = "{what} has no elements to pick"
    label = "only tensors are indexed"
    help = "declare a tensor parameter, such as `name: float[H]`, or drop the index"
    explanation = "`[` and `]` read an element of a tensor parameter. Scalars have none, and rows are used as a whole."
    bad = "attention biased(slope: float):\n    score = qk + slope[h]\n"
    good = "attention biased(slope: float[H]):\n    score = qk + slope[h]\n"

    what: str


@dataclass(frozen=True, slots=True)
class RowSizes(Diagnostic):
    code = "A0305"
    title = "rows of {left} and of {right} elements do not go together"
    label = "combined here"
    help = "{hint}"
    explanation = (
        "Rows are combined element by element, so they must have the same size for every call: rows of q and k "
        "have D elements, those of v have E, those of a tensor what its axis says."
    )
    bad = "attention gained(gain: float[H, E]):\n    k = k * gain[h, :]\n"
    good = "attention gained(gain: float[H, D]):\n    k = k * gain[h, :]\n"

    left: str
    right: str
    hint: str


@dataclass(frozen=True, slots=True)
class NeedsScalar(Diagnostic):
    code = "A0306"
    title = "{role} must be a single value, found a row of {size} elements"
    label = "this is a row"
    help = "{hint}"
    explanation = (
        "Only the clauses `q`, `k` and `v` compute rows. Elsewhere each tensor is read with one index per axis; in"
        " a row transform `sum`, `max`, `mean`, `norm` and `dot` make a single value of a row."
    )
    bad = "attention biased(bias: float[H, N]):\n    score = qk + bias[h]\n"
    good = "attention biased(bias: float[H, N]):\n    score = qk + bias[h, kv_idx]\n"

    role: str
    size: str
    hint: str = "read a tensor with one index per axis"


@dataclass(frozen=True, slots=True)
class NeedsRow(Diagnostic):
    code = "A0307"
    title = "{role} must be a row, found a single value"
    label = "this is one value"
    help = "{hint}"
    explanation = (
        "The clauses `q`, `k` and `v` give a whole row: one made from the row itself by functions such as `l2norm`"
        " and `rope`."
    )
    bad = "attention normed():\n    k = norm(k)\n"
    good = "attention normed():\n    k = k / norm(k)\n"

    role: str
    hint: str


@dataclass(frozen=True, slots=True)
class BadType(Diagnostic):
    code = "A0308"
    title = "{problem}"
    label = "in this declaration"
    help = "{hint}"
    explanation = (
        "A scalar is `int`, `float` or `bool`; a constant `const int`, `const float` or `const bool`. The elements"
        " of a tensor are `int` (i32 or i64), `float` (f16, bf16, f32 or f64), `bool`, or exactly one of `i32 i64 "
        "f16 bf16 f32 f64`."
    )
    bad = "attention biased(bias: float32[H]):\n    score = qk + bias[h]\n"
    good = "attention biased(bias: f32[H]):\n    score = qk + bias[h]\n"

    problem: str
    hint: str


@dataclass(frozen=True, slots=True)
class BadShape(Diagnostic):
    code = "A0309"
    title = "{problem}"
    label = "in the shape of `{tensor}`"
    help = "a shape is made of `B H HKV M N D E`, ints, `const int` parameters and arithmetic on them"
    explanation = (
        "The sizes of a tensor must follow from the sizes of q, k and v and from constants, so that every call can"
        " be checked before a kernel runs."
    )
    bad = "attention biased(reach: int, bias: float[H, 2 * reach]):\n    score = qk + bias[h, q_idx - kv_idx + reach]\n"
    good = (
        "attention biased(reach: const int = 8, bias: float[H, 2 * reach]):\n"
        "    score = qk + bias[h, q_idx - kv_idx + reach]\n"
    )

    problem: str
    tensor: str


@dataclass(frozen=True, slots=True)
class BadDefault(Diagnostic):
    code = "A0310"
    title = "the default of `{name}` {problem}"
    label = "given here"
    help = "{hint}"
    explanation = "A default is a constant of the parameter's type. Tensors have none: they are passed at each call."
    bad = "attention sliding(width: int = 0.5):\n    mask = window(width)\n"
    good = "attention sliding(width: int = 512):\n    mask = window(width)\n"

    name: str
    problem: str
    hint: str


@dataclass(frozen=True, slots=True)
class BadConstant(Diagnostic):
    code = "A0311"
    title = "constant `{name}` must be {expected}, found {found}"
    label = "declared here"
    help = "pass {name}= {expected}"
    explanation = (
        "A constant given by keyword has the type that the spec declares. An int is taken where a float is declared."
    )
    bad = (
        'attncc.build("attention blocked(size: const int):\\n    mask = q_idx // size == kv_idx // size\\n", size=0.5)'
    )
    good = (
        'attncc.build("attention blocked(size: const int):\\n    mask = q_idx // size == kv_idx // size\\n", size=64)'
    )

    name: str
    expected: str
    found: str


@dataclass(frozen=True, slots=True)
class IntPower(Diagnostic):
    code = "A0312"
    title = "the power of two ints needs a constant exponent"
    label = "{why}"
    help = "write `float(x) ** y` for a float, or `1 << n` for a power of two"
    explanation = (
        "An int to an int power is an int where the exponent is 0 or more and a fraction otherwise, so the "
        "exponent must be known: `q_idx ** 2`. With a float base any exponent will do: `2.0 ** h`."
    )
    bad = "attention sloped():\n    score = qk - 2 ** h\n"
    good = "attention sloped():\n    score = qk - 2.0 ** h\n"

    why: str


@dataclass(frozen=True, slots=True)
class NotConstant(Diagnostic):
    code = "A0313"
    title = "{role} must be known when the spec is built"
    label = "this is not {expected}"
    help = "write a literal, or a parameter declared `const`"
    explanation = (
        "Some arguments decide which program is built, such as `interleaved` and `dim` of `rope`; they cannot wait"
        " for the call."
    )
    bad = "attention rotary(paired: bool):\n    q = rope(q, q_idx, interleaved=paired)\n"
    good = "attention rotary(paired: const bool = false):\n    q = rope(q, q_idx, interleaved=paired)\n"

    role: str
    expected: str


@dataclass(frozen=True, slots=True)
class SoftmaxMisplaced(Diagnostic):
    code = "A0314"
    title = "{problem}"
    label = "this softmax"
    help = "{hint}"
    explanation = (
        "`weight = softmax(score)` normalises over the keys of a row; it is the whole `weight` clause, and its "
        "argument is the score as it is. `softmax(x, sink=s)` adds exp(s) to the sum. In row transforms "
        "`softmax(row)` is over the elements of one row."
    )
    bad = "attention sharp():\n    weight = softmax(2.0 * score)\n"
    good = "attention sharp():\n    score = 2.0 * qk\n    weight = softmax(score)\n"

    problem: str
    hint: str


@dataclass(frozen=True, slots=True)
class BadNormalize(Diagnostic):
    code = "A0315"
    title = "{problem}"
    label = "here"
    help = "{hint}"
    explanation = (
        "`normalize = sum` divides by the sum of the row's weights, `normalize = none` (what weights other than "
        "softmax have by themselves) divides by nothing. Softmax is normalised already."
    )
    bad = "attention averaged():\n    weight = relu(score)\n    normalize = mean\n"
    good = "attention averaged():\n    weight = relu(score)\n    normalize = sum\n"

    problem: str
    hint: str


@dataclass(frozen=True, slots=True)
class BadValue(Diagnostic):
    code = "A0317"
    title = "{role} must be {expected}, found {found}"
    label = "this is {found}"
    explanation = "The argument is of the right type, but the function has no meaning for this value."
    bad = "attention rotary():\n    q = rope(q, q_idx, dim=63)\n"
    good = "attention rotary():\n    q = rope(q, q_idx, dim=64)\n"

    role: str
    expected: str
    found: str


@dataclass(frozen=True, slots=True)
class NoAttributes(Diagnostic):
    code = "A0316"
    title = "`.{name}` belongs to nothing"
    label = "values have no attributes"
    help = "{hint}"
    explanation = (
        "There are no modules and no objects: builtins are called by their bare names. Nothing is transposed either: "
        "`outer(k, v)` is the matrix that papers write as a column times a row."
    )
    bad = "attention shifted(bias: float[H]):\n    score = qk + bias.h\n"
    good = "attention shifted(bias: float[H]):\n    score = qk + bias[h]\n"

    name: str
    hint: str


@dataclass(frozen=True, slots=True)
class NeverInside(Diagnostic):
    code = "A0318"
    title = "index {index} is outside axis {axis} of `{tensor}`, which has size {size}"
    label = "outside in every call"
    help = "{hint}"
    explanation = (
        "Indices count from 0 and do not wrap: those of an axis of size N end with N - 1. Coordinates of a pair are "
        "written in lower case, `b` for instance, and sizes in upper case, `B`."
    )
    bad = "attention padded(lengths: int[B]):\n    mask = kv_idx < lengths[B]\n"
    good = "attention padded(lengths: int[B]):\n    mask = kv_idx < lengths[b]\n"

    tensor: str
    axis: int
    size: str
    index: str
    hint: str


@dataclass(frozen=True, slots=True)
class ConstantOverflow(Diagnostic):
    code = "A0319"
    title = "an int of constants does not fit in 64 bits"
    label = "{value} takes more than 64 bits"
    help = "write a float where 64 bits are too few, such as `10.0 ** 30`"
    explanation = (
        "Ints have 64 bits. What constants make of each other is known when the specification is checked, and must fit."
    )
    bad = "attention far():\n    score = qk * 10 ** 39\n"
    good = "attention far():\n    score = qk * 10.0 ** 30\n"

    value: str
