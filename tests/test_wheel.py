"""The wheel holds all that it needs: installed in an environment of its own, it compiles a specification."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = """
import torch
import attncc
from pathlib import Path

assert "site-packages" in attncc.__file__, attncc.__file__
attn = attncc.build("attention windowed(window: int):\\n    mask = window(window)\\n")
q = torch.randn(1, 2, 50, 16)
o = attn(q, q, q, window=7)
assert (o - attn.reference(q, q, q, window=7)).abs().max() < 1e-5
assert "windowed_forward" in attn.source()
assert "tl.dot" in attncc.build("attention a():\\n    mask = causal\\n", target="triton:sm_90").source()["a_forward"]
print("compiled from", Path(attncc.__file__).parent)
"""


@pytest.mark.slow
def test_the_installed_wheel_compiles(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("attncc-*.whl")
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    # What attncc depends on (torch is large) comes from here; attncc itself does not: it is an editable install here,
    # whose .pth file is not read from a folder that a .pth file adds.
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = environment / "lib" / version / "site-packages"
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    python = str(environment / "bin/python")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    done = subprocess.run(
        [python, "-c", PROGRAM],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "ATTNCC_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(environment) in done.stdout
    script = subprocess.run([environment / "bin/attncc", "--version"], capture_output=True, text=True, check=True)
    assert script.stdout.startswith("attncc 0")
