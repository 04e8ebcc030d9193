"""Templates from outside the package: what they replace, what they add, and what is said where they are wrong."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from jinja2 import meta
from torch import Tensor

import attncc
from attncc import BuildError, CompiledAttention, cli, standalone
from attncc.emit import (
    families,
    recurrent_backward_cpp,
    recurrent_cpp,
    recurrent_triton,
    run,
    sequential_cpp,
    sequential_triton,
)
from attncc.emit.printers import printer_of
from attncc.ir import blocks as block_nodes
from attncc.ir.types import DType
from attncc.plan import features, recurrent, sequential, staged_inputs, staging
from attncc.plan import nodes as plan_nodes
from attncc.plan.nodes import Specialization, Target
from attncc.runtime.cpp_toolchain import native_arch
from attncc.runtime.targets import parse

TEMPLATES = Path(__file__).parent.parent / "templates"
README = (TEMPLATES / "README.md").read_text(encoding="utf-8")
PLAIN = "attention plain():\n    mask = true\n"
CAUSAL = "attention causally(cap: float = 5.0):\n    score = cap * tanh(qk / cap)\n    mask = causal\n"
# With every kind of kernel.
ROWS_AND_TILES = (
    "attention everything(docs: int[B, N]):\n    q = rope(q, q_idx)\n    mask = docs[b, q_idx] == docs[b, kv_idx]\n"
)
LINEAR = "attention linear():\n    recurrence:\n        S += outer(k, v)\n        out = q @ S\n"
INTERPRETED = "triton:interpret"


def operands(D: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, rows, D, generator=generator) for rows in (5, 7, 7)]


def assert_right(attn: CompiledAttention, **inputs: Tensor) -> None:
    found = attn(*operands(), return_lse=True, **inputs)
    expected = attn.reference(*operands(), return_lse=True, **inputs)
    for x, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), exact, rtol=1e-5, atol=1e-6)


Write = Callable[[Mapping[str, str]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write({name: text, …})`: a folder with these files."""

    def make(files: Mapping[str, str]) -> Path:
        folder = tmp_path / "my_templates"
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return folder

    return make


@pytest.fixture(autouse=True)
def forget_installed_folders() -> Iterator[None]:
    yield
    families._installed_folders.cache_clear()


def simple_kernel() -> str:
    """The kernel that the README shows in full."""
    return README.split("<!-- simple.cpp.jinja -->\n```jinja\n")[1].split("```")[0]


# --- replacing -------------------------------------------------------------------------------------------------------


def test_a_kernel_of_ones_own(write: Write) -> None:
    folder = write({"cpp/forward.cpp.jinja": simple_kernel()})
    attn = attncc.build(PLAIN, target="cpp", templates=[folder])
    assert_right(attn)
    (source,) = attn.source().values()
    assert source.startswith("// plain_forward: one product at a time, everything in double.\n")
    o, lse = attn(*(x.double() for x in operands()), return_lse=True)
    exact, exact_lse = attn.reference(*operands(), return_lse=True)
    torch.testing.assert_close(o, exact)
    torch.testing.assert_close(lse, exact_lse)
    # The project's own is untouched.
    assert "one product at a time" not in "".join(attncc.build(PLAIN, target="cpp").source().values())


@pytest.mark.parametrize(
    ("target", "file", "comment"),
    [("cpp", "cpp/forward.cpp.jinja", "//"), (INTERPRETED, "triton/forward.py.jinja", "#")],
)
def test_a_template_builds_on_the_one_that_it_replaces(write: Write, target: str, file: str, comment: str) -> None:
    folder = write({file: f'{comment} Reviewed for {{{{ plan.target }}}}.\n{{% include "attncc/{file}" %}}\n'})
    attn = attncc.build(CAUSAL, target=target, templates=[str(folder)])
    assert_right(attn)
    (source,) = attn.source().values()
    (own,) = attncc.build(CAUSAL, target=target).source(head_dim=8).values()
    own_target = f"cpp:{native_arch()}" if target == "cpp" else target
    assert source.rstrip() == f"{comment} Reviewed for {own_target}.\n{own}".rstrip()


