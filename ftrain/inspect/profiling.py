"""`profile`: a hook that looks into some steps of a run with torch's profiler, and costs nothing at all others.

What is open is closed at the end of its steps, of the run, or when the run fails, whatever comes first.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from ..data.spans import LISTENER
from ..errors import ArgumentError, HookError, LimitError, ProfileWarning, explain
from ..loops.cadences import Cadence, Clock, Moment
from ..loops.events import Event, compose, on
from ..loops.spent import PARTS
from ..state import TrainState
from ..steps.watching import watching
from ..types import Batch
from .splitting import Split

__all__ = ["profile"]

Steps = tuple[int, int]


def profile(
    at: int | Steps | Cadence = (10, 13),
    *,
    steps: int | None = None,
    path: str | os.PathLike[str] = "profile",
    trace: bool = True,
    memory: bool = False,
    shapes: bool = False,
    stacks: bool = False,
    rows: int = 40,
) -> Any:
    """A hook that profiles some steps of a run; it is called just before and after them, and at no other step.

    For steps 10 to 13 it writes:

    - `ops_10-13.txt`: the most expensive operations.
    - `split_10-13.json`: seconds by part: `data`, `step`, `evaluation`, `hooks`, `checkpoint`, `sinks`, `other`.
    - `trace_10-13.json`: a trace for https://ui.perfetto.dev or chrome://tracing, in which `ftrain: step`, `data`, `evaluation` and `checkpoint` are ranges.
    - with `memory`: on CUDA `memory_10-13.pickle`, a snapshot of all allocations for https://pytorch.org/memory_viz; elsewhere
      `memory_10-13.txt`, the operations that allocate most.

    Args:
        at: the first and the last step, counted since the run began; one step; or a cadence: the steps after each time it fires.
        steps: how many steps, where `at` is one step or a cadence; default: 1.
        path: a folder; made where there is none. Files of the same steps are replaced.
        trace: whether to write the trace.
        memory: whether to look at memory, too.
        shapes: whether to tell the same operation on other shapes apart.
        stacks: whether to record Python's stacks; slow.
        rows: so many operations.

    Returns:
        A hook for `ft.fit(..., hooks=[...])`; it leaves the state alone, and serves several runs.

    Raises:
        LimitError: now, if the steps make no sense.
        ArgumentError: now, if another argument does not.
        HookError: in the run, if another profiler is active.

    Warns:
        ProfileWarning: the run is over before these steps were reached, or before the last of them.

    >>> import pathlib, tempfile, torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(1, 1), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     hook = ft.profile(at=(2, 3), path=folder)
    ...     result = ft.fit(
    ...         ft.init(model, tx), step, [torch.ones(4, 1)] * 5, hooks=[hook], progress=False, compile=False
    ...     )
    ...     print(sorted(file.name for file in pathlib.Path(folder).iterdir()))
    ['ops_2-3.txt', 'split_2-3.json', 'trace_2-3.json']
    """
    opening = _opening(at, steps)
    folder = _folder(path)
    for name, value in (("trace", trace), ("memory", memory), ("shapes", shapes), ("stacks", stacks)):
        if not isinstance(value, bool):
            raise ArgumentError(
                explain(
                    f"ft.profile: {name}= is a bool.", expected="True or False", got=repr(value), fix=f"{name}=True"
                )
            )
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise LimitError(
            explain("ft.profile: rows= is a count.", expected="an integer >= 1", got=repr(rows), fix="rows=40")
        )
    run = _Run(opening, folder, _Wishes(trace, memory, shapes, stacks, rows))
    # First what closes: where the next steps follow on the last ones, they are begun at the same event.
    return compose(on((_Closing(run), "end", "exception"), run.close), on(_Opening(run, run.window), run.open))


@dataclass(frozen=True)
class _Wishes:
    trace: bool
    memory: bool
    shapes: bool
    stacks: bool
    rows: int


@dataclass(frozen=True)
class _Window:
    """Steps to look at: given ones, or so many after each time that a cadence fires."""

    given: Steps | None
    cadence: Cadence | None
    count: int

    def __str__(self) -> str:
        if self.given is not None:
            return f"steps {self.given[0]} to {self.given[1]}"
        return f"{self.count} step{'' if self.count == 1 else 's'} after {self.cadence!r}"


@dataclass
class _Run:
    """What is open, and what was seen in this run: effects on the process, so no part of the state."""

    window: _Window
    folder: Path
    wishes: _Wishes
    opened: _Open | None = None
    seen: bool = False

    def open(self, state: TrainState, event: Event) -> TrainState:
        steps = event.clock.steps
        last = steps + self.window.count if self.window.given is None else self.window.given[1]
        if torch._C._autograd._profiler_enabled():
            raise HookError(
                explain(
                    "ft.profile: another profiler is active, and there can be one only.",
                    where=f"after step {steps}",
                    cause="ft.fit inside of torch.profiler.profile, or two ft.profile hooks whose steps overlap",
                    fix="take one of them away, or give them other steps: at=(20, 23)",
                )
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.opened = _Open.begin((steps + 1, last), state.device, self.wishes)
        return state

    def close(self, state: TrainState, event: Event) -> TrainState:
        opened, self.opened = self.opened, None
        steps = event.clock.steps
        if opened is not None:
            done = steps - opened.steps[0] + 1
            self.seen = self.seen or done > 0
            name = f"{opened.steps[0]}-{max(steps, opened.steps[0])}"
            wanted = done > 0 or event.kind == "exception"
            opened.end(self.folder / f"memory_{name}.pickle" if wanted else None)
            if wanted:
                opened.write(self.folder, name, event)
            if event.kind == "end" and done > 0 and steps < opened.steps[1]:
                _warn(f"the run was over after step {steps}, so only {done} of {self._planned(opened)} were profiled")
        if event.kind in ("end", "exception"):
            missed = event.kind == "end" and not self.seen
            # A run that goes on behind these steps: the process before this one has seen them.
            behind = self.window.given is not None and steps >= self.window.given[1]
            self.seen = False
            if missed and not behind:
                _warn(f"nothing was profiled: the run was over after step {steps}, before {self.window}")
        return state

    def _planned(self, opened: _Open) -> str:
        return f"{opened.steps[1] - opened.steps[0] + 1} steps ({opened.steps[0]} to {opened.steps[1]})"


def _warn(what: str) -> None:
    warnings.warn(
        explain(f"ft.profile: {what}.", expected="steps within the run", fix="ft.profile(at=(2, 3))"),
        ProfileWarning,
        stacklevel=3,
    )


@dataclass(frozen=True)
class _Opening(Cadence):
    """The end of the step before the steps to look at, or, in a run that goes on among them, as soon as can be."""

    run: _Run
    window: _Window

    def fires(self, before: Clock | None, now: Clock) -> bool:
        if self.run.opened is not None:
            # What closes at this event comes first.
            return now.steps >= self.run.opened.steps[1] and self._due(before, now)
        return self._due(before, now)

    def _due(self, before: Clock | None, now: Clock) -> bool:
        if self.window.cadence is not None:
            return self.window.cadence.fires(before, now)
        assert self.window.given is not None, "one of both"
        first, last = self.window.given
        return not self.run.seen and self.run.opened is None and first - 1 <= now.steps < last

    def moments(self, now: Clock) -> list[Moment]:
        if self.window.cadence is not None:
            return self.window.cadence.moments(now)
        assert self.window.given is not None, "one of both"
        first, last = self.window.given
        return [] if self.run.seen or now.steps >= last else [Moment(max(first - 1, now.steps + 1))]

    def bound(self, length: int | None, tokens: bool, what: str) -> Cadence:
        if self.window.cadence is None:
            return self
        bound = self.window.cadence.bound(length, tokens, what)
        return _Opening(self.run, _Window(None, bound, self.window.count))

    def __repr__(self) -> str:
        return f"before {self.window}"


@dataclass(frozen=True)
class _Closing(Cadence):
    """The end of the last step that is looked at."""

    run: _Run

    def fires(self, before: Clock | None, now: Clock) -> bool:
        return self.run.opened is not None and now.steps >= self.run.opened.steps[1]

    def moments(self, now: Clock) -> list[Moment]:
        return [] if self.run.opened is None else [Moment(self.run.opened.steps[1])]

    def __repr__(self) -> str:
        return "the end of what is profiled"


@dataclass
class _Open:
    """A profiler that runs, and what goes with it."""

    steps: Steps
    device: torch.device
    wishes: _Wishes
    profiler: Any
    around: ExitStack
    spans: _Spans
    began: float
    split: Split = field(default_factory=lambda: Split({}))

    @classmethod
    def begin(cls, steps: Steps, device: torch.device, wishes: _Wishes) -> _Open:
        cuda = device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        profiler = torch.profiler.profile(
            activities=activities,
            record_shapes=wishes.shapes,
            profile_memory=wishes.memory,
            with_stack=wishes.stacks,
        )
        with ExitStack() as stack:
            if cuda:
                torch.cuda.synchronize(device)  # sync: what came before is none of these steps
            if wishes.memory and cuda:
                stack.enter_context(_allocations())
            spans = _Spans()
            stack.enter_context(_listening(spans))
            profiler.start()
            stack.callback(profiler.stop)
            return cls(steps, device, wishes, profiler, stack.pop_all(), spans, perf_counter())

    def end(self, snapshot: Path | None) -> None:
        """Stop everything, and put back what was there; the snapshot of CUDA's memory has to be made before that."""
        with self.around:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # sync: what the steps began is theirs
            now = perf_counter()
            self.split = self.spans.taken(now - self.began, now)
            if self.wishes.memory and self.device.type == "cuda" and snapshot is not None:
                torch.cuda.memory._dump_snapshot(str(snapshot))  # type: ignore[no-untyped-call]  # torch has no types for it

    def write(self, folder: Path, name: str, event: Event) -> None:
        """The files, but for the snapshot."""
        cuda, wishes = self.device.type == "cuda", self.wishes
        averages = self.profiler.key_averages(group_by_input_shape=wishes.shapes)
        sort = "self_device_time_total" if cuda else "self_cpu_time_total"
        (folder / f"ops_{name}.txt").write_text(averages.table(sort_by=sort, row_limit=wishes.rows) + "\n")
        about = {
            "first": self.steps[0],
            "complete": max(0, event.clock.steps - self.steps[0] + 1),
            "seconds": self.split.total,
            "parts": dict(self.split.seconds),
            "error": None if event.error is None else repr(event.error),
        }
        (folder / f"split_{name}.json").write_text(json.dumps(about, indent=2) + "\n")
        if wishes.trace:
            self.profiler.export_chrome_trace(str(folder / f"trace_{name}.json"))
        if wishes.memory and not cuda:
            table = averages.table(sort_by="self_cpu_memory_usage", row_limit=wishes.rows)
            (folder / f"memory_{name}.txt").write_text(table + "\n")


