"""Compiles Triton functions ahead of time: a program of its own, because a target that fails can abort the process.

Says {"ready": version of triton}, then reads requests from standard input, one JSON object per line, and answers each
with one line of JSON:

    {"path": …, "function": …, "arch": …, "signature": {name: type}, "constants": {name: value},
     "divisors": {name: divisor}, "options": {…}, "out": folder or null, "stem": …}
    {"registers": …, "spilled": …, "stack": …, "shared": …, "products": …, "warnings": […], "files": […], "name": …}
    {"error": …}

It imports triton alone: no torch, no attncc. (Run it with -P: a module beside it is called triton, too.)
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Matrix instructions in a target's assembly; those of Hopper and Blackwell are asynchronous.
PRODUCTS = {
    "sm_80": r"\bmma\.sync",
    "sm_90": r"\bwgmma\.mma_async",
    "sm_100": r"\btcgen05\.mma",
    "gfx942": r"\bv_mfma",
}


def main() -> None:
    """Answers requests until the input ends."""
    modules: dict[str, Any] = {}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What compilers print is no answer.
    answers.write(json.dumps({"ready": triton.__version__}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            path = request["path"]
            if path not in modules:
                modules[path] = load(path)
            answer = compile_one(modules[path], request)
        except Exception as error:  # noqa: BLE001 - a compiler may raise anything; the answer says what
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def load(path: str) -> Any:
    specification = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def compile_one(module: Any, request: dict[str, Any]) -> dict[str, Any]:
    function = getattr(module, request["function"])
    arch = request["arch"]
    names = list(request["signature"])
    attributes = {(names.index(name),): [["tt.divisibility", by]] for name, by in request["divisors"].items()}
    source = ASTSource(function, request["signature"], request["constants"], attributes)
    compiled = triton.compile(source, target=TARGETS[arch], options=request["options"])
    if arch.startswith("sm_"):
        found = nvidia_resources(compiled.asm["ptx"], int(TARGETS[arch].arch))
        assembly, extension = compiled.asm["ptx"], "ptx"
    else:
        assembly, extension = compiled.asm["amdgcn"], "amdgcn"
        found = amd_resources(assembly)
    found |= {
        "shared": compiled.metadata.shared,
        "products": len(re.findall(PRODUCTS[arch], assembly)),
        "name": compiled.metadata.name,
        "files": [],
    }
    if request["out"]:
        binary = "cubin" if "cubin" in compiled.asm else "hsaco"
        stem = Path(request["out"]) / request["stem"]
        stem.with_name(f"{stem.name}.{binary}").write_bytes(compiled.asm[binary])
        stem.with_name(f"{stem.name}.{extension}").write_text(assembly, encoding="utf-8")
        found["files"] = [f"{stem.name}.{binary}", f"{stem.name}.{extension}"]
    return found


def nvidia_resources(ptx: str, capability: int) -> dict[str, Any]:
    """What ptxas reports. Its C75xx warnings tell of wgmma that it had to serialise."""
    from triton.backends.nvidia.compiler import get_ptxas

    suffix = "a" if capability >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        command = [get_ptxas(capability).path, "-v", f"--gpu-name=sm_{capability}{suffix}", str(path)]
        run = subprocess.run([*command, "-o", f"{path}.cubin"], capture_output=True, text=True, check=True)
    report = run.stderr + run.stdout
    used = [int(number) for number in re.findall(r"Used (\d+) registers", report)]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    stack, stores, loads = (max(map(int, column)) for column in zip(*frames, strict=True))
    warnings = [
        line.strip() for line in report.splitlines() if re.search(r"warning|C75\d\d|serializ", line, re.IGNORECASE)
    ]
    return {"registers": max(used), "stack": stack, "spilled": stores + loads, "warnings": warnings}


def amd_resources(assembly: str) -> dict[str, Any]:
    """What the metadata at the end of the assembly says."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None, name
        return int(found[1])

    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "spilled": 4 * field("vgpr_spill_count"),
        "warnings": [],
    }


if __name__ == "__main__":
    main()
