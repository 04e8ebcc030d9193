"""What commands share: reading specifications and inputs, writing files, progress."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from attncc.build import build, check, read
from attncc.check.suggest import nearest
from attncc.commands.output import reason, say
from attncc.diagnostics import BuildError, CallError
from attncc.errors import CannotRead, CannotWrite, MissingOperand, NoShapeAtSizes, TensorSetting, UnknownSetting
from attncc.inputs import captured_tensors, describe, operands
from attncc.ir.nodes import Attention, Elementwise
from attncc.ir.recurrence import Recurrence, Specification
from attncc.passes.reassociate import recurrence_of
from attncc.recurrent_inputs import recurrent_tensors
from attncc.runtime.arguments import Sizes
from attncc.runtime.call import CompiledAttention
from attncc.runtime.recurrent import RecurrentAttention
from attncc.runtime.recurrent_errors import NoRecurrentKernel
from attncc.runtime.targets import INTERPRET, known_target
from attncc.syntax import nodes, parse

Value: TypeAlias = bool | int | float


@dataclass(frozen=True, slots=True)
class Loaded:
    """An attention of a file, and the values given on the command line, told apart: `constants` are compiled in."""

    path: str
    name: str | None
    text: str
    attention: Specification
    constants: Mapping[str, Value]
    scalars: Mapping[str, Value]

    @property
    def pairwise(self) -> Attention:
        """The attention, for commands that work on pairs. Raises BuildError where it is a recurrence."""
        if isinstance(self.attention, Recurrence):
            raise BuildError(NoRecurrentKernel(None, self.attention.name))
        return self.attention

    def built(self, target: str | None, templates: list[str]) -> CompiledAttention | RecurrentAttention:
        return build(self.path, name=self.name, target=target, templates=templates, **self.constants)

    def compiled(self, target: str | None, templates: list[str]) -> CompiledAttention:
        """As `built`, for commands that work on pairs."""
        assert self.pairwise is self.attention
        built = self.built(target, templates)
        assert isinstance(built, CompiledAttention)
        return built


def load(path: str, name: str | None, settings: Mapping[str, Value]) -> Loaded:
    """Reads and checks a specification. Raises SpecError for its mistakes."""
    source = read(Path(path))
    constants = constant_names(parse(source), name)
    values = {key: value for key, value in settings.items() if key in constants}
    others = {key: value for key, value in settings.items() if key not in constants}
    attention = check(Path(path), name=name, **values)
    refuse_unknown(attention, others, sorted(constants))
    return Loaded(path, name, source.text, attention, values, others)


def load_checked(path: str, name: str | None, settings: Mapping[str, Value]) -> Specification:
    """Reads and checks a specification, whether or not there are kernels of it."""
    constants = constant_names(parse(read(Path(path))), name)
    attention = check(Path(path), name=name, **{key: value for key, value in settings.items() if key in constants})
    others = {key: value for key, value in settings.items() if key not in constants}
    refuse_unknown(attention, others, sorted(constants))
    return attention


def refuse_unknown(attention: Specification, settings: Mapping[str, Value], constants: Sequence[str] = ()) -> None:
    """Raises CallError for settings that name no parameter, or a tensor of more than one number."""
    known = [parameter.name for parameter in attention.parameters]
    names = [*known, *constants]
    listed = f"its parameters are {', '.join(names)}" if names else "it has none"
    unknown = [name for name in settings if name not in known]
    tensors = [tensor for tensor in attention.tensors if tensor.shape and tensor.name in settings]
    if unknown or tensors:
        raise CallError(
            *(UnknownSetting(None, attention.name, n, nearest(n, names) or listed) for n in unknown),
            *(TensorSetting(tensor.span, tensor.name) for tensor in tensors),
        )


def constant_names(file: nodes.File, name: str | None) -> frozenset[str]:
    """The `const` parameters of the attentions of a file, or of the one named."""
    chosen = [attention for attention in file.attentions if name in (None, attention.name)]
    return frozenset(p.name for attention in chosen for p in attention.parameters if p.const)


def call_arguments(
    loaded: Loaded, arguments: argparse.Namespace, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """q, k, v and the inputs of a call: from `--input` where given, made up otherwise, which is said on stderr."""
    given: dict[str, Tensor] = {}
    path: Path | None = getattr(arguments, "input", None)
    if path is not None:
        given = _read_tensors(path)
        q, k, v = (given.pop(name) for name in "qkv")
        dtype = q.dtype
        sizes = Sizes(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
        unknown = sorted(set(given) - {tensor.name for tensor in loaded.attention.tensors})
        if unknown:
            say(f"{path}: not an input of {loaded.attention.name}, left aside: {', '.join(unknown)}")
            given = {name: tensor for name, tensor in given.items() if name not in unknown}
    else:
        sizes = Sizes(*arguments.shape)
        q, k, v = operands(sizes, dtype, torch.Generator().manual_seed(arguments.seed))
    missing = [tensor for tensor in loaded.attention.tensors if tensor.name not in given]
    if missing:
        generator = torch.Generator().manual_seed(arguments.seed + 1)
        try:
            recurrence = _recurrence(loaded.attention)
            if recurrence is not None:
                made_up = recurrent_tensors(recurrence, q, k, v, loaded.scalars, generator)
            else:
                made_up = captured_tensors(loaded.attention, sizes, dtype, generator)
        except ValueError as error:
            raise CallError(NoShapeAtSizes(None, str(error))) from error
        for tensor in missing:
            what = describe(tensor) if recurrence is None else "numbers with which nothing explodes"
            say(f"`{tensor.name}` is not given; taking {what}")
            given[tensor.name] = made_up[tensor.name]
    q, k, v = (x.to(device) for x in (q, k, v))
    return q, k, v, {**{name: tensor.to(device) for name, tensor in given.items()}, **loaded.scalars}


def _recurrence(attention: Specification) -> Recurrence | None:
    """The recurrence that an attention is, or that its weights are where they separate."""
    found = attention if isinstance(attention, Recurrence) else recurrence_of(attention)
    return found if isinstance(found, Recurrence) else None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CallError(CannotRead(None, str(path), reason(error))) from error
    missing = [name for name in "qkv" if name not in tensors]
    if missing:
        found = ", ".join(sorted(tensors)) or "nothing"
        raise CallError(*(MissingOperand(None, str(path), name, found) for name in missing))
    wrong = [name for name in "qkv" if tensors[name].dim() != 4]
    if wrong:
        raise CallError(
            *(CannotRead(None, str(path), f"{name} has {tensors[name].dim()} axes, not 4") for name in wrong)
        )
    return tensors


def returns_lse(attention: Specification) -> bool:
    """Whether a row of weights has a sum to return."""
    return isinstance(attention, Attention) and not isinstance(attention.normalizer, Elementwise)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)
    except (OSError, SafetensorError) as error:
        raise CallError(CannotWrite(None, str(path), reason(error))) from error


def device_of(target: str | None, folders: Sequence[Path]) -> str:
    """Where the tensors of a call have to lie for a target: a GPU for Triton, unless it is interpreted."""
    on_cpu = False
    if target is not None:
        wanted = known_target(target, folders)
        on_cpu = wanted.backend == "cpp" or wanted.arch == INTERPRET
    return "cpu" if on_cpu or not torch.cuda.is_available() else "cuda"
