"""Which argument of a call belongs to which parameter."""

from __future__ import annotations

from dataclasses import dataclass

from attncc.check.reporter import Reporter
from attncc.check.type_errors import WrongArguments
from attncc.syntax import nodes


@dataclass(frozen=True, slots=True)
class Bound:
    """Arguments by parameter, in the order of the parameters; `is_right` is false where the call was reported."""

    arguments: tuple[tuple[str, nodes.Expression], ...]
    is_right: bool


def bind(
    call: nodes.Call, parameters: tuple[str, ...], optional: frozenset[str], signature: str, reporter: Reporter
) -> Bound:
    """Binds a call's arguments by place, then by name."""
    problem = ""
    bound: dict[str, nodes.Expression] = dict(zip(parameters, call.arguments, strict=False))
    if len(call.arguments) > len(parameters):
        problem = f"`{call.function}` takes {_count(len(parameters))}, found {len(call.arguments)}"
    for keyword in call.keywords:
        if keyword.name not in parameters:
            problem = problem or f"`{call.function}` has no argument `{keyword.name}`"
        elif keyword.name in bound:
            problem = problem or f"`{call.function}` is given `{keyword.name}` twice"
        else:
            bound[keyword.name] = keyword.value
    missing = [name for name in parameters if name not in bound and name not in optional]
    if missing and not problem:
        names = " and ".join(f"`{name}`" for name in missing)
        problem = f"`{call.function}` lacks {names}"
    if problem:
        reporter.report(WrongArguments(call.span, problem, signature))
    ordered = tuple((name, bound[name]) for name in parameters if name in bound)
    return Bound(ordered, not problem)


def _count(n: int) -> str:
    return "no argument" if n == 0 else "1 argument" if n == 1 else f"{n} arguments"
