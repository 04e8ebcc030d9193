"""Families of templates: the project's own two, and those that users add.

A folder of templates adds a family by holding `<family>/target.toml`:

    based_on = "cpp"                 # or "triton": prints, compiles and launches its kernels
    flags = ["-fno-omit-frame-pointer"]   # optional, cpp only: further flags for the compiler

Folders come from `templates=`, `--templates` and the entry points of group `attncc.templates`, whose objects are paths.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from attncc.diagnostics import BuildError
from attncc.emit.errors import BadTargetFile, NoSuchTemplateFolder, UnknownFamily
from attncc.plan.nodes import Target

BACKENDS = ("cpp", "triton")


def template_folders(named: Sequence[str | Path]) -> tuple[Path, ...]:
    """The folders to search before the project's own: those named, then those of installed packages."""
    folders = tuple(Path(folder) for folder in named)
    missing = [folder for folder in folders if not folder.is_dir()]
    if missing:
        raise BuildError(*(NoSuchTemplateFolder(None, str(folder)) for folder in missing))
    return (*folders, *_installed_folders())


@functools.cache
def _installed_folders() -> tuple[Path, ...]:
    return tuple(Path(str(entry.load())) for entry in entry_points(group="attncc.templates"))


def target_of(family: str, arch: str, folders: Sequence[Path]) -> Target:
    """The target of a family, the project's own or one that a folder adds."""
    if family in BACKENDS:
        return Target(family, arch)
    based_on, flags = family_settings(family, folders)
    return Target(family, arch, based_on, flags)  # type: ignore[arg-type]


def family_settings(family: str, folders: Sequence[Path]) -> tuple[str, tuple[str, ...]]:
    """What a family from outside is based on, and its compiler flags. Raises BuildError if no folder has it."""
    for folder in folders:
        path = folder / family / "target.toml"
        if not path.is_file():
            continue
        try:
            settings = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BuildError(BadTargetFile(None, str(path), str(error))) from error
        based_on, flags = settings.get("based_on"), settings.get("flags", [])
        if based_on not in BACKENDS:
            raise BuildError(BadTargetFile(None, str(path), f"based_on is {based_on!r}, not one of {BACKENDS}"))
        if not isinstance(flags, list) or not all(isinstance(flag, str) for flag in flags):
            raise BuildError(BadTargetFile(None, str(path), "flags is not a list of strings"))
        return based_on, tuple(flags)
    added = sorted(path.parent.name for folder in folders for path in folder.glob("*/target.toml"))
    raise BuildError(UnknownFamily(None, family, ", ".join((*BACKENDS, *added))))
