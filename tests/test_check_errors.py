"""Every error that a spec can cause: what it says, word for word, and that its own example shows it."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from attncc.check.specification import check_all, check_source
from attncc.diagnostics import Diagnostic, SpecError, all_kinds, explain_code
from attncc.source import Source

if TYPE_CHECKING:
    from collections.abc import Mapping

    from conftest import Golden

FOLDER = Path(__file__).parent / "errors"
NAMES = sorted(path.stem for path in FOLDER.glob("*.attn") if path.stem != "used_masks")
KINDS = {code: kind for code, kind in all_kinds().items() if kind.__module__.startswith("attncc.")}
SPEC_KINDS = {code: kind for code, kind in KINDS.items() if "A0101" <= code < "A0500"}


def errors_of(source: Source, name: str | None = None, constants: Mapping[str, object] | None = None) -> SpecError:
    with pytest.raises(SpecError) as caught:
        check_source(source, name=name, constants=constants)
    return caught.value


def codes(error: SpecError) -> list[str]:
    return [diagnostic.code for diagnostic in error.diagnostics]


@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str, golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parent.parent)
    text = (FOLDER / f"{name}.attn").read_text(encoding="utf-8")
    source = Source(f"tests/errors/{name}.attn", text)
    chosen = re.search(r"^# name: (.*)$", text, re.MULTILINE)
    given = re.search(r"^# constants: (.*)$", text, re.MULTILINE)
    constants = dict(_assignment(part) for part in given.group(1).split(", ")) if given else {}
    if name.endswith("at_once"):
        with pytest.raises(SpecError) as caught:
            check_all(source, constants)
        error = caught.value
    else:
        error = errors_of(source, chosen.group(1) if chosen else None, constants)
        assert set(codes(error)) == {name.split("_", maxsplit=1)[0]}
    golden(FOLDER / f"{name}.expected", str(error))


def _assignment(text: str) -> tuple[str, float]:
    name, value = text.split("=")
    return name, float(value) if "." in value else int(value)


def test_every_code_of_specs_has_a_golden() -> None:
    assert set(SPEC_KINDS) <= {name.split("_")[0] for name in NAMES}


@pytest.mark.parametrize("code", SPEC_KINDS)
def test_examples_of_a_kind(code: str) -> None:
    kind = SPEC_KINDS[code]
    assert codes(_tried(kind.bad) or pytest.fail("the bad example is right")) == [code]
    assert _tried(kind.good) is None


def _tried(example: str) -> SpecError | None:
    """What an example raises: a spec, or a call of `attncc.build` with constants."""

    class Attncc:
        @staticmethod
        def build(text: str, *, name: str | None = None, **constants: object) -> None:
            check_source(Source("example.attn", text), name=name, constants=constants)

    try:
        if example.startswith("attncc.build("):
            eval(example, {"attncc": Attncc})
        else:
            Attncc.build(example)
    except SpecError as error:
        return error
    return None


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_is_explained(kind: type[Diagnostic]) -> None:
    text = explain_code(kind.code)
    assert text is not None
    assert text.startswith(f"{kind.code}: ")
    assert len(kind.explanation) > 20
    if kind.code < "A09":
        assert kind.bad
        assert kind.good
        assert kind.bad != kind.good


def test_an_unknown_code_has_no_explanation() -> None:
    assert explain_code("A0999") is None
    assert explain_code("a0201") == explain_code("A0201")


def test_errors_are_sorted_by_place() -> None:
    source = Source("x.attn", "attention full():\n    score = aa + bb\n    mask = cc\n    scale = dd\n")
    error = errors_of(source)
    assert [d.span.text for d in error.diagnostics if d.span] == ["aa", "bb", "cc", "dd"]


def test_a_broken_definition_is_blamed_once_whatever_uses_it() -> None:
    text = "define f(x) = x + nothing\n\nattention full():\n    score = f(qk)\n    mask = f(1) > 0 and causal\n"
    assert codes(errors_of(Source("x.attn", text))) == ["A0201"]


def test_errors_of_a_used_file_point_into_it(tmp_path: Path) -> None:
    (tmp_path / "masks.attn").write_text("define near(n) = abs(q_idx - kv_indx) < n\n")
    path = tmp_path / "spec.attn"
    error = errors_of(Source(str(path), 'use "masks.attn"\n\nattention local():\n    mask = near(4)\n'))
    assert codes(error) == ["A0201"]
    assert error.diagnostics[0].span is not None
    assert error.diagnostics[0].span.source.name.endswith("masks.attn")


def test_syntax_errors_of_a_used_file_are_reported(tmp_path: Path) -> None:
    (tmp_path / "masks.attn").write_text("define near(n) = abs(q_idx - kv_idx <\n")
    error = errors_of(Source(str(tmp_path / "s.attn"), 'use "masks.attn"\n\nattention local():\n    mask = causal\n'))
    assert codes(error) == ["A0104"]


def test_a_definition_in_two_used_files_is_ambiguous_unless_the_file_has_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.attn").write_text("define near(n) = kv_idx < n\n")
    (tmp_path / "b.attn").write_text("define near(n) = kv_idx > n\n")
    uses = 'use "a.attn"\nuse "b.attn"\n'
    attention = "\nattention local():\n    mask = near(4)\n"
    path = str(tmp_path / "spec.attn")
    assert codes(errors_of(Source(path, uses + attention))) == ["A0203"]
    check_source(Source(path, uses + "define near(n) = kv_idx == n\n" + attention))


def test_files_may_use_each_other(tmp_path: Path) -> None:
    (tmp_path / "a.attn").write_text('use "b.attn"\ndefine one = two\n')
    (tmp_path / "b.attn").write_text('use "a.attn"\ndefine two = causal\n')
    check_source(Source(str(tmp_path / "s.attn"), 'use "a.attn"\nattention local():\n    mask = one\n'))


def test_a_cycle_through_two_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.attn").write_text('use "b.attn"\ndefine one = two\n')
    (tmp_path / "b.attn").write_text('use "a.attn"\ndefine two = one\n')
    error = errors_of(Source(str(tmp_path / "s.attn"), 'use "a.attn"\nattention local():\n    mask = one\n'))
    assert codes(error) == ["A0207"]


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.attn").write_bytes(b"\xff\xfe\x00")
    error = errors_of(Source(str(tmp_path / "s.attn"), 'use "a.attn"\nattention local():\n    mask = causal\n'))
    assert codes(error) == ["A0208"]


@pytest.mark.parametrize("value", [float("nan"), "64", None, [1], 2**63, True, 1.5])
def test_constants_of_another_kind_are_refused(value: object) -> None:
    source = Source("x.attn", "attention blocked(size: const int):\n    mask = q_idx // size == kv_idx // size\n")
    assert codes(errors_of(source, constants={"size": value})) == ["A0311"]


def test_a_deep_chain_of_definitions_is_refused_without_a_traceback() -> None:
    lines = ["define f0(x) = x"] + [f"define f{i}(x) = f{i - 1}(f{i - 1}(x)) + 1.0" for i in range(1, 60)]
    text = "\n".join(lines) + "\n\nattention deep():\n    score = f59(qk)\n"
    assert codes(errors_of(Source("x.attn", text)))[0] == "A0406"


def test_an_exponential_chain_of_definitions_is_refused_soon() -> None:
    lines = ["define f0(x) = x"] + [f"define f{i}(x) = f{i - 1}(x) * f{i - 1}(x + 1.0)" for i in range(1, 25)]
    text = "\n".join(lines) + "\n\nattention wide():\n    score = f24(qk)\n    mask = f24(1) > 0\n"
    start = time.thread_time()
    assert codes(errors_of(Source("x.attn", text))) == ["A0406"]
    assert time.thread_time() - start < 10
