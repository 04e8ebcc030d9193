"""Kernels to vendor: source files that run with torch (and triton, or a C++ compiler) where attncc is not installed."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from attncc.emit.render import fill
from attncc.emit.run import first_line
from attncc.ir.nodes import Apply, Attention, Constant, Expr, ScalarParameter, Size, TensorParameter
from attncc.ir.types import DType, Kind
from attncc.plan.nodes import KernelPlan, Program, Specialization, Target
from attncc.runtime.arguments import TORCH_DTYPES
from attncc.runtime.call import CompiledAttention
from attncc.runtime.cpp_toolchain import flags


@dataclass(frozen=True, slots=True)
class Standalone:
    """What the template of a standalone file receives as `plan`."""

    name: str
    spec: Attention
    program: Program
    kernels: tuple[str, ...]
    launcher: str
    symbols: tuple[str, ...]
    flags: tuple[str, ...]
    tensor_dtypes: Mapping[str, DType]
    accepted_dtypes: Mapping[str, tuple[DType, ...]]


def standalone(attn: CompiledAttention, specialization: Specialization, target: Target) -> dict[str, str]:
    """Files by name: one Python file for Triton, a C++ file and its Python loader for C++."""
    program, sources, launcher = attn.sources(specialization, target)
    spec = program.spec
    cpp = target.backend == "cpp"
    files = {f"{spec.name}.cpp": _one_cpp_file(program, sources)} if cpp else {}
    plan = Standalone(
        name=spec.name,
        spec=attn.attention,
        program=program,
        kernels=()
        if cpp
        else tuple(_without_imports(p, s, len(sources) > 1) for p, s in zip(program.kernels, sources, strict=True)),
        launcher=launcher,
        symbols=tuple(kernel.name for kernel in program.kernels),
        flags=flags(target.arch, target.flags) if cpp else (),
        tensor_dtypes=dict(specialization.tensors),
        accepted_dtypes={p.name: _accepted(p, dict(specialization.tensors)[p.name]) for p in attn.attention.tensors},
    )
    filters = {
        "first_line": first_line,
        "describe": describe,
        "torch_name": _torch_name,
        "keywords": lambda plan: "".join(f", {p.name}=…" for p in plan.spec.parameters),
        "input_value": lambda parameter: _input_value(parameter, plan.tensor_dtypes),
        "python_shape": lambda tensor: "(" + "".join(f"{_size(axis)}, " for axis in tensor.shape) + ")",
    }
    files[f"{spec.name}.py"] = fill("standalone.py.jinja", plan, spec.name, target, filters, attn.templates)
    return files


def widest_ints(attention: Attention, specialization: Specialization) -> Specialization:
    """The same with int64 for each captured tensor that may have it, so that the function takes int32 and int64."""
    wide = {p.name: DType.I64 for p in attention.tensors if DType.I64 in p.dtypes}
    return replace(specialization, tensors=tuple((name, wide.get(name, d)) for name, d in specialization.tensors))


def describe(specialization: Specialization) -> str:
    """What q, k and v a standalone function takes."""
    s = specialization
    return f"q, k and v of {_torch_name(s.dtype)}, D = {s.head_dim_qk} and E = {s.head_dim_v}"


def _accepted(parameter: TensorParameter, wanted: DType) -> tuple[DType, ...]:
    """The types that a captured tensor may have: the one that the kernel reads, and those that it holds exactly."""
    to = TORCH_DTYPES[wanted]
    return tuple(d for d in parameter.dtypes if torch.promote_types(TORCH_DTYPES[d], to) == to)


def _torch_name(dtype: DType) -> str:
    return str(TORCH_DTYPES[dtype]).removeprefix("torch.")


def _one_cpp_file(program: Program, sources: tuple[str, ...]) -> str:
    """The kernels, each in a namespace of its name and with entry points of its name."""
    parts: list[str] = []
    for plan, source in zip(program.kernels, sources, strict=True):
        renamed = re.sub(r"\battncc_(run|bind)\b", rf"{plan.name}_\1", source).strip()
        parts.append(f"namespace {plan.name}_ {{\n\n{renamed}\n\n}}  // namespace {plan.name}_\n")
    return "\n".join(parts)


def _without_imports(plan: KernelPlan, source: str, shared: bool) -> str:
    """A generated Triton module without its docstring and imports. shared: in a file with others, so that what it
    defines beside its kernels gets names of its own."""
    tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    body = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    if body and isinstance(body[0], ast.Expr):  # the docstring
        body = body[1:]
    defined = [name for node in body for name in _defined(node) if not name.startswith(plan.name)]
    starts = [min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) for node in body]
    text = "".join(lines[starts[0] - 1 :])
    for name in defined if shared else ():
        suffix = plan.name.removeprefix(plan.spec.name)
        text = re.sub(rf"\b{name}\b", name + (suffix.upper() if name.isupper() else suffix), text)
    return text


def _defined(node: ast.stmt) -> list[str]:
    match node:
        case ast.FunctionDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
        case _:
            return []


def _input_value(parameter: ScalarParameter | TensorParameter, dtypes: Mapping[str, DType]) -> str:
    match parameter:
        case ScalarParameter(name=name, kind=kind):
            return f"{ {Kind.BOOL: 'bool', Kind.INT: 'int', Kind.FLOAT: 'float'}[kind] }({name})"
        case TensorParameter(name=name, summed=None):
            return name
        case TensorParameter(name=name, summed=axis):
            return f"{name}.cumsum({axis}, dtype=torch.float64).to(torch.{_torch_name(dtypes[name])})"


def _size(expr: Expr) -> str:
    """A size of a captured tensor as Python over the sizes of the call."""
    match expr:
        case Size(name=name):
            return name
        case Constant(value=value):
            return str(int(value))
        case Apply(op=op, args=args) if op in _SIZE_SPELLING:
            return _SIZE_SPELLING[op].format(*map(_size, args))
        case _:
            raise AssertionError(f"not a shape expression: {expr}")


_SIZE_SPELLING = {
    "add": "({} + {})",
    "sub": "({} - {})",
    "mul": "{} * {}",
    "neg": "-{}",
    "floordiv": "({} // {})",
    "mod": "({} % {})",
    "min": "min({}, {})",
    "max": "max({}, {})",
}
