"""`bench`: times beside those of PyTorch."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from rich.console import Console

from attncc.bench import PEERS, RECURRENT_PEERS, Result, bench_recurrence, table
from attncc.bench import bench as bench_pairs
from attncc.commands.common import call_arguments, device_of, load
from attncc.commands.output import progress, say, write
from attncc.diagnostics import CallError
from attncc.errors import UnknownPeer
from attncc.ir.recurrence import Recurrence
from attncc.ir.types import DType
from attncc.peers import Call
from attncc.runtime.arguments import TORCH_DTYPES
from attncc.runtime.cpp_toolchain import find_compiler
from attncc.runtime.recurrent import RecurrentAttention


def bench(arguments: argparse.Namespace) -> int:
    """A table per type, and all figures as JSON on request."""
    loaded = load(arguments.file, arguments.name, dict(arguments.set))
    peers = tuple(RECURRENT_PEERS if isinstance(loaded.attention, Recurrence) else PEERS)
    against = peers if arguments.against is None else tuple(filter(None, arguments.against.split(",")))
    unknown = [name for name in against if name not in peers]
    if unknown:
        raise CallError(*(UnknownPeer(None, name, ", ".join(peers)) for name in unknown))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    attn = loaded.built(arguments.target, arguments.templates)
    device = device_of(arguments.target, attn.templates)
    to_stdout = str(arguments.json) == "-"
    results: list[Result] = []
    for dtype in arguments.dtype or ("f32", "bf16"):
        q, k, v, inputs = call_arguments(loaded, arguments, TORCH_DTYPES[DType(dtype)], device)
        for x in (q, k, v):
            x.requires_grad_(arguments.backward)
        with progress() as bar:
            task = bar.add_task("", total=None)
            options: dict[str, Any] = {
                "against": against,
                "repeat": arguments.repeat,
                "backward": arguments.backward,
                "compiler": find_compiler().command[0] if device == "cpu" else None,
                "tick": lambda name: bar.update(task, description=f"{loaded.attention.name}, {dtype}: {name}"),
            }
            call = Call(q, k, v, inputs)
            if isinstance(attn, RecurrentAttention):
                result = bench_recurrence(attn, call, **options)
            else:
                result = bench_pairs(attn.attention, lambda: attn(q, k, v, **inputs), call, **options)
        results.append(result)
        if not to_stdout:
            Console(width=None if sys.stdout.isatty() else 110).print(table(result))
    if arguments.json is not None:
        text = json.dumps([result.as_json() for result in results], indent=2) + "\n"
        if to_stdout:
            print(text, end="")
        else:
            write(arguments.json, text)
            say(f"wrote {arguments.json}")
    return 0
