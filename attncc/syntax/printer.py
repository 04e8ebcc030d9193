"""Syntax tree → text, in the one canonical layout.

Four spaces indent; operators stand between blanks; brackets stand where the grammar needs them, and around an `and`
inside an `or`; a line that would be longer than 100 characters is broken inside brackets, before its operators. The
`=` of clauses on neighbouring lines stand below each other, and so do those of `let` lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from attncc.syntax import nodes

WIDTH = 100
# Names that differ more in length are not aligned: the gap would say nothing.
MAX_PADDING = 5
INDENT = "    "

# How tightly each form binds, loosest first.
# After `or` comes a level of its right operand alone: an `and` there gets brackets, one within an `and` does not.
_CONDITIONAL, _OR, _AFTER_OR, _AND, _NOT, _COMPARE = range(6)
_BINARY = {
    "or": _OR,
    "and": _AND,
    "|": 6,
    "^": 7,
    "&": 8,
    "<<": 9,
    ">>": 9,
    "+": 10,
    "-": 10,
    "*": 11,
    "/": 11,
    "//": 11,
    "%": 11,
    "@": 11,
}
_UNARY, _POWER, _POSTFIX, _ATOM = range(12, 16)


def print_file(file: nodes.File) -> str:
    """The text of a file, its items apart by blank lines; `use` lines and definitions stay together."""
    lines: list[str] = []
    previous: nodes.Item | None = None
    for item in file.items:
        together = type(previous) is type(item) and not isinstance(item, nodes.Attention)
        if previous is not None and not together:
            lines.append("")
        lines += item_lines(item)
        previous = item
    return "\n".join(lines) + "\n" if lines else ""


def item_lines(item: nodes.Item) -> list[str]:
    match item:
        case nodes.Use(path=path):
            return [f'use "{path}"']
        case nodes.Define():
            return define_lines(item)
        case nodes.Attention(doc=doc, body=body):
            lines = header_lines(item)
            if doc is not None:
                lines += doc_lines(doc)
            for statement, width in zip(body, name_widths(body, [True] * len(body)), strict=True):
                lines += statement_lines(statement, width)
            return lines
        case _:
            assert_never(item)


def define_lines(define: nodes.Define) -> list[str]:
    head = f"define {define.name}"
    if define.parameters is not None:
        parameters = [
            p.name if p.default is None else f"{p.name}={expression_text(p.default)}" for p in define.parameters
        ]
        head += f"({', '.join(parameters)})"
    return _assigned(head + " = ", define.value, "")


def header_lines(attention: nodes.Attention) -> list[str]:
    """`attention name(parameters):`, one parameter per line where they do not fit on one."""
    parameters = [_parameter(p) for p in attention.parameters]
    line = f"attention {attention.name}({', '.join(parameters)}):"
    if len(line) <= WIDTH or not parameters:
        return [line]
    return [f"attention {attention.name}(", *(f"{INDENT}{p}," for p in parameters), "):"]


def doc_lines(doc: str) -> list[str]:
    """The docstring, indented; on one line where it is one."""
    if "\n" not in doc and not doc.endswith('"'):
        return [f'{INDENT}"""{doc}"""']
    first, *rest = doc.split("\n")
    return [f'{INDENT}"""{first}', *(INDENT + line if line else "" for line in rest), f'{INDENT}"""']


def name_widths(body: Sequence[nodes.Statement], adjoining: Sequence[bool]) -> list[int]:
    """How wide the name of each statement is printed, given whether it stands right below the one before it."""
    runs: list[list[nodes.Statement]] = []
    for statement, adjoins in zip(body, adjoining, strict=True):
        if adjoins and runs and _aligns(statement, runs[-1]):
            runs[-1].append(statement)
        else:
            runs.append([statement])
    return [max(len(_target(member)) for member in run) for run in runs for _ in run]


def _target(statement: nodes.Statement) -> str:
    return statement.target if isinstance(statement, nodes.Clause) else statement.name


def _aligns(statement: nodes.Statement, run: Sequence[nodes.Statement]) -> bool:
    """Whether a statement is of the same sort as those of a run: row transforms, other clauses, `let` lines."""
    if _sort(statement) != _sort(run[-1]) or not _is_short(statement) or not _is_short(run[-1]):
        return False
    lengths = [len(_target(member)) for member in (*run, statement)]
    return max(lengths) - min(lengths) <= MAX_PADDING


def _sort(statement: nodes.Statement) -> tuple[type[nodes.Statement], bool]:
    return type(statement), statement.name in ("q", "k", "v")


def _is_short(statement: nodes.Statement) -> bool:
    return not isinstance(statement, nodes.Later | nodes.Recurrence) and len(statement_lines(statement)) == 1


def statement_lines(statement: nodes.Statement, width: int = 0) -> list[str]:
    """The lines of a statement, its name padded to `width`."""
    match statement:
        case nodes.Let(name=name, value=value):
            return _assigned(f"{INDENT}let {name} = ", value, INDENT, width - len(name))
        case nodes.Clause(target=target, value=value):
            return _assigned(f"{INDENT}{target} = ", value, INDENT, width - len(target))
        case nodes.Recurrence(body=body):
            return recurrence_header_lines() + [line for inner in body for line in recurrence_statement_lines(inner)]
        case nodes.Later(text=text):
            return [INDENT + line if line else "" for line in text.split("\n")]
        case _:
            assert_never(statement)


def recurrence_header_lines() -> list[str]:
    return [f"{INDENT}recurrence:"]


def recurrence_statement_lines(statement: nodes.Let | nodes.Clause | nodes.Update) -> list[str]:
    """The lines of a statement under `recurrence:`. Nothing is aligned there: it is read line by line."""
    indent = 2 * INDENT
    match statement:
        case nodes.Let(name=name, value=value):
            return _assigned(f"{indent}let {name} = ", value, indent)
        case nodes.Clause(name=name, value=value):
            return _assigned(f"{indent}{name} = ", value, indent)
        case nodes.Update(name=name, operator=operator, value=value):
            return _assigned(f"{indent}{name} {operator} ", value, indent)
        case _:
            assert_never(statement)


def _parameter(parameter: nodes.Parameter) -> str:
    text = f"{parameter.name}: {'const ' if parameter.const else ''}{parameter.type.name}"
    if parameter.type.shape is not None:
        text += f"[{', '.join(expression_text(axis) for axis in parameter.type.shape)}]"
    return text if parameter.default is None else f"{text} = {expression_text(parameter.default)}"


def _assigned(head: str, value: nodes.Expression, indent: str, padding: int = 0) -> list[str]:
    flat = head + expression_text(value)
    if len(flat) <= WIDTH:
        # The padding does not count, so that a line is not broken for the sake of its neighbours.
        return [head.replace(" = ", " " * max(0, padding) + " = ") + expression_text(value)]
    lines = _broken(value, indent)
    if lines is None:
        return [flat]
    if isinstance(value, nodes.Call):
        return [head + lines[0].strip(), *lines[1:]]
    return [f"{head}(", *_deeper(value, indent + INDENT), f"{indent})"]


def _deeper(value: nodes.Expression, indent: str) -> list[str]:
    """The expression on lines of this indentation, in one if it fits."""
    flat = indent + expression_text(value)
    if len(flat) <= WIDTH:
        return [flat]
    return _broken(value, indent) or [flat]


def _broken(value: nodes.Expression, indent: str) -> list[str] | None:
    """The expression over several lines that stand inside brackets; None where it has no place to break."""
    match value:
        case nodes.Binary(operator=operator) if operator != "**":
            first, *rest = _chain(value, _BINARY[operator])
            lines = _operand(first[1], indent, _BINARY[operator], "")
            for link, operand in rest:
                lines += _operand(operand, indent, _BINARY[operator] + 1, f"{link} ")
            return lines
        case nodes.Conditional(then=then, condition=condition, otherwise=otherwise):
            return [
                *_operand(then, indent, _OR, ""),
                *_operand(condition, indent, _OR, "if "),
                *_operand(otherwise, indent, _CONDITIONAL, "else "),
            ]
        case nodes.Call(function=function, arguments=arguments, keywords=keywords) if arguments or keywords:
            lines = [f"{indent}{function}("]
            for argument in arguments:
                lines += _listed(argument, indent + INDENT, "")
            for keyword in keywords:
                lines += _listed(keyword.value, indent + INDENT, f"{keyword.name}=")
            return [*lines, f"{indent})"]
        case _:
            return None


def _listed(value: nodes.Expression, indent: str, head: str) -> list[str]:
    """An argument on lines of its own, with a comma after it."""
    lines = _deeper(value, indent + " " * len(head))
    lines[0] = indent + head + lines[0].strip()
    lines[-1] += ","
    return lines


def _operand(value: nodes.Expression, indent: str, least: int, head: str) -> list[str]:
    """An operand of a broken expression after its operator, in brackets where it needs them."""
    if _binding(value) < least or _misleading(value, least):
        flat = f"{indent}{head}({expression_text(value)})"
        broken = _broken(value, indent + INDENT) if len(flat) > WIDTH else None
        return [flat] if broken is None else [f"{indent}{head}(", *broken, f"{indent})"]
    flat = f"{indent}{head}{expression_text(value)}"
    if len(flat) > WIDTH and isinstance(value, nodes.Call):
        broken = _broken(value, indent)
        if broken is not None:
            return [f"{indent}{head}{broken[0].strip()}", *broken[1:]]
    return [flat]


def _chain(value: nodes.Expression, level: int) -> list[tuple[str, nodes.Expression]]:
    """The operands of a chain of operators of one level, each with the operator before it."""
    links: list[tuple[str, nodes.Expression]] = []
    while isinstance(value, nodes.Binary) and _BINARY.get(value.operator) == level:
        links.append((value.operator, value.right))
        value = value.left
    return [("", value), *reversed(links)]


def expression_text(value: nodes.Expression) -> str:
    """The expression on one line."""
    match value:
        case nodes.Name(name=name):
            return name
        case nodes.Number(value=number, text=text):
            return text or repr(number)
        case nodes.Boolean(value=boolean):
            return "true" if boolean else "false"
        case nodes.Unary(operator="not", operand=operand):
            return f"not {_within(operand, _NOT)}"
        case nodes.Unary(operator=operator, operand=operand):
            return f"{operator}{_within(operand, _UNARY)}"
        case nodes.Binary(operator="**", left=left, right=right):
            return f"{_within(left, _POSTFIX)} ** {_within(right, _UNARY)}"
        case nodes.Binary(operator=operator, left=left, right=right):
            level = _BINARY[operator]
            return f"{_within(left, level)} {operator} {_within(right, level + 1)}"
        case nodes.Compare(first=first, rest=rest):
            links = [f" {operator} {_within(operand, _COMPARE + 1)}" for operator, operand in rest]
            return _within(first, _COMPARE + 1) + "".join(links)
        case nodes.Conditional(then=then, condition=condition, otherwise=otherwise):
            return f"{_within(then, _OR)} if {_within(condition, _OR)} else {_within(otherwise, _CONDITIONAL)}"
        case nodes.Call(function=function, arguments=arguments, keywords=keywords):
            texts = [expression_text(argument) for argument in arguments]
            texts += [f"{keyword.name}={expression_text(keyword.value)}" for keyword in keywords]
            return f"{function}({', '.join(texts)})"
        case nodes.Subscript(base=base, indices=indices):
            return f"{_within(base, _POSTFIX)}[{', '.join(_index_texts(indices))}]"
        case nodes.Attribute(base=base, name=name):
            # `1.x` would be read as the number `1.`.
            text = f"({expression_text(base)})" if isinstance(base, nodes.Number) else _within(base, _POSTFIX)
            return f"{text}.{name}"
        case _:
            assert_never(value)


def _index_texts(indices: Sequence[nodes.Expression | nodes.FullSlice]) -> list[str]:
    return [":" if isinstance(index, nodes.FullSlice) else expression_text(index) for index in indices]


def _within(value: nodes.Expression, least: int) -> str:
    """The text of a part where forms that bind at least so tightly need no brackets."""
    text = expression_text(value)
    return f"({text})" if _binding(value) < least or _misleading(value, least) else text


def _misleading(value: nodes.Expression, least: int) -> bool:
    """Whether the grammar needs no brackets but a reader does: `a or b and c`."""
    return isinstance(value, nodes.Binary) and value.operator == "and" and least in (_OR, _AFTER_OR)


def _binding(value: nodes.Expression) -> int:
    """How tightly the outermost form of an expression binds."""
    match value:
        case nodes.Name() | nodes.Number() | nodes.Boolean() | nodes.Call():
            return _ATOM
        case nodes.Subscript() | nodes.Attribute():
            return _POSTFIX
        case nodes.Unary(operator=operator):
            return _NOT if operator == "not" else _UNARY
        case nodes.Binary(operator=operator):
            return _POWER if operator == "**" else _BINARY[operator]
        case nodes.Compare():
            return _COMPARE
        case nodes.Conditional():
            return _CONDITIONAL
        case _:
            assert_never(value)
