"""Errors of names (A02xx), of types and shapes (A03xx), and what no algorithm of this version can do (A04xx)."""

from __future__ import annotations

from dataclasses import dataclass

from attncc.diagnostics import Diagnostic

# --- A02xx: names ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UnknownName(Diagnostic):
    code = "A0201"
    title = "unknown name `{name}`"
    label = "not defined {where}"
    explanation = (
        "A name in an expression is a parameter of the attention, a `let` above the line, a `define`, a coordinate "
        "(`b`, `h`, `hkv`, `q_row`, `q_idx`, `kv_idx`), a size (`B`, `H`, `HKV`, `M`, `N`, `D`, `E`), `q`, `k`, `v`, "
        "`qk`, `score`, `inf` or `pi`. A `define` sees its own parameters only, not those of the attention that uses it."
    )
    bad = "attention sliding(window: int):\n    mask = causal and q_idx - kv_idx < windw\n"
    good = "attention sliding(window: int):\n    mask = causal and q_idx - kv_idx < window\n"

    name: str
    where: str
    hint: str = ""

    def helps(self) -> tuple[str, ...]:
        return (self.hint,) if self.hint else ()


@dataclass(frozen=True, slots=True)
class UnknownFunction(Diagnostic):
    code = "A0202"
    title = "unknown function `{name}`"
    label = "no builtin and no definition has this name"
    explanation = (
        "A function is a builtin (docs/language.md lists them), a definition of the prelude, or a `define` of this "
        "file or of one that it uses."
    )
    bad = "attention capped():\n    score = 50.0 * tan(qk / 50.0)\n"
    good = "attention capped():\n    score = 50.0 * tanh(qk / 50.0)\n"

    name: str
    hint: str = ""

    def helps(self) -> tuple[str, ...]:
        return (self.hint,) if self.hint else ()


@dataclass(frozen=True, slots=True)
class Duplicate(Diagnostic):
    code = "A0203"
    title = "{what} `{name}` is given twice"
    label = "the second one"
    help = "{mend}"
    explanation = "Each name is declared once in its attention or file, and each clause stands at most once."
    bad = "attention twice():\n    mask = causal\n    mask = kv_idx > 4\n"
    good = "attention once():\n    mask = causal and kv_idx > 4\n"

    what: str
    name: str
    mend: str


@dataclass(frozen=True, slots=True)
class ReservedName(Diagnostic):
    code = "A0204"
    title = "`{name}` cannot be declared"
    label = "{why}"
    help = "choose another name"
    explanation = (
        "Coordinates, sizes, builtins and the arguments that every call has (`q`, `k`, `v`, `q_offset`, `return_lse`, …) "
        "keep their meaning everywhere; a parameter must also be a name that Python takes as a keyword argument."
    )
    bad = "attention shifted(h: int):\n    mask = kv_idx <= q_idx + h\n"
    good = "attention shifted(shift: int):\n    mask = kv_idx <= q_idx + shift\n"

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class UnknownClause(Diagnostic):
    code = "A0205"
    title = "unknown clause `{name}`"
    label = "no clause has this name"
    help = "{hint}"
    explanation = (
        "The clauses of an attention are `q`, `k`, `v`, `scale`, `score`, `mask`, `weight` and `normalize`. A local "
        "name is given with `let`."
    )
    bad = "attention sliding():\n    masks = causal\n"
    good = "attention sliding():\n    mask = causal\n"

    name: str
    hint: str


@dataclass(frozen=True, slots=True)
class UsedBeforeDefinition(Diagnostic):
    code = "A0206"
    title = "`{name}` is used before it is defined"
    label = "not defined yet"
    help = "move the `let` above this line"
    explanation = "A `let` is seen by the lines below it, as in Python."
    bad = "attention sliding():\n    mask = 0 <= distance\n    let distance = q_idx - kv_idx\n"
    good = "attention sliding():\n    let distance = q_idx - kv_idx\n    mask = 0 <= distance\n"

    name: str


