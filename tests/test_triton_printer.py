"""How expressions are spelled in Triton, what a kernel takes, and which names are taken."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jinja2
import jinja2.meta
import pytest

import attncc
from attncc.diagnostics import BuildError
from attncc.emit.printers import printer_of
from attncc.emit.render import render
from attncc.emit.triton import TritonPrinter
from attncc.emit.triton_names import RESERVED, name_of
from attncc.emit.triton_text import tidy
from attncc.ir.types import DType, Kind
from attncc.plan.backward import plan_backward
from attncc.plan.build import plan_attention
from attncc.plan.nodes import BackwardPlan, ForwardPlan, KernelPlan, Program, Specialization, Target
from attncc.plan.triton_tiles import (
    MACHINES,
    WITHOUT_F64,
    accumulator_registers,
    candidates,
    chunk_widths,
    covered,
    shared_bytes,
)
from attncc.resources import folder
from attncc.runtime.triton import LoadedModule, compile_kernel, store
from attncc.runtime.triton_fields import functions_of

FAMILY = folder("templates") / "triton"


def program(spec: str, dtype: DType = DType.F32, arch: str = "interpret", width: int = 64) -> Program:
    attention = attncc.check(spec)
    tensors = tuple((tensor.name, tensor.dtypes[-1]) for tensor in attention.tensors)
    return plan_attention(attention, Specialization(dtype, width, width, tensors), Target("triton", arch))


def mask_of(condition: str, parameters: str = "w: int = 3", dtype: DType = DType.F32) -> str:
    """How a mask is spelled in a matrix of pairs."""
    plan = program(f"attention spelled({parameters}):\n    mask = {condition}\n", dtype).forward
    assert plan.mask is not None
    return TritonPrinter(plan).print(plan.mask.value, matrix=True).source


@pytest.mark.parametrize(
    ("condition", "text"),
    [
        ("kv_idx <= q_idx", "offs_n[None, :] <= q_idx[:, None]"),
        (
            "kv_idx <= q_idx and q_idx - kv_idx < w",
            "(offs_n[None, :] <= q_idx[:, None]) & (q_idx[:, None] - offs_n[None, :] < w)",
        ),
        ("not (kv_idx == q_idx)", "offs_n[None, :] != q_idx[:, None]"),
        ("w > q_idx - kv_idx", "w > q_idx[:, None] - offs_n[None, :]"),
        ("(q_idx - kv_idx) * (q_idx + kv_idx) < 5 or q_idx == kv_idx", None),
    ],
)
def test_spelling(condition: str, text: str | None) -> None:
    found = mask_of(condition)
    ast.parse(found)
    assert text is None or found == text


def test_ints_that_may_need_64_bits_have_them() -> None:
    assert ".to(tl.int64)" not in mask_of("q_idx - kv_idx < w")
    assert ".to(tl.int64)" in mask_of("(q_idx - kv_idx) * w < 7")
    plan = program("attention a(w: int):\n    mask = q_idx * 3 + w > kv_idx\n").forward
    assert "q_idx.to(tl.int64) * 3 + w.to(tl.int64)" in render(plan, printer_of(plan))


def test_division_is_corrected_only_where_it_must_be() -> None:
    source = "".join(sources("attention a():\n    mask = kv_idx // 16 == q_idx // 16\n"))
    assert "offs_n // 16" in source and "attn_floordiv(q_idx, 16)" in source
    assert "def attn_floordiv" in source and "def attn_mod" not in source


def kernels(spec: str, **options: object) -> tuple[KernelPlan, ...]:
    """The kernels of both passes; every captured tensor of floats wants a gradient."""
    forward = program(spec, **options)  # type: ignore[arg-type]
    wanted = frozenset(name for name, dtype in forward.specialization.tensors if dtype.kind is Kind.FLOAT)
    attention = attncc.check(spec)
    return (*forward.kernels, *plan_backward(attention, forward.specialization, forward.target, wanted).kernels)


def sources(spec: str, **options: object) -> list[str]:
    return [render(plan, printer_of(plan)) for plan in kernels(spec, **options)]


SPECS = [
    "attention a():\n    score = qk\n",
    "attention a(w: int):\n    mask = kv_idx <= q_idx and (kv_idx < 4 or q_idx - kv_idx < w)\n",
    "attention a(doc: int[B, N]):\n    mask = doc[b, q_idx] == doc[b, kv_idx] and kv_idx <= q_idx\n",
    "attention a(w: int):\n    mask = abs(q_idx - kv_idx) < w and (q_idx - kv_idx) % 2 == 0\n",
    "attention a(s: f32[H]):\n    weight = softmax(score, sink=s[h])\n    q = rope(q, q_idx)\n    k = l2norm(k)\n",
    "attention a(g: f32[H]):\n    weight = sigmoid(score + g[h])\n    normalize = sum\n    mask = causal\n",
    "attention a(g: bool[N]):\n    weight = relu(score) ** 2\n    mask = g[kv_idx]\n",
    """attention a(t: f32[M, 7], u: f32[N], c: f32[2]):
    score = qk * u[kv_idx] + t[q_row, kv_idx % 7] + u[q_idx] + c[clamp(q_idx - kv_idx, 0, 1)]
    mask = causal
