"""What is wrong with a recurrence (A032x shapes, A040x and A041x form)."""

from __future__ import annotations

from dataclasses import dataclass

from attncc.diagnostics import Diagnostic

_STATEMENTS = "\n    recurrence:\n        S += outer(k, v)\n        out = q @ S\n"
_SCALED = _STATEMENTS.replace("out = q", "out = scale * q")
_NAMED = "\n    recurrence:\n        let z = k @ S\n        S += outer(k, v - z)\n        out = q @ S\n"


@dataclass(frozen=True, slots=True)
class ShapeMismatch(Diagnostic):
    code = "A0320"
    title = "{left} and {right} do not go together"
    label = "combined here"
    help = "{hint}"
    explanation = (
        "Under `recurrence:` a value is a scalar, a key vector (D elements: q, k, and what is loaded with `:` on an "
        "axis of size D), a value vector (E elements: v, and axes of size E) or as large as the state (D x E). "
        "Operators combine equal shapes element by element, and anything with a scalar. `outer(x, y)`, `x[:, None]` "
        "and `y[None, :]` make something as large as the state of vectors; `x @ S` and `S @ y` sum over one axis of it."
    )
    bad = "attention added():\n    recurrence:\n        S += k * v\n        out = q @ S\n"
    good = "attention added():\n    recurrence:\n        S += outer(k, v)\n        out = q @ S\n"

    left: str
    right: str
    hint: str


@dataclass(frozen=True, slots=True)
class WrongProduct(Diagnostic):
    code = "A0321"
    title = "`@` does not multiply {left} by {right}"
    label = "this product"
    help = "{hint}"
    explanation = (
        "`x @ S` sums over key channels: a key vector x (D) gives a value vector (E). `S @ y` sums over value "
        "channels: a value vector y (E) gives a key vector (D). `x @ y` of two vectors of one size is their `dot`. In "
        "features and row transforms `x @ W` takes a row and a tensor with two axes left whole, as `W[h]` of "
        "`W: float[H, D, R]`."
    )
    bad = "attention turned():\n    recurrence:\n        S += outer(k, v)\n        out = S @ q\n"
    good = "attention turned():\n    recurrence:\n        S += outer(k, v)\n        out = q @ S\n"

    left: str
    right: str
    hint: str


@dataclass(frozen=True, slots=True)
class WrongShape(Diagnostic):
    code = "A0322"
    title = "{role} must be {expected}, found {found}"
    label = "this is {found}"
    help = "{hint}"
    explanation = (
        "What a statement of a recurrence gives a value to has a shape: `out` is a value vector (E), the state `S` has "
        "D x E elements, and a scalar may stand in for all of either. `outer` takes a key vector and a value "
        "vector, in this order; reductions such as `sum` take a vector."
    )
    bad = "attention read():\n    recurrence:\n        S += outer(k, v)\n        out = q\n"
    good = "attention read():\n    recurrence:\n        S += outer(k, v)\n        out = q @ S\n"

    role: str
    expected: str
    found: str
    hint: str


@dataclass(frozen=True, slots=True)
class BesideRecurrence(Diagnostic):
    code = "A0407"
    title = "`{clause}` cannot stand beside `recurrence`"
    label = "a clause of pairs of positions"
    help = "{hint}"
    explanation = (
        "An attention is given by pairs of positions (`score`, `mask`, `weight`, `normalize`), or by what each token "
        "does to a state (`recurrence`). Row transforms and `scale` go with both."
    )
    bad = f"attention both():\n    mask = causal{_STATEMENTS}"
    good = f"attention one():{_STATEMENTS}"

    clause: str
    hint: str


@dataclass(frozen=True, slots=True)
class NoOutput(Diagnostic):
    code = "A0408"
    title = "the recurrence has no `out`"
    label = "it changes the state, and nothing is read"
    help = "read the state: `out = q @ S`, below the updates that it should see"
    explanation = "Each token gives a value vector, which the statement `out = …` computes."
    bad = "attention silent():\n    recurrence:\n        S += outer(k, v)\n"
    good = f"attention linear():{_STATEMENTS}"


@dataclass(frozen=True, slots=True)
class NotTheState(Diagnostic):
    code = "A0409"
    title = "`{name}` cannot be updated"
    label = "not the state"
    help = "{hint}"
    explanation = (
        "A recurrence has one state, `S`: `S *= …`, `S += …`, `S -= …` and `S = …` change it, `out = …` gives the "
        "token's result, and `let name = …` names a value."
    )
    bad = f"attention named():{_NAMED.replace('let z', 'z')}"
    good = f"attention named():{_NAMED}"

    name: str
    hint: str


@dataclass(frozen=True, slots=True)
class UnreadScale(Diagnostic):
    code = "A0410"
    title = "`scale` is given and never read"
    label = "this clause has no effect"
    help = "read it where the state is read: `out = scale * q @ S`; or remove the line"
    explanation = (
        "Nothing is scaled by itself in a recurrence: `scale` is a name that its statements may read, with the value "
        "1 / sqrt(D) where no clause gives another one."
    )
    bad = f"attention scaled():\n    scale = 0.5{_STATEMENTS}"
    good = (
        "attention scaled():\n    scale = 0.5\n    recurrence:\n        S += outer(k, v)\n        out = scale * q @ S\n"
    )


@dataclass(frozen=True, slots=True)
class BesideFeature(Diagnostic):
    code = "A0411"
    title = "`{clause}` cannot stand beside `feature`"
    label = "not with a weight that is a product of features"
    help = "{hint}"
    explanation = (
        "With `feature` the weight of a pair is the product of the features of its query and its key, so that sums "
        "over keys can be made before any query is known. A mask is `causal`, or there is none; `normalize = sum` "
        "divides by the row's sum of weights."
    )
    bad = "attention linear():\n    feature = elu(x) + 1.0\n    mask = window(64)\n"
    good = "attention linear():\n    feature = elu(x) + 1.0\n    mask = causal\n"

    clause: str
    hint: str


@dataclass(frozen=True, slots=True)
class FeatureWidth(Diagnostic):
    code = "A0323"
    title = "{problem}"
    label = "this is how wide they are"
    help = "{hint}"
    explanation = (
        "Features of q and of k have as many elements as each other: their product is a sum over them. That number is "
        "made of constants and of D and E, since a kernel is made for it."
    )
    bad = "attention linear():\n    feature(k) = concat(k, -k)\n"
    good = "attention linear():\n    feature = concat(x, -x)\n"

    problem: str
    hint: str
