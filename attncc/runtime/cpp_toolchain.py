"""The machine and its C++ compiler: which instructions there are, which compiler, which flags."""

from __future__ import annotations

import errno
import functools
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from attncc.diagnostics import BuildError
from attncc.runtime.toolchain_errors import CompilerFailed, NoCompiler

# Features that an architecture needs, as /proc/cpuinfo names them, widest first.
_FEATURES: dict[str, frozenset[str]] = {
    "avx512_bf16": frozenset("avx512f avx512bw avx512cd avx512dq avx512vl avx512_bf16 fma f16c bmi2".split()),
    "avx512": frozenset("avx512f avx512bw avx512cd avx512dq avx512vl fma f16c bmi2".split()),
    "avx2": frozenset("avx2 fma f16c bmi2".split()),
    "portable": frozenset(),
}
_FLAGS: dict[str, tuple[str, ...]] = {
    "avx512_bf16": ("-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"),
    "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "avx2": ("-march=x86-64-v3",),
    "portable": (),
}
# No errno and no traps, so that square roots and choices vectorise; rounding, infinities and NaN stay as they are.
_COMMON_FLAGS = (
    "-O3 -std=gnu++17 -shared -fPIC -fvisibility=hidden -fno-exceptions -fno-rtti -fno-math-errno -fno-trapping-math"
    " -Wno-psabi"
).split()

ARCHS = tuple(_FEATURES)


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler: how to call it, and what tells it from another one or another version."""

    command: tuple[str, ...]
    identity: str


@functools.cache
def native_arch() -> str:
    """The widest architecture that this machine has."""
    return widest_arch(_cpu_features())


def widest_arch(features: frozenset[str]) -> str:
    """The widest architecture whose features are all among `features`."""
    return next(arch for arch, needed in _FEATURES.items() if needed <= features)


def _cpu_features() -> frozenset[str]:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def find_compiler() -> Compiler:
    """$CXX, or g++, or clang++, or c++. Raises BuildError where there is none."""
    return _find_compiler(os.environ.get("CXX", "").strip(), os.environ.get("PATH", ""))


@functools.cache
def _find_compiler(cxx: str, path: str) -> Compiler:
    try:
        candidates = [shlex.split(cxx)] if cxx else [["g++"], ["clang++"], ["c++"]]
    except ValueError:  # a quotation mark without its partner
        candidates = []
    for command in candidates:
        found = shutil.which(command[0], path=path)
        if found is not None:
            # Asking for its version would cost a process at every start. `ccache g++` is two programs.
            programs = [found, *filter(None, (shutil.which(word, path=path) for word in command[1:]))]
            return Compiler((found, *command[1:]), " ".join(map(_identity, programs)))
    raise BuildError(NoCompiler(None, cxx or "g++, clang++ or c++", _install_hint()))


def _identity(program: str) -> str:
    resolved = Path(program).resolve()
    stat = resolved.stat()
    return f"{resolved} {stat.st_size} {stat.st_mtime_ns}"


def _install_hint() -> str:
    if platform.system() == "Darwin":
        return "xcode-select --install"
    for tool, hint in (
        ("apt-get", "sudo apt-get install g++"),
        ("dnf", "sudo dnf install gcc-c++"),
        ("pacman", "sudo pacman -S gcc"),
        ("apk", "sudo apk add g++"),
        ("zypper", "sudo zypper install gcc-c++"),
    ):
        if shutil.which(tool):
            return hint
    return "your system's g++ or clang++ package"


def flags(arch: str, more: Sequence[str] = ()) -> tuple[str, ...]:
    """The flags that a kernel for `arch` is compiled with."""
    return (*_COMMON_FLAGS, *_FLAGS[arch], *more)


def compile_library(compiler: Compiler, flags: Sequence[str], source: Path, output: Path) -> None:
    """Compiles `source` to the shared library `output`. Raises BuildError where the compiler fails, OSError where that
    is because the disk is full."""
    command = [*compiler.command, *flags, str(source), "-o", str(output), "-lm"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, env={**os.environ, "LC_ALL": "C"}
        )
    except OSError as error:
        raise BuildError(CompilerFailed(None, shlex.join(command), str(error), str(source))) from error
    if done.returncode != 0:
        for number in (errno.ENOSPC, errno.EDQUOT):
            if os.strerror(number) in done.stderr:
                raise OSError(number, os.strerror(number), str(output))
        raise BuildError(
            CompilerFailed(None, shlex.join(command), _first_errors(done.stderr, done.returncode), str(source))
        )


def _first_errors(stderr: str, code: int, limit: int = 5) -> str:
    """The first few error lines of a compiler, or the end of what it said."""
    lines = stderr.strip().splitlines()
    errors = [line for line in lines if "error" in line.lower()][:limit] or lines[-limit:]
    return "\n".join(errors) or f"it ended with status {code} and said nothing"
