"""Errors of the C++ compiler and of targets (A05xx)."""

from __future__ import annotations

from dataclasses import dataclass

from attncc.diagnostics import Diagnostic

# --- A05xx: the C++ compiler ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NoCompiler(Diagnostic):
    code = "A0501"
    title = "there is no C++ compiler: {wanted} was not found"
    help = "install one ({hint}), or set CXX to the command of one that you have"
    explanation = (
        "The `cpp` target compiles each kernel with the system's C++ compiler at the first call: $CXX if it is set, "
        "or else g++, clang++ or c++, whichever is found first on PATH."
    )
    bad = 'PATH=/nowhere python -c "…; attn(q, k, v)"'
    good = "sudo apt-get install g++"

    wanted: str
    hint: str


@dataclass(frozen=True, slots=True)
class CompilerFailed(Diagnostic):
    code = "A0502"
    title = "the C++ compiler failed: {output}"
    explanation = (
        "The generated C++ did not compile. With templates or flags of your own, the compiler's words say what to "
        "mend; with attncc's own, the compiler is probably too old (g++ 9 and clang++ 12 are known to do) or CXX names "
        "something else."
    )
    bad = "CXX=/bin/false python …"
    good = "CXX=g++ python …"

    command: str
    output: str
    source: str

    def helps(self) -> tuple[str, ...]:
        return f"the command was: {self.command}", f"the source is kept at {self.source}"


@dataclass(frozen=True, slots=True)
class NotALibrary(Diagnostic):
    code = "A0503"
    title = "what the C++ compiler wrote cannot be loaded: {reason}"
    explanation = (
        "The compiler ended without an error, and its output is no shared library for this process: CXX may name a "
        "compiler for another machine, or something that is no compiler; or libraries may not be loaded from there."
    )
    bad = "CXX=/bin/true python …"
    good = "CXX=g++ python …"

    reason: str
    command: str
    folder: str

    def helps(self) -> tuple[str, ...]:
        return (
            f"the command was: {self.command}",
            f"if {self.folder} lies on a file system that is mounted noexec, set ATTNCC_CACHE to another folder",
        )


@dataclass(frozen=True, slots=True)
class NoCacheFolder(Diagnostic):
    code = "A0504"
    title = "there is no place to write a kernel to: {reason}"
    help = "set ATTNCC_CACHE to a folder that can be written and has room; neither {folder} nor a temporary folder does"
    explanation = (
        "Kernels are compiled into the cache folder, or, where that cannot be written or is full, into a temporary "
        "folder of the process. Here both failed."
    )
    bad = "ATTNCC_CACHE=/proc TMPDIR=/proc python …"
    good = "ATTNCC_CACHE=$HOME/kernels python …"

    folder: str
    reason: str


# --- A05xx: targets -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NoKernelForDevice(Diagnostic):
    code = "A0551"
    title = "{target} has no kernel for {device}"
    help = "{advice}"
    explanation = (
        "C++ kernels take tensors on the CPU, Triton kernels tensors on a GPU; `triton:interpret` takes the CPU's."
    )
    bad = 'attncc.build(spec, target="triton")(q, k, v)             # with q on the CPU'
    good = 'attncc.build(spec, target="triton:interpret")(q, k, v)'

    target: str
    device: str
    advice: str


@dataclass(frozen=True, slots=True)
class UnknownArch(Diagnostic):
    code = "A0552"
    title = "`{family}` knows no machine `{arch}`"
    help = "it knows {known}"
    explanation = "What follows the colon of a target names a machine, as in `cpp:avx2` or `triton:sm_90`."
    bad = 'attncc.build(spec, target="cpp:avx1024")'
    good = 'attncc.build(spec, target="cpp:avx512")'

    family: str
    arch: str
    known: str


@dataclass(frozen=True, slots=True)
class UnsupportedArch(Diagnostic):
    code = "A0553"
    title = "this machine cannot run {target}"
    help = "the widest that it has is {native}; leave the machine out to take that"
    explanation = "A kernel for instructions that the processor lacks would end the process; attncc does not launch it."
    bad = 'attncc.build(spec, target="cpp:avx512_bf16")   # on a machine with AVX2'
    good = 'attncc.build(spec, target="cpp")'

    target: str
    native: str
