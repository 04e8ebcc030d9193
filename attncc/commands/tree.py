"""Prints syntax trees and plans: a node per line, its parts indented below it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum

from attncc.ir.nodes import Attention, Expr
from attncc.ir.recurrence import Recurrence
from attncc.ir.text import to_text
from attncc.source import Span


def dump(node: object) -> str:
    """The tree below a dataclass. IR expressions are written as text, source positions are left out."""
    return "\n".join(_lines("", node, 0))


def _lines(label: str, node: object, depth: int) -> Iterator[str]:
    prefix = "  " * depth + label
    match node:
        case Attention(name=name) | Recurrence(name=name):
            yield f"{prefix}attention {name}"
        case _ if isinstance(node, Expr):
            yield prefix + to_text(node)
        case Enum():
            yield f"{prefix}{node.value}"
        case tuple() if node:
            yield prefix.rstrip(" =")
            for item in node:
                yield from _lines("- ", item, depth + 1)
        case _ if is_dataclass(node):
            yield prefix + type(node).__name__
            for item in fields(node):
                value = getattr(node, item.name)
                if not isinstance(value, Span):
                    yield from _lines(f"{item.name} = ", value, depth + 1)
        case _:
            yield f"{prefix}{node!r}"
