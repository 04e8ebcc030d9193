"""Errors that a user can cause: what they say, where they point, and how they look.

To add an error kind, declare one frozen dataclass in a module named `errors.py` or `…_errors.py` of the package that
raises it:

    @dataclass(frozen=True, slots=True)
    class WrongHeads(Diagnostic):
        code = "A0603"                                      # A01 syntax, A02 names, A03 types and shapes, A04 what no
        title = "`{tensor}` has {found} heads"              # algorithm can do, A05 toolchain and device, A06 calls
        label = "declared with {expected} heads here"       # beside the caret; unused where there is no span
        help = "pass a tensor with {expected} heads"        # or override `helps()` for none, several, or a choice
        explanation = "A paragraph for `attncc explain A0603`."
        bad = "attn(q, k, v, bias=torch.zeros(3, 8, 8))"    # an example of the mistake …
        good = "attn(q, k, v, bias=torch.zeros(4, 8, 8))"   # … and the same one mended

        tensor: str
        found: int
        expected: str

and raise it, alone or with every other independent one that was found:

    raise CallError(WrongHeads(span, "bias", 3, "H"), …)

`span` is the first field of every kind; None where no spec text is to blame. Texts are templates over the fields.
More places worth showing are given as `related=(Label(span, "`window` is declared here"),)`.
A test checks that each code has its example; those of specs (A01 to A04) also have a golden in `tests/errors/`.
"""

from __future__ import annotations

import importlib
import pkgutil
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar

from attncc.source import Source, Span


@dataclass(frozen=True, slots=True)
class Label:
    """A second place that an error shows, and a few words about it."""

    span: Span
    text: str


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One error. Subclasses fill in the class-level texts, which are `str.format` templates over the fields."""

    code: ClassVar[str] = ""
    title: ClassVar[str] = ""
    label: ClassVar[str] = ""
    help: ClassVar[str] = ""
    explanation: ClassVar[str] = ""
    bad: ClassVar[str] = ""
    good: ClassVar[str] = ""

    span: Span | None
    related: tuple[Label, ...] = field(default=(), kw_only=True)

    def __init_subclass__(cls) -> None:
        if cls.code:
            known = _KINDS.setdefault(cls.code, cls)
            # `slots=True` builds each class twice; the second one replaces the first.
            if known.__qualname__ != cls.__qualname__ or known.__module__ != cls.__module__:
                raise TypeError(f"{cls.__qualname__} reuses the code {cls.code} of {known.__qualname__}")
            _KINDS[cls.code] = cls

    def fill(self, template: str) -> str:
        """The template with this error's fields in it."""
        return template.format_map({f.name: getattr(self, f.name) for f in fields(self)})

    def helps(self) -> tuple[str, ...]:
        """The help lines: by default the class's `help`, if there is one."""
        return (self.fill(self.help),) if self.help else ()

    def __str__(self) -> str:
        return render(self)


_KINDS: dict[str, type[Diagnostic]] = {}


class AttnError(Exception):
    """A mistake in a spec, a build or a call, with every independent error that was found, in source order."""

    def __init__(self, *diagnostics: Diagnostic) -> None:
        self.diagnostics = tuple(sorted(diagnostics, key=_order))
        super().__init__(*self.diagnostics)

    def __str__(self) -> str:
        return "\n\n".join(render(d) for d in self.diagnostics)


class SpecError(AttnError):
    """The specification is wrong."""


class BuildError(AttnError):
    """The specification is right, but no kernel could be made of it here."""


class CallError(AttnError):
    """A kernel was called with arguments that do not fit its specification."""


def render(diagnostic: Diagnostic) -> str:
    """The error as the user reads it: code and title, the lines of the spec with carets, and help."""
    lines = [f"error[{diagnostic.code}]: {diagnostic.fill(diagnostic.title)}"]
    gutter = 1
    if diagnostic.span is not None:
        marks = [_Mark(diagnostic.span, diagnostic.fill(diagnostic.label), "^")]
        marks += [_Mark(label.span, label.text, "-") for label in diagnostic.related]
        gutter = max(len(str(mark.line)) for mark in marks)
        # The blamed file first, then the others in the order in which they are named.
        sources = list(dict.fromkeys(id(mark.span.source) for mark in marks))
        for i, source in enumerate(sources):
            lines += _excerpt([m for m in marks if id(m.span.source) == source], gutter, "-->" if i == 0 else ":::")
    helps = diagnostic.helps()
    if helps and diagnostic.span is not None:
        lines.append(" " * (gutter + 1) + "|")
    for text in helps:
        first, *rest = text.split("\n")
        lines.append(" " * (gutter + 1) + "= help: " + first)
        lines += [" " * (gutter + 1) + "        " + line for line in rest]
    return "\n".join(line.rstrip() for line in lines)


def explain_code(code: str) -> str | None:
    """What an error code means, with a bad example and the mended one; None if there is no such code."""
    kind = all_kinds().get(code.upper())
    if kind is None:
        return None
    names = {f.name: f.name.upper() for f in fields(kind)}
    parts = [f"{kind.code}: {kind.title.format_map(names)}", kind.explanation]
    if kind.bad:
        parts += ["Wrong:", _indented(kind.bad)]
    if kind.good:
        parts += ["Right:", _indented(kind.good)]
    return "\n\n".join(parts)


def all_kinds() -> dict[str, type[Diagnostic]]:
    """Every error kind by its code, those of modules that were not needed so far among them."""
    import attncc

    for module in pkgutil.walk_packages(attncc.__path__, "attncc."):
        if module.name.endswith("errors"):
            importlib.import_module(module.name)
    return dict(sorted(_KINDS.items()))


@dataclass(frozen=True, slots=True)
class _Mark:
    """A span to underline: the caret line under the line where it starts."""

    span: Span
    text: str
    stroke: str

    @property
    def line(self) -> int:
        return self.span.source.position(self.span.start)[0]

    def underline(self) -> str:
        """The caret line. Columns are those of a terminal: wide characters count twice."""
        _, column = self.span.source.position(self.span.start)
        text = self.span.source.line(self.line)
        start = column - 1
        end = max(start + 1, min(len(text), start + self.span.end - self.span.start))
        width = max(1, _width(text[start:end]))
        return (" " * _width(text[:start]) + self.stroke * width + " " + self.text).rstrip()


def _excerpt(marks: Sequence[_Mark], gutter: int, arrow: str) -> list[str]:
    """The marked lines of one source under a line that names the place of the first mark."""
    source: Source = marks[0].span.source
    empty = " " * (gutter + 1) + "|"
    result = [f"{' ' * gutter}{arrow} {marks[0].span}", empty]
    previous: int | None = None
    for number in sorted({mark.line for mark in marks}):
        if previous is not None and number > previous + 1:
            result.append("...")
        result.append(f"{number:>{gutter}} | {source.line(number).expandtabs(1)}".rstrip())
        here = [mark for mark in marks if mark.line == number]
        result += [f"{empty} {mark.underline()}" for mark in here]
        previous = number
    return result


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


def _indented(text: str) -> str:
    return "\n".join("    " + line if line else line for line in text.strip("\n").split("\n"))


def _order(diagnostic: Diagnostic) -> tuple[str, int]:
    span = diagnostic.span
    return ("", -1) if span is None else (span.source.name, span.start)
