"""Tables of staged cores: what depends on places alone, made by PyTorch once for all rows of a call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attncc.eager import Environment, torch_value
from attncc.ir.rewrite import contains
from attncc.plan.staged_inputs import Table
from attncc.runtime.decays import moves
from attncc.runtime.recurrent_arguments import BoundRecurrence


class Tables:
    """Makes the tables of a core. Those that depend on neither tokens nor the position of the first, a decay of each
    head, say, are kept for the next call that is alike: a step takes less time than such a table does."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self._tables = tuple(tables)
        self._kept: dict[str, tuple[object, Tensor]] = {}

    def of(self, bound: BoundRecurrence, like: Tensor) -> dict[str, Tensor]:
        """Each table by its name, with one axis for each of its places; like: a row of the call. Floats are computed in
        f64 and have f32, or f64 beside f64."""
        wide = torch.promote_types(like.dtype, torch.float32)
        key = bound.sizes, tuple(bound.scalars.items()), like.dtype
        result: dict[str, Tensor] = {}
        env: Environment | None = None
        for table in self._tables:
            kept = self._kept.get(table.name)
            if kept is not None and kept[0] == key:
                result[table.name] = kept[1]
                continue
            env = env or _environment(bound, like)
            made = result[table.name] = _of_places(table, _value(table, env), bound, wide)
            if not contains(table.value, moves):
                self._kept[table.name] = key, made
        return result


def _value(table: Table, env: Environment) -> Tensor:
    channel = torch.arange(table.width, device=env.indices["t"].device)
    indices = {**env.indices, "d": channel, "e": channel}
    return torch_value(table.value, Environment(indices, env.sizes, env.inputs, {}, env.floating, {}))


def _of_places(table: Table, value: Tensor, bound: BoundRecurrence, wide: torch.dtype) -> Tensor:
    """`value` with its places for axes."""
    sizes = {"b": bound.sizes.B, "h": bound.sizes.H, "t": bound.sizes.N, "d": table.width, "e": table.width}
    axes = {"b": 0, "h": 1, "t": 2, "d": 3, "e": 3}
    value = value[(None,) * (4 - value.dim())]
    shape = [1, 1, 1, 1]
    for place in table.places:
        shape[axes[place]] = sizes[place]
    value = value.expand(shape).reshape([sizes[place] for place in table.places])
    return (value.to(wide) if value.is_floating_point() else value).contiguous()


def _environment(bound: BoundRecurrence, like: Tensor) -> Environment:
    device, sizes = like.device, bound.sizes
    h = torch.arange(sizes.H, device=device).reshape(-1, 1, 1)
    indices = {
        "b": torch.arange(sizes.B, device=device).reshape(-1, 1, 1, 1),
        "h": h,
        "hkv": h // max(sizes.H // max(sizes.HKV, 1), 1),
        "t": torch.arange(sizes.N, device=device).reshape(-1, 1),
    }
    return Environment(indices, {**sizes._asdict(), "q_offset": bound.q_offset}, bound.scalars, {}, torch.float64, {})
