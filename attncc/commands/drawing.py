"""`explain FILE --png`: a picture of the mask."""

from __future__ import annotations

import argparse

from attncc.commands.common import Loaded, call_arguments
from attncc.commands.output import say
from attncc.diagnostics import CallError
from attncc.errors import NoSuchHead
from attncc.ir.types import DType
from attncc.picture import draw as draw_mask
from attncc.plan.nodes import Specialization
from attncc.runtime.arguments import DTYPES, TORCH_DTYPES, Bound, Mismatch, Signature
from attncc.runtime.refusals import refuse
from attncc.runtime.targets import parse as parse_target


def draw(loaded: Loaded, arguments: argparse.Namespace) -> None:
    """Draws the mask of one head of a call, of --input or made up, in the tiles of the kernel of --target."""
    attn = loaded.compiled(arguments.target, arguments.templates)
    q, k, v, inputs = call_arguments(loaded, arguments, TORCH_DTYPES[DType(arguments.dtype)], "cpu")
    signature = Signature(loaded.pairwise)
    try:
        bound = signature.bind(q, k, v, None, inputs)
    except Mismatch:
        raise refuse(signature, {"q": q, "k": k, "v": v}, None, inputs) from None
    sizes = bound.sizes
    for axis, index, size in (("batch", arguments.batch, sizes.B), ("head", arguments.head, sizes.H)):
        if index >= max(size, 1):  # That there is none at all is said of the drawing.
            raise CallError(NoSuchHead(None, axis, index, size))
    tensors = tuple((name, DTYPES[tensor.dtype]) for name, tensor in bound.tensors.items())
    specialization = Specialization(DTYPES[q.dtype], sizes.D, sizes.E, tensors)
    program, _, _ = attn.sources(specialization, parse_target(arguments.target, attn.templates))
    tile = program.forward.tile
    counts = draw_mask(
        loaded.pairwise,
        {**sizes._asdict(), "q_offset": bound.q_offset},
        {**bound.tensors, **bound.scalars},
        arguments.png,
        block_m=tile.block_m,
        block_n=tile.block_n,
        b=arguments.batch,
        h=arguments.head,
    )
    say(f"drew batch {arguments.batch}, head {arguments.head} of {_call(bound)}")
    say(
        f"wrote {arguments.png}: of {counts.total} tiles of {tile.block_m} x {tile.block_n}, "
        f"{counts.empty} are skipped, {counts.full} need no mask, {counts.partial} are masked pair by pair"
    )


def _call(bound: Bound) -> str:
    """The sizes of a call, and the scalars that it was made with."""
    return " ".join(f"{name}={value}" for name, value in {**bound.sizes._asdict(), **bound.scalars}.items())
