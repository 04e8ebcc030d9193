"""Parse tree → syntax tree."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, TypeAlias, cast

from attncc.diagnostics import Diagnostic
from attncc.source import Source, Span
from attncc.syntax import nodes
from attncc.syntax.errors import BadNumber, TooDeep

# lark's trees and tokens, whose types say little about what they hold.
Node: TypeAlias = Any

# Deep enough for people; shallow enough that every pass may recurse.
MAX_DEPTH = 100


class Builder:
    """Builds the tree of one source; `errors` collects what is wrong with single literals."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.errors: list[Diagnostic] = []

    def file(self, tree: Node) -> nodes.File:
        items: list[nodes.Item] = []
        for child in tree.children:
            match cast("str", child.data):
                case "use":
                    items.append(self._use(child))
                case "define":
                    items.append(self._define(child))
                case "attention":
                    items.append(self._attention(child))
                case "broken":
                    pass
                case other:
                    raise AssertionError(other)
        return nodes.File(tuple(items), Span(self.source, 0, len(self.source.text)))

    def _use(self, tree: Node) -> nodes.Use:
        path: Node = tree.children[0]
        return nodes.Use(str(path)[1:-1], self._line_span(tree), self._span(path))

    def _define(self, tree: Node) -> nodes.Define:
        name, parameters, value = tree.children
        built = None
        if parameters is not None:
            built = tuple(self._define_parameter(child) for child in parameters.children if child is not None)
        return nodes.Define(
            str(name), built, self.expression(value), span=self._line_span(tree), name_span=self._span(name)
        )

    def _define_parameter(self, tree: Node) -> nodes.DefineParameter:
        name, default = tree.children
        return nodes.DefineParameter(
            str(name), None if default is None else self.expression(default), span=self._span(name)
        )

    def _attention(self, tree: Node) -> nodes.Attention:
        name, parameters, doc, *body = tree.children
        colon = self.source.text.index(":", parameters.meta.end_pos) + 1
        return nodes.Attention(
            str(name),
            tuple(self._parameter(child) for child in parameters.children if child is not None),
            None if doc is None else clean_doc(str(doc.children[0])[3:-3]),
            tuple(self._statement(child) for child in body if child.data != "broken"),
            span=self._line_span(tree),
            name_span=self._span(name),
            header_span=Span(self.source, tree.meta.start_pos, colon),
            doc_span=None if doc is None else self._span(doc.children[0]),
        )

    def _parameter(self, tree: Node) -> nodes.Parameter:
        name, const, type_, default = tree.children
        type_name, shape = type_.children
        axes = None if shape is None else tuple(self.expression(c) for c in shape.children if c is not None)
        return nodes.Parameter(
            str(name),
            const is not None,
            nodes.Type(str(type_name), axes, span=self._tree_span(type_)),
            None if default is None else self.expression(default),
            span=self._tree_span(tree),
            name_span=self._span(name),
        )

    def _statement(self, tree: Node) -> nodes.Statement:
        span = self._line_span(tree)
        match cast("str", tree.data):
            case "let":
                name, value = tree.children
                return nodes.Let(str(name), self.expression(value), span, self._span(name))
            case "assign":
                name, value = tree.children
                return nodes.Clause(str(name), self.expression(value), span, self._span(name))
            case "feature_of":
                name, row, value = tree.children
                return nodes.Clause(str(name), self.expression(value), span, self._span(name), str(row))
            case "recurrence":
                return self._recurrence(tree, span)
            case _:
                keyword: Node = tree.children[0]
                column = self.source.position(span.start)[1] - 1
                text = "\n".join(_outdented(line, column) for line in span.text.split("\n"))
                return nodes.Later(str(keyword), text, span, self._span(keyword))

    def _recurrence(self, tree: Node, span: Span) -> nodes.Recurrence:
        keyword, *body = tree.children
        colon = self.source.text.index(":", keyword.end_pos) + 1
        return nodes.Recurrence(
            tuple(self._recurrence_statement(child) for child in body if child.data != "broken"),
            span,
            self._span(keyword),
            Span(self.source, keyword.start_pos, colon),
        )

    def _recurrence_statement(self, tree: Node) -> nodes.Let | nodes.Clause | nodes.Update:
        span = self._line_span(tree)
        match cast("str", tree.data):
            case "let":
                name, value = tree.children
                return nodes.Let(str(name), self.expression(value), span, self._span(name))
            case "assign":
                name, value = tree.children
                return nodes.Clause(str(name), self.expression(value), span, self._span(name))
            case "update":
                name, operator, value = tree.children
                return nodes.Update(
                    str(name),
                    cast("nodes.UpdateOperator", str(operator)),
                    self.expression(value),
                    span,
                    self._span(name),
                    self._span(operator),
                )
            case other:
                raise AssertionError(other)

    def expression(self, tree: Node, depth: int = 0) -> nodes.Expression:
        """The expression of a tree; 0 where it is too deep, which is reported."""
        span = self._tree_span(tree)
        if depth > MAX_DEPTH:
            self.errors.append(TooDeep(span, MAX_DEPTH))
            return nodes.Number(0, "0", span)
        deeper = depth + 1
        children: list[Any] = tree.children
        match cast("str", tree.data):
            case "name":
                return nodes.Name(str(children[0]), span)
            case "number":
                return self._number(str(children[0]), span)
            case "true" | "false":
                return nodes.Boolean(tree.data == "true", span)
            case "group":
                # The brackets count into the span, so that a caret line under a larger expression covers them.
                return dataclasses.replace(self.expression(children[0], deeper), span=span)
            case "unary":
                operator, operand = children
                return nodes.Unary(cast("nodes.UnaryOperator", str(operator)), self.expression(operand, deeper), span)
            case "binary":
                left, operator, right = children
                return nodes.Binary(
                    cast("nodes.BinaryOperator", str(operator)),
                    self.expression(left, deeper),
                    self.expression(right, deeper),
                    span,
                    self._span(operator),
                )
            case "compare":
                first, *operands = (self.expression(child, deeper) for child in children[::2])
                links = cast("list[nodes.Comparison]", [str(link) for link in children[1::2]])
                return nodes.Compare(first, tuple(zip(links, operands, strict=True)), span)
            case "conditional":
                then, condition, otherwise = (self.expression(child, deeper) for child in children)
                return nodes.Conditional(then, condition, otherwise, span)
            case "call":
                return self._call(children, span, deeper)
            case "subscript":
                base, *indices = children
                return nodes.Subscript(
                    self.expression(base, deeper),
                    tuple(
                        nodes.FullSlice(self._tree_span(index))
                        if index.data == "full_slice"
                        else self.expression(index, deeper)
                        for index in indices
                    ),
                    span,
                )
            case "attribute":
                base, name = children
                return nodes.Attribute(self.expression(base, deeper), str(name), span)
            case other:
                raise AssertionError(other)

    def _call(self, children: list[Any], span: Span, depth: int) -> nodes.Call:
        arguments: list[nodes.Expression] = []
        keywords: list[nodes.Keyword] = []
        for child in children[1:]:
            if child is None:
                continue
            if child.data == "keyword":
                name, value = child.children
                keywords.append(nodes.Keyword(str(name), self.expression(value, depth), self._tree_span(child)))
            else:
                arguments.append(self.expression(child, depth))
        return nodes.Call(str(children[0]), tuple(arguments), tuple(keywords), span, self._span(children[0]))

    def _number(self, text: str, span: Span) -> nodes.Number:
        digits = text.lower()
        try:
            if digits.startswith(("0x", "0b")) or not set(digits) & set(".e"):
                value: int | float = int(digits, 0)
                problem = "ints have 64 bits" if value >= 2**63 else ""
            else:
                value = float(digits)
                problem = "too large for a float" if value == float("inf") else ""
        except ValueError:
            value, problem = 0, "misplaced digits or `_`"
        if problem:
            self.errors.append(BadNumber(span, text if len(text) <= 40 else text[:37] + "...", problem))
            value = 0
        return nodes.Number(value, text, span)

    def _span(self, token: Node) -> Span:
        return Span(self.source, token.start_pos or 0, token.end_pos or 0)

    def _tree_span(self, tree: Node) -> Span:
        return Span(self.source, tree.meta.start_pos, tree.meta.end_pos)

    def _line_span(self, tree: Node) -> Span:
        """The span of a statement or a definition, without the line break and whatever blank comes after it."""
        return Span(self.source, tree.meta.start_pos, _end(tree))


def _outdented(line: str, columns: int) -> str:
    """The line without the blanks of its first columns (a comment may have fewer) and those at its end."""
    return line.removeprefix(line[:columns]).rstrip() if line[:columns].isspace() else line.strip()


def clean_doc(text: str) -> str:
    """A docstring without its indentation, blank lines around it, and white space at the ends of lines."""
    return "\n".join(line.rstrip() for line in inspect.cleandoc(text).strip().split("\n"))


# Trees that hold whole lines, so that their own extent reaches over the line break at their end.
_LINES = frozenset(
    (
        *("use", "define", "attention", "doc", "let", "assign", "recurrence", "update"),
        *("feature_of", "sort_by", "later_recurrence", "select", "branch"),
    )
)


def _end(tree: Node) -> int:
    """Where the last thing written in a tree ends."""
    if tree.data not in _LINES:
        return tree.meta.end_pos
    last = next(child for child in reversed(tree.children) if child is not None and child != "broken")
    return _end(last) if hasattr(last, "data") else last.end_pos
