"""Compiles C++ kernels, keeps them, and launches them.

A compiled kernel lies in the cache folder as a shared library with a digest of its content at the end (which loaders
ignore): a file that was cut short, damaged or put there by something else does not match, and is made again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import struct
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from attncc.emit.cpp_machine import argument_fields
from attncc.plan.nodes import KernelPlan
from attncc.runtime.cache import key_of
from attncc.runtime.cpp_toolchain import compile_library, find_compiler, flags

_DIGEST_BYTES = 32


class CppKernel:
    """A compiled kernel.

    fields   the names of the 8-byte slots that it takes, in order (`attncc.emit.cpp_machine.argument_fields`):
             pointers and ints as int, floats as float
    path     of its shared library
    """

    __slots__ = ("_library", "_pack", "_run", "fields", "path")

    def __init__(self, plan: KernelPlan, library: ctypes.CDLL, path: Path) -> None:
        slots = [slot for field in argument_fields(plan) for slot in field.slots]
        self.fields: tuple[str, ...] = tuple(name for name, _ in slots)
        self.path = path
        self._pack: Callable[..., bytes] = struct.Struct("".join(form for _, form in slots)).pack
        self._library = library
        self._run = library.attncc_run
        self._run.argtypes = (ctypes.c_char_p,)
        self._run.restype = ctypes.c_int

    def launch(self, values: Sequence[int | float]) -> None:
        """Runs the kernel on `values`, one per field. The memory behind the pointers must live until it returns.

        Raises MemoryError where the kernel cannot have the scratch memory that it needs.
        """
        self.launch_packed(self._pack(*values))

    def launch_packed(self, block: bytes) -> None:
        """As `launch`, with the values packed into one block of 8-byte slots."""
        if self._run(block):
            raise MemoryError("not enough memory for the scratch space of an attention kernel")


def compile_kernel(plan: KernelPlan, source: str, folder: Path) -> CppKernel:
    """The kernel of `source`, compiled into `folder` or found there. Raises BuildError where it cannot be compiled."""
    compiler = find_compiler()
    options = flags(plan.target.arch, plan.target.flags)
    name = f"{plan.name}-{key_of(source, options, compiler.command, compiler.identity)}"
    path = folder / f"{name}.so"
    library = _load(path)
    if library is None:
        _compile(source, options, path)
        library = _load(path)
        if library is None:
            raise OSError(f"{path} was damaged as soon as it was written")
    library.attncc_bind.argtypes = (ctypes.c_void_p,)
    library.attncc_bind.restype = None
    library.attncc_bind(parallel_region())
    return CppKernel(plan, library, path)


def _load(path: Path) -> ctypes.CDLL | None:
    """The library at `path`, or None where there is none or it is not whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError:  # of another machine, or against another C library
        return None
    return library if hasattr(library, "attncc_run") and hasattr(library, "attncc_bind") else None


def _compile(source: str, options: Sequence[str], path: Path) -> None:
    """Compiles `source` to `path` by way of temporary names, so that others see all of it or nothing. The source stays
    beside it, for people to read; where the compiler fails, that is what its message points to."""
    listing = path.with_suffix(".cpp")
    _write_text(listing, source)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".so")
    os.close(handle)
    try:
        compile_library(find_compiler(), options, listing, Path(temporary))
        with open(temporary, "r+b") as file:
            digest = hashlib.sha256(file.read()).digest()
            file.write(digest)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _write_text(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


@functools.cache
def parallel_region() -> int:
    """The address of `GOMP_parallel` in the OpenMP runtime that PyTorch uses; 0 where it has none.

    GCC's, LLVM's and Intel's runtimes all export it. Kernels call it by this address and link with no runtime of their
    own, so that one set of threads serves both, as `torch.set_num_threads` says.
    """
    for path in _openmp_libraries():
        try:
            address = ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
        if address:
            return address
    warnings.warn("found no OpenMP runtime of PyTorch: C++ kernels run on one thread", stacklevel=2)
    return 0


def _openmp_libraries() -> list[Path]:
    """Shared libraries of OpenMP runtimes that are loaded, or that come with PyTorch; PyTorch's own first."""
    own = Path(torch.__file__).parent / "lib"
    loaded: list[Path] = []
    try:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            loaded = list(dict.fromkeys(Path(line.split(maxsplit=5)[-1].strip()) for line in maps if "omp" in line))
    except OSError:
        pass
    names = ("libgomp", "libomp", "libiomp")
    candidates = [*loaded, *sorted(own.glob("lib*omp*"))]
    found = [path for path in candidates if path.name.startswith(names) and ".so" in path.name + ".so"]
    return sorted(found, key=lambda path: path.parent != own)