@dataclass(frozen=True, slots=True)
class RecursiveDefine(Diagnostic):
    code = "A0207"
    title = "`{name}` is defined by itself: {cycle}"
    label = "this definition never ends"
    help = "a definition is an expression, put in the place of its use; it cannot call itself"
    explanation = "A `define` is an abbreviation: it is expanded where it is used, so it cannot use itself, directly or through others."
    bad = "define decay(n) = decay(n - 1) * 0.5\n\nattention decayed():\n    score = qk + decay(q_idx)\n"
    good = "define decay(n) = 0.5 ** n\n\nattention decayed():\n    score = qk + decay(q_idx)\n"

    name: str
    cycle: str


@dataclass(frozen=True, slots=True)
class UnreadableFile(Diagnostic):
    code = "A0208"
    title = 'cannot use "{path}": {reason}'
    label = "looked for {place}"
    explanation = "`use` reads the definitions of another file. Its path is relative to the file that uses it."
    bad = 'use "no_such_masks.attn"\n\nattention full():\n    mask = causal\n'
    good = "attention full():\n    mask = causal\n"

    path: str
    reason: str
    place: str
    hint: str = ""

    def helps(self) -> tuple[str, ...]:
        return (self.hint,) if self.hint else ()


@dataclass(frozen=True, slots=True)
class NoAttention(Diagnostic):
    code = "A0209"
    title = "there is no attention in this file"
    label = "expected `attention NAME(PARAMETERS):`"
    help = "add one, such as\nattention causal_attention():\n    mask = causal"
    explanation = "A file that is built or checked defines at least one attention; one that is only used may hold definitions alone."
    bad = "define near(n) = abs(q_idx - kv_idx) < n\n"
    good = "define near(n) = abs(q_idx - kv_idx) < n\n\nattention local():\n    mask = near(8)\n"


@dataclass(frozen=True, slots=True)
class WhichAttention(Diagnostic):
    code = "A0210"
    title = "{problem}"
    help = "choose with name=: {names}"
    explanation = "A file may define several attentions; a build makes one of them, chosen by `name=` (on the command line, `--name`)."
    bad = 'attncc.build("attention one():\\n    mask = causal\\nattention two():\\n    score = qk\\n")'
    good = 'attncc.build("attention one():\\n    mask = causal\\nattention two():\\n    score = qk\\n", name="one")'

    problem: str
    names: str


@dataclass(frozen=True, slots=True)
class UnknownConstant(Diagnostic):
    code = "A0211"
    title = "`{attention}` has no constant `{name}`"
    label = "{why}"
    help = "{hint}"
    explanation = (
        "Constants are given when a spec is built, and become part of the kernel; they are declared `name: const int`. "
        "Run-time scalars and tensors are given at each call instead."
    )
    bad = 'attncc.build("attention sliding(window: int):\\n    mask = window(window)\\n", window=1024)'
    good = 'attncc.build("attention sliding(window: const int):\\n    mask = window(window)\\n", window=1024)'

    name: str
    attention: str
    why: str
    hint: str


@dataclass(frozen=True, slots=True)
class MissingConstant(Diagnostic):
    code = "A0212"
    title = "constant `{name}` has no value"
    label = "declared without a default"
    help = "give it where the spec is built: {name}=…, or declare a default: `{name}: const {type} = …`"
    explanation = "A constant is part of the kernel, so its value must be known when the spec is checked."
    bad = "attention blocked(size: const int):\n    mask = q_idx // size == kv_idx // size\n"
    good = "attention blocked(size: const int = 64):\n    mask = q_idx // size == kv_idx // size\n"

    name: str
    type: str


