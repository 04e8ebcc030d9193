"""`check`, `fmt` and `explain`. Formatting, and looking up an error code, start without PyTorch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from attncc.build import read
from attncc.commands.output import say, write
from attncc.diagnostics import AttnError, CallError, explain_code
from attncc.errors import UnknownCode
from attncc.syntax import format_source


def check(arguments: argparse.Namespace) -> int:
    """Every attention of every file, and all errors of all files."""
    from attncc.check.specification import check_all, check_source

    def names(path: str) -> list[str]:
        source, constants = read(Path(path)), dict(arguments.set)
        if arguments.name is None:
            return list(check_all(source, constants))
        return [check_source(source, name=arguments.name, constants=constants).name]

    errors: list[AttnError] = []
    for path in arguments.files:
        try:
            for name in names(path):
                print(f"{path}: {name}: ok")
        except AttnError as error:
            errors.append(error)
    for error in errors:
        print(error, end="\n\n", file=sys.stderr)
    return 1 if errors else 0


def fmt(arguments: argparse.Namespace) -> int:
    """Rewrites files in the one form; with --check only says which would change."""
    errors: list[AttnError] = []
    changed: list[str] = []
    for path in arguments.files:
        try:
            source = read(Path(path))
            text = format_source(source)
            if text != source.text:
                changed.append(path)
                if not arguments.check:
                    write(Path(path), text)
        except AttnError as error:
            errors.append(error)
    for path in changed:
        say(f"{path}: would be reformatted" if arguments.check else f"{path}: reformatted")
    for error in errors:
        print(error, end="\n\n", file=sys.stderr)
    return 1 if errors or (arguments.check and changed) else 0


def explain(arguments: argparse.Namespace) -> int:
    """An error code, or what the compiler found out about a specification and chose for it."""
    what: str = arguments.what
    if not what.endswith(".attn") and not Path(what).exists():
        text = explain_code(what)
        if text is None:
            raise CallError(UnknownCode(None, what))
        print(text)
        return 0
    from attncc.commands.common import load
    from attncc.ir.recurrence import Recurrence

    loaded = load(what, arguments.name, dict(arguments.set))
    if isinstance(loaded.attention, Recurrence) and arguments.png is None:
        from attncc.explain_recurrence import explain_recurrence

        print(explain_recurrence(read(Path(what)).text, loaded.attention))
        return 0
    attn = loaded.compiled(arguments.target, arguments.templates)
    if arguments.png is None:
        from attncc.ir.types import DType
        from attncc.runtime.arguments import TORCH_DTYPES

        head_dim, head_dim_v = arguments.head_dim
        dtype = TORCH_DTYPES[DType(arguments.dtype)]
        print(attn.explain(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim_v))
        return 0
    from attncc.commands.drawing import draw

    draw(loaded, arguments)
    return 0
