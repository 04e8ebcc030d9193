"""Text → syntax tree, or every syntax error in it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attncc.diagnostics import Diagnostic, SpecError
from attncc.resources import folder
from attncc.source import Source
from attncc.syntax import nodes
from attncc.syntax.builder import Builder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lark import Lark, Token, Tree

# After this many syntax errors the rest of the file is left unread.
MAX_ERRORS = 20

# lark's indenter keeps its state in the parser.
_lock = threading.Lock()
_cache_folder: Path | None = None


def use_cache_folder(path: Path | None) -> None:
    """Keeps the parser's tables in a folder: loading them takes a tenth of the time of making them."""
    global _cache_folder  # noqa: PLW0603 - it is a setting of the process
    _cache_folder = path


def parse(source: Source) -> nodes.File:
    """The syntax tree of a file. Raises `SpecError` with all syntax errors."""
    with _lock:
        tree, errors = _parse_tree(source)
    builder = Builder(source)
    file = builder.file(tree) if tree is not None else None
    errors += builder.errors
    if errors or file is None:
        raise SpecError(*errors)
    return file


def _parse_tree(source: Source) -> tuple[Tree[Any] | None, list[Diagnostic]]:
    from lark import UnexpectedInput
    from lark.indenter import DedentError

    text = source.text.rstrip()
    base = _base_indentation(text)
    # A text may be indented as a whole, as one inside a Python program is; the last line break returns to that level.
    text += "\n" + " " * base
    if "\t" in text or "\0" in text:
        from attncc.syntax import recovery

        errors = recovery.forbidden_characters(source)
        if errors:
            return None, errors
    errors: list[Diagnostic] = []
    parser: Any = _lark()
    while True:
        parser.options.postlex.base = base
        try:
            return parser.parse(text), errors
        except (UnexpectedInput, DedentError) as error:
            from attncc.syntax import recovery

            diagnostic, broken = recovery.explain(source, text, error, base)
        errors.append(diagnostic)
        if broken is None or len(errors) == MAX_ERRORS:
            return None, errors
        start, end = broken
        text = text[:start] + "\0" * (end - start) + text[end:]


def _base_indentation(text: str) -> int:
    """The indentation of the first line that is neither blank nor a comment."""
    first = re.search(r"^([ \ufeff]*)[^\s#\ufeff]", text, re.MULTILINE)
    return len(first.group(1).replace("\ufeff", "")) if first else 0


@functools.cache
def _lark() -> Lark:
    import lark
    from lark.indenter import DedentError, Indenter

    class Layout(Indenter):
        """Line breaks and indentation as tokens, from the indentation of the first line on."""

        # lark declares properties, and reads attributes as well.
        NL_type = "_NEWLINE"  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
        OPEN_PAREN_types = ["LPAR", "LSQB"]  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
        CLOSE_PAREN_types = ["RPAR", "RSQB"]  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
        INDENT_type = "_INDENT"  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
        DEDENT_type = "_DEDENT"  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
        tab_len = 8  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
        base = 0

        def handle_NL(self, token: Token) -> Iterator[Token]:  # noqa: N802 - lark calls it so
            before, line = token.rsplit("\n", 1)
            if len(line) < self.base and self.paren_level == 0:
                raise DedentError(line)
            yield from super().handle_NL(token.update(value=f"{before}\n{line[self.base :]}"))

    grammar = (folder("grammar") / "attn.lark").read_text(encoding="utf-8")

    def make(cache: str | bool) -> Lark:
        return lark.Lark(
            grammar,
            parser="lalr",
            lexer="contextual",
            postlex=Layout(),
            propagate_positions=True,
            maybe_placeholders=True,
            cache=cache,
        )

    if _cache_folder is None:
        return make(cache=False)
    key = hashlib.sha256(f"{lark.__version__}\0{sys.version}\0{grammar}".encode()).hexdigest()[:16]
    path = _cache_folder / f"grammar-{key}.lark"
    if _is_whole(path):
        return make(cache=str(path))
    # lark writes in place; another process must see the whole file or none.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    parser = make(cache=str(temporary))
    with contextlib.suppress(OSError):  # A folder that cannot be written to costs time, not correctness.
        with temporary.open("r+b") as file:
            file.write(hashlib.sha256(file.read()).digest())
        temporary.replace(path)
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
    return parser


def _is_whole(path: Path) -> bool:
    """Whether the tables at `path` are those that were written: their digest follows them, where lark reads no more."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]
