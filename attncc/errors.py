"""Errors of the library's front door and of the command line."""

from __future__ import annotations

from dataclasses import dataclass

from attncc.diagnostics import Diagnostic


@dataclass(frozen=True, slots=True)
class CannotReadSpec(Diagnostic):
    code = "A0100"
    title = "cannot read {path}: {reason}"
    help = "name a file of UTF-8 text that ends in .attn, or pass the specification itself"
    explanation = "A specification is the path of a file that ends in `.attn`, or the text of one."
    bad = 'attncc.build("exmaples/causal.attn")'
    good = 'attncc.build("examples/causal.attn")'

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class PassedByPosition(Diagnostic):
    code = "A0616"
    title = "`{function}` takes {operands} by position, and all else by keyword"
    help = "{advice}"
    explanation = (
        "A call takes q, k and v by position, `attncc.build` the specification. Inputs, constants and options have "
        "names, which stand at the call: the order of their declaration means nothing."
    )
    bad = "attn(q, k, v, 128)"
    good = "attn(q, k, v, window=128)"

    function: str
    operands: str
    advice: str


@dataclass(frozen=True, slots=True)
class CannotRead(Diagnostic):
    code = "A0631"
    title = "cannot read {path}: {reason}"
    help = "pass a safetensors file with q (B, H, M, D), k (B, HKV, N, D) and v (B, HKV, N, E)"
    explanation = "`--input` names a safetensors file that holds q, k, v and the captured tensors, each under its name."
    bad = "attncc run causal.attn --input qkv.txt"
    good = "attncc run causal.attn --input qkv.safetensors"

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class CannotWrite(Diagnostic):
    code = "A0632"
    title = "cannot write {path}: {reason}"
    help = "name a file in a folder that exists and can be written"
    explanation = "The file that `-o` or `--png` names could not be written. Nothing was left half-written."
    bad = "attncc run causal.attn -o /proc/out.safetensors"
    good = "attncc run causal.attn -o out.safetensors"

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class MissingOperand(Diagnostic):
    code = "A0633"
    title = "{path} holds no `{name}`"
    help = "it holds {found}; q, k and v must be among them"
    explanation = "`--input` names a safetensors file that holds q, k and v under these names."
    bad = "attncc run causal.attn --input kv.safetensors"
    good = "attncc run causal.attn --input qkv.safetensors"

    path: str
    name: str
    found: str


@dataclass(frozen=True, slots=True)
class NoShapeAtSizes(Diagnostic):
    code = "A0634"
    title = "no input can be made up at these sizes: {reason}"
    help = "choose another --shape, or pass the tensors with --input"
    explanation = "Captured tensors are made up in the shapes that the specification declares, at the sizes of --shape."
    bad = "attncc run spec.attn --shape 1,8,3,64,64,64"
    good = "attncc run spec.attn --shape 1,8,2,64,64,64"

    reason: str


@dataclass(frozen=True, slots=True)
class UnknownPeer(Diagnostic):
    code = "A0635"
    title = "there is no peer `{name}` to measure against"
    help = "the peers are {known}"
    explanation = "`--against` names what to measure beside attncc."
    bad = "attncc bench causal.attn --against fa9"
    good = "attncc bench causal.attn --against sdpa"

    name: str
    known: str


@dataclass(frozen=True, slots=True)
class UnknownCode(Diagnostic):
    code = "A0636"
    title = "there is no error code or file `{what}`"
    help = "pass a code as it stands in an error message, such as A0201, or the path of a specification"
    explanation = "`attncc explain` takes an error code or a specification."
    bad = "attncc explain A9999"
    good = "attncc explain A0201"

    what: str


@dataclass(frozen=True, slots=True)
class UnknownSetting(Diagnostic):
    code = "A0638"
    title = "`{attention}` has no parameter `{name}`"
    help = "{advice}"
    explanation = "`--set` gives a value to a run-time scalar or a `const` parameter of the specification."
    bad = "attncc run sliding_window.attn --set windw=512"
    good = "attncc run sliding_window.attn --set window=512"

    attention: str
    name: str
    advice: str


@dataclass(frozen=True, slots=True)
class TensorSetting(Diagnostic):
    code = "A0643"
    title = "`{name}` is a tensor, and `--set` gives numbers"
    label = "declared here"
    help = "commands that have `--input` take it, with q, k and v, from a safetensors file; without one it is made up"
    explanation = (
        "`--set` gives a value to a run-time scalar, a `const` parameter or a tensor of no axes. Tensors with axes are "
        "read from the file that `--input` names, each under its name."
    )
    bad = "attncc run alibi.attn --set slope=0.5"
    good = "attncc run alibi.attn --input tensors.safetensors"

    name: str


@dataclass(frozen=True, slots=True)
class NoSuchHead(Diagnostic):
    code = "A0641"
    title = "there is no {axis} {index} to draw"
    help = "the call has {size}, counted from 0"
    explanation = "A picture shows the mask of one batch and head, those of `--batch` and `--head`."
    bad = "attncc explain causal.attn --png mask.png --shape 1,8,8,512,512,64 --head 8"
    good = "attncc explain causal.attn --png mask.png --shape 1,8,8,512,512,64 --head 7"

    axis: str
    index: int
    size: int


@dataclass(frozen=True, slots=True)
class SeveralFiles(Diagnostic):
    code = "A0642"
    title = "{path} names one file, and the standalone source is {files}"
    help = "name a folder for them: -o {folder}"
    explanation = (
        "A standalone kernel for Triton is one Python file. One for C++ is a C++ file and a loader, which finds it in "
        "its own folder."
    )
    bad = "attncc emit causal.attn --target cpp --standalone -o causal.py"
    good = "attncc emit causal.attn --target cpp --standalone -o causal/"

    path: str
    files: str
    folder: str


@dataclass(frozen=True, slots=True)
class ReadsOutside(Diagnostic):
    code = "A0639"
    title = "`{tensor}` is read outside its axis {axis}: index {index} of {size}"
    label = "at {place}"
    help = "a pair that must not read here has to be left out by `mask`, or the index moved with `clamp`"
    explanation = (
        "A pair that the mask keeps reads outside a captured tensor. Kernels read the nearest element instead, so "
        "nothing breaks, but the result is hardly what was meant."
    )
    bad = "attention shifted(bias: f32[N]):\n    score = qk + bias[kv_idx + 1]"
    good = "attention shifted(bias: f32[N + 1]):\n    score = qk + bias[kv_idx + 1]"

    tensor: str
    axis: int
    index: int
    size: int
    place: str


@dataclass(frozen=True, slots=True)
class NotEnoughMemory(Diagnostic):
    code = "A0640"
    title = "there is not enough memory: {reason}"
    help = "choose a smaller --shape"
    explanation = "The tensors of the call, or what it is compared with, do not fit into the memory of this machine."
    bad = "attncc run causal.attn --shape 1,8,8,10000000000,10000000000,64"
    good = "attncc run causal.attn --shape 1,8,8,4096,4096,64"

    reason: str


@dataclass(frozen=True, slots=True)
class InternalError(Diagnostic):
    code = "A0901"
    title = "attncc itself failed: {kind}: {message}"
    help = "please report it, with the specification and the command"
    explanation = "This is a mistake of attncc, not of the specification or the call."

    kind: str
    message: str
