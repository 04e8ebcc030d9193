"""The whole pipeline, top to bottom.

    text ─ read ─▶ Source ─ check ─▶ Attention ─ plan ─▶ Program ─ render ─▶ sources ─ compile ─▶ Executable

`build` goes as far as the Attention; the rest waits for the first call, which tells what to specialize for: element
types and head dimensions, never lengths, batch, heads or run-time scalars. Both halves are kept in the cache folder;
what a step needs (PyTorch, a template engine, the printers) is imported only when it has to run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attncc.diagnostics import CallError, SpecError
from attncc.emit.families import BACKENDS, template_folders
from attncc.errors import CannotReadSpec, PassedByPosition
from attncc.ir.nodes import Attention
from attncc.ir.recurrence import Recurrence, Specification
from attncc.plan.nodes import Specialization, Target
from attncc.runtime import cache
from attncc.source import Source
from attncc.syntax import parse, use_cache_folder

if TYPE_CHECKING:
    from attncc.runtime.call import CompiledAttention
    from attncc.runtime.kernels import BackwardSources, Sources
    from attncc.runtime.operator import Variant
    from attncc.runtime.recurrent import RecurrentAttention


def build(
    spec: str | Path | Source,
    *extra: object,
    name: str | None = None,
    target: str | None = None,
    templates: str | Path | Sequence[str | Path] = (),
    **constants: bool | int | float,
) -> CompiledAttention | RecurrentAttention:
    """Compiles an attention variant.

    spec: the path of a file (it ends in `.attn`) or the text of a specification. name: which attention, where the file
    holds several. target: `cpp`, `cpp:avx2`, `triton`, `triton:interpret`, …; by default what suits the device of q at
    each call. templates: a folder or several, searched for templates before the project's own. constants: a value
    for each `const` parameter that has no default, or another one.

    Raises SpecError for a mistake in the specification, BuildError where no kernel can be made of it here.
    """
    from attncc.runtime.call import CompiledAttention
    from attncc.runtime.recurrent import RecurrentAttention
    from attncc.runtime.targets import known_target

    source = spec if isinstance(spec, Source) else read(spec)
    if extra:
        raise CallError(PassedByPosition(None, "attncc.build", "the specification", _keyword_for(extra[0], source)))
    attention = check(source, name=name, **constants)
    folders = template_folders(templates)
    if target is not None:
        known_target(target, folders)
    named = folders[: len(folders) - len(template_folders(()))]
    recipe = _recipe(source, name, target, named, constants)
    if isinstance(attention, Recurrence):
        return RecurrentAttention(attention, source.text, target, folders, from_recipe, recipe)
    register_operators()
    make = (sources_of, backward_sources_of, from_recipe)
    return CompiledAttention(attention, source.text, target, folders, *make, recipe)


def register_operators() -> None:
    """Registers `torch.ops.attncc` with PyTorch. `build` does so too: only a process that runs programs exported
    elsewhere, and builds nothing itself, has to ask for it."""
    from attncc.runtime.operator import use_builder

    use_builder(_variant_of)


def _recipe(
    source: Source,
    name: str | None,
    target: str | None,
    folders: Sequence[Path],
    constants: Mapping[str, bool | int | float],
) -> str:
    """A text that says what to build, to any process that has the same folders of templates."""
    if "use" in source.text:
        from attncc.check.modules import self_contained

        source = self_contained(source)
    parts = {
        "file": source.name,
        "text": source.text,
        "used": source.used or (),
        "name": name,
        "target": target,
        "templates": [str(folder.resolve()) for folder in folders],
        "constants": dict(constants),
    }
    # A constant may be a number of numpy's.
    return json.dumps({key: part for key, part in parts.items() if part}, default=lambda number: number.item())


def from_recipe(recipe: str) -> CompiledAttention | RecurrentAttention:
    """What `build` has made, anew: in another process, say."""
    parts = json.loads(recipe)
    source = Source(parts["file"], parts["text"], tuple(tuple(file) for file in parts.get("used", ())))
    return build(
        source,
        name=parts.get("name"),
        target=parts.get("target"),
        templates=parts.get("templates", ()),
        **parts.get("constants", {}),
    )


def _variant_of(recipe: str) -> Variant:
    from attncc.runtime.call import CompiledAttention

    built = from_recipe(recipe)
    assert isinstance(built, CompiledAttention), "recurrences are no operators"
    return built.dropped if json.loads(recipe).get("dropout") else built.variant


def _keyword_for(value: object, source: Source) -> str:
    """What to write in place of an argument that was passed to `build` without its name."""
    if isinstance(value, str):
        keyword = "target" if value.partition(":")[0] in BACKENDS else "name"
        return f"write attncc.build(spec, {keyword}={value!r})"
    constants = [p.name for attention in parse(source).attentions for p in attention.parameters if p.const]
    if constants and isinstance(value, int | float):
        return f"write attncc.build(spec, {constants[0]}={value!r})"
    return "its keywords are name, target, templates and the `const` parameters; all others are given at each call"


def check(spec: str | Path | Source, *, name: str | None = None, **constants: bool | int | float) -> Specification:
    """Parses and checks a specification: the IR of one of its attentions. Arguments and errors as for `build`."""
    source = spec if isinstance(spec, Source) else read(spec)

    def front_end() -> Specification:
        from attncc.check.specification import check_source

        with contextlib.suppress(OSError):  # Without a place to write to it takes longer.
            use_cache_folder(cache.folder())
        return check_source(source, name=name, constants=constants)

    if "use" in source.text:  # What it says depends on other files too.
        return front_end()
    key = cache.key_of("check", cache.compiler_fingerprint(), source.name, source.text, name, sorted(constants.items()))
    return cache.remember(key, front_end)


def read(spec: str | Path) -> Source:
    """The text of a specification, from a file or as given. Raises SpecError where the file cannot be read."""
    if isinstance(spec, str) and ("\n" in spec or not spec.endswith(".attn")):
        if len(spec.split()) == 1:
            reason = "it is neither a path that ends in `.attn` nor the text of a specification"
            raise SpecError(CannotReadSpec(None, spec.strip(), reason))
        return Source("<spec>", spec)
    try:
        return Source(str(spec), Path(spec).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SpecError(CannotReadSpec(None, str(spec), str(reason))) from error


def sources_of(
    attention: Attention, specialization: Specialization, target: Target, templates: Sequence[Path] = ()
) -> Sources:
    """The kernels of one specialization, the source text of each, and that of the module that launches them."""
    from attncc.emit.printers import printer_of
    from attncc.emit.render import render
    from attncc.emit.run import render_run
    from attncc.plan.build import plan_attention

    program = plan_attention(attention, specialization, target)
    texts = tuple(render(plan, printer_of(plan), templates) for plan in program.kernels)
    return program, texts, render_run(program, templates)


def backward_sources_of(
    attention: Attention,
    specialization: Specialization,
    target: Target,
    wanted: Sequence[str],
    templates: Sequence[Path] = (),
) -> BackwardSources:
    """The kernels of a backward pass, and the source text of each. wanted: captured tensors that need a gradient."""
    from attncc.emit.printers import printer_of
    from attncc.emit.render import render
    from attncc.plan.backward import plan_backward

    program = plan_backward(attention, specialization, target, frozenset(wanted))
    return program, tuple(render(plan, printer_of(plan), templates) for plan in program.kernels)
