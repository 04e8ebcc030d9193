"""Errors of names (A02xx)."""

from __future__ import annotations

from dataclasses import dataclass

from attncc.diagnostics import Diagnostic


@dataclass(frozen=True, slots=True)
class UnknownName(Diagnostic):
    code = "A0201"
    title = "unknown name `{name}`"
    label = "not defined {where}"
    explanation = (
        "A name in an expression is a parameter of the attention, a `let` above the line, a `define`, a coordinate"
        " (`b`, `h`, `hkv`, `q_row`, `q_idx`, `kv_idx`), a size (`B`, `H`, `HKV`, `M`, `N`, `D`, `E`), `q`, `k`, "
        "`v`, `qk`, `score`, `inf` or `pi`. A `define` sees its own parameters only, not those of the attention "
        "that uses it."
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
        "A function is a builtin (docs/language.md lists them), a definition of the prelude, or a `define` of this"
        " file or of one that it uses."
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
        "Coordinates, sizes, builtins and the arguments that every call has (`q`, `k`, `v`, `q_offset`, "
        "`return_lse`, …) keep their meaning everywhere; a parameter must also be a name that Python takes as a "
        "keyword argument, and begin with a letter."
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
        "The clauses of an attention are `q`, `k`, `v`, `scale`, `score`, `mask`, `weight` and `normalize`; `feature`, "
        "or `feature(q)` and `feature(k)`, in the place of score and weight; and `recurrence:`. A local name is given "
        "with `let`."
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
    explanation = (
        "A `define` is an abbreviation: it is expanded where it is used, so it cannot use itself, directly or "
        "through others."
    )
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
    explanation = (
        "A file that is built or checked defines at least one attention; one that is only used may hold "
        "definitions alone."
    )
    bad = "define near(n) = abs(q_idx - kv_idx) < n\n"
    good = "define near(n) = abs(q_idx - kv_idx) < n\n\nattention local():\n    mask = near(8)\n"


@dataclass(frozen=True, slots=True)
class WhichAttention(Diagnostic):
    code = "A0210"
    title = "{problem}"
    help = "choose with name=: {names}"
    explanation = (
        "A file may define several attentions; a build makes one of them, chosen by `name=` (on the command line, "
        "`--name`)."
    )
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
        "Constants are given when a spec is built, and become part of the kernel; they are declared `name: const "
        "int`. Run-time scalars and tensors are given at each call instead."
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
        "Each clause sees what is known when it is computed. Row transforms see the position of their own row: "
        "`q_idx` in `q`, `kv_idx` in `k` and `v`. Then come `scale`, `score` (which sees `qk`), `mask` (which sees"
        " no score) and `weight` (which sees `score`)."
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
