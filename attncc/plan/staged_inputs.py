"""What kernels that make their operands themselves read of a call: inputs where they lie, and tables.

A *table* is what depends on places alone: on positions, channels, heads and sizes, with the scalars of a call. PyTorch
makes it once for all rows, positions in f64: an angle at position 1,000,000 has no digits behind the point left in f32.

    relu(q) * cos(pi / 2 * (t + q_offset) / length)        x0[t, d] = row of q     x1[t] = cos(pi / 2 * …), a table
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attncc.ir.nodes import Constant, Element, Expr, Index, Load, Reduce, Size, TensorParameter, Variable
from attncc.ir.rewrite import contains, has_free, kind_of, substitute
from attncc.ir.types import DType, Kind
from attncc.passes.simplify import simplify_expr
from attncc.plan.sequential import CHANNELS, Axis, Channel

_COORDINATES = ("b", "h", "hkv", "t", "d", "e")
# How many places there are of a coordinate.
_SIZES = {"b": Size("B"), "h": Size("H"), "hkv": Size("HKV"), "t": Size("N")}


@dataclass(frozen=True, slots=True)
class Input:
    """A row of q, k or v, as it comes or as it is made of that, or what a captured tensor or a table has for a token:
    one number, or one for each channel of `axes`.

    places: for each axis of the tensor, the coordinate along it, or a number. A matrix has both channels among them;
    `axes` is that of its columns.
    """

    name: str
    tensor: str
    dtype: DType
    axes: tuple[Axis, ...]
    places: tuple[str | int, ...]

    @property
    def varies(self) -> bool:
        """Whether tokens have their own."""
        return "t" in self.places

    @property
    def rows(self) -> Channel | None:
        """The channel along the rows of a matrix."""
        columns = self.axes[0].channel if self.axes else None
        return next((x for x in CHANNELS if columns is not None and x in self.places and x != columns), None)


@dataclass(frozen=True, slots=True)
class Table:
    """`value` of every batch, head, token and one of `width` channels, whichever of them it depends on."""

    name: str
    value: Expr
    width: int
    places: tuple[str, ...]


class NotStaged(Exception):
    """A core cannot make these operands itself; says why."""


class Inputs:
    """Collects inputs and tables."""

    def __init__(
        self,
        parameters: Mapping[str, TensorParameter],
        dtypes: Mapping[str, DType],
        sizes: Mapping[Expr, Expr],
        prefix: str,
    ) -> None:
        """parameters: the captured tensors. dtypes: theirs, and those of q, k and v. sizes: those of D and E. prefix:
        of the names of inputs."""
        self.sizes = sizes
        self.inputs: dict[tuple[str, tuple[str | int, ...]], Input] = {}
        self.tables: dict[tuple[Expr, int], Table] = {}
        self._parameters = parameters
        self._dtypes = dtypes
        self._prefix = prefix

    def read(self, load: Load, axes: tuple[Axis, ...]) -> Variable:
        """An element of a tensor, the channels of `axes` among its coordinates."""
        places: list[str | int] = []
        for index in load.indices:
            match index:
                case Index(name=name) if name in _COORDINATES and name not in places:
                    places.append(name)
                case Constant(value=int() as value) if value >= 0:
                    places.append(value)
                case _:
                    raise NotStaged(f"`{load.tensor}` is read at a place that is computed")
        if len({"h", "hkv"} & set(places)) == 2:
            raise NotStaged(f"`{load.tensor}` is read by two sorts of heads")
        if not all(self._is_within(load.tensor, axis, place, axes) for axis, place in enumerate(places)):
            raise NotStaged(f"`{load.tensor}` is read along an axis that may be shorter")
        return self._input(load.tensor, self._dtypes[load.tensor], axes, tuple(places), load.kind)

    def _is_within(self, tensor: str, axis: int, place: str | int, axes: tuple[Axis, ...]) -> bool:
        """Whether a coordinate has as many places as a captured tensor has elements along the axis, or a number is one
        of them: kernels do not look."""
        if tensor not in self._parameters:
            return True
        extent = self.extent(tensor, axis)
        if isinstance(place, int):
            return extent is not None and place < extent
        if place in _SIZES:
            return self._parameters[tensor].shape[axis] == _SIZES[place]
        return all(extent == x.size for x in axes if x.channel == place)

    def extent(self, tensor: str, axis: int) -> int | None:
        """How many elements a captured tensor has along an axis; None where that is not known beforehand."""
        if tensor not in self._parameters:
            size: Expr = Size("E" if tensor == "v" else "D") if axis == 3 else Size("N")
        else:
            size = self._parameters[tensor].shape[axis]
        match simplify_expr(substitute(size, self.sizes)):
            case Constant(value=int() as value):
                return value
            case _:
                return None

    def table(self, expr: Expr, axes: tuple[Axis, ...]) -> Variable:
        """What depends on places alone, for the channels of `axes`, if any."""
        width = axes[0].size if axes and has_free(expr, axes[0].channel) else 1
        if (expr, width) not in self.tables:
            free = {name for name in _COORDINATES if has_free(expr, name)}
            free |= {"h"} if "hkv" in free else set()
            places = tuple(place for place in ("b", "h", "t", "d", "e") if place in free)
            self.tables[expr, width] = Table(f"table {self._prefix}{len(self.tables)}", expr, width, places)
        table, kind = self.tables[expr, width], kind_of(expr)
        wide = DType.F64 if self._dtypes["q"] is DType.F64 else DType.F32
        dtype = {Kind.FLOAT: wide, Kind.INT: DType.I64, Kind.BOOL: DType.BOOL}[kind]
        of_channels = axes if any(axis.channel in table.places for axis in axes) else ()
        return self._input(table.name, dtype, of_channels, table.places, kind)

    def _input(
        self, tensor: str, dtype: DType, axes: tuple[Axis, ...], places: tuple[str | int, ...], kind: Kind
    ) -> Variable:
        if axes and kind is not Kind.FLOAT:
            raise NotStaged(f"`{tensor}` has ints or bools of channels")
        if (tensor, places) not in self.inputs:
            self.inputs[tensor, places] = Input(f"{self._prefix}{len(self.inputs)}", tensor, dtype, axes, places)
        return Variable(self.inputs[tensor, places].name, kind)


def is_of_places(expr: Expr) -> bool:
    """Whether `expr` is made of coordinates, sizes and scalars alone, and of more than batch and head, which kernels
    count themselves."""
    if contains(expr, lambda node: isinstance(node, Load | Element | Reduce | Variable)):
        return False
    return contains(
        expr, lambda node: isinstance(node, Size) or (isinstance(node, Index) and node.name not in ("b", "h"))
    )
