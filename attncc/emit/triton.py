"""Spells the IR in Triton: what the templates of `templates/triton` print a plan's expressions with.

A value of a kernel is a scalar, a vector over the queries or the keys of a tile, or a matrix over both. Each filter
prints for one of these shapes; in a matrix, vectors are turned into columns (`x[:, None]`, first axis) and rows
(`x[None, :]`, second axis), so that everything broadcasts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import assert_never

from attncc.emit.triton_expressions import AND, PRODUCT, SHIFT, SIGN, SUM, Expressions, Text
from attncc.emit.triton_facts import (
    Axis,
    bindings_of,
    block_rows,
    blocks_of,
    delta_rows,
    diagonal_block,
    expressions_of,
    longest_first,
    passes,
    per_head,
    reduce_sizes,
    segments,
    to_log2,
)
from attncc.emit.triton_names import INDEX_NAMES, name_of
from attncc.emit.triton_text import chunks, functions, header, tidy
from attncc.ir.errors import IRError
from attncc.ir.nodes import (
    Constant,
    Element,
    Expr,
    Hole,
    Index,
    IndexName,
    Load,
    Reduce,
    Size,
    SizeName,
    Summary,
    Variable,
)
from attncc.ir.rewrite import kind_of, walk
from attncc.ir.types import DType, Kind
from attncc.passes.ranges import Range, int_range
from attncc.plan.nodes import BackwardPlan, ForwardPlan, KernelPlan, RowsPlan, TilesPlan
from attncc.plan.triton_tiles import power_of_two

FLOAT_NAMES = {DType.F16: "float16", DType.BF16: "bfloat16", DType.F32: "float32", DType.F64: "float64"}
# Products of f32 are taken in f32, not in the 10-bit TF32 that Triton takes for granted.
DOT_OPTIONS = {DType.F32: ', input_precision="ieee"', DType.F64: ", out_dtype=tl.float64"}
LOWEST = {DType.F32: -3.4028234663852886e38, DType.F64: -1.7976931348623157e308}


class TritonPrinter(Expressions):
    """Prints the expressions of one plan. keys_first: a matrix has its keys along the first axis, not its queries."""

    extension = "py"

    def __init__(self, plan: KernelPlan, *, keys_first: bool = False) -> None:
        # Tables are made once for every element type of q: in f64, as the reference decides.
        super().__init__(double=isinstance(plan, TilesPlan) or plan.dtype is DType.F64, keys_first=keys_first)
        self.plan = plan
        self.dtypes = {tensor.name: tensor.dtype for tensor in plan.tensors}
        self.ranks = {tensor.name: tensor.rank for tensor in plan.tensors}
        self.shapes = {parameter.name: parameter.shape for parameter in plan.spec.tensors}
        # Outside rows, a rows kernel computes floats in f64: f32 cannot hold the angle of a late position.
        self.mixed = isinstance(plan, RowsPlan) and not self.double
        if isinstance(plan, RowsPlan):
            self.doubles = {b.name for b in (*plan.call, *plan.position)}
        for axis, binding in bindings_of(plan):
            self.axes[binding.name] = axis
            if binding.kind is Kind.INT:
                self.ranges[binding.name] = int_range(binding.value, self.dtypes, self.ranges)
                self.wide |= {binding.name} if self._is_wide(binding.value) else set()

    def filters(self) -> Mapping[str, Callable[..., object]]:
        across = TritonPrinter(self.plan, keys_first=True)

        def turned(keys_first: bool) -> TritonPrinter:
            return across if keys_first else self

        return {
            # Text.
            "header": header,
            "functions": functions,
            "tidy": tidy,
            "chunks": chunks,
            "name": name_of,
            "triton_dtype": lambda dtype: f"tl.{FLOAT_NAMES[dtype]}",
            "dot_options": lambda dtype: DOT_OPTIONS.get(dtype, ""),
            # Expressions, by the shape of the value.
            "vector": lambda expr: self.print(expr, matrix=False).source,
            "vector_operand": lambda expr: self.print(expr, matrix=False).at(PRODUCT),
            "negated": lambda expr: f"({self.print(expr, matrix=False).at(SHIFT)} == 0)",
            "matrix": lambda expr, keys_first=False: turned(keys_first).print(expr, matrix=True).source,
            "matrix_operand": lambda expr, keys_first=False: turned(keys_first).print(expr, matrix=True).at(AND),
            "matrix_factor": lambda expr, keys_first=False: turned(keys_first).print(expr, matrix=True).at(SIGN),
            "outer_vector": lambda expr: self.outer_value(expr, matrix=False),
            "outer_matrix": lambda expr: self.outer_value(expr, matrix=True),
            "tile_matrix": lambda expr, keys_first=False: turned(keys_first).tile_matrix(expr),
            "entry_of": self.entry_of,
            "range_end": self.range_end,
            # Facts.
            "compute_dtype": lambda _: "tl.float64" if self.double else "tl.float32",
            "exact": lambda dtype: dtype in (DType.F32, DType.F64),
            "lowest": lambda dtype: LOWEST[DType.F64 if dtype is DType.F64 else DType.F32],
            "to_log2": to_log2,
            "axes": range,
            "passes": passes,
            "segments": segments,
            "has_full": lambda key_range: key_range.full_lo != key_range.full_hi,
            "longest_first": longest_first,
            "per_head": per_head,
            "is_one": lambda expr: expr == Constant(1.0),
            "delta_rows": delta_rows,
            "diagonal_block": diagonal_block,
            "reads": self.reads,
            "reduce_sizes": reduce_sizes,
            "block_rows": block_rows,
            "power_of_two": power_of_two,
            "is_float": lambda summary: summary.load.kind is Kind.FLOAT,
            "is_bool": lambda summary: summary.load.kind is Kind.BOOL,
        }

    def read(self, expr: Expr, *, matrix: bool, wide: bool) -> Text:
        match expr:
            case Index(name=name):
                return self._leaf(INDEX_NAMES[name], self._index_axis(name), matrix, wide)
            case Hole(name="dot"):
                return Text("qk")
            case Hole(name="score"):
                return Text("score")
            case Load():
                return self._load(expr, matrix, wide)
            case Element(index=index, upstream=upstream):
                return self._element("upstream_rows" if upstream else "x_rows", index, matrix)
            case Reduce(op=op, body=body, size=size):
                return self._reduce(op, body, size, matrix)
            case Summary():
                return self._summary(expr, wide)
            case _:
                return super().read(expr, matrix=matrix, wide=wide)

    def outer_value(self, expr: Expr, *, matrix: bool) -> str:
        """A value of a level outside rows. One per element is kept as FLOAT, as rows compute with it."""
        self.outer, self._float = self.mixed, "tl.float64" if self.mixed else "FLOAT"
        source = self.print(expr, matrix=matrix).source
        self.outer, self._float = False, "FLOAT"
        return f"tl.cast({source}, FLOAT)" if self.mixed and matrix and kind_of(expr) is Kind.FLOAT else source

    def range_end(self, expr: Expr, size: str = "N") -> str:
        """An end of a range of `size` positions, in 32 bits: where it may not fit, brought back to the nearest one."""
        text = self.print(expr, matrix=False).source
        return f"tl.minimum(tl.maximum({text}, 0), {size}).to(tl.int32)" if self._is_wide(expr) else text

    def entry_of(self, load: Load, tensor: str) -> str:
        """Where in another tensor of the same shape, contiguous, the entries lie that `load` reads: pointers."""
        offsets = [f"{self._clamped(load, axis, True)} * {tensor}_stride_{axis}" for axis in range(len(load.indices))]
        return " + ".join([tensor, *offsets])

    def tile_matrix(self, expr: Expr) -> str:
        """A value of every pair of the tile, also where it varies with queries or keys alone."""
        text = self.print(expr, matrix=True)
        if any(isinstance(node, Hole) or self._is_matrix(node) for node in walk(expr)):
            return text.source
        shape = "BLOCK_N, BLOCK_M" if self.keys_first else "BLOCK_M, BLOCK_N"
        return f"tl.zeros([{shape}], FLOAT) + {text.at(PRODUCT)}"

    def _is_matrix(self, expr: Expr) -> bool:
        return isinstance(expr, Variable) and self.axes[expr.name] is Axis.BOTH

    def reads(self, plan: KernelPlan, index: IndexName, size: SizeName) -> bool:
        """Whether a captured tensor is read at `index` along an axis of that `size`."""
        read = (Index(index), Size(size))
        return any(
            isinstance(node, Load) and read in zip(node.indices, self.shapes[node.tensor], strict=True)
            for expr in expressions_of(plan)
            for node in walk(expr)
        )

    # --- leaves -----------------------------------------------------------------------------------------------------

    def _index_axis(self, name: str) -> Axis:
        match self.plan:
            case ForwardPlan() | BackwardPlan():
                axes = {"q_row": Axis.FIRST, "q_idx": Axis.FIRST, "kv_idx": Axis.SECOND}
            case RowsPlan():
                axes = {"q_row": Axis.FIRST, "q_idx": Axis.FIRST, "kv_idx": Axis.FIRST, "d": Axis.SECOND}
            case TilesPlan():
                axes = {}
        return axes.get(name, Axis.NONE)

    def _load(self, load: Load, matrix: bool, wide: bool) -> Text:
        tensor = name_of(load.tensor)
        offsets = [f"{self._clamped(load, axis, matrix)} * {tensor}_stride_{axis}" for axis in range(len(load.indices))]
        return Text(f"tl.load({' + '.join([tensor, *offsets])}){self._widening(load, wide)}")

    def _widening(self, load: Load, wide: bool) -> str:
        """The conversion of a loaded element to the type that it is computed in."""
        dtype = self.dtypes[load.tensor]
        match load.kind:
            case Kind.FLOAT:
                computed = DType.F64 if self.double or self.outer else DType.F32
                return "" if dtype is computed else f".to({self._float})"
            case Kind.INT:
                return ".to(tl.int64)" if wide and dtype is not DType.I64 else ""
            case Kind.BOOL:
                return ""
            case _:
                assert_never(load.kind)

    def _clamped(self, load: Load, axis: int, matrix: bool) -> str:
        """The index of one axis of a load, kept within the tensor."""
        index, size = load.indices[axis], self.shapes[load.tensor][axis]
        match index, size:
            case (
                (Index(name="b"), Size(name="B"))
                | (Index(name="h"), Size(name="H"))
                | (Index(name="hkv"), Size(name="HKV"))
                | (Index(name="q_row"), Size(name="M"))
            ):
                return self.print(index, matrix=matrix).source
            case Index(name="kv_idx"), Size(name="N"):
                return self._leaf("rows_n", self._index_axis("kv_idx"), matrix, wide=False).source
            case _, Constant(value=int(value)) if int_range(index, self.dtypes, self.ranges).within(
                Range(0, value - 1)
            ):
                return self.print(index, matrix=matrix).at(PRODUCT)
            case _:
                return f"attn_clamp({self.print(index, matrix=matrix).source}, {name_of(load.tensor)}_size_{axis})"

    def _summary(self, summary: Summary, wide: bool) -> Text:
        number = blocks_of(self.plan).summaries.index(summary)
        table = f"summary_{number}"
        tile = "tile_n" if summary.axis == "kv" else "tile_m"
        source = f"tl.load({table} + b * {table}_stride_b + h * {table}_stride_h + {tile})"
        return Text(source + self._widening(summary.load, wide))

    # --- transforms of rows -----------------------------------------------------------------------------------------

    def _element(self, rows: str, index: Expr, matrix: bool) -> Text:
        if not isinstance(self.plan, RowsPlan):
            raise IRError("only a rows kernel reads elements of q, k or v")
        width = self.plan.width
        text = self.print(index, matrix=matrix)
        if not int_range(index, self.dtypes, self.ranges).within(Range(0, width - 1)):
            text = Text(f"attn_clamp({text.source}, {width})")
        start = f"{rows}[:, None]" if matrix else rows
        return Text(f"tl.load({start} + {text.at(SUM + 1)}).to(FLOAT)")

    def _reduce(self, op: str, body: Expr, size: Expr, matrix: bool) -> Text:
        if not (isinstance(size, Constant) and isinstance(size.value, int)):
            raise IRError(f"a reduction over {size} has no length at compile time")
        inner = self.print(body, matrix=True).source
        own = f"offs_d{size.value}"
        inner = re.sub(r"\boffs_d\b", own, inner)
        if power_of_two(size.value) != size.value:
            neutral = "0.0" if op == "sum" else 'float("-inf")'
            inner = f"tl.where({own}[None, :] < {size.value}, {inner}, {neutral})"
        return Text(f"tl.{op}({inner}, 1)" + ("[:, None]" if matrix else ""))