@dataclass(frozen=True, slots=True)
class NotAvailable(Diagnostic):
    code = "A0213"
    title = "`{name}` cannot be read in `{clause}`"
    label = "{why}"
    explanation = (
        "Each clause sees what is known when it is computed. Row transforms see the position of their own row: `q_idx` "
        "in `q`, `kv_idx` in `k` and `v`. Then come `scale`, `score` (which sees `qk`), `mask` (which sees no score) and "
        "`weight` (which sees `score`)."
    )
    bad = "attention thresholded():\n    mask = score > 0.0\n"
    good = "attention thresholded():\n    score = qk if qk > 0.0 else -inf\n"

    name: str
    clause: str
    why: str
    hint: str = ""

    def helps(self) -> tuple[str, ...]:
        return (self.hint,) if self.hint else ()


@dataclass(frozen=True, slots=True)
class NeedsCall(Diagnostic):
    code = "A0214"
    title = "`{name}` is a function"
    label = "used without arguments"
    help = "call it: `{call}`"
    explanation = (
        "A function is called with its arguments; only a definition without parameters is used by its bare name."
    )
    bad = "attention sliding():\n    mask = causal and window\n"
    good = "attention sliding():\n    mask = causal and window(64)\n"

    name: str
    call: str


@dataclass(frozen=True, slots=True)
class NotAFunction(Diagnostic):
    code = "A0215"
    title = "`{name}` is no function"
    label = "called with arguments"
    help = "{hint}"
    explanation = (
        "Only builtins and definitions with parameters are called. Elements of tensors are read with `[` and `]`."
    )
    bad = "attention biased(bias: float[H]):\n    score = qk + bias(h)\n"
    good = "attention biased(bias: float[H]):\n    score = qk + bias[h]\n"

    name: str
    hint: str


# --- A03xx: types and shapes ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WrongKind(Diagnostic):
    code = "A0301"
    title = "{role} must be {expected}, found {found}"
    label = "this is {found}"
    explanation = (
        "There are bools, ints and floats. An int becomes a float by itself where a float is needed; nothing else "
        "converts by itself. `int(x)` drops the fraction of a float and makes 0 or 1 of a bool, `float(x)` makes a float."
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
        "An element of a tensor takes one int for each axis. In a row transform one axis may be left whole: `gain[h, :]`, "
        "or `gain[h]` for the last one."
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
        "Rows are combined element by element, so they must have the same size for every call: rows of q and k have D "
        "elements, those of v have E, those of a tensor what its axis says."
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
        "Only the clauses `q`, `k` and `v` compute rows. Elsewhere each tensor is read with one index per axis; in a row "
        "transform `sum`, `max`, `mean`, `norm` and `dot` make a single value of a row."
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
    explanation = "The clauses `q`, `k` and `v` give a whole row: one made from the row itself by functions such as `l2norm` and `rope`."
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
        "A scalar is `int`, `float` or `bool`; a constant `const int`, `const float` or `const bool`. The elements of a "
        "tensor are `int` (i32 or i64), `float` (f16, bf16, f32 or f64), `bool`, or exactly one of `i32 i64 f16 bf16 f32 f64`."
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
        "The sizes of a tensor must follow from the sizes of q, k and v and from constants, so that every call can be "
        "checked before a kernel runs."
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
        "An int to an int power is an int where the exponent is 0 or more and a fraction otherwise, so the exponent must "
        "be known: `q_idx ** 2`. With a float base any exponent will do: `2.0 ** h`."
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
    explanation = "Some arguments decide which program is built, such as `interleaved` and `dim` of `rope`; they cannot wait for the call."
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
        "`weight = softmax(score)` normalises over the keys of a row; it is the whole `weight` clause, and its argument is "
        "the score as it is. `softmax(x, sink=s)` adds exp(s) to the sum. In row transforms `softmax(row)` is over the "
        "elements of one row."
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
        "`normalize = sum` divides by the sum of the row's weights, `normalize = none` (what weights other than softmax "
        "have by themselves) divides by nothing. Softmax is normalised already."
    )
    bad = "attention averaged():\n    weight = relu(score)\n    normalize = mean\n"
    good = "attention averaged():\n    weight = relu(score)\n    normalize = sum\n"

    problem: str
    hint: str


