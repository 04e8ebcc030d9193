"""Which target a call is compiled for: the one that was named, or the one that suits the device of q."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from attncc.diagnostics import BuildError
from attncc.emit.families import target_of
from attncc.plan.nodes import Target
from attncc.plan.triton_tiles import MACHINES
from attncc.runtime.cpp_toolchain import ARCHS, native_arch
from attncc.runtime.toolchain_errors import NoKernelForDevice, UnknownArch, UnsupportedArch
from attncc.runtime.triton import arch_of

INTERPRET = "interpret"


def resolve(named: str | None, device: torch.device, folders: Sequence[Path]) -> Target:
    """The target for tensors on `device`. named: `family`, `family:arch`, or None for the project's choice.

    Raises BuildError where there is no such target, or where its kernels cannot run on that device.
    """
    if named is None:
        if device.type not in ("cpu", "cuda"):
            raise BuildError(NoKernelForDevice(None, "attncc", str(device), "move the tensors to a CPU or a GPU"))
        named = "cpp" if device.type == "cpu" else "triton"
    target = parse(named, folders, device)
    wanted = "cpu" if target.backend == "cpp" or target.arch == INTERPRET else "cuda"
    if device.type != wanted:
        advice = (
            f"move the tensors to {wanted!r}"
            if target.backend == "cpp"
            else "target='triton:interpret' runs the same kernel interpreted, on tensors of the CPU"
        )
        raise BuildError(NoKernelForDevice(None, str(target), str(device), advice))
    if target.backend == "cpp" and ARCHS.index(target.arch) < ARCHS.index(native_arch()):
        raise BuildError(UnsupportedArch(None, str(target), native_arch()))
    return target


def default_target(named: str | None, folders: Sequence[Path]) -> Target:
    """The target where there are no tensors: the one that is named, or that of the processor."""
    return resolve(None, torch.device("cpu"), folders) if named is None else parse(named, folders)


def parse(named: str, folders: Sequence[Path] = (), device: torch.device | None = None) -> Target:
    """The target of a name, with the machine at hand where it names none."""
    target = known_target(named, folders)
    if target.arch:
        return target
    return replace(target, arch=native_arch() if target.backend == "cpp" else _gpu_arch(device))


def known_target(named: str, folders: Sequence[Path] = ()) -> Target:
    """The target of a name as it stands, whose machine is empty where it names none. Raises BuildError if there is no
    such family or machine."""
    family, _, arch = named.partition(":")
    target = target_of(family, arch, folders)
    known = ARCHS if target.backend == "cpp" else (*MACHINES, INTERPRET)
    if arch and arch not in known:
        raise BuildError(UnknownArch(None, family, arch, ", ".join(known)))
    return target


def _gpu_arch(device: torch.device | None) -> str:
    if torch.cuda.is_available():
        return arch_of(device if device is not None and device.type == "cuda" else torch.device("cuda"))
    advice = "name the machine, as in `triton:sm_90`, to compile ahead of time; `triton:interpret` runs on the CPU"
    raise BuildError(NoKernelForDevice(None, "triton", "this machine, which has no GPU", advice))
