"""What this machine's registers can do: the rate of multiply-adds with nothing to load or store.

A kernel's share of it says how much there is left to gain, on any machine and at any clock.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

# Enough independent accumulators to hide the latency of a multiply-add, few enough to stay in registers.
_SOURCE = r"""
#if defined(__AVX512F__)
#define WIDTH 64
#define ACCUMULATORS 20
#elif defined(__AVX__)
#define WIDTH 32
#define ACCUMULATORS 12
#else
#define WIDTH 16
#define ACCUMULATORS 12
#endif

#if defined(__x86_64__)
#define OPAQUE(x) __asm__ volatile("" : "+v"(x))
#else
#define OPAQUE(x) __asm__ volatile("" : "+w"(x))
#endif

template <typename T> static void multiply_add(long rounds) {
    typedef T vec __attribute__((vector_size(WIDTH)));
    vec a[ACCUMULATORS], x = vec{} + T(0.999), y = vec{} + T(1e-6);
#pragma GCC unroll 20
    for (int i = 0; i < ACCUMULATORS; ++i) a[i] = vec{} + T(i);
    for (long r = 0; r < rounds; ++r) {
#pragma GCC unroll 20
        for (int i = 0; i < ACCUMULATORS; ++i) a[i] = a[i] * x + y;
        OPAQUE(x);
    }
#pragma GCC unroll 20
    for (int i = 0; i < ACCUMULATORS; ++i) OPAQUE(a[i]);  // All lanes are needed.
}

// Operations per round; rounds < 0 asks for no more than that.
extern "C" double run_f32(long rounds) {
    if (rounds > 0) multiply_add<float>(rounds);
    return 2.0 * ACCUMULATORS * (WIDTH / 4);
}

extern "C" double run_f64(long rounds) {
    if (rounds > 0) multiply_add<double>(rounds);
    return 2.0 * ACCUMULATORS * (WIDTH / 8);
}

// 0 where there are no products of bf16 pairs.
extern "C" double run_bf16(long rounds) {
#if defined(__AVX512BF16__)
    typedef float vec __attribute__((vector_size(WIDTH)));
    vec a[ACCUMULATORS], x = vec{}, y = vec{};
#pragma GCC unroll 20
    for (int i = 0; i < ACCUMULATORS; ++i) a[i] = vec{} + float(i);
    for (long r = 0; r < rounds; ++r) {
#pragma GCC unroll 20
        for (int i = 0; i < ACCUMULATORS; ++i) __asm__("vdpbf16ps %2, %1, %0" : "+v"(a[i]) : "v"(x), "v"(y));
        OPAQUE(x);
    }
#pragma GCC unroll 20
    for (int i = 0; i < ACCUMULATORS; ++i) OPAQUE(a[i]);
    return 4.0 * ACCUMULATORS * (WIDTH / 4);
#else
    (void)rounds;
    return 0;
#endif
}
"""

_SECONDS = 0.08
_TRIES = 5

_BEST: dict[tuple[str, int], float] = {}


def peak(dtype: torch.dtype, compiler: str) -> float:
    """Floating-point operations per second of all torch threads together, in the arithmetic that `dtype` computes in:
    pairs of bf16 where the machine has them, f32 for f16 and otherwise, f64 for f64."""
    run = _function(dtype, compiler)
    # Other work on the machine can only make it look slower: the best of all times counts.
    key = run.__name__, torch.get_num_threads()
    _BEST[key] = max(_BEST.get(key, 0.0), _rate(run, _SECONDS, _TRIES))
    return _BEST[key]


def current_peak(dtype: torch.dtype, compiler: str) -> float:
    """Likewise at the clock of the moment, which on a shared machine may be a fifth below the best: to be measured in
    turns with what is to be a share of it."""
    return _rate(_function(dtype, compiler), _SECONDS / 40, 1)


def _function(dtype: torch.dtype, compiler: str) -> ctypes._NamedFuncPointer:
    library = _library(compiler)
    name = {torch.bfloat16: "run_bf16", torch.float64: "run_f64"}.get(dtype, "run_f32")
    return getattr(library, name if getattr(library, name)(-1) else "run_f32")


def _rate(run: ctypes._NamedFuncPointer, lasting: float, tries: int) -> float:
    threads = torch.get_num_threads()
    # One thread's own processor time is not stretched by other work on the machine.
    clock = time.thread_time if threads == 1 else time.perf_counter
    operations = run(-1)
    rounds = 100_000
    with ThreadPoolExecutor(threads) as pool:

        def seconds() -> float:
            start = clock()
            if threads == 1:
                run(rounds)
            else:
                list(pool.map(run, [rounds] * threads))
            return clock() - start

        rounds = max(1, int(rounds * lasting / min(seconds() for _ in range(2))))
        return threads * rounds * operations / min(seconds() for _ in range(tries))


@functools.cache
def _library(compiler: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="attncc-peak-") as folder:
        source, shared = Path(folder) / "peak.cpp", Path(folder) / "peak.so"
        source.write_text(_SOURCE, encoding="utf-8")
        native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
        flags = ["-O3", native, "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(source), "-o", str(shared)], check=True, capture_output=True)
        library = ctypes.CDLL(str(shared))
    for name in ("run_f32", "run_f64", "run_bf16"):
        function = getattr(library, name)
        function.argtypes, function.restype = [ctypes.c_long], ctypes.c_double
    return library
