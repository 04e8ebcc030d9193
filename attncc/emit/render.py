"""Renders a plan through the template of its kernel and target.

The template `<family>/<kernel>.<extension>.jinja` is looked up in the user's folders first, then in the project's own,
so that a folder with one file in it replaces one kernel. A family that is based on another falls back to its templates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError, TemplateSyntaxError

from attncc.diagnostics import BuildError
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
    environment = Environment(
        loader=FileSystemLoader([*templates, folder("templates")]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters.update(filters)
    names = [f"{target.family}/{file}", f"{target.backend}/{file}"]
    try:
        return environment.select_template(names).render(plan=plan)
    except TemplateError as error:
        line = f":{error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        where = getattr(error, "filename", None) or getattr(error, "name", None) or names[0]
        raise BuildError(BrokenTemplate(None, name, f"{where}{line}", str(error))) from error
