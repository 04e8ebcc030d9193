"""Standalone files run where attncc cannot be imported, and say the same as attncc."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import attncc
from attncc.cli import main
from attncc.inputs import captured_tensors, operands
from attncc.plan.nodes import Specialization
from attncc.runtime.arguments import DTYPES, Sizes
from attncc.runtime.targets import parse
from attncc.standalone import standalone

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZES = Sizes(2, 4, 2, 70, 90, 32, 16)

PROGRAM = """
import sys
sys.modules["attncc"] = None  # importing it fails
import torch
sys.path.insert(0, sys.argv[1])
inputs = torch.load(sys.argv[2])
function = getattr(__import__(sys.argv[3]), sys.argv[3])
q, k, v, more = inputs["q"], inputs["k"], inputs["v"], inputs["more"]
torch.save(function(q, k, v, **more, return_lse=True), sys.argv[4])
"""


@pytest.mark.slow  # that of the quick tier is in `test_cli.py`
@pytest.mark.parametrize("example", ["sliding_window", "document_causal", "yarn", "forgetting_transformer"])
@pytest.mark.parametrize("target", ["cpp", "triton:interpret"])
def test_a_standalone_file_runs_without_attncc(example: str, target: str, tmp_path: Path) -> None:
    attn = attncc.build(EXAMPLES / f"{example}.attn", target=target)
    generator = torch.Generator().manual_seed(0)
    q, k, v = operands(SIZES, torch.float32, generator)
    more: dict[str, Any] = dict(captured_tensors(attn.attention, SIZES, torch.float32, generator))
    more |= {p.name: 20 for p in attn.attention.scalars if p.default is None}
    tensors = tuple((name, DTYPES[x.dtype]) for name, x in more.items() if isinstance(x, torch.Tensor))
    specialization = Specialization(DTYPES[q.dtype], SIZES.D, SIZES.E, tensors)
    for name, text in standalone(attn, specialization, parse(target)).items():
        (tmp_path / name).write_text(text)
    torch.save({"q": q, "k": k, "v": v, "more": more}, tmp_path / "inputs.pt")

    arguments = [str(tmp_path), str(tmp_path / "inputs.pt"), example, str(tmp_path / "out.pt")]
    environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if target.startswith("triton") else {})}
    for _ in range(2):  # the second process finds what the first has compiled
        subprocess.run([sys.executable, "-c", PROGRAM, *arguments], check=True, env=environment)

    o, lse = torch.load(tmp_path / "out.pt")
    expected, expected_lse = attn(q, k, v, **more, return_lse=True)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-5)


def function_of(example: str, folder: Path, *options: str) -> Any:
    """The function of a standalone file that the command line has written."""
    assert main(["emit", str(EXAMPLES / f"{example}.attn"), "--standalone", *options, "-o", str(folder)]) == 0
    namespace: dict[str, Any] = {"__file__": str(folder / f"{example}.py")}
    exec((folder / f"{example}.py").read_text(), namespace)
    return namespace[example]


def test_a_standalone_function_takes_ints_of_both_widths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = function_of("document", tmp_path, "--head-dim", "32,16")
    assert "for q, k and v of float32, D = 32 and E = 16; --dtype and --head-dim" in capsys.readouterr().err
    assert "q, k and v of float32, D = 32 and E = 16;" in (tmp_path / "document.py").read_text()
    q, k, v = operands(SIZES, torch.float32, torch.Generator().manual_seed(0))
    doc = torch.arange(90).div(20, rounding_mode="floor").repeat(2, 1)
    expected = attncc.build(EXAMPLES / "document.attn", target="cpp").reference(q, k, v, doc=doc).float()
    for dtype in (torch.int32, torch.int64):
        torch.testing.assert_close(document(q, k, v, doc=doc.to(dtype)), expected)
    for wrong in (doc.float(), doc.short(), doc[:, :-1]):
        with pytest.raises(ValueError, match=r"doc must be int32 or int64 \(2, 90\), not"):
            document(q, k, v, doc=wrong)


def test_a_standalone_function_takes_narrower_floats(tmp_path: Path) -> None:
    sink = function_of("attention_sink", tmp_path, "--head-dim", "32,16")
    q, k, v = operands(SIZES, torch.float32, torch.Generator().manual_seed(0))
    sinks = torch.tensor([0.5, 1.0, -2.0, 0.25])
    expected = sink(q, k, v, sinks=sinks, window=20)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(sink(q, k, v, sinks=sinks.to(dtype), window=20), expected)
    with pytest.raises(ValueError, match="sinks must be float16 or bfloat16 or float32"):
        sink(q, k, v, sinks=sinks.double(), window=20)


def test_a_standalone_function_refuses_what_it_was_not_made_for(tmp_path: Path) -> None:
    attn = attncc.build(EXAMPLES / "causal.attn", target="cpp")
    specialization = Specialization(DTYPES[torch.float32], 32, 16)
    for name, text in standalone(attn, specialization, parse("cpp")).items():
        (tmp_path / name).write_text(text)
    namespace: dict[str, object] = {"__file__": str(tmp_path / "causal.py")}
    exec((tmp_path / "causal.py").read_text(), namespace)
    causal = namespace["causal"]
    assert callable(causal)
    q, k, v = operands(SIZES, torch.float32, torch.Generator())
    with pytest.raises(ValueError, match="do not fit"):
        causal(q[..., :8], k, v)
    with pytest.raises(TypeError, match="float32"):
        causal(q.half(), k.half(), v.half())
    with pytest.raises(ValueError, match="one cpu device"):
        causal(q.to("meta"), k, v)
    with pytest.raises(RuntimeError, match="no gradients"):
        causal(q.requires_grad_(), k, v)
