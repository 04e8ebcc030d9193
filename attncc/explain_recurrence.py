"""`explain` of a recurrence: its statements as they were understood, and its normal form."""

from __future__ import annotations

from collections.abc import Iterator

from attncc.ir.nodes import Expr, Size
from attncc.ir.recurrence import Recurrence
from attncc.ir.text import to_text
from attncc.passes.normal_form import NormalForm, Sequential, logged, normal_form
from attncc.passes.simplify import simplify_expr
from attncc.passes.updates import update_form

_SIDES = {
    "none": "none",
    "scalar": "one number for the whole state",
    "key": "by key channel",
    "value": "by value channel",
}


# What runs.
_SEQUENTIAL = (
    "forward    the statements as they stand, token by token; a thread (C++) or program (Triton) holds a head's state",
    "backward   the same statements in PyTorch, token by token, from the state of every sqrt(N)-th token",
)


def explain_recurrence(spec_text: str, recurrence: Recurrence) -> str:
    """The specification, its statements, their normal form, and the kernel."""
    form = normal_form(recurrence)
    sections = [
        ("Specification", spec_text.strip().splitlines()),
        ("Meaning", to_text(recurrence).strip().splitlines()[1:]),
        ("Normal form", list(_none(form) if isinstance(form, Sequential) else _lines(recurrence, form))),
        ("Kernel", list(_SEQUENTIAL if isinstance(form, Sequential) else _core(form))),
    ]
    return "\n\n".join(f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in sections) + "\n"


def _none(form: Sequential) -> Iterator[str]:
    yield f"none: {form.why}"
    if form.span is not None:
        yield f"at {form.span}: {form.span.text.strip()}"


def _core(form: NormalForm) -> Iterator[str]:
    yield "core       in chunks of tokens, only the state passed on from each to the next; a step token by token"
    for update in update_form(form).updates:
        does = "written and erased" if update.value and update.erase else "written" if update.value else "erased"
        yield f"           one product along a key, by which is {does}"
    for x in logged(form.decay):
        outside = "<= 0" if x.base else "< 0, or is 0 and has a gradient"
        yield f"but        token by token, slowly, where {_text(x.value)} {outside}"


def _lines(recurrence: Recurrence, form: NormalForm) -> Iterator[str]:
    if recurrence.key_width != Size("D"):
        yield f"keys    {_text(recurrence.key_width)} channels"
    if recurrence.bidirectional:
        yield "order   all tokens; then every query reads what they have left"
    decayed = "S" if form.side == "none" else "S~"
    yield f"decay   {_SIDES[form.side]}" + (
        "" if form.side == "none" else f": S~ = exp(g) * S, g = {_text(form.log_decay)}"
    )
    for erase in form.erases:
        yield f"erase   S' -= r (e . {'S' if erase.before else decayed})"
        yield f"        e = {_text(erase.e)}"
        same = any(erase.r == write.key for write in form.writes)
        yield f"        r = {_text(erase.r)}" + (", the key of a write" if same else "")
    for write in form.writes:
        yield "write   S' += key value"
        yield f"        key = {_text(write.key)}"
        yield f"        value = {_text(write.value)}"
    yield f"read    query . {'S, before' if form.read == 'pre' else chr(39).join(('S', ', after'))} the update"
    yield f"        query = {_text(form.query)}"
    if form.gate is not None:
        yield f"gate    {_text(form.gate)}, times what is read"
    if form.bonus is not None:
        yield f"bonus   {_text(form.bonus)}, added to what is read"
    if recurrence.normalizer == "sum":
        yield "divide  by the same of ones in the place of v, one more value channel; 0 where that is 0"


def _text(expr: Expr) -> str:
    return to_text(simplify_expr(expr))
