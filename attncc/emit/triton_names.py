"""The names that Triton kernels use themselves, and those of the coordinates in them."""

from __future__ import annotations

import keyword
import re

from attncc.ir.nodes import IndexName

INDEX_NAMES: dict[IndexName, str] = {
    "b": "b",
    "h": "h",
    "hkv": "hkv",
    "q_row": "rows_m",
    "q_idx": "q_idx",
    "kv_idx": "offs_n",
    "d": "offs_d",
    "q_lo": "q_lo",
    "q_hi": "q_hi",
    "kv_lo": "kv_lo",
    "kv_hi": "kv_hi",
}

# Names of the templates in `templates/triton`; a test reads them off generated kernels and compares.
_KERNEL_NAMES = """
    triton tl float BLOCK_M BLOCK_N BLOCK_R BLOCK_T FLOAT EXACT QK_TO_LOG2 LN2 LOWEST MASKED WRITE
    q k v o lse x out B H HKV M N q_offset heads_per_section
    pid section position heads tile_m tile_n tiles tiles_m b h hkv bh rows
    start_m start_n row_m row_n rows_m rows_n rows_r offs_m offs_n offs_r q_idx q_lo q_hi kv_lo kv_hi inside
    q_start k_head k_start v_head v_start o_start o_rows x_head x_rows
    qk score keep p m_i l_i m_new alpha sink total lse_i finite strange seen turn sign multiplier
    row_max entropy row_max_i h_i raised log2_p log2_sink
    i begin end count entry partial list_offsets list_tiles list_counts list_stride_b list_stride_h list_row
    table value values live full place
    do upstream dq dk dv total dtotal delta strange_programs STRANGE SORTED DTOTAL LOG2_E
    do_start do_head q_head total_start delta_start at_m total_m delta_m share_m dtotal_m dp df ds
    tiles_n shift out_start upstream_rows column upper turned member first_program
"""
_NUMBERED = re.compile(
    r"attn_\w+"
    r"|summary_\d\w*"
    r"|stride_\w+"
    r"|(?:q_tile|k_tile|v_tile|o_tile|do_tile|acc|dq_acc|dk_acc|dv_acc|adjoint|sum|part|offs_d|offs_e|first|last|full_first|full_last|lo|hi|full_lo|full_hi)_?\d*"
)
# Those that belong to a captured tensor. A name of this form must not be that of one spelt `of_spec_…`; no name of a
# specification begins with an underscore.
_OF_TENSOR = re.compile(r"\w+_(?:stride|size)_\d+")
RESERVED = frozenset({*_KERNEL_NAMES.split(), *keyword.kwlist})


def name_of(name: str) -> str:
    """A name of the specification or of a binding, as a kernel spells it: the kernel's own names come first."""
    last = f"of_spec__{name}" if _OF_TENSOR.fullmatch(name) else f"of_spec_{name}"
    spellings = (name, f"{name}_", last)
    return next(spelt for spelt in spellings if spelt.startswith("of_spec_") or not _taken(spelt))


def _taken(name: str) -> bool:
    if name in RESERVED or _NUMBERED.fullmatch(name) or _OF_TENSOR.fullmatch(name):
        return True
    # `x_` is how `x` may be spelt.
    return name.endswith("_") and _taken(name[:-1])
