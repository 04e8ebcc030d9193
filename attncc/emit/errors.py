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


@dataclass(frozen=True, slots=True)
class BadEntryPoint(Diagnostic):
    code = "A0545"
    title = "the templates of the installed entry point {entry} cannot be used: {reason}"
    help = "mend or remove the package that declares it"
    explanation = (
        "An installed package adds templates by an entry point of group `attncc.templates`, whose object is the path "
        "of a folder. Leaving out one that is broken would quietly compile something else than what was installed."
    )
    bad = 'my_kernels = "my_package:missing"'
    good = 'my_kernels = "my_package:TEMPLATES"     # where TEMPLATES = Path(__file__).parent / "templates"'

    entry: str
    reason: str


@dataclass(frozen=True, slots=True)
class BrokenLauncher(Diagnostic):
    code = "A0546"
    title = "the module that launches {name} cannot be used: {reason}"
    help = "mend the template run.py.jinja that it was rendered from"
    explanation = (
        "The template `run.py.jinja` renders a Python module with a function `run`, which allocates the output and "
        "launches the kernels; templates/README.md says what it is called with."
    )
    bad = "a run.py.jinja that renders `def run(`"
    good = "a run.py.jinja that renders a module with a function `run`"

    name: str
    reason: str