def test_a_shared_macro_changes_every_kernel(write: Write) -> None:
    header = "{% macro header(plan, summary) %}\n// Mine: {{ plan.name }}.\n{% endmacro %}\n"
    attn = attncc.build(ROWS_AND_TILES, target="cpp", templates=[write({"cpp/_header.jinja": header})])
    assert_right(attn, docs=torch.tensor([[0, 0, 0, 1, 1, 2, 2]]))
    sources = attn.source()
    assert len(sources) == 3
    for name, source in sources.items():
        assert source.lstrip().startswith(f"// Mine: {name}.\n")


def test_the_first_folder_wins(write: Write, tmp_path: Path) -> None:
    first = write({"cpp/forward.cpp.jinja": "// First.\n" + simple_kernel()})
    second = tmp_path / "second"
    first.rename(second)
    first = write({"cpp/rows.cpp.jinja": "// Of no use here.\n"})
    for order in ([first, second], [second, first]):
        assert next(iter(attncc.build(PLAIN, target="cpp", templates=order).source().values())).startswith("// First.")


def test_a_changed_template_is_used(write: Write) -> None:
    for version in ("one", "two", "six"):
        folder = write({"cpp/forward.cpp.jinja": f"// Version {version}.\n" + simple_kernel()})
        attn = attncc.build(PLAIN, target="cpp", templates=[folder])
        assert_right(attn)
        assert next(iter(attn.source().values())).startswith(f"// Version {version}.")


def test_a_launcher_of_ones_own(write: Write) -> None:
    launcher = (
        '{% include "attncc/cpp/run.py.jinja" %}\n\n_run = run\n\n\ndef run(*args):\n    return -_run(*args)[0], None\n'
    )
    attn = attncc.build(PLAIN, target="cpp", templates=[write({"cpp/run.py.jinja": launcher})])
    torch.testing.assert_close(attn(*operands()), -attncc.build(PLAIN, target="cpp")(*operands()))


def test_links_and_other_files_are_no_matter(write: Write) -> None:
    folder = write({"cpp/forward.cpp.jinja": simple_kernel(), "notes.txt": "none"})
    (folder / "nowhere").symlink_to(folder / "missing")
    assert_right(attncc.build(PLAIN, target="cpp", templates=[folder]))


def test_one_folder_may_be_named_without_a_list(write: Write) -> None:
    folder = write({"cpp/forward.cpp.jinja": simple_kernel()})
    for named in (folder, str(folder), [folder], (str(folder),)):
        attn = attncc.build(PLAIN, target="cpp", templates=named)
        assert "one product at a time" in attn.source()["plain_forward"]


# --- adding ----------------------------------------------------------------------------------------------------------

TARGET = 'based_on = "cpp"\nflags = ["-DTUNED=7", "-fno-omit-frame-pointer"]\n'
TUNED = """#if TUNED != 7
#error the flags of target.toml are not used
#endif
{% include "attncc/cpp/forward.cpp.jinja" %}
"""


@pytest.mark.parametrize("target", ["tuned", "tuned:portable"])
def test_a_target_of_ones_own(write: Write, target: str) -> None:
    folder = write({"tuned/target.toml": TARGET, "tuned/forward.cpp.jinja": TUNED})
    attn = attncc.build(ROWS_AND_TILES, target=target, templates=[folder])
    assert_right(attn, docs=torch.tensor([[0, 0, 0, 1, 1, 2, 2]]))
    sources = attn.source()
    assert [source.startswith("#if TUNED") for source in sources.values()] == [False, False, True]
    machine = target if ":" in target else f"tuned:{native_arch()}"
    assert f"Generated by attncc for {machine}" in sources["everything_forward"]
    assert machine in attn.explain()


def test_a_target_without_templates_of_its_own(write: Write) -> None:
    """Flags alone."""
    assert_right(attncc.build(CAUSAL, target="quick", templates=[write({"quick/target.toml": 'based_on = "cpp"\n'})]))


