"""Files and what they define: the file itself, those that it uses, and the prelude."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from attncc.check.functions import is_builtin
from attncc.check.name_errors import Duplicate, RecursiveDefine, ReservedName, UnreadableFile
from attncc.check.reporter import Reporter
from attncc.check.world import WORLD
from attncc.diagnostics import Label, SpecError
from attncc.resources import folder
from attncc.source import Source, Span
from attncc.syntax import nodes, parse
from attncc.syntax.walk import calls_and_names


@dataclass(slots=True, eq=False)
class Module:
    """One file: its definitions, and the modules whose definitions it sees after its own."""

    file: nodes.File
    defines: dict[str, nodes.Define] = field(default_factory=dict[str, nodes.Define])
    visible: list[Module] = field(default_factory=list["Module"])
    is_prelude: bool = False

    def find(self, name: str) -> tuple[nodes.Define, Module] | None:
        """The definition that `name` means in this file, and the module that it stands in."""
        for module in (self, *self.visible):
            if name in module.defines:
                return module.defines[name], module
        return None

    def names(self) -> Iterator[nodes.Define]:
        for module in (self, *self.visible):
            yield from module.defines.values()


@functools.cache
def prelude() -> Module:
    """The definitions that every file sees."""
    text = (folder("grammar") / "prelude.attn").read_text(encoding="utf-8")
    file = parse(Source("prelude.attn", text))
    return Module(file, {define.name: define for define in file.defines}, is_prelude=True)


def load(source: Source, reporter: Reporter) -> Module:
    """The module of a source with everything that it uses. Raises `SpecError` if its own syntax is wrong."""
    return _Loader(reporter, source.used).module(source, Path(source.name))


def self_contained(source: Source) -> Source:
    """The same source with the texts of all files that it uses. It has been loaded without errors."""
    loader = _Loader(Reporter(), source.used)
    loader.module(source, Path(source.name))
    return Source(source.name, source.text, tuple(loader.texts.items()))


class _Loader:
    def __init__(self, reporter: Reporter, used: Sequence[tuple[str, str]] | None) -> None:
        self.reporter = reporter
        self.given = None if used is None else dict(used)
        self.loaded: dict[Path, Module] = {}
        self.texts: dict[str, str] = {}

    def _read(self, path: Path) -> str:
        if self.given is None:
            return path.read_text(encoding="utf-8")
        try:
            return self.given[str(path)]
        except KeyError:
            raise FileNotFoundError from None

    def module(self, source: Source, path: Path) -> Module:
        module = Module(parse(source))
        self.loaded[path.resolve()] = module
        for define in module.file.defines:
            self._declare(module, define)
        for use in module.file.uses:
            used = self._use(use, path.parent)
            if used is not None and used is not module and used not in module.visible:
                module.visible.append(used)
        self._refuse_ambiguity(module)
        module.visible.append(prelude())
        _refuse_cycles(module, self.reporter)
        return module

    def _declare(self, module: Module, define: nodes.Define) -> None:
        if define.name in WORLD or is_builtin(define.name):
            self.reporter.report(ReservedName(define.name_span, define.name, "this name has a meaning of its own"))
            # Its uses are not to blame.
            module.defines[define.name] = define
        elif define.name in module.defines:
            first = Label(module.defines[define.name].name_span, "the first one")
            mend = "remove one of them, or give it another name"
            self.reporter.report(Duplicate(define.name_span, "definition", define.name, mend, related=(first,)))
        else:
            module.defines[define.name] = define
        seen: dict[str, Span] = {}
        for parameter in define.parameters or ():
            if parameter.name in seen:
                first = Label(seen[parameter.name], "the first one")
                mend = "give each parameter its own name"
                self.reporter.report(Duplicate(parameter.span, "parameter", parameter.name, mend, related=(first,)))
            if parameter.name in WORLD:
                why = "this name has a meaning of its own"
                self.reporter.report(ReservedName(parameter.span, parameter.name, why))
            seen[parameter.name] = parameter.span

    def _use(self, use: nodes.Use, folder_: Path) -> Module | None:
        path = folder_ / use.path
        try:
            if path.resolve() in self.loaded:
                return self.loaded[path.resolve()]
            text = self.texts[str(path)] = self._read(path)
        except FileNotFoundError:
            reason = "there is no such file"
        except IsADirectoryError:
            reason = "it is a folder"
        except UnicodeDecodeError:
            reason = "it is no UTF-8 text"
        except (OSError, ValueError, RuntimeError) as error:
            reason = (getattr(error, "strerror", None) or str(error)).lower()
        else:
            try:
                return self.module(Source(str(path), text), path)
            except SpecError as error:
                self.reporter.errors.extend(error.diagnostics)
                return None
        self.reporter.report(UnreadableFile(use.path_span, use.path, reason, str(path), _near_file(path)))
        return None

    def _refuse_ambiguity(self, module: Module) -> None:
        """Two used files that define the same name, which the file itself does not define, leave its meaning open."""
        for i, first in enumerate(module.visible):
            for second in module.visible[i + 1 :]:
                for name in first.defines.keys() & second.defines.keys() - module.defines.keys():
                    use = module.file.uses[-1]
                    places = tuple(Label(m.defines[name].name_span, "defined here") for m in (first, second))
                    mend = f"define `{name}` in this file, or use one of the two files only"
                    self.reporter.report(Duplicate(use.path_span, "definition", name, mend, related=places))


def _near_file(path: Path) -> str:
    try:
        siblings = [p.name for p in path.parent.glob("*.attn")]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return f'did you mean "{near[0]}"?' if near else ""


def _refuse_cycles(module: Module, reporter: Reporter) -> None:
    """Reports each definition of the module that leads back to itself, and takes it out."""
    reported: set[str] = set()
    for name in list(module.defines):
        cycle = _cycle(name, module)
        if cycle is None:
            continue
        if not reported & set(cycle):
            text = " → ".join(f"`{n}`" for n in cycle)
            reporter.report(RecursiveDefine(module.defines[name].name_span, name, text))
        reported |= set(cycle)
    for name in reported & module.defines.keys():
        reporter.refused.add(module.defines[name].name_span)


def _cycle(name: str, module: Module) -> list[str] | None:
    """A way from a definition back to itself, as the names on it."""
    start = module.defines[name]
    stack: list[tuple[nodes.Define, Module, list[str]]] = [(start, module, [name])]
    seen: set[Span] = set()
    while stack:
        define, home, path = stack.pop()
        parameters = {p.name for p in define.parameters or ()}
        for used in calls_and_names(define.value):
            target = None if used in parameters and home.find(used) is None else home.find(used)
            if target is None or (used in parameters and target[0].parameters is None):
                continue
            if target[0] is start:
                return [*path, name]
            if target[0].name_span not in seen:
                seen.add(target[0].name_span)
                stack.append((*target, [*path, used]))
    return None
