"""Families of templates: the project's own two, and those that users add.

A folder of templates adds a family by holding `<family>/target.toml`:

    based_on = "cpp"                      # or "triton": prints, compiles and launches its kernels
    flags = ["-fno-omit-frame-pointer"]   # optional, cpp only: further flags for the compiler

Folders come from `templates=`, `--templates` and the entry points of group `attncc.templates`, whose objects are paths.
templates/README.md says how to write them.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal, TypeAlias

from attncc.diagnostics import BuildError
from attncc.emit.errors import BadEntryPoint, BadTargetFile, NoSuchTemplateFolder, UnknownFamily
from attncc.plan.nodes import Target

Backend: TypeAlias = Literal["cpp", "triton"]
BACKENDS: tuple[Backend, ...] = ("cpp", "triton")
_SETTINGS = ("based_on", "flags")


def template_folders(named: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    """The folders to search before the project's own: those named, then those of installed packages."""
    folders = tuple(Path(folder) for folder in ((named,) if isinstance(named, str | Path) else named))
    missing = [folder for folder in folders if not folder.is_dir()]
    if missing:
        raise BuildError(*(NoSuchTemplateFolder(None, str(folder)) for folder in missing))
    return (*folders, *_installed_folders())


@functools.cache
def _installed_folders() -> tuple[Path, ...]:
    return tuple(_folder_of(entry) for entry in entry_points(group="attncc.templates"))


def _folder_of(entry: EntryPoint) -> Path:
    named = f"{entry.name} = {entry.value}" + (f" of {entry.dist.name}" if entry.dist is not None else "")
    try:
        path = Path(entry.load())
    except Exception as error:  # whatever the code of another package raises
        raise BuildError(BadEntryPoint(None, named, f"{type(error).__name__}: {error}")) from error
    if not path.is_dir():
        raise BuildError(BadEntryPoint(None, named, f"there is no folder {path}"))
    return path


def target_of(family: str, arch: str, folders: Sequence[Path]) -> Target:
    """The target of a family, the project's own or one that a folder adds."""
    if family in BACKENDS:
        return Target(family, arch)
    based_on, flags = family_settings(family, folders)
    return Target(family, arch, based_on, flags)


def family_settings(family: str, folders: Sequence[Path]) -> tuple[Backend, tuple[str, ...]]:
    """What a family from outside is based on, and its compiler flags. Raises BuildError if no folder has it."""
    for folder in folders:
        path = folder / family / "target.toml"
        if not path.is_file():
            continue
        try:
            settings = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BuildError(BadTargetFile(None, str(path), str(error))) from error
        reasons = _mistakes(settings)
        if reasons:
            raise BuildError(*(BadTargetFile(None, str(path), reason) for reason in reasons))
        return settings["based_on"], tuple(settings.get("flags", ()))
    added = sorted(path.parent.name for folder in folders for path in folder.glob("*/target.toml"))
    raise BuildError(UnknownFamily(None, family, ", ".join((*BACKENDS, *added))))


def _mistakes(settings: dict[str, Any]) -> list[str]:
    based_on, flags = settings.get("based_on"), settings.get("flags", [])
    known = " or ".join(f'"{backend}"' for backend in BACKENDS)
    mistakes = [f"`{name}` means nothing here" for name in settings if name not in _SETTINGS]
    if "based_on" not in settings:
        mistakes.append(f"based_on is missing; it is {known}")
    elif based_on not in BACKENDS:
        mistakes.append(f"based_on is {based_on!r}, not {known}")
    if not isinstance(flags, list) or not all(isinstance(flag, str) for flag in flags):
        mistakes.append("flags is not a list of strings")
    elif flags and based_on == "triton":
        mistakes.append("flags are those of a C++ compiler, and it is based on triton")
    return mistakes
