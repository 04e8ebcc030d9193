"""Walking over expressions of the syntax tree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

from attncc.syntax import nodes


def children(expression: nodes.Expression) -> tuple[nodes.Expression, ...]:
    """The expressions directly below one, in reading order."""
    match expression:
        case nodes.Name() | nodes.Number() | nodes.Boolean():
            return ()
        case nodes.Unary(operand=operand):
            return (operand,)
        case nodes.Binary(left=left, right=right):
            return (left, right)
        case nodes.Compare(first=first, rest=rest):
            return (first, *(operand for _, operand in rest))
        case nodes.Conditional(then=then, condition=condition, otherwise=otherwise):
            return (then, condition, otherwise)
        case nodes.Call(arguments=arguments, keywords=keywords):
            return (*arguments, *(keyword.value for keyword in keywords))
        case nodes.Subscript(base=base, indices=indices):
            return (base, *(index for index in indices if not isinstance(index, nodes.FullSlice)))
        case nodes.Attribute(base=base):
            return (base,)
        case _:
            assert_never(expression)


def walk(expression: nodes.Expression) -> Iterator[nodes.Expression]:
    """An expression and everything below it, parents first, in reading order."""
    stack = [expression]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(children(node)))


def calls_and_names(expression: nodes.Expression) -> Iterator[str]:
    """The names of values and functions that an expression mentions."""
    for node in walk(expression):
        match node:
            case nodes.Name(name=name):
                yield name
            case nodes.Call(function=function):
                yield function
            case _:
                pass