class _Spans:
    """Seconds by part, and ranges in the trace: of what lies in another part, the range alone."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(("data", "step", *PARTS), 0.0)
        self._open: list[tuple[str, float]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        # A hook or a sink may stop a profiler, as `ft.profile` itself does: see ftrain/data/spans.py.
        named = nullcontext() if part in ("hooks", "sinks") else record_function(f"ftrain: {part}")
        self._open.append((part, perf_counter()))
        try:
            with named:
                yield
        finally:
            _, began = self._open.pop()
            if not self._open:
                self._seconds[part] += perf_counter() - began

    def step(self, step: Any, state: TrainState, batch: Batch) -> Any:
        """A watcher of steps; those of an evaluation lie within it, and so count to it."""
        with self("step"):
            return step(state, batch)

    def taken(self, total: float, now: float) -> Split:
        """The split of so many seconds, which end within a part perhaps."""
        found = dict(self._seconds)
        if self._open:
            part, began = self._open[0]
            found[part] += now - began
        found["other"] = max(0.0, total - sum(found.values()))
        return Split(found)


@contextmanager
def _listening(spans: _Spans) -> Iterator[None]:
    token = LISTENER.set(spans)
    try:
        with watching(spans.step):
            yield
    finally:
        LISTENER.reset(token)


@contextmanager
def _allocations() -> Iterator[None]:
    """Context in which CUDA's allocations are recorded; where somebody else has them recorded, they go on to be."""
    recorded = getattr(torch._C, "_cuda_isHistoryEnabled", lambda: False)()
    if recorded:
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=200_000)
    try:
        yield
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def _opening(at: object, steps: object) -> _Window:
    whole = isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1
    if steps is not None and not whole:
        raise LimitError(
            explain(
                f"ft.profile: steps={steps!r} makes no sense.",
                expected="an integer >= 1",
                got=repr(steps),
                fix="steps=3",
            )
        )
    count = int(steps) if isinstance(steps, int) else 1
    if isinstance(at, Cadence):
        return _Window(None, at, count)
    given: Any = at if isinstance(at, tuple) else (at,)
    right = len(given) == (2 if isinstance(at, tuple) else 1) and all(
        isinstance(n, int) and not isinstance(n, bool) for n in given
    )
    numbers = (given[0], given[1] if len(given) == 2 else given[0] + count - 1) if right else ()
    if not numbers or not 1 <= numbers[0] <= numbers[1]:
        raise LimitError(
            explain(
                f"ft.profile: at={at!r} makes no sense.",
                expected="the first and the last step, from 1 on; one step; or a cadence",
                got=repr(at),
                cause="the first step is step 1" if numbers and numbers[0] == 0 else None,
                fix="ft.profile(at=(10, 13))",
            )
        )
    if isinstance(at, tuple) and steps is not None:
        raise LimitError(
            explain(
                "ft.profile: steps= goes with one step or a cadence, not with a first and a last one.",
                got=f"at={at!r}, steps={steps!r}",
                fix=f"ft.profile(at={at[0]}, steps={steps})",
            )
        )
    return _Window((numbers[0], numbers[1]), None, numbers[1] - numbers[0] + 1)


def _folder(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)) or (Path(path).exists() and not Path(path).is_dir()):
        raise ArgumentError(
            explain(
                f"ft.profile: path={path!r} is no folder.",
                expected="a folder, or nothing yet",
                got="a file" if isinstance(path, (str, os.PathLike)) else type(path).__name__,
                fix='path="profile"',
            )
        )
    return Path(path).absolute()  # the process may change its folder
