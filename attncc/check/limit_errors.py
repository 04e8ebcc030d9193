"""What no algorithm of this version can do (A04xx)."""

from __future__ import annotations

from dataclasses import dataclass

from attncc.diagnostics import Diagnostic


@dataclass(frozen=True, slots=True)
class LaterClause(Diagnostic):
    code = "A0401"
    title = "`{name}` is not supported yet by this version"
    label = "this clause"
    help = "{hint}"
    explanation = (
        "The clause is part of the language, but this version compiles attention over all pairs that a mask keeps, and "
        "recurrences: row transforms, scale, score, mask, weight, normalize, feature and recurrence."
    )
    bad = "attention reformer():\n    sort by argmax(q) chunk 64 back 1\n"
    good = "attention local():\n    mask = same_block(64)\n"

    name: str
    hint: str


@dataclass(frozen=True, slots=True)
class RowInPair(Diagnostic):
    code = "A0402"
    title = "`{clause}` computes with rows, which is not supported yet by this version"
    label = "{what}"
    help = "{hint}"
    explanation = (
        "Clauses of a pair of positions see single values: `qk`, coordinates, parameters and elements of tensors. "
        "Sums over the elements of a row belong in the row transforms `q`, `k` and `v`, whose product is `qk`."
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
    explanation = (
        "Products of rows with matrices go with `feature` and with `recurrence:`. Row transforms of pairwise attention "
        "are computed element by element, which such a product is not: apply it to q, k or v before the call."
    )
    bad = "attention projected(R: float[H, D, D]):\n    q = q @ R[h]\n"
    good = "attention projected(gain: float[H, D]):\n    q = q * gain[h, :]\n"


@dataclass(frozen=True, slots=True)
class LaterFunction(Diagnostic):
    code = "A0404"
    title = "`{name}` is not supported yet by this version"
    label = "this function"
    help = "{hint}"
    explanation = "The function belongs to a form of attention that this version reads but does not compile."
    bad = "attention pooled():\n    v = pool(v)\n"
    good = "attention pooled():\n    v = l2norm(v)\n"

    name: str
    hint: str


@dataclass(frozen=True, slots=True)
class OtherRow(Diagnostic):
    code = "A0405"
    title = "the transform of `{clause}` reads `{name}`"
    label = "a row of another tensor"
    help = "{hint}"
    explanation = (
        "Rows are transformed one by one, before queries meet keys: `q = …` may read `q`, its position and "
        "parameters, and likewise `k` and `v`."
    )
    bad = "attention shared():\n    k = l2norm(q)\n"
    good = "attention shared():\n    k = l2norm(k)\n"

    clause: str
    name: str
    hint: str = "a row transform sees its own row; combine q, k and v before the call"


@dataclass(frozen=True, slots=True)
class TooLarge(Diagnostic):
    code = "A0406"
    title = "`{clause}` becomes too large an expression ({size})"
    label = "after its definitions are put in place"
    help = "compute a part of it before the call and pass it as a tensor"
    explanation = (
        "Definitions and `let` names are put in the place of their uses. An expression of more than ten thousand "
        "terms, or one that nests more than 150 deep, makes no sensible kernel."
    )
    bad = "define f(x) = x * x + x\ndefine g(x) = f(f(f(f(x))))\n\nattention huge():\n    score = g(g(g(qk)))\n"
    good = "define f(x) = x * x + x\n\nattention small():\n    score = f(f(qk))\n"

    clause: str
    size: str


@dataclass(frozen=True, slots=True)
class SummedAndRead(Diagnostic):
    code = "A0412"
    title = "`{name}` is summed and read by itself, or summed along two axes"
    label = "summed here"
    help = "declare a second parameter and pass the same tensor for both"
    explanation = (
        "`cumsum(x[b, h, :])` is the running sum of a parameter, which is taken before the kernel runs and stands in "
        "its place. So one parameter is read by its elements, or by its sums along one axis."
    )
    bad = (
        "attention gated(g: float[B, H, N]):\n    let G = cumsum(g[b, h, :])\n"
        "    score = qk + G[q_idx] - G[kv_idx] + g[b, h, kv_idx]\n"
    )
    good = (
        "attention gated(g: float[B, H, N]):\n    let G = cumsum(g[b, h, :])\n    score = qk + G[q_idx] - G[kv_idx]\n"
    )

    name: str