@dataclass(frozen=True, slots=True)
class NoAttributes(Diagnostic):
    code = "A0316"
    title = "`.{name}` belongs to nothing"
    label = "values have no attributes"
    help = "functions are called by their bare names, such as `tanh(x)`"
    explanation = "There are no modules and no objects: builtins are called by their bare names."
    bad = "attention capped():\n    score = 50.0 * torch.tanh(qk / 50.0)\n"
    good = "attention capped():\n    score = 50.0 * tanh(qk / 50.0)\n"

    name: str


# --- A04xx: what this version cannot do -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LaterClause(Diagnostic):
    code = "A0401"
    title = "`{name}` is not supported yet by this version"
    label = "this clause"
    help = "{hint}"
    explanation = (
        "The clause is part of the language, but this version compiles pairwise attention only: row transforms, scale, "
        "score, mask, weight and normalize."
    )
    bad = "attention linear():\n    feature = elu(x) + 1.0\n"
    good = "attention linear():\n    weight = elu(score) + 1.0\n"

    name: str
    hint: str


@dataclass(frozen=True, slots=True)
class RowInPair(Diagnostic):
    code = "A0402"
    title = "`{clause}` computes with rows, which is not supported yet by this version"
    label = "{what}"
    help = "{hint}"
    explanation = (
        "Clauses of a pair of positions see single values: `qk`, coordinates, parameters and elements of tensors. Sums "
        "over the elements of a row belong in the row transforms `q`, `k` and `v`, whose product is `qk`."
    )
    bad = "attention positioned(table: float[N, D]):\n    score = qk + dot(q, table[kv_idx, :])\n"
    good = "attention positioned(table: float[N, D]):\n    k = k + table[kv_idx, :]\n"

    clause: str
    what: str
    hint: str


@dataclass(frozen=True, slots=True)
class MatrixProduct(Diagnostic):
    code = "A0403"
    title = "`@` is not supported yet by this version"
    label = "a product with a matrix"
    help = "multiply by the matrix before the call: q, k and v are yours to project"
    explanation = "Row transforms are computed element by element, which a product with a matrix is not. Apply it to q, k or v before the call."
    bad = "attention projected(R: float[H, D, D]):\n    q = q @ R[h]\n"
    good = "attention projected(gain: float[H, D]):\n    q = q * gain[h, :]\n"


@dataclass(frozen=True, slots=True)
class LaterFunction(Diagnostic):
    code = "A0404"
    title = "`{name}` is not supported yet by this version"
    label = "this function"
    help = "{hint}"
    explanation = "The function belongs to a form of attention that this version reads but does not compile."
    bad = "attention summed():\n    v = cumsum(v)\n"
    good = "attention summed():\n    v = l2norm(v)\n"

    name: str
    hint: str


@dataclass(frozen=True, slots=True)
class OtherRow(Diagnostic):
    code = "A0405"
    title = "the transform of `{clause}` reads `{name}`"
    label = "a row of another tensor"
    help = "a row transform sees its own row; combine q, k and v before the call"
    explanation = (
        "Rows are transformed one by one, before queries meet keys: `q = …` may read `q`, its position and parameters, and "
        "likewise `k` and `v`."
    )
    bad = "attention shared():\n    k = l2norm(q)\n"
    good = "attention shared():\n    k = l2norm(k)\n"

    clause: str
    name: str


@dataclass(frozen=True, slots=True)
class TooLarge(Diagnostic):
    code = "A0406"
    title = "`{clause}` becomes too large an expression ({size})"
    label = "after its definitions are put in place"
    help = "compute a part of it before the call and pass it as a tensor"
    explanation = (
        "Definitions and `let` names are put in the place of their uses. An expression of more than ten thousand terms, or "
        "one that nests more than 150 deep, makes no sensible kernel."
    )
    bad = "define a(x) = x * x + x\ndefine b(x) = a(a(a(a(x))))\n\nattention huge():\n    score = b(b(b(qk)))\n"
    good = "define a(x) = x * x + x\n\nattention small():\n    score = a(a(qk))\n"

    clause: str
    size: str
