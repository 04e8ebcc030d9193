"""The whole pipeline, top to bottom.

    text ─ read ─▶ Source ─ check ─▶ Attention ─ plan ─▶ Program ─ render ─▶ sources ─ compile ─▶ Executable

`build` goes as far as the Attention; the rest waits for the first call, which tells what to specialize for: element
types and head dimensions, never lengths, batch, heads or run-time scalars.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attncc.check import check_source
from attncc.emit.render import render
from attncc.emit.targets import printer_of
from attncc.ir.nodes import Attention
from attncc.plan.build import plan_attention
from attncc.plan.nodes import Program, Specialization, Target
from attncc.runtime import cache
from attncc.runtime.call import CompiledAttention
from attncc.source import Source


def build(
    spec: str | Path,
    *,
    name: str | None = None,
    target: str | None = None,
    templates: Sequence[str | Path] = (),
    **constants: bool | int | float,
) -> CompiledAttention:
    """Compiles an attention variant.

    spec: the path of a file (it ends in `.attn`) or the text of a specification. name: which attention, where the file
    holds several. target: `cpp`, `cpp:avx2`, `triton`, `triton:interpret`, …; by default what suits the device of q at
    each call. templates: folders searched for kernel templates before the project's own. constants: a value for each
    `const` parameter that has no default, or another one.

    Raises SpecError for a mistake in the specification, BuildError where no kernel can be made of it here.
    """
    attention = check(spec, name=name, **constants)
    return CompiledAttention(attention, target, tuple(Path(folder) for folder in templates), sources_of)


def check(spec: str | Path, *, name: str | None = None, **constants: bool | int | float) -> Attention:
    """Parses and checks a specification: the IR of one of its attentions. Arguments and errors as for `build`."""
    source = read(spec)

    def front_end() -> Attention:
        return check_source(source, name=name, constants=constants)

    if "use" in source.text:  # What it says depends on other files too.
        return front_end()
    key = cache.key_of("check", cache.compiler_fingerprint(), source.name, source.text, name, sorted(constants.items()))
    return cache.remember(key, front_end)


def read(spec: str | Path) -> Source:
    """The text of a specification, from a file or as given."""
    if isinstance(spec, Path) or (spec.endswith(".attn") and "\n" not in spec):
        return Source(str(spec), read_text(Path(spec)))
    return Source("<spec>", spec)


def sources_of(
    attention: Attention, specialization: Specialization, target: Target, templates: Sequence[Path] = ()
) -> tuple[Program, tuple[str, ...]]:
    """The kernels of one specialization, and the source text of each."""
    program = plan_attention(attention, specialization, target)
    return program, tuple(render(plan, printer_of(plan, templates), templates) for plan in program.kernels)
