"""Errors of the Triton toolchain (A052x)."""

from __future__ import annotations

from dataclasses import dataclass

from attncc.diagnostics import Diagnostic


@dataclass(frozen=True, slots=True)
class NoTriton(Diagnostic):
    code = "A0521"
    title = "triton cannot be imported: {reason}"
    help = "pip install 'triton>=3.6'"
    explanation = "Running or compiling the kernels of the triton target takes the triton package (Linux only)."
    bad = 'attncc.build(spec, target="triton")     # where triton is not installed'
    good = 'attncc.build(spec, target="cpp")'

    reason: str


@dataclass(frozen=True, slots=True)
class TritonCompilationFailed(Diagnostic):
    code = "A0522"
    title = "triton cannot compile {kernel} for {arch}"
    help = "{reason}"
    explanation = (
        "The generated kernel was refused by Triton or by the assembler of the target. Unless the kernel comes from "
        "your own template this is a fault of attncc: please report it with the specification."
    )
    bad = "a template that calls a function Triton does not have"
    good = "a template that compiles: attncc emit FILE --stage source shows the kernel"

    kernel: str
    arch: str
    reason: str


@dataclass(frozen=True, slots=True)
class WrongParameters(Diagnostic):
    code = "A0523"
    title = "{kernel} does not take the parameters that its plan passes"
    help = "declare it as: def {kernel}({expected}); found ({found})"
    explanation = "A kernel from a template of your own takes the same parameters as the kernel that it replaces."
    bad = "a forward.py.jinja whose function lacks `lse`"
    good = "a forward.py.jinja with the parameters of attncc's own"

    kernel: str
    expected: str
    found: str


@dataclass(frozen=True, slots=True)
class NotATritonModule(Diagnostic):
    code = "A0524"
    title = "the generated module of {kernel} cannot be imported: {reason}"
    help = "see {path}"
    explanation = "The template was rendered, but what came out is no Python module with the kernel in it."
    bad = "a template that renders `def kernel(`"
    good = "a template that renders valid Python"

    kernel: str
    reason: str
    path: str


@dataclass(frozen=True, slots=True)
class UnknownArch(Diagnostic):
    code = "A0525"
    title = "there is no Triton target `{arch}`"
    help = "the targets are {known}"
    explanation = "Kernels are planned for sm_80, sm_90, sm_100 or gfx942, or for Triton's interpreter on the CPU."
    bad = "--target triton:sm_70"
    good = "--target triton:sm_80"

    arch: str
    known: str


@dataclass(frozen=True, slots=True)
class NoDevice(Diagnostic):
    code = "A0526"
    title = "the tensors are on {device}, and target triton:{arch} runs on a GPU"
    help = 'move them to a GPU, or use target="triton:interpret" (slow, for checking) or target="cpp"'
    explanation = "A kernel compiled for a GPU cannot read the memory of the CPU."
    bad = 'attncc.build(spec, target="triton:sm_90")(q, k, v)     # q on the CPU'
    good = 'attncc.build(spec, target="triton:sm_90")(q.cuda(), k.cuda(), v.cuda())'

    device: str
    arch: str


@dataclass(frozen=True, slots=True)
class NoDoubles(Diagnostic):
    code = "A0527"
    title = "{kernel} cannot be compiled for {arch} in f64"
    help = 'use float32 there, or target="cpp" on the CPU, which computes in f64'
    explanation = "Triton has no products of f64 for Blackwell (sm_100) and CDNA 3 (gfx942)."
    bad = "attn(q.double(), k.double(), v.double())     # on a B200"
    good = "attn(q.float(), k.float(), v.float())"

    kernel: str
    arch: str
