"""Hypothesis strategies: syntax trees."""

from __future__ import annotations

from hypothesis import strategies as st

from attncc.source import Source, Span
from attncc.syntax import nodes
from attncc.syntax.builder import clean_doc

# Spans take no part in comparison; every drawn node carries this one.
SPAN = Span(Source("drawn", ""), 0, 0)

names = st.sampled_from(
    ["q_idx", "kv_idx", "qk", "x", "window", "a_rather_long_name_for_a_value", "sort", "chunk", "h"]
)
functions = st.sampled_from(["tanh", "max", "rope", "near"])

numbers = st.one_of(
    st.integers(0, 2**63 - 1),
    st.floats(min_value=0, allow_nan=False, allow_infinity=False),
).map(lambda value: nodes.Number(value, "", SPAN))

leaves = st.one_of(
    names.map(lambda name: nodes.Name(name, SPAN)),
    numbers,
    st.booleans().map(lambda value: nodes.Boolean(value, SPAN)),
)

BINARY = ["or", "and", "|", "^", "&", "<<", ">>", "+", "-", "*", "/", "//", "%", "@", "**"]


def _extended(inner: st.SearchStrategy[nodes.Expression]) -> st.SearchStrategy[nodes.Expression]:
    keywords = st.builds(nodes.Keyword, st.sampled_from(["base", "scaling", "eps"]), inner, st.just(SPAN))
    indices = st.lists(st.one_of(inner, st.just(nodes.FullSlice(SPAN))), min_size=1, max_size=3).map(tuple)
    links = st.tuples(st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), inner)
    return st.one_of(
        st.builds(nodes.Unary, st.sampled_from(["not", "-", "+", "~"]), inner, st.just(SPAN)),
        st.builds(nodes.Binary, st.sampled_from(BINARY), inner, inner, st.just(SPAN), st.just(SPAN)),
        st.builds(nodes.Compare, inner, st.lists(links, min_size=1, max_size=2).map(tuple), st.just(SPAN)),
        st.builds(nodes.Conditional, inner, inner, inner, st.just(SPAN)),
        st.builds(
            nodes.Call,
            functions,
            st.lists(inner, max_size=2).map(tuple),
            st.lists(keywords, max_size=2).map(tuple),
            st.just(SPAN),
            st.just(SPAN),
        ),
        st.builds(nodes.Subscript, inner, indices, st.just(SPAN)),
        st.builds(nodes.Attribute, inner, names, st.just(SPAN)),
    )


expressions: st.SearchStrategy[nodes.Expression] = st.recursive(leaves, _extended, max_leaves=12)

docs = (
    st.text(alphabet=st.characters(codec="ascii", exclude_characters="\0\r\x0b\x0c\x1c\x1d\x1e"), max_size=60)
    .filter(lambda text: '"""' not in text)
    .map(clean_doc)
    .filter(lambda doc: clean_doc(doc) == doc)
)


@st.composite
def parameters(draw: st.DrawFn, name: str) -> nodes.Parameter:
    shape = draw(st.none() | st.lists(expressions, max_size=2).map(tuple))
    type_ = nodes.Type(draw(st.sampled_from(["int", "float", "f32"])), shape, SPAN)
    return nodes.Parameter(name, draw(st.booleans()), type_, draw(st.none() | expressions), SPAN, SPAN)


def _statements() -> st.SearchStrategy[nodes.Statement]:
    later = st.sampled_from(
        [
            ("sort", "sort by argmax(q) chunk 64 back 1"),
            (
                "select",
                "select blocks(64):\n  rank = dot(q, mean(k))   # kept as it is\n\n  always = first(1), current",
            ),
        ]
    )
    clause_names = st.sampled_from(["q", "k", "v", "scale", "score", "mask", "weight", "normalize", "unknown"])
    return st.one_of(
        st.builds(nodes.Clause, clause_names, expressions, st.just(SPAN), st.just(SPAN)),
        st.builds(nodes.Clause, st.just("feature"), expressions, st.just(SPAN), st.just(SPAN), names),
        st.builds(nodes.Let, names, expressions, st.just(SPAN), st.just(SPAN)),
        _recurrences(),
        later.map(lambda pair: nodes.Later(pair[0], pair[1], SPAN, SPAN)),
    )


def _recurrences() -> st.SearchStrategy[nodes.Recurrence]:
    targets = st.sampled_from(["S", "out", "x"])
    operators = st.sampled_from(["*=", "+=", "-="])
    inner = st.one_of(
        st.builds(nodes.Let, names, expressions, st.just(SPAN), st.just(SPAN)),
        st.builds(nodes.Clause, targets, expressions, st.just(SPAN), st.just(SPAN)),
        st.builds(nodes.Update, targets, operators, expressions, st.just(SPAN), st.just(SPAN), st.just(SPAN)),
    )
    bodies = st.lists(inner, min_size=1, max_size=4).map(tuple)
    return st.builds(nodes.Recurrence, bodies, st.just(SPAN), st.just(SPAN), st.just(SPAN))


@st.composite
def _attentions(draw: st.DrawFn) -> nodes.Attention:
    doc = draw(st.none() | docs)
    body = tuple(draw(st.lists(_statements(), min_size=1 if doc is None else 0, max_size=4)))
    declared = draw(st.lists(st.sampled_from(["alpha", "beta", "gamma_with_a_long_name"]), max_size=3))
    return nodes.Attention(
        draw(names),
        tuple(draw(parameters(name)) for name in declared),
        doc,
        body,
        span=SPAN,
        name_span=SPAN,
        header_span=SPAN,
        doc_span=None,
    )


def _defines() -> st.SearchStrategy[nodes.Define]:
    one = st.builds(nodes.DefineParameter, names, st.none() | expressions, st.just(SPAN))
    given = st.none() | st.lists(one, max_size=2).map(tuple)
    return st.builds(nodes.Define, names, given, expressions, st.just(SPAN), st.just(SPAN))


def files() -> st.SearchStrategy[nodes.File]:
    uses = st.sampled_from(["a.attn", "masks/b.attn"]).map(lambda path: nodes.Use(path, SPAN, SPAN))
    items = st.lists(st.one_of(uses, _defines(), _attentions()), max_size=4)
    return items.map(lambda drawn: nodes.File(tuple(drawn), SPAN))
