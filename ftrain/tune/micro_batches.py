"""Micro-batches as small as memory wants them: a step that, where memory runs out, is tried again in more parts.

Laws
----
- A step whose memory runs out has not happened: the next larger number of parts begins from the same state.
- The result is that of `make_step(k)` for the k that was found, bitwise; so it is that of one batch up to rounding (see
  `ft.with_accumulation`).
- What was found is in the state, under `state.extra["auto_accumulate"]`: a run that goes on elsewhere goes on with it, bitwise, and
  a run that begins anew begins with `start` again. It is read from the device once in a run.

A step that is compiled with donation consumes its state also where it fails. So its first call for each k and each shape of a batch
is made with a copy of the state in host memory: that takes none of the memory that is short. A call that fails later, with a k and
a shape that had worked, cannot be tried again, and says so.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch

from .. import tree
from ..data import Window
from ..data.checks import integer
from ..errors import ArgumentError, CompileError, LimitError, MemoryWarning, explain
from ..state import TrainState
from ..steps.bind import batch_size
from ..steps.calls import seeded_by
from ..steps.compile import CompiledStep
from ..steps.rehearsal import shapes
from ..steps.train import Stepped
from ..types import Batch
from .out_of_memory import free, is_out_of_memory

__all__ = ["AutoAccumulated", "auto_accumulate"]

NAME = "auto_accumulate"
Step = Callable[[TrainState, Batch], Any]


def auto_accumulate(make_step: Callable[[int], Step], *, start: int = 1, limit: int | None = None) -> AutoAccumulated:
    """A step in as many micro-batches as memory wants: on out-of-memory it is tried again, from the same state, in more of them.

    The number of parts k is the next larger one that divides the batch; it is kept for the rest of the run, a short batch is cut into
    the fewest equal parts that are no larger, and a `MemoryWarning` says once which k it is.

    Args:
        make_step: `k -> step`, with `accumulate=k`; called for each k that is tried. With other wrappers (`ft.with_ema`) inside.
        start: the k to begin with.
        limit: the largest k; None: up to one sample in a part.

    Returns:
        A step, for `ft.fit`, `ft.compile` and `ft.loop`. `.k` is the number of parts of the newest step, `.rows` the largest number of
        samples that a part may have, or None as long as memory has not run out.

    Raises:
        ArgumentError: `make_step` is no function, or gives no step.
        LimitError: `start` is larger than `limit`, or one is below 1.
        torch.OutOfMemoryError (when called), or what torch raised: there is no larger k.

    >>> import torch, warnings, ftrain as ft
    >>> def loss_fn(model, batch):
    ...     if len(batch) > 2:
    ...         raise torch.OutOfMemoryError("CUDA out of memory.")
    ...     return model(batch).square().mean()
    >>> model, tx = torch.nn.Linear(3, 1), ft.optim.sgd(0.1)
    >>> step = ft.auto_accumulate(lambda k: ft.train_step(model, loss_fn, tx, accumulate=k))
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     result = ft.fit(ft.init(model, tx), step, torch.ones(16, 3), batch_size=8, progress=False, compile=False)
    >>> print(caught[0].message)
    ft.auto_accumulate: memory ran out with a batch of 8 samples in 1 part, so it is now cut into 4 of 2 (CUDA out of memory.)
    >>> step.k, result.state.extra["auto_accumulate"]
    (4, {'rows': tensor(2)})
    """
    if not callable(make_step) or hasattr(make_step, "advances"):
        raise ArgumentError(
            explain(
                "ft.auto_accumulate wants a function that makes the step for a number of micro-batches.",
                expected="k -> step",
                got=repr(make_step),
                fix="ft.auto_accumulate(lambda k: ft.train_step(model, loss_fn, tx, accumulate=k))",
            )
        )
    fix = "ft.auto_accumulate(make_step, start=1, limit=16)"
    integer(start, "ft.auto_accumulate", "start", least=1, kind=LimitError, fix=fix)
    if limit is not None:
        integer(limit, "ft.auto_accumulate", "limit", least=1, kind=LimitError, fix=fix)
        if limit < start:
            raise LimitError(
                explain(
                    "ft.auto_accumulate: the limits contradict each other.",
                    expected="start <= limit",
                    got=f"start={start}, limit={limit}",
                    fix=f"limit={start}",
                )
            )
    return AutoAccumulated(make_step, start, limit)


class AutoAccumulated(Stepped):
    """Made by `auto_accumulate`.

    Attributes:
        k: micro-batches of the newest step, or `start` before the first.
        rows: the largest number of samples that a micro-batch may have; None as long as memory has not run out.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(3, 1), ft.optim.sgd(0.1)
    >>> loss_fn = lambda model, batch: model(batch).square().mean()
    >>> step = ft.auto_accumulate(lambda k: ft.train_step(model, loss_fn, tx, accumulate=k), start=2)
    >>> state, metrics = step(step.init(ft.init(model, tx)), torch.ones(8, 3))
    >>> step.k, step.rows, step
    (2, None, auto_accumulate(k=2, rows=None))
    """

    def __init__(self, make_step: Callable[[int], Step], start: int, limit: int | None) -> None:
        self.make_step, self.start, self.limit = make_step, start, limit
        self.k, self.rows = start, None
        self.runs = 0  # how many runs were begun
        self._plain = _Attempts(self, lambda step: step)
        self._said: set[str] = set()
        first = self._plain.step(start)
        super().__init__(first, ())
        self.advances = bool(getattr(first, "advances", False))

    k: int
    rows: int | None

    def __repr__(self) -> str:
        return f"auto_accumulate(k={self.k}, rows={self.rows})"

    def init(self, state: TrainState) -> TrainState:
        """The state with what the step needs, and with a place for the size that is found; called at the start of a run."""
        self.runs += 1
        inner = getattr(self.fn, "init", None)
        state = state if inner is None else inner(state)
        if NAME in state.extra:
            return state
        return state.replace(extra={**state.extra, NAME: {"rows": torch.zeros_like(state.step)}})

    def names(self) -> set[str]:
        """The names of the sub-states that the step keeps in `state.extra`."""
        return {NAME} | (self.fn.names() if isinstance(self.fn, Stepped) else set())

    def check(self, state: TrainState, batch: Batch | None = None) -> None:
        """As the step inside."""
        inner = getattr(self.fn, "check", None)
        if inner is not None:
            inner(state, batch)

    def check_rows(self, n: int) -> None:
        """Any number of samples will do: there is always a k that divides it."""

    def compiled(self, compile_one: Callable[[Step], CompiledStep]) -> CompiledStep:
        """For `ft.compile`: the same choice, among compiled steps."""
        return _Compiled(self, compile_one)

    def __call__(self, state: TrainState, batch: Batch) -> Any:
        if torch.compiler.is_compiling():
            raise CompileError(
                explain(
                    "ft.auto_accumulate stands inside a step that is compiled as a whole.",
                    cause="out-of-memory can be caught only around a compiled step",
                    fix="ft.auto_accumulate(lambda k: ft.with_ema(ft.train_step(..., accumulate=k)))   # wrap inside",
                )
            )
        return self._plain(state, batch)

    def say(self, text: str) -> None:
        """Warn, once."""
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, MemoryWarning, stacklevel=2)


class _Attempts:
    """One way of running the steps, plain or compiled, and what is known of the memory that it takes."""

    def __init__(self, auto: AutoAccumulated, prepare: Callable[[Step], Step]) -> None:
        self.auto, self.prepare = auto, prepare
        self.steps: dict[int, Any] = {}
        self.rehearsals: dict[int, Any] = {}
        self.rows: int | None = None
        self.asked = 0  # the newest run whose state was asked what it knows
        self.worked: set[tuple[int, str]] = set()  # numbers of parts and shapes of batches

    def step(self, k: int) -> Any:
        """The step in k parts."""
        if k not in self.steps:
            made = self.auto.make_step(k)
            if not callable(made) or isinstance(made, torch.nn.Module):
                raise ArgumentError(
                    explain(
                        "ft.auto_accumulate: make_step gave no step.",
                        where=f"make_step({k})",
                        expected="(state, batch) -> (state, metrics)",
                        got=type(made).__name__,
                        fix="ft.auto_accumulate(lambda k: ft.train_step(model, loss_fn, tx, accumulate=k))",
                    )
                )
            self.steps[k] = self.prepare(made)
            if k in self.rehearsals:
                self.steps[k].rehearse(self.rehearsals.pop(k))
        return self.steps[k]

    def __call__(self, state: TrainState, batch: Batch) -> Any:
        if self.asked != self.auto.runs:
            self.asked, self.rows = self.auto.runs, _known(state)
        n = _rows(batch)
        k = first = self._choose(n)
        while True:
            seen = (k, str(shapes(batch)))
            step = self.step(k)
            donates = isinstance(step, CompiledStep) and step.donate and step.rung not in ("loss", "eager")
            backup = _on_host(state) if donates and seen not in self.worked else None
            try:
                new, metrics = self._run(step, state, batch)
            except Exception as error:
                more = self._more(n, k) if is_out_of_memory(error) else None
                if more is None:
                    raise
                if "_donated_at" in state.__dict__ and backup is None:
                    _gone(error, k)
                    raise
                reason = str(error).strip().partition("\n")[0]
                if not any(parts == k for parts, _ in self.worked):
                    # Its program is for a batch that does not fit: a smaller one is to get a program of its own.
                    del self.steps[k], step
                free(error)
            else:
                self.worked.add(seen)
                break
            if "_donated_at" in state.__dict__:
                assert backup is not None, "looked at above"
                state = _back(backup)
            k = more
        self.auto.k, self.auto.rows = k, self.rows
        if k != first:
            self.rows = self.auto.rows = n // k
            parts = "1 part" if first == 1 else f"{first} parts"
            self.auto.say(
                f"ft.auto_accumulate: memory ran out with a batch of {n} samples in {parts}, so it is now cut into {k} of {n // k} "
                f"({reason})"
            )
            if NAME in new.extra:
                rows = torch.full_like(new.extra[NAME]["rows"], n // k)
                new = new.replace(extra={**new.extra, NAME: {"rows": rows}})
        return new, metrics

    def _run(self, step: Any, state: TrainState, batch: Batch) -> Any:
        if isinstance(step, (Stepped, CompiledStep)):
            return step(state, batch)
        with seeded_by(state):  # a step by hand, which nobody else seeds
            return step(state, batch)

    def _divisors(self, n: int) -> list[int]:
        found = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
        both = sorted({*found, *(n // d for d in found)})
        limit = self.auto.limit
        return [d for d in both if limit is None or d <= limit] or [1]

    def _choose(self, n: int) -> int:
        """The fewest parts that are known to do, or may do."""
        if n < 1:
            return self.auto.start
        divisors = self._divisors(n)
        start = self.auto.start
        good = [d for d in divisors if (d >= start if self.rows is None else n // d <= self.rows)]
        return good[0] if good else divisors[-1]

    def _more(self, n: int, k: int) -> int | None:
        return next((d for d in self._divisors(n) if d > k), None) if n > 0 else None


class _Compiled(CompiledStep):
    """The compiled form: a compiled step for each number of micro-batches."""

    def __init__(self, auto: AutoAccumulated, compile_one: Any) -> None:
        words = compile_one.keywords
        self.step, self.donate, self.requested = auto, words["donate"], words["rung"]
        self.advances = auto.advances
        self._attempts = _Attempts(auto, lambda step: step if isinstance(step, CompiledStep) else compile_one(step))

    def __repr__(self) -> str:
        return f"compile({self.step!r}, donate={self.donate}, rung={self.requested!r})"

    def __call__(self, state: TrainState, batch: Batch) -> Any:
        return self._attempts(state, batch)

    @property
    def _now(self) -> CompiledStep | None:
        return self._attempts.steps.get(self._attempts.auto.k)

    @property
    def rung(self) -> Any:  # type: ignore[override]  # of the step that is used now
        return None if self._now is None else self._now.rung

    @property
    def reason(self) -> str | None:  # type: ignore[override]
        return None if self._now is None else self._now.reason

    @property
    def compiles(self) -> int:  # type: ignore[override]
        return sum(step.compiles for step in self._attempts.steps.values())

    @property
    def recompiles(self) -> list[Any]:  # type: ignore[override]
        return [one for step in self._attempts.steps.values() for one in step.recompiles]

    def shapes(self) -> list[Any]:
        """For each number of micro-batches, what its own compiled step says."""
        found = {**self._attempts.rehearsals, **{k: step.shapes() for k, step in self._attempts.steps.items()}}
        return [[k, one] for k, one in sorted(found.items()) if one]

    def rehearse(self, shapes: list[Any]) -> None:
        """As for each of the compiled steps."""
        for k, one in shapes:
            if k in self._attempts.steps:
                self._attempts.steps[k].rehearse(one)
            else:
                self._attempts.rehearsals[k] = one


def _rows(batch: Batch) -> int:
    """The number that k has to divide: of the samples of a batch, or of each batch of a window."""
    if isinstance(batch, Window):
        return math.gcd(*(batch_size(one) for one in batch.batches))
    return batch_size(batch)


def _known(state: TrainState) -> int | None:
    """What an earlier part of the run found out."""
    own = state.extra.get(NAME)
    if own is None:
        return None
    rows = int(own["rows"].item())  # once in a run
    return rows if rows > 0 else None


def _on_host(state: TrainState) -> tuple[TrainState, list[torch.device]]:
    """A copy in the memory of the host, and where each of its leaves was: some lie on the CPU anyway (of `ft.once`, say)."""
    copy: TrainState = tree.map(lambda leaf: leaf.to("cpu", copy=True), state)
    if state._host is not None:
        copy.__dict__["_host"] = state._host
    return copy, [leaf.device for leaf in tree.leaves(state)]


def _back(backup: tuple[TrainState, list[torch.device]]) -> TrainState:
    """The state again, where it was."""
    kept, devices = backup
    leaves = [leaf.to(device, copy=True) for leaf, device in zip(tree.leaves(kept), devices, strict=True)]
    copy: TrainState = tree.unflatten(tree.structure(kept), leaves)
    if kept._host is not None:
        copy.__dict__["_host"] = kept._host
    return copy


def _gone(error: Exception, k: int) -> None:
    """Say why this is the end, though there are larger numbers of parts."""
    error.add_note(
        explain(
            f"ftrain: ft.auto_accumulate cannot try again: the step had worked in {k} part(s) with such a batch, so that no copy of "
            "the state was made, and what failed has consumed it.",
            cause="memory that others use meanwhile, or that is in pieces",
            fix=f"ft.auto_accumulate(make_step, start={k + 1})   # or donate=False in ft.compile, or ft.fit(snapshot=...)",
        )
    )
