"""What `make demo` runs: compile an example, verify it, time it beside PyTorch."""

from __future__ import annotations

import sys
from pathlib import Path

from attncc.cli import main

SPEC = Path(__file__).with_name("sliding_window.attn")


def step(title: str, arguments: list[str]) -> None:
    command = "attncc " + " ".join(arguments)
    print(f"\n--- {title}\n$ {command}\n", flush=True)
    status = main(arguments)
    if status != 0:
        sys.exit(status)


def demo() -> None:
    spec = str(SPEC.relative_to(Path.cwd())) if SPEC.is_relative_to(Path.cwd()) else str(SPEC)
    print(f"--- {spec}\n\n{SPEC.read_text(encoding='utf-8')}", end="", flush=True)
    shape = ["--shape", "1,8,8,2048,2048,64", "--set", "window=256"]
    step("Compile it and call it", ["run", spec, *shape])
    step("Verify it: random shapes and inputs against the float64 reference", [
        "verify", spec, "--target", "cpp", "--target", "triton:interpret", "--examples", "16", "--longest", "200",
    ])  # fmt: skip
    step("Time it beside PyTorch", ["bench", spec, *shape])


if __name__ == "__main__":
    demo()
