"""Pieces of C++ text: what an expression prints as, when it needs parentheses, how a file is laid out."""

from __future__ import annotations

import re
from dataclasses import dataclass

from attncc.ir.types import Kind

# How tightly operators bind. Bitwise ones get parentheses whatever stands beside them.
ATOM, UNARY, PRODUCT, SUM, COMPARISON, BITS, LOGIC = range(7)
LEVELS = {"*": PRODUCT, "/": PRODUCT, "+": SUM, "-": SUM} | dict.fromkeys(
    ("<", "<=", ">", ">=", "==", "!="), COMPARISON
)

_WIDTH = 120


@dataclass(frozen=True, slots=True)
class Printed:
    """C++ text of an expression.

    lanes   a vector, one value per query
    wide    an int of 64 bits
    f64     a float of 64 bits where `real` may have 32
    level   of its outermost operator; joint: that operator, where more of the same may follow without parentheses
    """

    text: str
    kind: Kind
    lanes: bool = False
    wide: bool = False
    f64: bool = False
    level: int = ATOM
    joint: str = ""

    def within(self, level: int) -> str:
        """The text as an operand, in parentheses where it binds less tightly than `level`."""
        return f"({self.text})" if self.level > level else self.text

    def at_lane(self) -> str:
        """The text of its value for the query of lane `i`."""
        return f"{self.within(ATOM)}[i]" if self.lanes else self.text


def tidy(text: str) -> str:
    """Source text with at most one blank line at a time, none inside of a brace, no spaces at the ends of lines, and
    long statements broken."""
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"\n{3,}", "\n\n", text)
    text = re.sub(r"\{\n\n", "{\n", text)
    text = re.sub(r"\n\n( *\})(?!  //)", r"\n\1", text)
    return "\n".join(part for line in text.split("\n") for part in _broken(line))


def _broken(line: str) -> list[str]:
    """A line, or the lines that it is broken into: at the outermost operators of a long statement."""
    code = line.lstrip()
    if len(line) <= _WIDTH or not code.endswith(";") or "{" in code or code.startswith(("//", "#", "UNROLL")):
        return [line]
    depth, places = 0, dict[int, list[int]]()
    for match in re.finditer(r"[(\[]|[)\]]| (?=(?:&&|\|\||[-+&|?:]) )", line[len(line) - len(code) :]):
        c = match[0]
        depth += (c in "([") - (c in ")]")
        if c == " ":
            places.setdefault(depth, []).append(match.start() + len(line) - len(code))
    outermost = next((places[d] for d in sorted(places) if places[d]), [])
    if not outermost:
        return [line]
    margin = " " * (len(line) - len(code) + 4)
    starts = [0, *outermost]
    parts = [line[a:b] for a, b in zip(starts, [*outermost, len(line)], strict=True)]
    return [parts[0], *(margin + part.lstrip() for part in parts[1:])]
