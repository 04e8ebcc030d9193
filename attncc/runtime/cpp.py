"""Compiles C++ kernels, keeps them, and launches them.

A compiled kernel lies in the cache folder as a shared library with a digest of its content at the end (which loaders
ignore): a file that was cut short, damaged or put there by something else does not match, and is made again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import struct
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from attncc.diagnostics import BuildError
from attncc.emit.cpp_machine import Field, argument_fields
from attncc.plan.nodes import KernelPlan, Target
from attncc.runtime.cache import key_of, sweep, temporary_file, write_atomically
from attncc.runtime.cpp_toolchain import compile_library, find_compiler, flags
from attncc.runtime.toolchain_errors import NotALibrary

_DIGEST_BYTES = 32


class CppKernel:
    """A compiled kernel.

    fields   the arguments that it takes, in order, each of one or more 8-byte slots: pointers and ints as int, floats
             as float
    path     of its shared library
    """

    __slots__ = ("_library", "_pack", "_run", "fields", "path")

    def __init__(self, fields: tuple[Field, ...], library: ctypes.CDLL, path: Path) -> None:
        self.fields = fields
        self.path = path
        self._pack: Callable[..., bytes] = struct.Struct("".join(form for f in self.fields for _, form in f.slots)).pack
        self._library = library
        self._run = library.attncc_run
        self._run.argtypes = (ctypes.c_char_p,)
        self._run.restype = ctypes.c_int

    def launch(self, values: Sequence[int | float]) -> None:
        """Runs the kernel on `values`, one per slot. The memory behind the pointers must live until it returns.

        Raises MemoryError where the kernel cannot have the scratch memory that it needs.
        """
        self.launch_packed(self._pack(*values))

    def launch_packed(self, block: bytes) -> None:
        """As `launch`, with the values packed into one block of 8-byte slots."""
        if self._run(block):
            raise MemoryError("not enough memory for the scratch space of an attention kernel")


def compile_kernel(plan: KernelPlan, source: str, folder: Path) -> CppKernel:
    """The kernel of `source`, compiled into `folder` or found there. Raises BuildError where it cannot be compiled,
    OSError where nothing can be written to `folder`."""
    return kernel_of(plan.name, plan.target, argument_fields(plan), source, folder)


def kernel_of(name: str, target: Target, fields: tuple[Field, ...], source: str, folder: Path) -> CppKernel:
    """As `compile_kernel`, of a source whose arguments are `fields`."""
    compiler = find_compiler()
    options = flags(target.arch, target.flags)
    path = folder / f"{name}-{key_of(source, options, compiler.command, compiler.identity)}.so"
    library = _load(path)
    if library is None:
        library = _compile(source, options, path)
    library.attncc_bind.argtypes = (ctypes.c_void_p,)
    library.attncc_bind.restype = None
    library.attncc_bind(0 if _forked else parallel_region())
    _bound.append(library)
    return CppKernel(fields, library, path)


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
        return _open(path, body)
    except ImportError:  # of another machine, or against another C library
        return None


def _open(path: Path, content: bytes) -> ctypes.CDLL:
    """The library at `path`, with the entry points of a kernel. Raises ImportError where it is none."""
    if _is_cut_short(content):
        raise ImportError("it is cut short")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(str(error)) from error
    for name in ("attncc_run", "attncc_bind"):
        if not hasattr(library, name):
            raise ImportError(f"it has no function {name}")
    return library


def _is_cut_short(library: bytes) -> bool:
    """Whether the end of an ELF file of 64 bits is missing: loading it would end the process."""
    if library[:5] != b"\x7fELF\x02" or len(library) < 64:
        return False
    sections, _, size, count = struct.unpack_from("=Q10sHH", library, 40)
    return sections + size * count > len(library)  # the table of sections comes last


def _compile(source: str, options: Sequence[str], path: Path) -> ctypes.CDLL:
    """Compiles `source` to `path` by way of a temporary name, so that others see all of it or nothing. The source stays
    beside it, for people to read; where the compiler fails, that is what its message points to."""
    listing = path.with_suffix(".cpp")
    write_atomically(listing, source.encode())
    sweep(path.parent)
    compiler = find_compiler()
    temporary = temporary_file(path)
    try:
        compile_library(compiler, options, listing, temporary)
        with temporary.open("r+b") as file:
            content = file.read()
            file.write(hashlib.sha256(content).digest())
        try:
            library = _open(temporary, content)
        except ImportError as error:
            reason = str(error).replace(str(temporary), path.name)
            command = shlex.join((*compiler.command, *options))
            raise BuildError(NotALibrary(None, reason, command, str(path.parent))) from error
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return library


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


# Libraries that run on threads of the OpenMP runtime; whether these threads were left behind in a parent process.
_bound: list[ctypes.CDLL] = []
_forked = False


def _leave_threads_behind() -> None:
    """In a forked child the runtime waits for ever for threads that only its parent has: kernels run on one thread."""
    global _forked  # noqa: PLW0603 - it is a state of the process
    _forked = bool(_bound)
    for library in _bound:
        library.attncc_bind(0)


os.register_at_fork(after_in_child=_leave_threads_behind)


def _openmp_libraries() -> list[Path]:
    """Shared libraries of OpenMP runtimes that are loaded, or that come with PyTorch; PyTorch's own first."""
    own = Path(torch.__file__).parent / "lib"
    loaded: list[Path] = []
    try:
        with Path("/proc/self/maps").open(encoding="utf-8") as maps:
            loaded = list(dict.fromkeys(Path(line.split(maxsplit=5)[-1].strip()) for line in maps if "omp" in line))
    except OSError:
        pass
    names = ("libgomp", "libomp", "libiomp")
    candidates = [*loaded, *sorted(own.glob("lib*omp*"))]
    found = [path for path in candidates if path.name.startswith(names) and ".so" in path.name + ".so"]
    return sorted(found, key=lambda path: path.parent != own)
