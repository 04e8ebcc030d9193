"""Renders a plan through the template of its kernel and target.

The template `<family>/<kernel>.<extension>.jinja` is looked up in the user's folders first, then in the project's own,
so that a folder with one file in it replaces one kernel. A family that is based on another falls back to its templates.
A name that begins with `attncc/` is always the project's own: what a template replaces can still be included.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Protocol

from jinja2 import (
    BytecodeCache,
    ChoiceLoader,
    Environment,
    FileSystemLoader,
    PrefixLoader,
    StrictUndefined,
    TemplateError,
    TemplateSyntaxError,
)
from jinja2.bccache import Bucket

from attncc.diagnostics import AttnError, BuildError
from attncc.emit.errors import BrokenTemplate
from attncc.plan.nodes import KernelPlan, Target
from attncc.resources import folder


class Printer(Protocol):
    """Spells IR expressions in a target's language."""

    extension: str

    def filters(self) -> Mapping[str, Callable[..., object]]:
        """The Jinja filters through which a template prints the plan's expressions and asks about it."""
        ...


def render(plan: KernelPlan, printer: Printer, templates: Sequence[Path] = ()) -> str:
    """The source of the kernel that `plan` describes. Raises BuildError where its template cannot be rendered."""
    file = f"{plan.kernel}.{printer.extension}.jinja"
    return fill(file, plan, plan.name, plan.target, printer.filters(), templates)


def fill(
    file: str,
    plan: object,
    name: str,
    target: Target,
    filters: Mapping[str, Callable[..., object]],
    templates: Sequence[Path],
) -> str:
    """The template `file` of the target's family, or of the family that it is based on, with `plan` as its variable."""
    own = FileSystemLoader(folder("templates"))
    environment = Environment(
        loader=ChoiceLoader([FileSystemLoader(list(templates)), own, PrefixLoader({"attncc": own})]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
        bytecode_cache=_COMPILED,
    )
    environment.filters.update(filters)
    names = [f"{target.family}/{file}", f"{target.backend}/{file}"]
    try:
        return environment.select_template(names).render(plan=plan)
    except AttnError:
        raise
    except Exception as error:
        places = _places(error)
        theirs = [place for place in places if any(Path(place[0]).is_relative_to(root) for root in templates)]
        # What a filter of ours says of the arguments that our own templates pass to it is no mistake of the user's.
        if not isinstance(error, TemplateError) and not theirs:
            raise
        file, line = (theirs or places or [(names[0], 1)])[-1]
        reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise BuildError(BrokenTemplate(None, name, f"{file}:{line}", reason)) from error


def _places(error: Exception) -> list[tuple[str, int]]:
    """File and line in each template that was being rendered when an error arose, innermost last."""
    if isinstance(error, TemplateSyntaxError) and error.filename is not None:
        return [(error.filename, error.lineno)]
    frames = traceback.extract_tb(error.__traceback__)
    return [(frame.filename, frame.lineno or 1) for frame in frames if frame.filename.endswith(".jinja")]


class _Compiled(BytecodeCache):
    """Templates compiled to Python, by their text: every plan has an environment of its own, with its own filters."""

    def __init__(self) -> None:
        self._codes: dict[tuple[str, str], CodeType] = {}

    def load_bytecode(self, bucket: Bucket) -> None:
        bucket.code = self._codes.get((bucket.key, bucket.checksum))

    def dump_bytecode(self, bucket: Bucket) -> None:
        assert bucket.code is not None
        self._codes[bucket.key, bucket.checksum] = bucket.code


_COMPILED = _Compiled()
