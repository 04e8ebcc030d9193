"""Errors of drawing."""

from __future__ import annotations

from dataclasses import dataclass

from attncc.diagnostics import Diagnostic


@dataclass(frozen=True, slots=True)
class NoMatplotlib(Diagnostic):
    code = "A0561"
    title = "drawing needs matplotlib, which is not installed"
    help = "pip install 'attncc[plot]'"
    explanation = "Pictures of masks are drawn with matplotlib, an optional dependency."
    bad = "attncc explain causal.attn --png mask.png    # without matplotlib"
    good = "pip install 'attncc[plot]'; attncc explain causal.attn --png mask.png"


@dataclass(frozen=True, slots=True)
class NothingToDraw(Diagnostic):
    code = "A0637"
    title = "a mask of {queries} queries and {keys} keys has no picture"
    help = "choose sizes with at least one query and one key"
    explanation = "A picture shows pairs of queries and keys; a call without either has none."
    bad = "attncc explain causal.attn --png mask.png --shape 1,1,1,0,512,64"
    good = "attncc explain causal.attn --png mask.png --shape 1,1,1,512,512,64"

    queries: int
    keys: int
