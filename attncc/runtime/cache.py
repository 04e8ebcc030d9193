"""The cache folder: content-addressed files that a crash, a second process or a full disk cannot spoil.

Every entry is written to a temporary name in the same folder and moved into place (`os.replace`), so that a reader
sees all of it or nothing, and carries a digest of its content, so that a damaged file is made again, never trusted.
Temporary names begin with a dot; those that a killed process left behind are removed by later ones.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import hashlib
import os
import pickle
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Container, Iterable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from stat import S_ISREG
from types import CodeType, ModuleType
from typing import Any, TypeVar

from attncc.diagnostics import BuildError
from attncc.resources import folder as resource_folder
from attncc.runtime.toolchain_errors import NoCacheFolder

T = TypeVar("T")

_DIGEST_BYTES = 32
# Seconds after which a temporary file belongs to no process that still writes it.
_ABANDONED = 3600.0


def folder() -> Path:
    """`$ATTNCC_CACHE`, or `attncc` in the user's cache folder. Where that cannot be written, a temporary folder that
    lives as long as the process, with a warning. Raises OSError where there is no place for that either."""
    return _usable(_wanted())


def in_folder(make: Callable[[Path], T]) -> T:
    """What `make` makes in the cache folder; in a temporary one, with a warning, where writing fails there.

    Raises BuildError where nothing can be written anywhere.
    """
    try:
        place = folder()
        try:
            return make(place)
        except OSError as error:
            _warn(place, error)
            return make(_temporary())
    except OSError as error:
        raise BuildError(NoCacheFolder(None, str(_wanted()), error.strerror or str(error))) from error


def _wanted() -> Path:
    named = os.environ.get("ATTNCC_CACHE")
    if named:
        return Path(named).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path(os.path.expanduser("~")) / ".cache") / "attncc"  # noqa: PTH111 - never raises


@functools.cache
def _usable(wanted: Path) -> Path:
    try:
        if not wanted.is_absolute():  # a user without a home, whose folder would be one named `~`
            raise FileNotFoundError(errno.ENOENT, "there is no home folder")
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted) as probe:
            probe.write(b"attncc")
    except OSError as error:
        _warn(wanted, error)
        return _temporary()
    return wanted


def _warn(place: Path, error: OSError) -> None:
    warnings.warn(
        f"cannot write to the cache folder {place} ({error.strerror or error}); using a temporary one instead. "
        "Set ATTNCC_CACHE to a folder that can be written, to keep compiled kernels.",
        stacklevel=3,
    )


@functools.cache
def _temporary() -> Path:
    """A folder that is removed when the process ends."""
    created = tempfile.mkdtemp(prefix="attncc-")
    atexit.register(shutil.rmtree, created, ignore_errors=True)
    return Path(created)


def sweep(place: Path) -> None:
    """Removes what processes that were killed left half-written in a cache folder."""
    for path in place.glob(".*"):
        try:
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink()
        except OSError:  # Another process was faster, or it is no file of ours.
            continue


def key_of(*parts: object) -> str:
    """A name for what the parts determine. Parts must have a `repr` that is the same in every process."""
    return hashlib.sha256("\x00".join(map(repr, parts)).encode()).hexdigest()[:32]


@functools.cache
def compiler_fingerprint() -> str:
    """Changes whenever a file of attncc, its grammar or its templates does."""
    package = Path(__file__).resolve().parent.parent
    roots = (package, resource_folder("grammar"), resource_folder("templates"))
    return key_of(fingerprint(roots, (".py", ".lark", ".attn", ".jinja")), sys.version)


def fingerprint(roots: Iterable[Path], suffixes: Container[str] | None = None) -> str:
    """Changes whenever a file below `roots` does, or one of those with the suffixes."""
    stats: list[tuple[str, int, int]] = []
    for path in (path for root in roots for path in sorted(root.rglob("*"))):
        if suffixes is None or path.suffix in suffixes:
            with contextlib.suppress(OSError):  # a link to nowhere, or a file that has just been removed
                stat = path.stat()
                if S_ISREG(stat.st_mode):
                    stats.append((str(path), stat.st_mtime_ns, stat.st_size))
    return key_of(stats)


def write_atomically(path: Path, content: bytes) -> None:
    """Puts `content` at `path`, whole or not at all."""
    temporary = temporary_file(path)
    try:
        temporary.write_bytes(content)
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class _SourceLoader(SourceFileLoader):
    """Compiles a module whenever it is imported, and writes no bytecode: that would be trusted without a digest."""

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002 - the name that Python calls it by
        return self.source_to_code(self.get_data(self.path), self.path)


def import_module(path: Path, name: str) -> ModuleType:
    """The generated Python module at `path`. Raises whatever its code raises."""
    loader = _SourceLoader(name, str(path))
    specification = spec_from_loader(name, loader)
    assert specification is not None
    module = module_from_spec(specification)
    loader.exec_module(module)
    return module


def temporary_file(path: Path) -> Path:
    """An empty file in the folder of `path`, which is made where it is missing: to write, and then to move there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    return Path(temporary)


def remember(key: str, make: Callable[[], T], suffix: str = "pickle") -> T:
    """The object stored under `key`, made and stored if it is not there whole.

    Objects are pickled: the folder is the user's own, as trusted as the shared libraries that lie in it.
    """
    try:
        path = folder() / f"{key}.{suffix}"
    except OSError:  # Nothing can be written anywhere; whoever needs more than this will say so.
        return make()
    stored = _stored(path)
    if stored is not None:
        return stored[0]
    made = make()
    body = pickle.dumps(made, protocol=pickle.HIGHEST_PROTOCOL)
    try:
        write_atomically(path, hashlib.sha256(body).digest() + body)
    except OSError as error:
        _warn(path.parent, error)
    return made


def _stored(path: Path) -> tuple[Any] | None:
    """The object in the file at `path`, or None where it is not there whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    body = content[_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != content[:_DIGEST_BYTES]:
        return None
    try:
        return (pickle.loads(body),)
    except Exception:  # noqa: BLE001 - whatever another version of a library has to say about it
        return None
