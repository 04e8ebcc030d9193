"""Checks a file: all of its attentions, or one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from attncc.check import suggest
from attncc.check.clauses import lower
from attncc.check.definitions import check_definitions
from attncc.check.limit_errors import TooLarge
from attncc.check.linear import lower_feature
from attncc.check.modules import Module, load
from attncc.check.name_errors import Duplicate, NoAttention, WhichAttention
from attncc.check.recurrence import lower_recurrence
from attncc.check.reporter import Reporter
from attncc.diagnostics import Label
from attncc.ir.recurrence import Specification
from attncc.source import Source, Span
from attncc.syntax import nodes


def check_source(
    source: Source, *, name: str | None = None, constants: Mapping[str, object] | None = None
) -> Specification:
    """The attention of a file: the only one, or the one called `name`.

    `constants` gives values to its `const` parameters. Raises `SpecError` with every error of the file's definitions
    and of that attention.
    """
    reporter = Reporter()
    module = _loaded(source, reporter)
    chosen = _chosen(module, name, reporter)
    if chosen is None:
        reporter.raise_errors()
        raise AssertionError("an attention that cannot be chosen is an error")
    return _lowered([chosen], module, [constants or {}], reporter)[chosen.name]


def check_all(source: Source, constants: Mapping[str, object] | None = None) -> dict[str, Specification]:
    """Every attention of a file by its name, in the order of the file.

    `constants` gives values to the `const` parameters of those that have one of that name. Raises `SpecError` with
    every error of the file.
    """
    reporter = Reporter()
    module = _loaded(source, reporter)
    attentions = list(module.file.attentions)
    if not attentions:
        reporter.report(_no_attention(module))
    given = constants or {}
    declared = {p.name for attention in attentions for p in attention.parameters if p.const}
    # What no attention has is left to each of them to refuse; the rest goes where it belongs.
    each = [
        {n: v for n, v in given.items() if n not in declared or n in {p.name for p in a.parameters if p.const}}
        for a in attentions
    ]
    return _lowered(attentions, module, each, reporter)


def _loaded(source: Source, reporter: Reporter) -> Module:
    module = load(source, reporter)
    check_definitions(module, reporter)
    first: dict[str, Span] = {}
    for attention in module.file.attentions:
        if attention.name in first:
            related = (Label(first[attention.name], "the first one"),)
            mend = "give each attention its own name"
            reporter.report(Duplicate(attention.name_span, "attention", attention.name, mend, related=related))
        first.setdefault(attention.name, attention.name_span)
    return module


def _chosen(module: Module, name: str | None, reporter: Reporter) -> nodes.Attention | None:
    attentions = module.file.attentions
    distinct = list(dict.fromkeys(attention.name for attention in attentions))
    names = ", ".join(f"`{each}`" for each in distinct)
    if not attentions:
        reporter.report(_no_attention(module))
        return None
    if name is None and len(distinct) > 1:
        span = next(attention.name_span for attention in attentions if attention.name == distinct[1])
        reporter.report(WhichAttention(span, f"the file defines {len(distinct)} attentions", names))
        return None
    if name is None:
        return attentions[0]
    for attention in attentions:
        if attention.name == name:
            return attention
    near = suggest.nearest(name, distinct)
    reporter.report(WhichAttention(None, f"there is no attention `{name}`" + (f"; {near}" if near else ""), names))
    return None


def _no_attention(module: Module) -> NoAttention:
    source = module.file.span.source
    items = module.file.items
    return NoAttention(items[0].span if items else Span(source, 0, 0))


def _lowered(
    attentions: list[nodes.Attention], module: Module, constants: Sequence[Mapping[str, object]], reporter: Reporter
) -> dict[str, Specification]:
    result: dict[str, Specification] = {}
    for attention, given in zip(attentions, constants, strict=True):
        try:
            lowered = _lowering(attention)(attention, module, given, reporter)
        except RecursionError:
            # Deeper than the stack of the caller leaves room for.
            reporter.report(TooLarge(attention.name_span, attention.name, "too many levels deep"))
            continue
        if lowered is not None:
            result[attention.name] = lowered
    reporter.raise_errors()
    return result


def _lowering(attention: nodes.Attention) -> Callable[..., Specification | None]:
    if any(isinstance(statement, nodes.Recurrence) for statement in attention.body):
        return lower_recurrence
    featured = any(isinstance(s, nodes.Clause) and s.name == "feature" for s in attention.body)
    return lower_feature if featured else lower
