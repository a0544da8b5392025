"""One step of a run, done again: its inputs, its outputs and its gradient, to the last bit.

Laws
----
- The state after a replayed step is, bit by bit, the one that the run had after it, and the metrics are those of the run.
- Where the run recorded the loss of this very step, the two are compared, and a difference is said.
- Nothing is written to the run's folder, and the state that is passed stays as it is.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import rng, tree
from ..checkpoint.checkpoints import Checkpoints
from ..errors import ArgumentError, CheckpointError, CompileError, LimitError, ReplayWarning, explain
from ..loops.cadences import Cadence
from ..loops.evaluate import Compile, Evaluator, prepare
from ..loops.fit import fit
from ..loops.meter import Meter
from ..metrics import Metric
from ..state import TrainState, check_state
from ..steps.compile import CompiledStep
from ..steps.train import TrainStep
from ..steps.update import Update
from ..steps.watching import watching
from ..types import Batch, Metrics, Params
from .beginning import Beginning, Never

__all__ = ["Replay", "replay"]


@dataclass(frozen=True, repr=False)
class Replay:
    """A step that was done again, as a value. Its tensors are its own.

    Attributes:
        step: its number: what `state_after.step` is.
        checkpoint: the step of the checkpoint from which it was come to; None: from the state that was passed.
        state_before: the state that the step was given.
        batch: the batch that it was given, on the state's device.
        state_after: the state that it gave; hooks were not called on it yet.
        metrics: the metrics that it gave, by name.
        gradients: the gradient of the loss that the optimizer got, by parameter; None where there is none, see `note`.
        note: why there are no gradients, or None.
        recorded: the loss that the run recorded of this step; None where its records do not tell (they are means of several steps,
            or end before it).
        agrees: whether the loss is the recorded one, to the last bit; None where none was recorded.

    >>> import ftrain as ft
    >>> "gradients" in ft.inspect.Replay.__dataclass_fields__
    True
    """

    step: int
    checkpoint: int | None
    state_before: TrainState
    batch: Batch
    state_after: TrainState
    metrics: Metrics
    gradients: Params | None
    note: str | None = None
    recorded: float | None = None
    agrees: bool | None = None

    def __repr__(self) -> str:
        start = "state that was passed" if self.checkpoint is None else f"checkpoint of step {self.checkpoint}"
        lines = [f"Replay(step={self.step}, from the {start})"]
        lines += [f"  batch      {path}: {tree.describe(leaf)}" for path, leaf in tree.items(self.batch, "batch")][:8]
        numbers = ((name, _number(metric)) for name, metric in self.metrics.items())
        shown = [f"{name}={value:.6g}" for name, value in numbers if value is not None]
        lines.append(f"  metrics    {', '.join(shown) or 'none'}")
        if self.agrees is None:
            lines.append("  recorded   no loss of this step alone, so nothing was compared")
        else:
            said = "the same" if self.agrees else "another one than here"
            lines.append(f"  recorded   loss={self.recorded:.6g}, {said}")
        if self.gradients is None:
            lines.append(f"  gradients  none: {self.note}")
        else:
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in self.gradients.values()))
            lines.append(f"  gradients  {len(self.gradients)} tensors, norm {norm:.6g}")
        return "\n".join(lines)


def replay(
    checkpoints: str | os.PathLike[str] | Checkpoints,
    at: int,
    state: TrainState,
    step: Callable[[TrainState, Any], Any],
    data: Any,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    until: Cadence | None = None,
    at_least: Cadence | None = None,
    batch_size: int | None = None,
    shuffle: bool = True,
    evals: Mapping[str, Evaluator] | None = None,
    hooks: Sequence[Any] = (),
    tokens: Callable[[Any], int] | None = None,
    compile: Compile = "auto",
    backend: str | Callable[..., Any] = "inductor",
) -> Replay:
    """Do one step of a run again: from the nearest checkpoint before it, through the steps in between, to the last bit.

    Where no checkpoint lies before it, the run is done again from its first state, which is the one that is passed. Where the run
    recorded the loss of this very step (`log=ft.every(steps=1)`, and a checkpoint after it), the two losses are compared.

    Pass what was passed to `fit`, as for going on with the run. Hooks and evaluators are needed where they change the state, or
    have a memory in it; they are called again, and those with effects have them again. Sinks are not called, and nothing is written
    to the folder, in which the run may be going on meanwhile. Where a hook went by the time of day, the steps after it may differ; where
    one went back to an earlier state, the step is the first of this number after the checkpoint.

    Args:
        checkpoints: the folder of the run's checkpoints, or the `ft.Checkpoints` that it was given.
        at: which step, as `state.step` counts: the one after which it is `at`.
        state: as given to `fit`; only its form and seed are looked at, unless no checkpoint lies before the step.
        step: as given to `fit`.
        data: as given to `fit`.
        epochs: limit of the run, as the next two; with none of them, also a step after its end can be tried.
        steps: as `epochs`.
        until: as `epochs`.
        at_least: as given to `fit`.
        batch_size: as given to `fit`.
        shuffle: as given to `fit`.
        evals: as given to `fit`.
        hooks: as given to `fit`.
        tokens: as given to `fit`.
        compile: as given to `fit`; otherwise the roundings are others.
        backend: as given to `fit`.

    Returns:
        A `Replay`. It takes the memory of three states, and of one gradient.

    Raises:
        CheckpointError: neither a checkpoint nor the state that is passed lies before the step, or the checkpoint is damaged.
        RestoreError: the checkpoint is of another model, optimizer, seed or data (the differences are listed), or the state is not
            the one with which the run began.
        LimitError: the run ends before this step, or `at` is no step.

    Warns:
        ReplayWarning: the loss is not the one that the run recorded, or its records cannot be read.

    >>> import tempfile, torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(2, 1), ft.optim.adam(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> state, data = ft.init(model, tx, seed=0), torch.linspace(-1, 1, 40).reshape(20, 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ckpt = ft.Checkpoints(folder, every=ft.every(steps=2), keep=None)
    ...     result = ft.fit(
    ...         state, step, data, batch_size=4, log=ft.every(steps=1), checkpoint=ckpt, progress=False, compile=False
    ...     )
    ...     found = ft.replay(folder, 4, state, step, data, batch_size=4, compile=False)
    >>> found.checkpoint, found.state_before.step, found.batch.shape, sorted(found.gradients)
    (2, tensor(3), torch.Size([4, 2]), ['bias', 'weight'])
    >>> float(found.metrics["loss"].compute()) == found.recorded == float(result.history["loss"][3]), found.agrees
    (True, True)
    """
    check_state(state, "ft.replay")
    path = _path(checkpoints)
    if isinstance(at, bool) or not isinstance(at, int) or at < 1:
        raise LimitError(
            explain(f"ft.replay: at={at!r} is no step.", expected="an integer >= 1, as state.step counts", got=repr(at))
        )
    compiled = prepare(step, compile, donate=True, backend=backend, what="ft.replay")
    place = Beginning(path, at, state.counters().step)
    first = True

    def watcher(called: Any, state: TrainState, batch: Batch) -> Any:
        nonlocal first
        if called is not compiled:
            return called(state, batch)
        step = state.counters().step
        if first:  # hooks at the start may have set the count
            place.check_first(step)
            first = False
        if step != at - 1:
            return called(state, batch)
        before, given = state.copy(), tree.map(torch.clone, batch)
        raise _Reached(before, given, *called(state, batch))

    limited = not (epochs is None and steps is None and until is None)
    try:
        with watching(watcher):
            result = fit(
                state,
                compiled,
                data,
                epochs=epochs,
                steps=steps,
                until=until if limited else Never(),
                at_least=at_least,
                batch_size=batch_size,
                shuffle=shuffle,
                evals=evals,
                hooks=hooks,
                tokens=tokens,
                progress=False,
                compile=compile,
                backend=backend,
                checkpoint=place,
                resume=place.step,
                signals=False,
            )
    except _Reached as reached:
        before, given, after, metrics = reached.found
    else:
        end = result.state.counters().step
        raise LimitError(
            explain(
                f"ft.replay: the run ends before step {at}.",
                expected=f"a step up to {end}"
                if place.step is None
                else f"a step after {place.step}, the nearest checkpoint, and not after {end}",
                got=f"its end after step {end}: {result.reason}",
            )
        )
    gradients, note = _gradients(compiled, before, given, metrics)
    recorded, agrees = _compared(place, at, metrics)
    return Replay(at, place.step, before, given, after, metrics, gradients, note, recorded, agrees)


class _Reached(Exception):
    """The step was done: what it was given, and what it gave."""

    def __init__(self, before: TrainState, batch: Batch, after: TrainState, metrics: Metrics) -> None:
        super().__init__("ft.replay has what it wants, and ends this run here.")
        self.found = before, batch, after, {name: metrics[name] for name in metrics}


def _path(checkpoints: object) -> str:
    if isinstance(checkpoints, Checkpoints):
        return os.fspath(checkpoints.path)
    if isinstance(checkpoints, (str, os.PathLike)):
        return os.fspath(checkpoints)
    raise ArgumentError(
        explain(
            "ft.replay wants the checkpoints of a run as its first argument.",
            expected="a path, or ft.Checkpoints(path)",
            got=type(checkpoints).__name__,
            fix='ft.replay("run/ckpt", 123, state, step, data)',
        )
    )


# -- the records ----------------------------------------------------------------------------------------------------------------


def _compared(place: Beginning, at: int, metrics: Metrics) -> tuple[float | None, bool | None]:
    """The loss that the run recorded of this step, and whether it is the replayed one; None where that cannot be told."""
    try:
        recorded = place.recorded(at)
    except CheckpointError as error:
        said = str(error).splitlines()
        cause = "\n".join(line.strip() for line in said[1:] if line.strip().startswith(("where:", "got:")))
        text = explain(f"ft.replay: the loss of step {at} was compared with nothing: {said[0]}", cause=cause or None)
        warnings.warn(text, ReplayWarning, stacklevel=3)
        return None, None
    if recorded is None or "loss" not in metrics:
        return None, None
    meter = Meter()  # in which a record's numbers come into being, so that equal means equal to the last bit
    meter.add({"loss": metrics["loss"]})
    now = meter.fetch()["loss"]
    if not isinstance(now, float):
        return None, None
    if now == recorded or (math.isnan(now) and math.isnan(recorded)):
        return recorded, True
    causes = [
        "other data, or another step, model or hyper-parameter than in the run",
        "other settings of compile= or backend=, another device, or another version of torch",
        "hooks or evaluators that are missing here; a hook that goes by the clock, that goes back, or that tells a loss of its own",
    ]
    if place.step is None:
        causes.append("another first state")
    warnings.warn(
        explain(
            f"ft.replay: step {at} does not come out as it was recorded.",
            where=place.path,
            expected=f"loss {recorded!r}, as in the records of the run",
            got=f"loss {now!r}",
            cause="\n".join(causes),
            fix="ft.replay(path, at, state, step, data, **config)   # what was given to ft.fit",
        ),
        ReplayWarning,
        stacklevel=3,
    )
    return recorded, False


# -- the gradient -------------------------------------------------------------------------------------------------------------


class _Gradient:
    """`(state, batch) -> {"grads", "loss"}`: what a step's update is made of, under the step's key; compiled like a step."""

    def __init__(self, update: Update) -> None:
        self._update = update

    def __call__(self, state: TrainState, batch: Batch) -> dict[str, Any]:
        params, given = self._update.arguments(state)
        grads, loss, (metrics, _) = self._update.grad_fn(params, given, batch, rng.fold_in(state.seed, state.step))
        return {"grads": grads, "loss": metrics.get("loss", loss)}


def _gradients(
    compiled: CompiledStep, before: TrainState, batch: Batch, metrics: Metrics
) -> tuple[Params | None, str | None]:
    """The gradient of a step, computed on the rung that the step runs on; or why there is none."""
    inner: Any = compiled.step
    while not isinstance(inner, TrainStep) and hasattr(
        inner, "step"
    ):  # averages, masks, guards: they act after the update
        inner = inner.step
    if not isinstance(inner, TrainStep):
        return None, f"{inner!r} is a step written by hand, which has no single gradient"
    alone = CompiledStep(
        _Gradient(inner.update),
        donate=False,
        rung=compiled.rung or "eager",
        compiler=compiled._compiler,
        dynamic=compiled._dynamic,
    )
    try:
        found = alone(before, batch)
    except CompileError as error:
        return None, f"the gradient does not compile by itself: {str(error).splitlines()[0]}"
    # Inductor numbers the random operations of a graph, so another graph may draw other numbers from the same seed.
    if compiled._random and not _same_loss(found["loss"], metrics.get("loss")):
        return None, (
            "in a graph of its own it draws other random numbers than the compiled step does; "
            "it is there with compile=False, for a run made so"
        )
    return {name: grad.detach().clone() for name, grad in found["grads"].items()}, None


def _same_loss(one: Metric | None, other: Metric | None) -> bool:
    """Whether two losses are the same up to the roundings of two programs; no, where that cannot be told."""
    a, b = (None if metric is None else _number(metric) for metric in (one, other))
    return a is not None and b is not None and math.isclose(a, b, rel_tol=1e-3)


def _number(metric: Any) -> float | None:
    value = metric.compute() if isinstance(metric, Metric) else metric
    return float(value) if isinstance(value, Tensor) and value.numel() == 1 else None
