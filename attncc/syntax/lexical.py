"""What can be said of a text without its grammar: comments, strings, brackets, tabs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

PartKind = Literal[
    "comment", "docstring", "string", "open_docstring", "open_string", "bracket", "newline", "tab", "text"
]

_PARTS = re.compile(
    r"""(?P<comment>\#[^\n]*)
      | (?P<docstring>\"{3}[\s\S]*?\"{3})
      | (?P<open_docstring>\"{3}[\s\S]*)
      | (?P<string>"[^"\n]*")
      | (?P<open_string>"[^\n]*)
      | (?P<bracket>[()\[\]])
      | (?P<newline>\n)
      | (?P<tab>(?<![^\n])[\ ]*\t)
      | (?P<text>[^\s"\#()\[\]]+)
    """,
    re.VERBOSE,
)
CLOSING = {"(": ")", "[": "]"}


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of text [start, end): a comment, a string, a bracket, a line break, an indenting tab, or other text."""

    kind: PartKind
    text: str
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


def parts(text: str) -> Iterator[Part]:
    """The parts of `text` in order; white space inside lines is skipped."""
    for match in _PARTS.finditer(text):
        # The groups of the pattern are named as kinds are.
        yield Part(match.lastgroup, match.group(), match.start())  # pyright: ignore[reportArgumentType]


def open_brackets(text: str, end: int) -> list[Part]:
    """The brackets that are open at offset `end`, outermost first. A wrong closing bracket closes nothing."""
    stack: list[Part] = []
    for part in parts(text):
        if part.start >= end:
            break
        if part.kind == "bracket":
            if part.text in CLOSING:
                stack.append(part)
            elif stack and CLOSING[stack[-1].text] == part.text:
                stack.pop()
    return stack


def statement_starts(text: str) -> list[int]:
    """Offsets at which a line starts outside brackets and strings, in order; the end of the text is the last one."""
    starts = [0]
    depth = 0
    for part in parts(text):
        if part.kind == "bracket":
            depth = depth + 1 if part.text in CLOSING else max(0, depth - 1)
        elif part.kind == "newline" and depth == 0:
            starts.append(part.end)
    if starts[-1] != len(text):
        starts.append(len(text))
    return starts
