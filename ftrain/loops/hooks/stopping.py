"""Stop a run when a metric no longer gets better, is good enough, diverges, or is not finite.

An evaluator's metric is looked at when it is evaluated. One of training is summed up on the device, in the hook's memory, and
looked at when a cadence fires; there is no look, and no transfer, in between.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...errors import LimitError, explain
from ...state import TrainState
from ..cadences import Cadence
from ..events import Event, Hook, Outcome, compose, on
from .monitors import (
    check_choice,
    check_evaluator,
    check_every,
    check_names,
    check_numbers,
    check_seen,
    check_start,
    named,
    step_metric,
    value_of,
    weighed,
)

__all__ = ["early_stop"]

Memory = dict[str, Tensor]
_HOOK = "early_stop"


def early_stop(
    monitor: str,
    *,
    patience: int = 3,
    min_delta: float = 0.0,
    mode: str = "min",
    stop_at: float | None = None,
    diverged_at: float | None = None,
    finite: bool = True,
    every: Cadence | None = None,
    name: str = _HOOK,
) -> Any:
    """A hook that ends the run, with a reason that says why.

    At each look at the metric m, with b the best so far (for `mode="min"`), the run ends at the first of these that holds:
    m is not finite; `m <= stop_at`; `m >= diverged_at`; and m was not better in `patience` looks in a row, where better means
    `m < b - min_delta`. NaN is not better.

    Args:
        monitor: `"val/loss"`: what the evaluator `val` gives, looked at whenever it is evaluated. A name without a `/`, as `"loss"`: the
            mean of that metric of training over the steps since the last look, each with its weight.
        patience: after how many looks in a row without a better value the run ends.
        min_delta: how much better is better, in units of the metric.
        mode: `"min"` if less is better, `"max"` if more is (then all of the above is mirrored).
        stop_at: end as soon as the metric is at least this good; None: never.
        diverged_at: end as soon as it is this bad; None: never.
        finite: end when the metric is NaN or infinite.
        every: when to look at a metric of training; default: at the end of each epoch.
        name: of the memory in `state.extra`; give each of several hooks its own.

    Returns:
        A hook for `ft.fit(..., hooks=[...])`. Its memory: `best` float64 (); `bad`, how many looks since, and `seen`, how many in all,
        int64 (); for a metric of training, `total` and `weight` since the last look, float64 ().

    Raises:
        LimitError: now, if an argument makes no sense.
        HookError: when the run starts, if it has no such evaluator; at the first evaluation by the evaluator, or the first step,
            that lacks the metric. An evaluator that never ran is said in a warning at the end.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(1, 1), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).mean() * 0.0 + 1.0, tx)  # never gets better
    >>> hook = ft.hooks.early_stop("loss", patience=2)
    >>> data = [torch.ones(2, 1)]
    >>> ft.fit(ft.init(model, tx), step, data, epochs=9, hooks=[hook], progress=False, compile=False).reason
    'early_stop: loss did not get better than 1 in 2 epochs'
    """
    check_names(_HOOK, monitor=monitor, name=name)
    check_choice(_HOOK, "mode", mode, "min", "max")
    check_numbers(_HOOK, least=1, patience=patience)
    check_numbers(_HOOK, whole=False, min_delta=min_delta)
    check_every(_HOOK, every)
    sign = 1.0 if mode == "min" else -1.0
    _check_thresholds(sign, stop_at, diverged_at)
    who, evaluated = named(_HOOK, monitor), "/" in monitor
    if evaluated and every is not None:
        raise LimitError(
            explain(
                f"{who}: every= is for metrics of training.",
                expected="no every=: an evaluator's metric is looked at whenever there is a new one",
                got=f"every={every!r}",
                fix=f"ft.Evaluator(..., every={every!r})",
            )
        )
    unit = "evaluation" if evaluated else "epoch" if every is None else "look"

    def init(state: TrainState) -> Memory:
        zero = torch.zeros((), dtype=torch.float64, device=state.device)
        count = torch.zeros((), dtype=torch.int64, device=state.device)
        memory = {"best": zero + sign * math.inf, "bad": count, "seen": count.clone()}
        return memory if evaluated else {**memory, "total": zero, "weight": zero.clone()}

    def verdict(value: float, best: float, bad: int) -> str | None:
        if finite and not math.isfinite(value):
            return f"{monitor} is {value}"
        if stop_at is not None and sign * value <= sign * stop_at:
            return f"{monitor} reached {value:.6g} (stop_at={stop_at:g})"
        if diverged_at is not None and sign * value >= sign * diverged_at:
            return f"{monitor} diverged to {value:.6g} (diverged_at={diverged_at:g})"
        if bad < patience:
            return None
        margin = f" by more than {min_delta:g}" if min_delta else ""
        looks = f"{bad} {unit}{'' if bad == 1 else 's'}"
        return f"{monitor} did not get better than {best:.6g}{margin} in {looks}"

    def observe(state: TrainState, memory: Memory, value: Tensor) -> tuple[Any, Memory]:
        read = torch.stack([value, memory["best"], memory["bad"].to(torch.float64)])
        now, best, bad = read.tolist()  # sync: once per look
        better = sign * now < sign * best - min_delta
        best, bad = (now, 0) if better else (best, int(bad) + 1)
        new = {
            **memory,
            "best": torch.full_like(memory["best"], best),
            "bad": torch.full_like(memory["bad"], bad),
            "seen": memory["seen"] + 1,
        }
        why = verdict(now, best, bad)
        return (state if why is None else Outcome(state, stop=f"{name}: {why}")), new

    if evaluated:

        def update(state: TrainState, memory: Memory, event: Event) -> tuple[Any, Memory]:
            if event.kind == "start":
                check_start(_HOOK, monitor, event, who)
            elif event.kind == "end":
                check_seen(_HOOK, monitor, lambda: bool(memory["seen"] > 0), event, who)  # sync: one read, at the end
            elif monitor in event.metrics:
                return observe(state, memory, value_of(event.metrics[monitor], state.device, who))
            else:
                check_evaluator(_HOOK, monitor, event, who)
            return state, memory

        return on(("start", "evaluation", "end"), Hook(name, init, update))

    def add(state: TrainState, memory: Memory, event: Event) -> tuple[TrainState, Memory]:
        total, weight = weighed(step_metric(_HOOK, monitor, event, who), state.device, who)
        return state, {**memory, "total": memory["total"] + total, "weight": memory["weight"] + weight}

    def look(state: TrainState, event: Event) -> Any:
        memory = state.extra[name]
        if not bool(memory["weight"] > 0):  # sync: once per look; no step since the last one, or none that counts
            return state
        out, new = observe(state, memory, memory["total"] / memory["weight"])
        fresh = {**new, "total": torch.zeros_like(new["total"]), "weight": torch.zeros_like(new["weight"])}
        after = state.replace(extra={**state.extra, name: fresh})
        return out._replace(state=after) if isinstance(out, Outcome) else after

    look.__name__ = name
    return compose(on("step", Hook(name, init, add)), on("epoch" if every is None else every, look))


def _check_thresholds(sign: float, stop_at: Any, diverged_at: Any) -> None:
    for key, value in (("stop_at", stop_at), ("diverged_at", diverged_at)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise LimitError(
                explain(
                    f"ft.hooks.early_stop: {key}={value!r} is no threshold.",
                    expected="a finite number, in units of the metric",
                    got=repr(value),
                    fix=f"{key}=None   # for none"
                    if key == "stop_at"
                    else f"{key}=None   # finite=True stops at inf and NaN",
                )
            )
    if stop_at is not None and diverged_at is not None and not sign * stop_at < sign * diverged_at:
        raise LimitError(
            explain(
                "ft.hooks.early_stop: what is good enough is as bad as what has diverged.",
                expected=f"stop_at {'below' if sign > 0 else 'above'} diverged_at, with mode={'min' if sign > 0 else 'max'!r}",
                got=f"stop_at={stop_at!r}, diverged_at={diverged_at!r}",
                fix=f"mode={'max' if sign > 0 else 'min'!r}, or the two exchanged"
                if stop_at != diverged_at
                else "only one of them",
            )
        )
