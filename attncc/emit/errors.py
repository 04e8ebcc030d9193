"""Errors of templates and targets (A05xx)."""

from __future__ import annotations

from dataclasses import dataclass

from attncc.diagnostics import Diagnostic


@dataclass(frozen=True, slots=True)
class NoSuchTemplateFolder(Diagnostic):
    code = "A0541"
    title = "there is no folder of templates at {folder}"
    help = "name a folder that holds `cpp/` or `triton/` with the templates to use instead of attncc's own"
    explanation = "`templates=` and `--templates` name folders that are searched before attncc's own templates."
    bad = 'attncc.build(spec, templates=["my_templats"])'
    good = 'attncc.build(spec, templates=["my_templates"])'

    folder: str


@dataclass(frozen=True, slots=True)
class BadTargetFile(Diagnostic):
    code = "A0542"
    title = "{path} does not describe a target: {reason}"
    help = 'it needs `based_on = "cpp"` or `based_on = "triton"`, and may have `flags = ["…"]`'
    explanation = "A folder of templates adds a target by holding `<name>/target.toml`, which says what it is based on."
    bad = 'based_on = "cuda"'
    good = 'based_on = "triton"'

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class UnknownFamily(Diagnostic):
    code = "A0543"
    title = "there is no target `{family}`"
    help = "the targets at hand are {known}"
    explanation = (
        "A target is `cpp`, `triton`, or one that a folder of templates adds; `:arch` may follow, as in `cpp:avx2`."
    )
    bad = 'attncc.build(spec, target="cuda")'
    good = 'attncc.build(spec, target="triton")'

    family: str
    known: str


@dataclass(frozen=True, slots=True)
class BrokenTemplate(Diagnostic):
    code = "A0544"
    title = "the template of {kernel} cannot be rendered: {reason}"
    help = "mend {template}"
    explanation = "A template receives one variable, `plan`; templates/README.md lists its fields and the filters."
    bad = "{{ plan.hed_dim }}"
    good = "{{ plan.head_dim_qk }}"

    kernel: str
    template: str
    reason: str
