"""Timing on a machine that others use too.

Two contenders are compared by their times in the same round, seconds apart, never by figures of two runs: what slows the machine
for a while slows both. Where others take turns with us on a core, processor time is the steadier witness, so both times are
kept. A round runs a slice of steps of every contender, in an order drawn anew; what is reported are medians
and quartiles over the rounds, of times and of ratios. No slice is thrown away.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass
class Contender:
    """One way to train.

    Attributes:
        key: its name in the JSON.
        label: its name in the table.
        run: takes so many steps, and returns when the host is done with them.
        steps: length of a slice.
        sets_up: whether each call of `run` builds its trainer anew. Then `run(1)` is timed too, reported as set-up, and
            taken off: a step costs `(run(n) - run(1)) / (n - 1)`.
    """

    key: str
    label: str
    run: Callable[[int], object]
    steps: int
    sets_up: bool = False


@dataclass
class Samples:
    """What was measured of one contender, an entry for each round."""

    label: str
    first_call: float  # seconds until the first step was done, with whatever had to be compiled
    step: list[float] = field(default_factory=list)  # microseconds of wall time for a step
    cpu: list[float] = field(default_factory=list)  # microseconds of processor time for a step, all threads
    set_up: list[float] = field(default_factory=list)  # milliseconds


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """`over / under`, round by round."""
    return Spread.of([a / b for a, b in zip(over, under, strict=True)])


def measure(
    contenders: Sequence[Contender],
    rounds: int,
    *,
    sync: Callable[[], object] = lambda: None,
    tell: Callable[[str], object] = lambda text: None,
    ready: Callable[[], object] = lambda: None,
    warm: int = 20,
) -> dict[str, Samples]:
    """Run `rounds` rounds.

    Args:
        contenders: taken in a new order in each round.
        rounds: how many.
        sync: waits for the device; called before each look at the clock.
        tell: is told what goes on.
        ready: called after the warm-up, when each contender has taken the same number of steps.
        warm: steps that are run untimed before each slice, so that no contender pays for the caches that another one filled.
    """
    found: dict[str, Samples] = {}
    for one in contenders:
        tell(f"first call: {one.label}")
        first, _ = _timed(one, 1, sync)
        found[one.key] = Samples(one.label, round(first, 3))
        one.run(max(warm, 2))
    ready()
    gc.collect()
    gc.freeze()  # else each collection below walks the million objects of torch
    dice = random.Random(0)
    for number in range(rounds):
        tell(f"round {number + 1} of {rounds}")
        for one in dice.sample(contenders, len(contenders)):
            gc.collect()
            _slice(one, found[one.key], sync, warm)
    gc.unfreeze()
    return found


def _slice(one: Contender, samples: Samples, sync: Callable[[], object], warm: int) -> None:
    if one.sets_up:
        alone, alone_cpu = _timed(one, 1, sync)
        samples.set_up.append(alone * 1e3)
    else:
        alone = alone_cpu = 0.0
        one.run(min(warm, one.steps))
    wall, cpu = _timed(one, one.steps, sync)
    steps = one.steps - one.sets_up
    samples.step.append((wall - alone) / steps * 1e6)
    samples.cpu.append((cpu - alone_cpu) / steps * 1e6)


def _timed(one: Contender, steps: int, sync: Callable[[], object]) -> tuple[float, float]:
    sync()
    wall, cpu = time.perf_counter(), time.process_time()
    one.run(steps)
    sync()
    return time.perf_counter() - wall, time.process_time() - cpu