def test_a_target_based_on_triton(write: Write) -> None:
    files = {
        "mine/target.toml": 'based_on = "triton"\n',
        "mine/forward.py.jinja": '# Mine.\n{% include "attncc/triton/forward.py.jinja" %}\n',
    }
    attn = attncc.build(CAUSAL, target="mine:interpret", templates=[write(files)])
    assert_right(attn)
    assert next(iter(attn.source().values())).startswith("# Mine.")


def test_the_command_line(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write({"tuned/target.toml": TARGET, "tuned/forward.cpp.jinja": TUNED})
    spec = tmp_path / "spec.attn"
    spec.write_text(CAUSAL)
    options = ["--templates", str(folder), "--target", "tuned"]
    assert cli.main(["emit", str(spec), *options]) == 0
    assert capsys.readouterr().out.startswith("#if TUNED")
    assert cli.main(["run", str(spec), *options, "--shape", "1,2,2,16,16,8"]) == 0
    assert "against the float64 reference" in capsys.readouterr().out
    assert cli.main(["run", str(spec), "--target", "tuned"]) == 1
    assert "error[A0543]: there is no target `tuned`" in capsys.readouterr().err


@pytest.fixture
def installed(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`installed(object)`: an installed package `my_kernels` whose entry point names that object of it."""

    def install(named: str) -> Path:
        folder = write({"tuned/target.toml": TARGET, "tuned/forward.cpp.jinja": TUNED})
        site = tmp_path / "site"
        info = site / "my_kernels-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-kernels\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[attncc.templates]\nmine = {named}\n")
        (site / "my_kernels.py").write_text(f"from pathlib import Path\nTEMPLATES = Path({str(folder)!r})\nWRONG = 3\n")
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, "my_kernels", raising=False)
        importlib.invalidate_caches()
        families._installed_folders.cache_clear()
        return folder

    return install


def test_an_installed_package(
    installed: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    installed("my_kernels:TEMPLATES")
    attn = attncc.build(CAUSAL, target="tuned")
    assert_right(attn)
    assert next(iter(attn.source().values())).startswith("#if TUNED")
    spec = tmp_path / "spec.attn"
    spec.write_text(CAUSAL)
    assert cli.main(["emit", str(spec), "--target", "tuned"]) == 0
    assert capsys.readouterr().out.startswith("#if TUNED")


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ("my_kernels:MISSING", "AttributeError"),
        ("not_there:TEMPLATES", "ModuleNotFoundError"),
        ("my_kernels:WRONG", "TypeError"),
    ],
)
def test_an_installed_package_that_is_broken(installed: Callable[[str], Path], named: str, reason: str) -> None:
    installed(named)
    error = build_error(lambda: attncc.build(PLAIN), "A0545")
    assert f"entry point mine = {named} of my-kernels cannot be used: {reason}" in error


def test_an_installed_package_without_its_folder(installed: Callable[[str], Path]) -> None:
    folder = installed("my_kernels:TEMPLATES")
    folder.rename(folder.with_name("elsewhere"))
    assert f"there is no folder {folder}" in build_error(lambda: attncc.build(PLAIN), "A0545")


# --- mistakes --------------------------------------------------------------------------------------------------------


def build_error(build: Callable[[], object], *codes: str) -> str:
    with pytest.raises(BuildError) as caught:
        build()
    assert tuple(d.code for d in caught.value.diagnostics) == codes
    return str(caught.value)


BROKEN = {
    "syntax": ("// one\n// two\n{% for x in %}\n", 3, "Expected an expression"),
    "never closed": ("// one\n{% if plan.mask %}\n", 2, "Unexpected end of template"),
    "unknown field": ("// one\n// {{ plan.head_dim_qk }}\n// {{ plan.hed_dim }}\n", 3, "has no attribute 'hed_dim'"),
    "unknown variable": ("{{ config.block }}\n", 1, "'config' is undefined"),
    "unknown filter": ("\n{{ plan.scale | cppp }}\n", 2, "cppp"),
    "wrong use of a filter": ("\n\n{{ plan.name | cpp }}\n", 3, ""),
    "wrong use of a macro": (
        '\n{% import "cpp/_vectors.jinja" as vectors %}\n{{ vectors.transpose(plan.nothing) }}\n', 3, "nothing",
    ),
    "missing file": ('\n{% include "cpp/missing.jinja" %}\n', 2, "cpp/missing.jinja"),
    "itself": ('{% include "cpp/forward.cpp.jinja" %}\n', 1, "recursion"),
    "a mistake of Python": ("\n{{ 1 // 0 }}\n", 2, "ZeroDivisionError"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "line", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_template(write: Write, text: str, line: int, reason: str) -> None:
    folder = write({"cpp/forward.cpp.jinja": text})
    attn = attncc.build(PLAIN, target="cpp", templates=[folder])
    error = build_error(lambda: attn(*operands()), "A0544")
    assert "the template of plain_forward cannot be rendered" in error
    assert f"mend {folder / 'cpp' / 'forward.cpp.jinja'}:{line}" in error
    assert reason in error


def test_a_broken_template_of_shared_macros(write: Write) -> None:
    folder = write({"cpp/_header.jinja": "{% macro header(plan, summary) %}\n\n{{ plan.nothing }}\n{% endmacro %}\n"})
    error = build_error(lambda: attncc.build(PLAIN, target="cpp", templates=[folder]).source(), "A0544")
    assert f"mend {folder / 'cpp' / '_header.jinja'}:3" in error


def test_a_failure_of_our_own_is_not_blamed_on_a_template(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("planned badly")

    monkeypatch.setattr("attncc.emit.cpp.CppPrinter.functions", fail)
    attn = attncc.build(PLAIN.replace("plain", "failing"), target="cpp", templates=[write({"notes.txt": ""})])
    with pytest.raises(AssertionError, match="planned badly"):
        attn.source()


def test_a_template_that_is_no_cpp(write: Write) -> None:
    attn = attncc.build(PLAIN, target="cpp", templates=[write({"cpp/forward.cpp.jinja": "int attncc_run( {\n"})])
    error = build_error(lambda: attn(*operands()), "A0502")
    assert "error:" in error
    assert "the source is kept at" in error


def test_a_template_without_the_functions_of_a_kernel(write: Write) -> None:
    attn = attncc.build(PLAIN, target="cpp", templates=[write({"cpp/forward.cpp.jinja": "int nothing;\n"})])
    assert "it has no function attncc_run" in build_error(lambda: attn(*operands()), "A0503")


@pytest.mark.parametrize(
    ("text", "reason"),
    [("def run(\n", "SyntaxError"), ("import nothing_like_it\n", "ModuleNotFoundError"), ("\n", "no function `run`")],
)
def test_a_launcher_that_is_no_module(write: Write, text: str, reason: str) -> None:
    attn = attncc.build(PLAIN, target="cpp", templates=[write({"cpp/run.py.jinja": text})])
    assert reason in build_error(lambda: attn(*operands()), "A0546")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("def kernel(\n", "A0524"),
        ("raise ValueError(1)\n", "A0524"),
        ("import nothing_like_it\n", "A0524"),
        ("x = 1\n", "A0523"),
    ],
)
def test_a_template_that_is_no_triton_module(write: Write, text: str, code: str) -> None:
    attn = attncc.build(PLAIN, target=INTERPRETED, templates=[write({"triton/forward.py.jinja": text})])
    build_error(lambda: attn(*operands()), code)


def test_a_folder_that_is_not_there(write: Write, tmp_path: Path) -> None:
    folder = write({"a": ""})
    error = build_error(
        lambda: attncc.build(PLAIN, templates=[tmp_path / "one", folder, folder / "a"]), "A0541", "A0541"
    )
    assert f"there is no folder of templates at {tmp_path / 'one'}" in error
    assert f"there is no folder of templates at {folder / 'a'}" in error


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("based_on = cpp", ["line 1"]),
        ("", ["based_on is missing"]),
        ('based_on = "cuda"', ['based_on is \'cuda\', not "cpp" or "triton"']),
        ('based_on = ["cpp"]', ["based_on is ['cpp']"]),
        ('based_on = "cpp"\nflags = "-O1"', ["flags is not a list of strings"]),
        ('based_on = "cpp"\nflags = [1]', ["flags is not a list of strings"]),
        ('based_on = "triton"\nflags = ["-O1"]', ["flags are those of a C++ compiler"]),
        (
            'basedon = "cpp"\nflag = []',
            ["`basedon` means nothing here", "`flag` means nothing here", "based_on is missing"],
        ),
    ],
)
def test_a_target_file_that_is_wrong(write: Write, text: str, reasons: list[str]) -> None:
    folder = write({"tuned/target.toml": text})
    error = build_error(lambda: attncc.build(PLAIN, target="tuned", templates=[folder]), *["A0542"] * len(reasons))
    assert f"{folder / 'tuned' / 'target.toml'} does not describe a target" in error
    for reason in reasons:
        assert reason in error


@pytest.mark.parametrize("target", ["tund", "tund:avx2", "", ":avx2"])
def test_a_target_that_is_not_there(write: Write, target: str) -> None:
    folder = write({"tuned/target.toml": TARGET})
    error = build_error(lambda: attncc.build(PLAIN, target=target, templates=[folder]), "A0543")
    assert "the targets at hand are cpp, triton, tuned" in error


def test_a_machine_that_is_not_there(write: Write) -> None:
    folder = write({"tuned/target.toml": TARGET})
    error = build_error(lambda: attncc.build(PLAIN, target="tuned:sm_90", templates=[folder])(*operands()), "A0552")
    assert "it knows avx512_bf16, avx512, avx2, portable" in error


# --- the project's own ------------------------------------------------------------------------------------------------


FILES = sorted(str(path.relative_to(TEMPLATES)) for path in TEMPLATES.rglob("*.jinja"))


def used_filters(text: str) -> set[str]:
    return set(re.findall(r"\| *(\w+)", text)) | set(re.findall(r"filter (\w+)", text))


@functools.cache
def _tree(name: str) -> jinja2.nodes.Template:
    environment = jinja2.Environment()
    text = (TEMPLATES / name).read_text(encoding="utf-8")
    # Which filters there are is the business of what renders it.
    environment.filters.update(dict.fromkeys(used_filters(text) - environment.filters.keys(), str))
    tree = environment.parse(text)
    tree.set_environment(environment)
    return tree


def _own_names(name: str) -> set[str]:
    """What a template sets itself, and those that include it."""
    tree = _tree(name)
    own = {node.name for node in tree.find_all(jinja2.nodes.Name) if node.ctx == "store"}
    own |= {node.target for node in tree.find_all(jinja2.nodes.Import)}
    own |= {node.name for node in tree.find_all(jinja2.nodes.Macro)}
    includers = [file for file in FILES if name in meta.find_referenced_templates(_tree(file))]
    included = [
        file
        for file in includers
        if any(_is_included(node, name) for node in _tree(file).find_all(jinja2.nodes.Include))
    ]
    return own.union(*(_own_names(file) for file in included))


def _is_included(node: jinja2.nodes.Include, name: str) -> bool:
    return isinstance(node.template, jinja2.nodes.Const) and node.template.value == name


@pytest.mark.parametrize("name", FILES)
def test_a_template_receives_the_plan_and_nothing_else(name: str) -> None:
    assert meta.find_undeclared_variables(_tree(name)) - _own_names(name) <= {"plan"}


def documented(title: str) -> set[str]:
    """The names in the first column of the table below a heading of the README."""
    section = re.split(r"^##+ ", README.split(f"### {title}\n")[1], flags=re.MULTILINE)[0]
    return set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))


def _fields(kind: Any) -> set[str]:
    properties = {name for name, value in vars(kind).items() if isinstance(value, property)}
    return {field.name for field in dataclasses.fields(kind)} | properties


PLAN_TYPES = {
    kind.__name__: kind
    for module in (plan_nodes, block_nodes, recurrent, sequential, staged_inputs, features, staging, standalone)
    for name, kind in vars(module).items()
    if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__ and not name.startswith("_")  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("name", PLAN_TYPES)
def test_every_field_of_a_plan_is_documented_and_every_documented_field_exists(name: str) -> None:
    assert documented(f"`{name}`") == _fields(PLAN_TYPES[name])


def test_every_documented_type_exists() -> None:
    documented = set(re.findall(r"^### `(\w+)`$", README, re.MULTILINE))
    assert documented == set(PLAN_TYPES)


@functools.cache
def _filters() -> dict[str, set[str]]:
    """The filters that templates are given, by the heading under which the README has them."""
    found: dict[str, set[str]] = {}
    for target in ("cpp", INTERPRETED):
        attn = attncc.build(ROWS_AND_TILES, target=target)
        program = attn.sources(attn._specialization(torch.float32, 8, None))[0]
        title = "Filters of C++ kernels" if target == "cpp" else "Filters of Triton kernels"
        (names,) = {frozenset(printer_of(plan).filters()) for plan in program.kernels}
        found[title] = set(names)
        found["Filters of `run.py.jinja`"] = set(run._filters(program))
    return found


@functools.cache
def _filters_of_standalone_files() -> set[str]:
    given: list[Mapping[str, object]] = []

    def fill(file: str, plan: object, name: str, target: object, filters: Mapping[str, object], folders: object) -> str:
        given.append(filters)
        return ""

    attn = attncc.build(PLAIN, target="cpp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standalone, "fill", fill)
        specialization = attn._specialization(torch.float32, 8, None)
        standalone.standalone(attn, specialization, attn.sources(specialization)[0].target)
    return set(given[0])


@functools.cache
def _filters_of_recurrences() -> dict[str, set[str]]:
    """Those that templates of recurrences are given, by the name of the template."""
    given: dict[str, set[str]] = {}

    def fill(file: str, plan: Any, name: str, target: Target, filters: Mapping[str, object], folders: object) -> str:
        given.setdefault(f"{target.family}/{file}", set()).update(filters)
        return ""

    with pytest.MonkeyPatch.context() as patch:
        for module in (recurrent_cpp, recurrent_backward_cpp, recurrent_triton, sequential_cpp, sequential_triton):
            patch.setattr(module, "fill", fill)
        specialization = Specialization(DType.F32, 8, 8, ())
        for text in (LINEAR, LINEAR.replace("S +=", "S = tanh(S) +")):
            kernels = attncc.build(text).kernels
            for target in ("cpp:avx2", "triton:sm_90"):
                kernels.sources(specialization, parse(target))
                kernels.sources(specialization, parse(target), backward=True)
    return given


FILTER_TABLES = re.findall(r"^### (Filters of .*)$", README, re.MULTILINE)


@pytest.mark.parametrize("title", FILTER_TABLES)
def test_every_filter_is_documented_and_every_documented_filter_exists(title: str) -> None:
    given = _filters() | {"Filters of `standalone.py.jinja`": _filters_of_standalone_files()}
    of_recurrences = _filters_of_recurrences()
    for found in [given[title]] if title in given else [of_recurrences[name] for name in re.findall("`(.*?)`", title)]:
        assert documented(title) == found


def test_every_template_has_a_table_of_filters() -> None:
    titles = " ".join(FILTER_TABLES)
    assert all(f"`{name}`" in titles for name in _filters_of_recurrences())
    assert {"Filters of C++ kernels", "Filters of Triton kernels", "Filters of `run.py.jinja`"} <= set(FILTER_TABLES)
    assert "Filters of `standalone.py.jinja`" in FILTER_TABLES


def test_every_filter_is_used() -> None:
    """What no template of the project uses would be untested, and promised to others."""
    for title, names in _filters().items():
        folder = "cpp" if "C++" in title else "triton" if "Triton" in title else ""
        files = (TEMPLATES / folder).rglob("*.jinja")
        text = "\n".join(path.read_text(encoding="utf-8") for path in files)
        assert names <= used_filters(text), names - used_filters(text)


@pytest.mark.parametrize(
    "name", ["recurrent.cpp", "recurrent_backward.cpp", "recurrent.py", "sequential.cpp", "sequential.py"]
)
def test_every_filter_of_a_recurrence_is_used(name: str) -> None:
    folder = "cpp" if name.endswith("cpp") else "triton"
    names = _filters_of_recurrences()[f"{folder}/{name}.jinja"]
    texts = (path.read_text(encoding="utf-8") for path in (TEMPLATES / folder).glob("*.jinja"))
    used = used_filters("\n".join(texts))
    assert names <= used, names - used
