"""`explain FILE --png`: a picture of the mask."""

from __future__ import annotations

import argparse

from attncc.commands.common import Loaded, call_arguments
from attncc.commands.compiling import chosen
from attncc.commands.output import say
from attncc.picture import draw as draw_mask
from attncc.runtime.arguments import TORCH_DTYPES, Mismatch, Signature
from attncc.runtime.refusals import refuse

SIZES = ("B", "H", "HKV", "M", "N", "D", "E")


def draw(loaded: Loaded, arguments: argparse.Namespace) -> None:
    """Draws the mask of the first head at the sizes of --shape, in the tiles of the kernel of --target."""
    attn, specialization, target = chosen(loaded, arguments)
    program, _, _ = attn.sources(specialization, target)
    q, k, v, inputs = call_arguments(loaded, arguments, TORCH_DTYPES[specialization.dtype], "cpu")
    signature = Signature(loaded.attention)
    try:
        bound = signature.bind(q, k, v, None, inputs)
    except Mismatch:
        raise refuse(signature, {"q": q, "k": k, "v": v}, None, inputs) from None
    tile = program.forward.tile
    counts = draw_mask(
        loaded.attention,
        {**{name: getattr(bound.sizes, name) for name in SIZES}, "q_offset": bound.q_offset},
        {**bound.tensors, **bound.scalars},
        arguments.png,
        block_m=tile.block_m,
        block_n=tile.block_n,
    )
    say(
        f"wrote {arguments.png}: of {counts.total} tiles of {tile.block_m} x {tile.block_n}, "
        f"{counts.empty} are skipped, {counts.full} need no mask, {counts.partial} are masked pair by pair"
    )
