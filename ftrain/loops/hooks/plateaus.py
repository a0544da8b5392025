"""Lower the learning rate when a metric no longer gets better.

The rule is that of `torch.optim.lr_scheduler.ReduceLROnPlateau`, value by value. Its memory lies in the state, so it is in a
checkpoint like everything else, and nothing is read from the device: whether to lower the rate is decided by a `where`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...errors import LimitError, explain
from ...state import TrainState
from ..events import Event, Hook, compose, on
from .hyper import check_injected, replace_hyper
from .monitors import (
    check_choice,
    check_evaluator,
    check_names,
    check_numbers,
    check_seen,
    check_start,
    named,
    step_metric,
    value_of,
    weighed,
)

__all__ = ["plateau"]

Memory = dict[str, Tensor]


def plateau(
    monitor: str,
    *,
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: str = "rel",
    cooldown: int = 0,
    min_lr: float = 0.0,
    eps: float = 1e-8,
    mode: str = "min",
    name: str = "plateau",
    hyper: str = "lr",
) -> Any:
    """A hook that multiplies the injected learning rate by `factor` when a metric has stopped getting better.

    At each evaluation that gives the metric m, with b the best so far (for `mode="min"`): m is better if
    `m < b (1 - threshold)` (rel) or `m < b - threshold` (abs). After more than `patience` evaluations in a row that are not
    better, those of a cooldown left out, every injected `hyper` becomes `max(factor * hyper, min_lr)`, unless it would change by
    less than `eps`. NaN is not better.

    Args:
        monitor: `"val/loss"`, an evaluator's metric, at each of its evaluations; or `"loss"`, a metric of the step: its mean over the
            epoch, at the end of each.
        factor: by which it is multiplied, in (0, 1).
        patience: how many evaluations without a better value are borne.
        threshold: how much better is better.
        threshold_mode: `"rel"` (a part of the best value) or `"abs"`.
        cooldown: how many evaluations after a reduction are not counted.
        min_lr: what it does not fall below.
        eps: changes that are not larger are not made.
        mode: `"min"` if less is better, `"max"` if more is.
        name: of the memory in `state.extra`; give each of several hooks its own.
        hyper: the injected hyper-parameter, in every group that has it.

    Returns:
        A hook for `ft.fit(..., hooks=[...])`. Its memory: `best` float64 (), `bad`, `cooldown` and `seen` int64 ().

    Raises:
        LimitError: now, if an argument makes no sense.
        HookError: when the run starts, if the state has no such injected hyper-parameter or a schedule sets it, or the run no such
            evaluator; at the first evaluation by the evaluator, or the first step, that lacks the metric. One that never ran is said
            in a warning at the end.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(1, 1), ft.optim.inject(ft.optim.sgd)(lr=0.1)
    >>> def loss_fn(model, batch):
    ...     return model(batch).square().mean() * 0.0 + 1.0  # never gets better
    >>> step, data = ft.train_step(model, loss_fn, tx), [torch.ones(2, 1)]
    >>> val = ft.Evaluator(ft.eval_step(model, lambda model, batch: {"loss": model(batch).mean() * 0.0}), data)
    >>> hook = ft.hooks.plateau("val/loss", factor=0.5, patience=2)
    >>> result = ft.fit(
    ...     ft.init(model, tx), step, data, epochs=4, evals={"val": val}, hooks=[hook], progress=False, compile=False
    ... )
    >>> result.state.opt.hyper["lr"]
    tensor(0.0500, dtype=torch.float64)
    """
    check_names("plateau", monitor=monitor, name=name, hyper=hyper)
    check_choice("plateau", "mode", mode, "min", "max")
    check_choice("plateau", "threshold_mode", threshold_mode, "rel", "abs")
    _check_factor(factor)
    check_numbers("plateau", patience=patience, cooldown=cooldown)
    check_numbers("plateau", whole=False, threshold=threshold, min_lr=min_lr, eps=eps)
    sign = 1.0 if mode == "min" else -1.0
    who = named("plateau", monitor)

    def init(state: TrainState) -> Memory:
        check_injected(state.opt, hyper, who)
        zero = torch.zeros((), dtype=torch.int64, device=state.device)
        best = torch.full((), sign * math.inf, dtype=torch.float64, device=state.device)
        memory = {"best": best, "bad": zero, "cooldown": zero.clone(), "seen": zero.clone()}
        sums = {name: torch.zeros_like(best) for name in ("total", "weight")}
        return memory if "/" in monitor else {**memory, **sums}

    def better(value: Tensor, best: Tensor) -> Tensor:
        margin = best * (1.0 - sign * threshold) if threshold_mode == "rel" else best - sign * threshold
        return value < margin if mode == "min" else value > margin

    def observe(state: TrainState, memory: Memory, value: Tensor) -> tuple[TrainState, Memory]:
        improved = better(value, memory["best"])
        cooling = memory["cooldown"] > 0
        bad = torch.where(improved | cooling, 0, memory["bad"] + 1)
        left = torch.where(cooling, memory["cooldown"] - 1, memory["cooldown"])
        fires = bad > patience

        def lower(old: Tensor) -> Tensor:
            new = (old * factor).clamp(min=min_lr)
            return torch.where(fires & (old - new > eps), new, old)

        new = {
            **memory,
            "best": torch.where(improved, value, memory["best"]),
            "bad": torch.where(fires, 0, bad),
            "cooldown": torch.where(fires, cooldown, left),
            "seen": torch.ones_like(memory["seen"]),
        }
        return state.replace(opt=replace_hyper(state.opt, hyper, lower)), new

    def update(state: TrainState, memory: Memory, event: Event) -> tuple[TrainState, Memory]:
        if event.kind == "start":
            check_injected(state.opt, hyper, who)  # again: a state that goes on has its memory already
            check_start("plateau", monitor, event, who)
        elif event.kind == "evaluation":
            if monitor in event.metrics:
                return observe(state, memory, value_of(event.metrics[monitor], state.device, who))
            check_evaluator("plateau", monitor, event, who)
        elif event.kind == "end":
            check_seen("plateau", monitor, lambda: bool(memory["seen"] > 0), event, who)  # sync: one read, at the end
        return state, memory

    if "/" in monitor:
        return on(("start", "evaluation", "end"), Hook(name, init, update))

    def add(state: TrainState, memory: Memory, event: Event) -> tuple[TrainState, Memory]:
        if event.kind == "start":
            check_injected(state.opt, hyper, who)
            return state, memory
        total, weight = weighed(step_metric("plateau", monitor, event, who), state.device, who)
        return state, {**memory, "total": memory["total"] + total, "weight": memory["weight"] + weight}

    def look(state: TrainState, event: Event) -> TrainState:
        memory = state.extra[name]
        # An epoch in which no step counted has no mean: NaN, which is not better.
        new, after = observe(state, memory, memory["total"] / memory["weight"])
        fresh = {**after, "total": torch.zeros_like(after["total"]), "weight": torch.zeros_like(after["weight"])}
        return new.replace(extra={**new.extra, name: fresh})

    look.__name__ = name
    return compose(on(("start", "step"), Hook(name, init, add)), on("epoch", look))


def _check_factor(factor: object) -> None:
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < 1:
        raise LimitError(
            explain(
                f"ft.hooks.plateau: factor={factor!r} makes nothing smaller.",
                expected="0 < factor < 1",
                got=repr(factor),
                fix="factor=0.1",
            )
        )
