"""Errors in definitions, whether or not anything uses them."""

from __future__ import annotations

from attncc.check import suggest
from attncc.check.expressions import Scope
from attncc.check.functions import is_builtin
from attncc.check.modules import Module
from attncc.check.name_errors import UnknownFunction, UnknownName
from attncc.check.reporter import Reporter
from attncc.check.values import UNKNOWN
from attncc.check.world import WORLD
from attncc.diagnostics import Diagnostic, Label
from attncc.syntax import nodes
from attncc.syntax.walk import walk


def check_definitions(module: Module, reporter: Reporter) -> None:
    """Reports names in the definitions of a module, and of those that it uses, that mean nothing there.

    Kinds are checked where a definition is used, since they depend on its arguments. One that is reported here is not
    expanded, so that its error shows once.
    """
    checked: set[int] = set()
    pending = [module]
    while pending:
        current = pending.pop()
        if current.is_prelude or id(current) in checked:
            continue
        checked.add(id(current))
        pending.extend(current.visible)
        for define in current.defines.values():
            errors = _unknown(define, current)
            for error in errors:
                reporter.report(error)
            if errors:
                reporter.refused.add(define.name_span)


def _unknown(define: nodes.Define, module: Module) -> list[Diagnostic]:
    scope = Scope(module, "in this definition")
    scope.declared = {p.name: p.span for p in define.parameters or ()}
    scope.values = dict.fromkeys(scope.declared, UNKNOWN)
    errors: list[Diagnostic] = []
    defaults = [p.default for p in define.parameters or () if p.default is not None]
    for expression in (define.value, *defaults):
        for node in walk(expression):
            match node:
                case nodes.Name(name=name) if name not in scope.values and name not in WORLD:
                    if module.find(name) is None and not is_builtin(name):
                        errors.append(_unknown_name(node, scope, module))
                case nodes.Call(function=name) if module.find(name) is None and not is_builtin(name):
                    if name not in scope.values and name not in WORLD:
                        hint = suggest.function(name, scope)
                        errors.append(UnknownFunction(node.function_span, name, hint))
                case _:
                    pass
    return errors


def _unknown_name(node: nodes.Name, scope: Scope, module: Module) -> Diagnostic:
    hint, declared = suggest.value(node.name, scope)
    related = () if declared is None else (Label(declared[1], f"`{declared[0]}` is declared here"),)
    outer = [a for a in module.file.attentions if any(p.name == node.name for p in a.parameters)]
    if outer:
        hint = "a definition does not see the parameters of attentions: give it one of its own, and pass the value"
        parameter = next(p for p in outer[0].parameters if p.name == node.name)
        related = (Label(parameter.name_span, f"a parameter of `{outer[0].name}`"),)
    return UnknownName(node.span, node.name, scope.where, hint, related=related)
