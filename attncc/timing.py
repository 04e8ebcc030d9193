"""Times functions beside each other, on a machine that may have other work to do."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# A sample during which the scheduler took the processor away is thrown out; long ones are allowed one loss per so many
# seconds, or none would be left.
_TOLERANCE = 0.05
_ROUNDS_PER_SAMPLE = 3


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. `undisturbed`: only samples count that no other work on the machine disturbed."""

    median: float
    best: float
    samples: int
    undisturbed: bool


def alternate(
    functions: Mapping[str, Callable[[], object]],
    repeat: int = 9,
    warmup: int = 2,
    tick: Callable[[str], object] = lambda _: None,
) -> dict[str, Timing]:
    """Median times of the functions, run in turn, so that a change of the machine's mood meets all alike.

    With one torch thread the clock is that thread's processor time, which other work on the machine does not stretch,
    and every sample counts; else the wall clock. `tick` is called with a function's name after each counted sample.
    """
    alone = torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    for function in functions.values():
        for _ in range(warmup):
            function()
    clean: dict[str, list[float]] = {name: [] for name in functions}
    disturbed: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeat * _ROUNDS_PER_SAMPLE):
        waiting = [name for name in functions if len(clean[name]) < repeat]
        if not waiting:
            break
        for name in waiting:
            switches = _involuntary_switches()
            start = clock()
            functions[name]()
            seconds = clock() - start
            if alone or _involuntary_switches() - switches <= seconds / _TOLERANCE:
                clean[name].append(seconds)
                tick(name)
            else:
                disturbed[name].append(seconds)
    return {name: _timing(clean[name], disturbed[name], repeat) for name in functions}


def _timing(clean: list[float], disturbed: list[float], repeat: int) -> Timing:
    enough = len(clean) >= min(3, repeat)
    samples = clean if enough else clean + disturbed
    return Timing(statistics.median(samples), min(samples), len(samples), enough)


def _involuntary_switches() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
