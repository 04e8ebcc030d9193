"""Collects errors, and moves those inside expanded definitions to where a reader looks for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

from attncc.diagnostics import Diagnostic, Label, SpecError
from attncc.source import Span


@dataclass(frozen=True, slots=True)
class Expansion:
    """A definition being put in the place of its use."""

    name: str
    use: Span
    in_prelude: bool


class Reporter:
    """The errors found so far.

    `refused` holds definitions (by the span of their name) that were reported already: what uses them is not blamed.
    """

    def __init__(self) -> None:
        self.errors: list[Diagnostic] = []
        self.refused: set[Span] = set()
        self.expansions: list[Expansion] = []
        # Expressions evaluated so far: definitions that use each other twice make exponentially many.
        self.steps = 0

    def report(self, diagnostic: Diagnostic) -> None:
        self.errors.append(self._placed(diagnostic))

    def raise_errors(self) -> None:
        """Raises `SpecError` with every error, if there are any; each once."""
        unique = {(d.code, d.span, d.fill(d.title)): d for d in self.errors}
        if unique:
            raise SpecError(*unique.values())

    @contextmanager
    def expanding(self, expansion: Expansion) -> Generator[None]:
        self.expansions.append(expansion)
        try:
            yield
        finally:
            self.expansions.pop()

    def span_of(self, span: Span) -> Span:
        """The place to blame for something in the text at `span`: its use, where the text is the prelude's."""
        for expansion in reversed(self.expansions):
            if not expansion.in_prelude:
                break
            span = expansion.use
        return span

    def _placed(self, diagnostic: Diagnostic) -> Diagnostic:
        if not self.expansions or diagnostic.span is None:
            return diagnostic
        innermost = self.expansions[-1]
        span = self.span_of(diagnostic.span)
        if span != diagnostic.span:
            inside = Label(diagnostic.span, f"in the definition of `{innermost.name}`")
            return dataclasses.replace(diagnostic, span=span, related=(*diagnostic.related, inside))
        used = Label(self.expansions[0].use, f"`{self.expansions[0].name}` is used here")
        return dataclasses.replace(diagnostic, related=(*diagnostic.related, used))
