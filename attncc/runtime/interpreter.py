"""Runs Triton kernels on the CPU, one program after another, with Triton's own interpreter.

The interpreter is meant to be switched on for a whole process by TRITON_INTERPRET=1 before triton is imported. Here a
kernel is interpreted whatever that variable says and whatever else the process compiles: the functions of a private
copy of its module are rewritten for the interpreter, and what the interpreter changes in `triton.language` stands only
while a kernel runs.

What it gets wrong is put right in a builder of our own, and so for our own kernels alone:

- bf16, which it holds as raw 16-bit words: products multiplied the words, conversions cut bits off instead of rounding
- greatest and least of numbers, which spread NaN where the hardware drops it
- run-time bounds of loops under numpy >= 2.4, which refuses to make an int of an array (triton < 3.7)
"""

from __future__ import annotations

import contextlib
import threading
import types
import warnings
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.language import standard
from triton.runtime import interpreter as base

from attncc.runtime.cache import import_module

_LOCK = threading.RLock()
_COMPARISONS = (np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal)


class Builder(base.InterpreterBuilder):
    """The interpreter's operations, corrected."""

    def binary_op(self, lhs: Any, rhs: Any, op: Callable[..., Any]) -> Any:
        if not _is_bf16(lhs) and not _is_bf16(rhs):
            return super().binary_op(lhs, rhs, op)
        result = super().binary_op(_widened(lhs), _widened(rhs), op)
        return result if op in _COMPARISONS else _rounded(result)

    def unary_op(self, arg: Any, op: Callable[..., Any]) -> Any:
        return _rounded(super().unary_op(_widened(arg), op)) if _is_bf16(arg) else super().unary_op(arg, op)

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        to_bf16 = dst_type.scalar == tl.bfloat16
        if _is_bf16(src) == to_bf16:
            return src if to_bf16 else super().cast_impl(src, dst_type)
        if to_bf16:
            return _rounded(base.TensorHandle(src.data.astype(np.float32), tl.float32))
        wide = _widened(src)
        return wide if dst_type.scalar == tl.float32 else super().cast_impl(wide, dst_type)

    # Its class attributes call `cast_impl` of the instance; this one does not.
    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if _is_bf16(src) or dst_type.scalar == tl.bfloat16:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        return super().create_dot(_widened(a), _widened(b), d, input_precision, max_num_imprecise_acc)

    def get_bf16(self, value: float) -> Any:
        return _rounded(base.TensorHandle(np.array([value], np.float32), tl.float32))

    def create_maxnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_minnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmin)


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: Any) -> Any:
    """bf16 as f32, exactly; anything else as it is."""
    if not _is_bf16(handle):
        return handle
    return base.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(handle: Any) -> Any:
    """f32 as bf16, to the nearest, ties to even."""
    floats = np.ascontiguousarray(handle.data, np.float32)
    bits = floats.view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    data = np.where(np.isnan(floats), np.uint16(0x7FC0), nearest).reshape(handle.data.shape)
    return base.TensorHandle(data, tl.bfloat16)


_BUILDER = Builder()
_SEMANTIC = base.TritonSemantic(_BUILDER)


class InterpretedModule:
    """The functions of a generated module, ready to be interpreted."""

    def __init__(self, path: Path) -> None:
        module = import_module(path, f"{path.stem}_interpreted")
        # Rewritten functions look this up in their own module first.
        vars(module)["interpreter_semantic"] = _SEMANTIC
        jitted = {name: value.fn for name, value in vars(module).items() if _is_jitted(value)}
        self.functions = {name: base.FunctionRewriter(fn).rewrite_ast() for name, fn in jitted.items()}
        vars(module).update(self.functions)

    def launch(self, function: str, programs: int, arguments: Mapping[str, Any]) -> None:
        """Runs `programs` programs of `function`. Arguments that Triton sees as values are made by `typed`."""
        fn = self.functions[function]
        with _LOCK, _interpreting(fn):
            _BUILDER.set_grid_dim(programs, 1, 1)
            for program in range(programs):
                _BUILDER.set_grid_idx(program, 0, 0)
                fn(**arguments)


def typed(value: Tensor | bool | int | float, type_name: str) -> Any:
    """A run-time argument of exactly the type that a signature names; for a pointer, the address of a tensor's data."""
    if type_name == "constexpr":
        return value
    triton_type: Any = tl.str_to_ty(type_name, None)
    if isinstance(value, Tensor):
        data = np.array([value.data_ptr()], np.uint64)
    else:
        data = np.array([value], base._get_np_dtype(triton_type))  # noqa: SLF001 - Triton exports no such table
    return tl.core.tensor(base.TensorHandle(data, triton_type), triton_type)


@contextlib.contextmanager
def _interpreting(fn: Callable[..., Any]) -> Generator[None]:
    """`triton.language` as the interpreter needs it to run `fn`, and as it was afterwards."""
    before = base.interpreter_builder, base.interpreter_semantic
    base.interpreter_builder, base.interpreter_semantic = _BUILDER, _SEMANTIC
    scopes: list[Any] = []
    try:
        # The first sees triton.language as `tl`, the second as its own library does: as `core`.
        scopes += (base._patch_lang(fn), base._patch_lang(standard.zeros.fn))  # noqa: SLF001 - as its launcher does
        scopes[-1].set_attr(tl.core.tensor, "__index__", lambda self: int(self.handle.data.item()))
        for name, function in _library().items():
            if hasattr(tl, name):
                scopes[-1].set_attr(tl, name, function)
        # Scores of -inf and NaN are the business of the kernel, not of numpy.
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        for scope in reversed(scopes):
            scope.restore()
        base.interpreter_builder, base.interpreter_semantic = before


_LIBRARY: dict[str, Callable[..., Any]] = {}


def _library() -> dict[str, Callable[..., Any]]:
    """The jitted functions of `triton.language` (max, sum, cdiv, …), rewritten on their first use.

    What they hand to reductions stays as it is: the interpreter knows those functions by identity.
    """
    if not _LIBRARY:
        namespace = {**vars(standard), "interpreter_semantic": _SEMANTIC}
        for name, value in vars(standard).items():
            if _is_jitted(value) and "_combine" not in name and "_elementwise" not in name:
                copy = types.FunctionType(value.fn.__code__, namespace, name, value.fn.__defaults__)
                namespace[name] = _LIBRARY[name] = _rewritten_when_called(copy)
    return _LIBRARY


def _rewritten_when_called(fn: Callable[..., Any]) -> Callable[..., Any]:
    rewritten: list[Callable[..., Any]] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if not rewritten:
            rewritten.append(base.FunctionRewriter(fn).rewrite_ast())
        return rewritten[0](*args, **kwargs)

    return call


def _is_jitted(value: Any) -> bool:
    """Whether `value` is a function decorated by `triton.jit`, in either mode of the process."""
    return hasattr(value, "fn") and hasattr(value, "run") and callable(value.fn)
