"""Which batch size: steps with larger and larger batches, until memory does not suffice.

Laws
----
- A size fits where `steps` steps with it, begun from a copy of the state, stay within the memory. With `mode="bisect"` the one that
  is found fits, and the next larger one does not.
- The caller's state and the global generators are as they were, and what the trials took is given back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .. import rng, tree
from ..data import to_device
from ..data.arrays import Arrays
from ..data.checks import integer, one_of
from ..data.node import At
from ..errors import ArgumentError, BatchError, LimitError, explain
from ..loops.evaluate import Compile, check_step_fn
from ..loops.failing import annotate
from ..state import TrainState, check_state
from ..steps.bind import batch_size
from ..steps.compile import CompiledStep
from ..steps.compile import compile as compile_step
from .out_of_memory import free, is_out_of_memory
from .peak import peak

__all__ = ["BatchSizeFound", "Trial", "find_batch_size"]

Mode = Literal["power", "bisect"]
_DEFAULTS = {"start": 2, "multiple": 1, "steps": 3}
MOST = 1 << 24  # where nothing else ends the search: a size that costs no memory


@dataclass(frozen=True)
class Trial:
    """Some steps with batches of one size.

    Attributes:
        size: samples in the batch.
        fits: whether the memory was enough.
        peak: bytes that it took at its highest point: a copy of the state, the batch, and what the step allocates; None where it
            ran out.
        seconds: how long it took, compilation included.
        error: what was said where it ran out.

    >>> import ftrain as ft
    >>> ft.tune.Trial(64, True, 1 << 20, 0.1)
    Trial(size=64, fits=True, peak=1048576, seconds=0.1, error=None)
    """

    size: int
    fits: bool
    peak: int | None
    seconds: float
    error: str | None = None


@dataclass(frozen=True, repr=False)
class BatchSizeFound:
    """What `find_batch_size` gives back.

    Attributes:
        size: the batch size to use: the largest that fits, less the margin.
        largest: the largest that was tried and fits.
        trials: all trials, in order.
        memory: bytes that were allowed; None: as many as the card has.
        limited: what ended the search, `"memory"` or `"limit"`.

    >>> import ftrain as ft
    >>> ft.tune.BatchSizeFound(7, 8, (ft.tune.Trial(8, True, 2048, 0.1),), 4096, "limit")
    BatchSizeFound(size=7, largest=8, limited by limit)
      size    fits    memory    seconds
         8    yes     2.0 KiB   0.10
    """

    size: int
    largest: int
    trials: tuple[Trial, ...]
    memory: int | None
    limited: str

    def __repr__(self) -> str:
        lines = [f"BatchSizeFound(size={self.size}, largest={self.largest}, limited by {self.limited})"]
        width = max(4, *(len(str(one.size)) + 1 for one in self.trials)) if self.trials else 4
        lines.append(f"  {'size':>{width}}    {'fits':<7} {'memory':<9} seconds")
        for one in self.trials:
            taken = "ran out" if one.peak is None else _bytes(one.peak)
            lines.append(f"  {one.size:>{width}}    {'yes' if one.fits else 'no':<7} {taken:<9} {one.seconds:.2f}")
        return "\n".join(lines)


def find_batch_size(
    state: TrainState,
    step: Callable[[TrainState, Any], Any],
    data: Any,
    *,
    start: int = 2,
    limit: int | None = None,
    multiple: int = 1,
    mode: Mode = "power",
    steps: int = 3,
    memory: int | None = None,
    margin: float = 0.0,
    compile: Compile = "auto",
    backend: str | Callable[..., Any] = "inductor",
) -> BatchSizeFound:
    """Find the largest batch with which a step fits into memory: doubled until it does not, and then, if wanted, bisected.

    A trial makes a copy of the state, and takes `steps` steps with one batch. On CUDA it fits unless memory runs out (or, with
    `memory`, more than that is allocated). On a CPU, where the system kills a process that takes too much, `memory` is needed: what a
    trial takes is measured at the allocator, and compared. A trial that does not fit takes what it takes (twice as much as the one
    before, about), so let `memory` be at most half of what is free.

    Args:
        state: where each trial begins. It stays as it is.
        step: as for `fit`; compiled anew for each size, as a run with that size would, so `compile=False` is faster.
        data: a function `n -> batch` of n samples; or arrays (a tensor, or a tuple or dict of such), of which n rows are taken,
            again and again where there are fewer.
        start: the first size. (With one sample, a batch norm refuses to train.)
        limit: the largest size to try; None: as large as memory allows.
        multiple: sizes are multiples of this, e.g. of the step's `accumulate`.
        mode: `"power"`: `start` times a power of two; `"bisect"`: exact.
        steps: steps in a trial; two at least show what a second step needs while the state of the first is there.
        memory: bytes that a trial may take: the copy of the state, the batch, and all that the step allocates.
        margin: by which fraction the size is made smaller at the end.
        compile: as in `fit`.
        backend: a backend of `torch.compile`.

    Returns:
        A `BatchSizeFound`: `.size`, and the table of all `.trials`.

    Raises:
        BatchError: not even the smallest size fits (nor the smallest that the step takes, where it fails with fewer samples for a
            reason of its own), or a batch has another number of samples than was asked for.
        Whatever the step raises with the first size, with a note that says which one that is.
        LimitError, ArgumentError, DataError: arguments that make no sense, or a CPU without `memory`.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(100, 1), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> found = ft.find_batch_size(
    ...     ft.init(model, tx), step, torch.ones(10, 100), memory=100_000, mode="bisect", compile=False
    ... )
    >>> 100 < found.size < 250, found.limited, [trial.size for trial in found.trials][:4]
    (True, 'memory', [2, 4, 8, 16])
    """
    check_state(state, "ft.find_batch_size")
    check_step_fn(step, "ft.find_batch_size")
    _check(start=start, limit=limit, multiple=multiple, steps=steps, margin=margin)
    one_of(mode, Mode, "ft.find_batch_size", "mode", kind=LimitError)
    _check_memory(memory, state.device)
    first = -(-start // multiple) * multiple
    most = MOST if limit is None else limit
    most -= most % multiple
    if first > most:
        raise LimitError(
            explain(
                "ft.find_batch_size: there is no size to try.",
                expected="a multiple of `multiple` from start to limit",
                got=f"start={start}, limit={limit}, multiple={multiple}",
                fix=f"limit={first}",
            )
        )
    _check_rows(step, first)
    search = _Search(state, step, _maker(data), steps=steps, memory=memory, how=(compile, backend))
    counters = state.counters()
    with rng.Isolated(rng.fold_in_host(counters.seed, counters.step, 0xBA7C)):
        try:
            largest, limited = _search(search.fits, first, most, multiple, mode)
        except _Refused:  # by all sizes below those that do not fit
            largest, limited = None, "memory"
    if largest is None:
        raise BatchError(_nothing(search.trials[-1], memory, search.refused)) from search.refused
    size = max(multiple, int(largest * (1 - margin)) // multiple * multiple)
    return BatchSizeFound(size, largest, tuple(search.trials), memory, limited)


def _search(fits: Callable[[int], bool], first: int, most: int, multiple: int, mode: Mode) -> tuple[int | None, str]:
    """The largest size that fits, and what ended the search."""
    good, size = 0, first
    bad: int | None = None
    while bad is None:
        if not fits(size):
            bad = size
        elif size == most:
            return size, "limit"
        else:
            good, size = size, min(size * 2, most)
    while mode == "power" and not good and bad > multiple:  # `start` was too large
        size = max(multiple, bad // 2 // multiple * multiple)
        good, bad = (size, bad) if fits(size) else (0, size)
    while mode == "bisect" and bad - good > multiple:
        size = (good + bad) // 2 // multiple * multiple
        size = size if size > good else good + multiple
        good, bad = (size, bad) if fits(size) else (good, size)
    return good or None, "memory"


class _Refused(Exception):
    """The step fails with so few samples, for another reason than memory, and with more of them memory does not suffice."""


class _Search:
    """The trials of a search.

    Attributes:
        trials: those so far in which the step worked, or memory ran out.
        refused: the error of a step that does not work with so few samples, where memory did not suffice for more.
    """

    def __init__(
        self,
        state: TrainState,
        step: Any,
        make: Callable[[int], Any],
        *,
        steps: int,
        memory: int | None,
        how: tuple[Compile, Any],
    ) -> None:
        self.state, self.step, self.make, self.steps, self.memory, self.how = state, step, make, steps, memory, how
        self.trials: list[Trial] = []
        self.refused: Exception | None = None

    def fits(self, size: int) -> bool:
        """Try a size."""
        began = time.perf_counter()
        taken, error = self._try(size)
        free()
        fits = taken is not None and (self.memory is None or taken <= self.memory)
        self.trials.append(Trial(size, fits, taken, time.perf_counter() - began, error))
        return fits

    def _try(self, size: int) -> tuple[int | None, str | None]:
        """Bytes that the trial took, or what was said where memory ran out."""
        try:
            return peak(lambda: self._steps(size), self.state.device), None
        except Exception as error:
            if not is_out_of_memory(error):
                annotate(error, f"ftrain: raised in ft.find_batch_size, by the trial of {_samples(size)}")
                if not self.trials or any(one.fits for one in self.trials):
                    raise
                # What matters is that more samples did not fit: a batch norm that wants two of them would hide that.
                self.refused = error
                raise _Refused from error
            text = str(error).strip().partition("\n")[0]
            free(error)
            return None, text

    def _steps(self, size: int) -> None:
        batch = to_device(self.make(size), self.state.device)
        if batch_size(batch) != size:
            raise BatchError(
                explain(
                    "ft.find_batch_size: a batch has another number of samples than was asked for.",
                    expected=f"{size} rows",
                    got=tree.describe(next(iter(tree.leaves(batch)), None)),
                    fix="lambda n: make_batch(n)   # whose tensors have n rows",
                )
            )
        state, step = self.state.copy(), self._fresh()
        init = getattr(step.step, "init", None)
        state = state if init is None else init(state)
        for _ in range(self.steps):
            state, metrics = step(state, batch)
            del metrics

    def _fresh(self) -> CompiledStep:
        """The step, compiled as a run with this size alone would."""
        step, (compile, backend) = self.step, self.how
        if not isinstance(step, CompiledStep):
            rung: Any = "auto" if compile == "auto" else ("step" if compile else "eager")
            return compile_step(step, donate=True, rung=rung, backend=backend)
        if type(step) is not CompiledStep:
            return step  # one that chooses among several
        return CompiledStep(
            step.step, donate=step.donate, rung=step.requested, compiler=step._compiler, dynamic=step._dynamic
        )


def _maker(data: Any) -> Callable[[int], Any]:
    """The function that makes a batch of n samples."""
    if callable(data) and not isinstance(data, (Tensor, np.ndarray)):
        return data  # type: ignore[no-any-return]
    rows = Arrays(data, "ft.find_batch_size")
    if not rows.n:
        raise BatchError(
            explain("ft.find_batch_size: the arrays are empty.", expected="at least one row", got=tree.describe(data))
        )
    return lambda n: rows.gather(At(0, 0), np.arange(n) % rows.n)


def _check(*, start: int, limit: int | None, multiple: int, steps: int, margin: float) -> None:
    for name, value in (("start", start), ("multiple", multiple), ("steps", steps)):
        integer(value, "ft.find_batch_size", name, least=1, kind=LimitError, fix=f"{name}={_DEFAULTS[name]}")
    if limit is not None:
        integer(limit, "ft.find_batch_size", "limit", least=1, kind=LimitError, fix="limit=1024")
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 <= margin < 1:
        raise LimitError(
            explain(
                f"ft.find_batch_size: margin={margin!r} makes no sense.",
                expected="the fraction by which the size is made smaller, 0 <= margin < 1",
                got=repr(margin),
                fix="margin=0.05",
            )
        )


def _check_memory(memory: int | None, device: torch.device) -> None:
    if memory is not None:
        integer(memory, "ft.find_batch_size", "memory", least=1, kind=LimitError, fix="memory=4 * 2**30   # 4 GiB")
    elif device.type != "cuda":
        raise ArgumentError(
            explain(
                f"ft.find_batch_size needs to know how much memory it may take on {device.type}.",
                expected="memory=, in bytes",
                cause="without a limit the search ends where the system kills the process",
                fix="ft.find_batch_size(state, step, data, memory=4 * 2**30)   # 4 GiB",
            )
        )


def _check_rows(step: Any, n: int) -> None:
    inner = step.step if isinstance(step, CompiledStep) else step
    check = getattr(inner, "check_rows", None)
    if check is None:
        return
    try:
        check(n)
    except BatchError as error:
        error.add_note("ft.find_batch_size: let sizes be multiples of the step's accumulate=: multiple=4, say")
        raise


def _samples(n: int) -> str:
    return f"{n} sample{'s' if n > 1 else ''}"


def _nothing(last: Trial, memory: int | None, refused: Exception | None) -> str:
    """The error's text: what the smallest trial took, and why there was no smaller one."""
    cause = None
    if refused is not None:
        said = str(refused).strip().partition("\n")[0]
        cause = f"the step works with no smaller one: {type(refused).__name__}: {said}"
    return explain(
        "ft.find_batch_size: not even the smallest batch fits into memory.",
        where=_samples(last.size),
        expected="enough for a copy of the state, the batch and the step"
        if memory is None
        else f"at most {memory} bytes ({_bytes(memory)})",
        got=last.error if last.peak is None else f"{last.peak} bytes ({_bytes(last.peak)})",
        cause=cause,
        fix='ft.train_step(..., remat="blocks.*", precision="bf16-mixed")   # needs less'
        + ("" if memory is None or last.peak is None else f"; or memory={last.peak}, and more"),
    )


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} GiB"
