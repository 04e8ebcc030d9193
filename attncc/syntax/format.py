"""`attncc fmt`: a file in the canonical layout, with its comments and the blank lines between its parts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from attncc.syntax import nodes
from attncc.syntax.lexical import parts
from attncc.syntax.parser import parse
from attncc.syntax.printer import (
    INDENT,
    define_lines,
    doc_lines,
    header_lines,
    item_lines,
    name_widths,
    recurrence_header_lines,
    recurrence_statement_lines,
    statement_lines,
)

if TYPE_CHECKING:
    from attncc.source import Source, Span


@dataclass(frozen=True, slots=True)
class Piece:
    """Lines that belong together and the stretch of the source [start, end) that they stand for.

    `apart` puts a blank line before them whatever the source has; `joined` leaves out one that it has.
    """

    start: int
    end: int
    lines: list[str]
    indent: str = ""
    apart: bool = False
    joined: bool = False


@dataclass(frozen=True, slots=True)
class Comment:
    start: int
    end: int
    text: str


def format_source(source: Source) -> str:
    """The text of a file as `attncc fmt` writes it. Raises `SpecError` where it cannot be read."""
    file = parse(source)
    pieces: list[Piece] = []
    for i, item in enumerate(file.items):
        pieces += _pieces(item, source.text, new_sort=i > 0 and type(item) is not type(file.items[i - 1]))
    comments = [
        Comment(part.start, part.end, part.text.rstrip())
        for part in parts(source.text)
        if part.kind == "comment" and not _inside_later(part.start, file)
    ]
    return _Weaver(source.text, comments).weave(pieces)


def _pieces(item: nodes.Item, text: str, *, new_sort: bool) -> list[Piece]:
    """The pieces of an item; `new_sort` where the one before it is of another sort."""
    match item:
        case nodes.Attention(body=body, doc=doc, doc_span=doc_span):
            pieces = [_piece(item.header_span, header_lines(item), apart=True)]
            if doc is not None and doc_span is not None:
                pieces.append(_piece(doc_span, doc_lines(doc), INDENT, joined=True))
            ends = [item.header_span.end, *(statement.span.end for statement in body)]
            # Comments inside a statement come to stand above it.
            adjoining = [
                text.count("\n", end, statement.span.start) == 1 and "#" not in statement.span.text
                for end, statement in zip(ends, body, strict=False)
            ]
            for i, (statement, width) in enumerate(zip(body, name_widths(body, adjoining), strict=True)):
                first = i == 0 and doc is None
                if isinstance(statement, nodes.Recurrence):
                    pieces += _recurrence_pieces(statement, joined=first)
                else:
                    pieces.append(_piece(statement.span, statement_lines(statement, width), INDENT, joined=first))
            return pieces
        case nodes.Define():
            return [_piece(item.span, define_lines(item), apart=new_sort)]
        case nodes.Use():
            return [_piece(item.span, item_lines(item), apart=new_sort)]


def _recurrence_pieces(recurrence: nodes.Recurrence, *, joined: bool) -> list[Piece]:
    """The first line and each statement: comments between them stay there."""
    pieces = [_piece(recurrence.header_span, recurrence_header_lines(), INDENT, joined=joined)]
    for i, statement in enumerate(recurrence.body):
        pieces.append(_piece(statement.span, recurrence_statement_lines(statement), 2 * INDENT, joined=i == 0))
    return pieces


def _piece(span: Span, lines: list[str], indent: str = "", *, apart: bool = False, joined: bool = False) -> Piece:
    return Piece(span.start, span.end, lines, indent, apart, joined)


def _inside_later(offset: int, file: nodes.File) -> bool:
    """Whether a place lies in a clause that is kept as it stands."""
    return any(
        statement.span.start <= offset < statement.span.end
        for attention in file.attentions
        for statement in attention.body
        if isinstance(statement, nodes.Later)
    )


class _Weaver:
    """Puts comments between and behind pieces, in the order of the source."""

    def __init__(self, text: str, comments: list[Comment]) -> None:
        self.text = text
        self.comments = comments
        self.lines: list[str] = []
        # Where in the source the last thing written ended, and whether it stood at the top level.
        self.end = 0
        self.at_top = True

    def weave(self, pieces: list[Piece]) -> str:
        for piece in pieces:
            leading = self._take(piece.start)
            inner = self._take(piece.end)
            trailing = self._trailing(piece.end)
            # The end of the attention above: up to the first comment that is not indented.
            closing = [] if piece.indent else list(takewhile(self._is_deeper, leading))
            before = leading[len(closing) :]
            for comment in closing:
                self._comment(comment, INDENT)
            for i, comment in enumerate((*before, *inner)):
                self._comment(comment, piece.indent, apart=i == 0 and self._needs_blank(piece), joined=piece.joined)
            alone = not before and not inner
            self._blank(piece.start, apart=alone and self._needs_blank(piece), joined=piece.joined or bool(inner))
            self.lines += piece.lines
            if trailing is not None:
                self.lines[-1] += f"  {trailing.text}"
            self.end = piece.end if trailing is None else trailing.end
            self.at_top = not piece.indent
        for comment in self._take(len(self.text) + 1):
            self._comment(comment, INDENT if self._is_deeper(comment) else "")
        return "\n".join(self.lines) + "\n" if self.lines else ""

    def _needs_blank(self, piece: Piece) -> bool:
        """An attention stands apart from what comes before it, and everything at the top level from an attention."""
        return piece.apart or (not piece.indent and not self.at_top)

    def _is_deeper(self, comment: Comment) -> bool:
        """Whether a comment on a line of its own belongs to the attention above it."""
        column = comment.start - (self.text.rfind("\n", 0, comment.start) + 1)
        return not self.at_top and column > self._base()

    def _base(self) -> int:
        first = next((line for line in self.text.split("\n") if line.strip() and line.strip()[0] != "#"), "")
        return len(first) - len(first.lstrip())

    def _take(self, end: int) -> list[Comment]:
        """The comments that start before a place and were not written yet."""
        taken = [comment for comment in self.comments if comment.start < end]
        self.comments = self.comments[len(taken) :]
        return taken

    def _trailing(self, end: int) -> Comment | None:
        """The comment behind what ends at a place, on the same line."""
        if self.comments and "\n" not in self.text[end : self.comments[0].start]:
            return self.comments.pop(0)
        return None

    def _comment(self, comment: Comment, indent: str, *, apart: bool = False, joined: bool = False) -> None:
        self._blank(comment.start, apart=apart, joined=joined)
        self.lines.append(indent + comment.text)
        self.end = comment.end
        self.at_top = not indent

    def _blank(self, start: int, *, apart: bool, joined: bool = False) -> None:
        """A blank line before what starts at a place, where one is due or the source has some."""
        if not self.lines:
            return
        has_blank = self.text.count("\n", self.end, start) > 1
        if apart or (has_blank and not joined):
            self.lines.append("")
