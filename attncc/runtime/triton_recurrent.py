"""Recurrent cores on Triton: which kernel is launched with what, in which order.

forward    pairs ─▶ solve, where something is erased ─▶ states ─▶ outputs; for a few tokens, step alone
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attncc.emit.recurrent_triton import layout_of, render_core
from attncc.plan.recurrent import CorePlan, gradient_of
from attncc.runtime.recurrent_operands import Operands
from attncc.runtime.triton import LoadedModule

# Up to so many tokens in a sequence, on average, they are taken one by one.
_STEPS = 8


def compile_core(plan: CorePlan, templates: Sequence[Path], folder: Path) -> TritonCore:
    """The core of `plan`, whose rendered sources are stored in `folder` and imported from there."""
    return TritonCore(plan, templates, folder)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Chunks of sequences, on the device. offsets: where sequences begin, and the last one ends; first_chunks: the same
    in chunks; chunks (count, 3): the first token, the end of the sequence, and its number. All int32.

    Lengths of packed sequences are known to the device alone: there are as many chunks as there can be, and those past
    the last one have no tokens.
    """

    offsets: Tensor
    first_chunks: Tensor
    chunks: Tensor

    @property
    def sequences(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a core: its operands and workspaces by the names of the kernels' parameters."""

    operands: Mapping[str, Tensor]
    batch: int
    heads: int
    tokens: int
    schedule: Schedule

    @property
    def sizes(self) -> dict[str, int]:
        chunks, sequences = len(self.schedule.chunks), self.schedule.sequences
        return {"H": self.heads, "N": self.tokens, "chunk_count": chunks, "sequences": sequences}


class TritonCore:
    """The kernels of a core."""

    def __init__(self, plan: CorePlan, templates: Sequence[Path], folder: Path) -> None:
        assert not (plan.side == "value" and plan.erasing), "no update form decays by value channel and erases"
        self.plan = plan
        self.layout = layout_of(plan)
        self._forward = _Kernels(plan, templates, folder)
        self._backward = functools.cache(lambda: _Kernels(gradient_of(plan), templates, folder))

    def forward(
        self,
        operands: Operands,
        initial_state: Tensor | None,
        offsets: Tensor | None,
        o: Tensor,
        final_state: Tensor | None,
    ) -> None:
        call = self._call(operands, offsets)
        sequences = call.schedule.sequences
        initial_state = self._state(call) if initial_state is None else initial_state
        final_state = torch.empty_like(initial_state) if final_state is None else final_state
        if call.tokens <= _STEPS * sequences:
            programs = call.batch * call.heads * sequences * (self.layout.value_padded // self.layout.step_tile)
            ends = {"initial_state": initial_state, "o": o, "final_state": final_state}
            self._forward.run("step", programs, call, {**ends, "offsets": call.schedule.offsets})
            return
        workspaces = {**self._states(call, initial_state, final_state), "o": o}
        tiles = self.layout.value_padded // self.layout.output_tile
        tiles *= self.layout.blocks if self.plan.side == "value" else 1
        self._forward.run("outputs", self._chunks(call) * tiles, call, workspaces)

    def backward(
        self,
        operands: Operands,
        initial_state: Tensor | None,
        offsets: Tensor | None,
        d_o: Tensor,
        d_state: Tensor | None,
    ) -> tuple[Operands, Tensor]:
        call = self._call(operands, offsets)
        initial_state = self._state(call) if initial_state is None else initial_state
        d_state = self._state(call) if d_state is None else d_state
        workspaces = self._states(call, initial_state, torch.empty_like(initial_state))
        d_initial_state = torch.empty_like(initial_state)
        gradients = Operands.of(tuple(x if x is None else _like(x) for x in operands.tensors))
        workspaces |= {"d_o": d_o, "d_final_state": d_state, "d_initial_state": d_initial_state}
        workspaces |= {f"d_{name}": x for name, x in _named(gradients).items()}
        workspaces |= self._gradient_workspaces(call, workspaces)
        programs = self._programs(call)
        for function in self._backward().functions:
            self._backward().run(function, programs[function], call, workspaces)
        return gradients, d_initial_state

    def _programs(self, call: Call) -> dict[str, int]:
        """How many programs each function of a backward pass has."""
        chunks, by_value = self._chunks(call), self.plan.side == "value"
        sequences = call.batch * call.heads * call.schedule.sequences
        blocks = chunks * self.layout.blocks
        tiles = blocks * (self.layout.key_padded // self.layout.gradient_keys)
        return {
            "pair_gradients": blocks if by_value else chunks,
            "reverse": sequences * (self.layout.value_padded // self.layout.value_tile),
            "read_gradients": tiles,
            "update_gradients": tiles,
            "value_gradients": blocks,
            "decay_gradients": chunks,
        }

    def _gradient_workspaces(self, call: Call, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the kernels of the backward pass leave for each other."""
        layout, chunks = self.layout, self._chunks(call)
        workspaces = {
            "d_states": given["states"].new_empty((chunks, layout.key_padded, layout.value_padded)),
            "d_query_pairs": torch.empty_like(given["query_pairs"]),
        }
        if self.plan.side == "value":
            workspaces["d_outputs"] = given["queries"].new_empty((chunks, layout.chunk, layout.value_padded))
        if self.plan.erasing:
            workspaces["d_updates"] = torch.empty_like(given["updates"])
            workspaces["d_erase_pairs"] = torch.empty_like(given["inverses"])
        if self.plan.side != "none":
            rows = {"read": layout.chunk, "update": layout.rows, "last": layout.blocks}
            rows |= {"erase": layout.rows} if self.plan.erasing else {}
            for name, count in rows.items():
                workspaces[f"{name}_decays"] = given["decays"].new_empty((chunks, count, layout.decay_padded))
        return workspaces

    def _states(self, call: Call, initial_state: Tensor, final_state: Tensor) -> dict[str, Tensor]:
        """Everything up to the states before chunks: what `outputs` and the backward pass start from."""
        layout, chunks, query = self.layout, self._chunks(call), call.operands["query"]
        count = chunks + call.batch * call.heads * call.schedule.sequences

        def stored(rows: int, width: int, *, exact: bool = False) -> Tensor:
            return query.new_empty((chunks, rows, width), dtype=initial_state.dtype if exact else query.dtype)

        by_value, exact = self.plan.side == "value", self.plan.exact_state
        workspaces = {
            "query_pairs": stored(layout.chunk, layout.rows),
            "queries": stored(layout.chunk, layout.key_padded),
            "keys": stored(layout.rows, layout.key_padded, exact=exact and not by_value),
            "states": query.new_empty((count, layout.key_padded, layout.value_padded)),
            "initial_state": initial_state,
            "final_state": final_state,
        }
        if self.plan.side != "none":
            workspaces["decays"] = initial_state.new_empty((chunks, layout.decay_padded))
        if by_value or self.plan.erasing:
            workspaces["updates"] = stored(layout.rows, layout.value_padded, exact=exact)
        if self.plan.erasing:
            workspaces["erase_pairs"] = initial_state.new_empty((chunks, layout.rows, layout.rows))
            workspaces["erases"] = stored(layout.rows, layout.key_padded)
            workspaces["inverses"] = stored(layout.rows, layout.rows)
        self._forward.run("pairs", chunks * layout.blocks, call, workspaces)
        if self.plan.erasing:
            self._forward.run("solve", chunks, call, workspaces)
        sequences = call.batch * call.heads * call.schedule.sequences
        self._forward.run("states", sequences * (layout.value_padded // layout.value_tile), call, workspaces)
        return workspaces

    def _chunks(self, call: Call) -> int:
        return call.batch * call.heads * len(call.schedule.chunks)

    def _state(self, call: Call) -> Tensor:
        """A state of nothing for each sequence and head."""
        query = call.operands["query"]
        shape = (call.batch * call.schedule.sequences, call.heads, self.plan.key_width, self.plan.value_width)
        return query.new_zeros(shape, dtype=torch.promote_types(query.dtype, torch.float32))

    def _call(self, operands: Operands, offsets: Tensor | None) -> Call:
        tensors = {name: x.contiguous() if name == "log_decay" else _rows(x) for name, x in _named(operands).items()}
        batch, heads, tokens, _ = operands.query.shape
        device, chunk = operands.query.device, self.layout.chunk
        schedule = _whole(tokens, chunk, device) if offsets is None else schedule_of(offsets, tokens, chunk)
        return Call(tensors, batch, heads, tokens, schedule)


class _Kernels:
    """The functions of one generated module."""

    def __init__(self, plan: CorePlan, templates: Sequence[Path], folder: Path) -> None:
        self.module = LoadedModule(plan, render_core(plan, templates), folder)
        self.functions = {function.name.removeprefix(f"{plan.name}_"): function for function in self.module.functions}

    def run(self, name: str, programs: int, call: Call, workspaces: Mapping[str, Tensor]) -> None:
        """Launches a function with operands, workspaces and sizes by the names of its parameters."""
        function, schedule = self.functions[name], call.schedule
        tensors = {**call.operands, **workspaces, "chunks": schedule.chunks, "first_chunks": schedule.first_chunks}
        strides = {
            f"stride_{operand}_{axis}": stride
            for operand, x in call.operands.items()
            for axis, stride in zip("bhn", x.stride(), strict=False)
        }
        given: dict[str, Any] = {**tensors, **strides, **call.sizes}
        parameters = function.parameters
        strided = {operand: x for operand, x in call.operands.items() if f"stride_{operand}_n" in parameters}
        # Of all others the address alone matters.
        others = [x.flatten() for name, x in tensors.items() if name in parameters and name not in strided]
        operands = list(strided.values())
        arguments = [given[parameter] for parameter in parameters]
        self.module.run(function, programs, arguments, [*operands, *others], (), operands)


def schedule_of(offsets: Tensor, tokens: int, chunk: int) -> Schedule:
    """The chunks of packed sequences."""
    offsets = offsets.to(torch.int64)
    counts = (offsets.diff() + (chunk - 1)) // chunk
    first_chunks = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    number = torch.arange(tokens // chunk + len(counts), device=offsets.device)
    sequence = torch.searchsorted(first_chunks[1:].contiguous(), number, right=True).clamp(max=max(len(counts) - 1, 0))
    start, end = offsets[sequence] + (number - first_chunks[sequence]) * chunk, offsets[sequence + 1]
    chunks = torch.stack([torch.minimum(start, end), end, sequence], 1)
    return Schedule(offsets.int(), first_chunks.int(), chunks.int())


@functools.lru_cache(maxsize=64)
def _whole(tokens: int, chunk: int, device: torch.device) -> Schedule:
    """The chunks of one sequence of all tokens."""
    return schedule_of(torch.tensor([0, tokens], device=device), tokens, chunk)


def _named(operands: Operands) -> dict[str, Tensor]:
    """Operands by the names of parameters."""
    tensors: dict[str, Tensor | None] = {"query": operands.query, "log_decay": operands.log_decay}
    for kind, of_updates in (("key", operands.keys), ("value", operands.values), ("erase", operands.erases)):
        tensors |= {f"{kind}_{i}": x for i, x in enumerate(of_updates)}
    return {name: x for name, x in tensors.items() if x is not None}


def _rows(x: Tensor) -> Tensor:
    """An operand, the channels of a token one after the other."""
    return x if x.stride(3) == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    """A gradient of x, not written yet."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
