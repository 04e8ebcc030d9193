"""Memory beside which nothing may be read."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor


class Guarded:
    """Tensors that end where the next page may not be read, and begin where the one before may not."""

    PAGE = mmap.PAGESIZE

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []
        self._protect = ctypes.CDLL(None, use_errno=True).mprotect

    def copy(self, x: Tensor, *, at_end: bool) -> Tensor:
        size = x.numel() * x.element_size()
        pages = -(-size // self.PAGE)
        memory = mmap.mmap(-1, (pages + 2) * self.PAGE)
        self._maps.append(memory)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for page in (0, pages + 1):
            assert self._protect(ctypes.c_void_p(start + page * self.PAGE), self.PAGE, 0) == 0
        offset = self.PAGE + (pages * self.PAGE - size if at_end else 0)
        y = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
        return y.copy_(x)