""",
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("arch", ["interpret", "sm_90"])
def test_every_line_is_one_that_a_person_could_have_written(spec: str, arch: str) -> None:
    for source in sources(spec, arch=arch, width=80):
        ast.parse(source)
        assert "  \n" not in source and "\n\n\n\n" not in source and not source.startswith("\n")
        assert source.endswith("\n") and not source.endswith("\n\n")
        kernel = source.split("import triton.language as tl")[1]
        assert not re.search(r"\(\(\w+\)\)", kernel), "doubled parentheses"
        assert ast.get_docstring(ast.parse(source)), "no header"


def names_in(source: str) -> Iterator[str]:
    """What the functions of a module bind, and their parameters."""
    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef) or function.name.startswith("attn_"):
            continue
        yield from (argument.arg for argument in function.args.args)
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id


@pytest.mark.parametrize("spec", SPECS)
def test_every_name_of_a_kernel_is_taken(spec: str) -> None:
    for plan in kernels(spec, width=80):
        levels = ("call", "head", "key", "position", "position_element", "row_values")
        levels += ("row",) if isinstance(plan, ForwardPlan | BackwardPlan) else ()
        bindings = {binding.name for level in levels for binding in getattr(plan, level, ())}
        staged = [getattr(plan, part, None) for part in ("score", "mask", "weight", "element", "pair")]
        bindings |= {binding.name for part in staged if part is not None for binding in part.bindings}
        own = {parameter.name for parameter in plan.spec.parameters}
        derived = {f"{name}_{kind}_{axis}" for name in own for kind in ("size", "stride") for axis in range(4)}
        free = {name for name in names_in(render(plan, printer_of(plan))) if name_of(name) == name}
        assert free <= bindings | own | derived, "attncc/emit/triton_names.py does not reserve these"


def test_a_specification_may_use_any_name() -> None:
    assert all(name_of(name) != name for name in ("acc", "tl", "k_tile", "bias_stride_0", "attn_tanh", "lambda"))
    assert name_of("window") == "window"
    assert RESERVED


def test_templates_know_nothing_but_their_plan() -> None:
    environment = jinja2.Environment(autoescape=False)
    plan = program(SPECS[0]).forward
    environment.filters.update(TritonPrinter(plan).filters())
    for path in (FAMILY / f"{kernel}.py.jinja" for kernel in ("forward", "rows", "tiles", "backward")):
        unknown = jinja2.meta.find_undeclared_variables(environment.parse(path.read_text(encoding="utf-8")))
        assert unknown <= {"plan"}, path


@pytest.mark.parametrize("spec", SPECS)
def test_kernels_take_what_launchers_pass(spec: str) -> None:
    for plan, source in zip(kernels(spec), sources(spec), strict=True):
        defined = {f.name: f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef)}
        for function in functions_of(plan):
            arguments = tuple(argument.arg for argument in defined[function.name].args.args)
            assert arguments == function.parameters


def one_kernel() -> tuple[KernelPlan, str]:
    plan = program(SPECS[0]).forward
    return plan, render(plan, printer_of(plan))


def test_a_template_with_other_parameters_is_refused(tmp_path: Path) -> None:
    plan, source = one_kernel()
    with pytest.raises(BuildError, match="A0523"):
        compile_kernel(plan, source.replace("q, k, v, o, lse,", "q, k, v, o, m, lse,"), tmp_path)
    with pytest.raises(BuildError, match="A0523"):
        compile_kernel(plan, source.replace("def a_forward(", "def b_forward("), tmp_path)


def test_a_template_that_renders_no_python_is_refused(tmp_path: Path) -> None:
    plan, source = one_kernel()
    with pytest.raises(BuildError, match="A0524"):
        compile_kernel(plan, source.replace("import triton\n", "import triton oops\n"), tmp_path)


def test_a_truncated_module_is_written_again(tmp_path: Path) -> None:
    plan, source = one_kernel()
    path = store(plan.name, source, tmp_path)
    path.write_text(source[: len(source) // 2])
    assert LoadedModule(plan, source, tmp_path).path == path
    assert path.read_text() == source
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".py"] == [path.name]


def test_sources_do_not_depend_on_hashing() -> None:
    assert sources(SPECS[2]) == sources(SPECS[2])


@pytest.mark.parametrize("size", [*range(1, 300), 320, 512, 576, 600])
def test_chunks_cover_a_row(size: int) -> None:
    widths = chunk_widths(size)
    assert len(widths) <= 2
    assert all(width >= 16 and width & (width - 1) == 0 for width in widths)
    assert size <= covered(size) <= max(16, 1 << (size - 1).bit_length())
    assert sum(widths[:-1]) < size


def test_chunks_of_known_rows() -> None:
    known = {64: (64,), 80: (64, 16), 96: (64, 32), 120: (128,), 192: (128, 64), 576: (512, 64), 5: (16,), 24: (32,)}
    assert {size: chunk_widths(size) for size in known} == known


@pytest.mark.parametrize("arch", MACHINES)
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32, DType.F64])
def test_there_is_a_tile_that_fits(arch: str, dtype: DType) -> None:
    if dtype is DType.F64 and arch in WITHOUT_F64:
        pytest.skip("refused by Triton itself")
    for width_qk in (1, 16, 64, 80, 128, 192, 256):
        for width_v in (1, 64, 128, 256):
            for reads_pairs in (False, True):
                tiles = candidates(arch, dtype, width_qk, width_v, reads_pairs=reads_pairs)
                assert len(set(tiles)) == len(tiles)
                for tile in tiles:
                    assert shared_bytes(tile, dtype, width_qk, width_v) <= MACHINES[arch].shared
                    threads = tile.num_warps * MACHINES[arch].warp_size
                    assert accumulator_registers(tile, dtype, width_v, threads) <= MACHINES[arch].registers


def test_a_tile_of_another_target_is_no_tile_of_triton(tmp_path: Path) -> None:
    plan, source = one_kernel()
    assert isinstance(plan, ForwardPlan)
    other = plan_attention(plan.spec, Specialization(DType.F32, 64, 64), Target("cpp", "portable")).forward
    with pytest.raises(TypeError):
        compile_kernel(replace(plan, tile=other.tile), source, tmp_path)


def test_a_comment_of_two_lines_stays_in_one_piece() -> None:
    assert tidy("x = 1\n# Two lines\n# say it.\ny = 2\n") == "x = 1\n\n# Two lines\n# say it.\ny = 2"
