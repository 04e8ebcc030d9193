"""The cache folder: content-addressed files that a crash, a second process or a full disk cannot spoil.

Every entry is written to a temporary name in the same folder and moved into place (`os.replace`), so that a reader
sees all of it or nothing, and carries a digest of its content, so that a damaged file is made again, never trusted.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from attncc.resources import folder as resource_folder

T = TypeVar("T")

_DIGEST_BYTES = 32


def folder() -> Path:
    """`$ATTNCC_CACHE`, or `attncc` in the user's cache folder. Where that cannot be written, a temporary folder that
    lives as long as the process, with a warning."""
    named = os.environ.get("ATTNCC_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return _usable(Path(named) if named else Path(base) / "attncc")


@functools.cache
def _usable(wanted: Path) -> Path:
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted) as probe:
            probe.write(b"attncc")
    except OSError as error:
        temporary = Path(tempfile.mkdtemp(prefix="attncc-"))
        warnings.warn(
            f"cannot write to the cache folder {wanted} ({error.strerror}); using {temporary} for this process. "
            "Set ATTNCC_CACHE to a folder that can be written, to keep compiled kernels.",
            stacklevel=2,
        )
        return temporary
    return wanted


def key_of(*parts: object) -> str:
    """A name for what the parts determine. Parts must have a `repr` that is the same in every process."""
    return hashlib.sha256("\x00".join(map(repr, parts)).encode()).hexdigest()[:32]


@functools.cache
def compiler_fingerprint() -> str:
    """Changes whenever a file of attncc, its grammar or its templates does."""
    package = Path(__file__).resolve().parent.parent
    files = [
        path
        for root in (package, resource_folder("grammar"), resource_folder("templates"))
        for path in sorted(root.rglob("*"))
        if path.suffix in (".py", ".lark", ".attn", ".jinja")
    ]
    stats = [(path.name, (stat := path.stat()).st_mtime_ns, stat.st_size) for path in files]
    return key_of(stats)


def write_atomically(path: Path, content: bytes) -> None:
    """Puts `content` at `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remember(key: str, make: Callable[[], T], suffix: str = "pickle") -> T:
    """The object stored under `key`, made and stored if it is not there whole.

    Objects are pickled: the folder is the user's own, as trusted as the shared libraries that lie in it.
    """
    path = folder() / f"{key}.{suffix}"
    try:
        content = path.read_bytes()
        body = content[_DIGEST_BYTES:]
        if hashlib.sha256(body).digest() == content[:_DIGEST_BYTES]:
            return pickle.loads(body)
    except OSError:
        pass
    made = make()
    body = pickle.dumps(made, protocol=pickle.HIGHEST_PROTOCOL)
    try:
        write_atomically(path, hashlib.sha256(body).digest() + body)
    except OSError as error:
        warnings.warn(f"cannot store {path.name} in the cache folder {path.parent}: {error.strerror}", stacklevel=2)
    return made
