"""Averaged parameters, updated inside the step: exponential moving average, and stochastic weight averaging.

The average is a sub-state in `state.extra`, so it is compiled, donated and saved like everything else. Evaluation picks it by
its name: `ft.eval_step(model, metric_fn, params="ema")`.

Law: the step inside does not see the average; parameters and metrics are those of the step alone, bitwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import LimitError, StateError, StructureError, explain
from ..optim.averaging import first_average, moved_average
from ..optim.masks import nearest, some
from ..optim.transform import nonnegative, value_at
from ..state import TrainState
from ..types import Batch, Metrics, Params, Schedule
from .grad import constants
from .regions import region
from .train import Stepped
from .wrap import check_level, check_name, step_result

__all__ = ["Average", "averaged", "with_ema", "with_swa"]


class Average(NamedTuple):
    """The sub-state of an average: `params`, `buffers` (float32 where the state's are of half precision), `count` int64 ()."""

    params: Params
    buffers: Params
    count: Tensor  # type: ignore[assignment]  # hides tuple.count


class Averaged(Stepped):
    """Made by `with_ema` and `with_swa`."""

    def __init__(
        self,
        step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
        weight: Callable[[Tensor], Tensor],
        *,
        start: int,
        every: int,
        buffers: bool,
        name: str,
    ) -> None:
        super().__init__(step, ())
        self.step = step
        self.weight, self.start, self.every, self.buffers, self.name = weight, start, every, buffers, name
        self.advances = bool(getattr(step, "advances", False))  # as the step inside does

    def __repr__(self) -> str:
        return f"with_average({self.step!r}, name={self.name!r})"

    def init(self, state: TrainState) -> TrainState:
        """The state with the average in it, and with what the step inside needs, where they are not there yet."""
        inner = getattr(self.step, "init", None)
        if inner is not None:
            state = inner(state)
        if self.name in state.extra:
            return state
        count = torch.zeros_like(state.step)
        own = Average(first_average(state.params), first_average(state.buffers), count)
        return state.replace(extra={**state.extra, self.name: own})

    def names(self) -> set[str]:
        """The names of the sub-states that the step keeps in `state.extra`."""
        return {self.name} | (self.step.names() if isinstance(self.step, Stepped) else set())

    def check(self, state: TrainState, batch: Batch | None = None) -> None:
        """Raise unless the state has the average, and suits the step inside."""
        inner = getattr(self.step, "check", None)
        if inner is not None:
            inner(state, batch)
        own = state.extra.get(self.name)
        if isinstance(own, Average) and own.params.keys() != state.params.keys():
            raise StructureError(
                explain(
                    f"the average {self.name!r} is of other parameters than those of the state.",
                    where=f"state.extra[{self.name!r}].params",
                    expected=some(list(state.params)),
                    got=some(list(own.params)),
                    cause="a state whose trainable parameters are others, with the average of the one before",
                    fix="state = step.init(state.replace(extra={}))   # a new average",
                )
            )
        if not isinstance(own, Average):
            raise StateError(
                explain(
                    f"the state has no average {self.name!r}.",
                    where=f"state.extra[{self.name!r}]",
                    expected="an Average",
                    got=f"state.extra with {', '.join(state.extra) or 'nothing'}",
                    fix="state = step.init(state)   # once, before the first step; ft.fit and ft.loop do it themselves",
                )
            )

    def check_rows(self, n: int) -> None:
        """As the step inside."""
        inner = getattr(self.step, "check_rows", None)
        if inner is not None:
            inner(n)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if not torch.compiler.is_compiling():
            if torch.is_inference_mode_enabled():  # tensors made in there could never be trained
                with torch.inference_mode(False):
                    return self(state, batch)
            self.check(state, batch)
        new, metrics = step_result(self.step(state, batch), repr(self))
        after = region(self, self._average)(new.extra[self.name], new.params, new.buffers, new.step)
        return new.replace(extra={**new.extra, self.name: after}), metrics

    def _average(self, before: Average, params: Params, buffers: Params, step: Tensor) -> Average:
        where = None
        if self.start > 1 or self.every > 1:
            where = (step >= self.start) & ((step - self.start) % self.every == 0)
        first = before.count == 0
        weight = torch.where(first, 1.0, self.weight(before.count.to(torch.float64)))
        new = moved_average(before.params, constants(params), weight, where)
        kept = moved_average(before.buffers, buffers, weight if self.buffers else torch.ones_like(weight), where)
        return Average(new, kept, before.count + (1 if where is None else where.to(torch.int64)))


def with_ema(
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    decay: float | Tensor | Schedule = 0.999,
    *,
    warmup: bool = False,
    every: int = 1,
    start: int = 0,
    buffers: bool = True,
    name: str = "ema",
) -> Averaged:
    """Keep an exponential moving average of the parameters beside them.

    Law, after the n-th average (n = 0 copies): `ema = d ema + (1 - d) params`, with `d = decay`, or with `warmup`
    `d = min(decay, (1 + n) / (10 + n))`, so that the first averages do not cling to the beginning.

    Args:
        step: a step that is not compiled yet.
        decay: d, between 0 and 1; a schedule is a function of n.
        warmup: see above.
        every: average after every so many steps.
        start: the first step after which it is averaged.
        buffers: average the floating buffers (batch-norm statistics) too; False keeps those of the last average.
        name: key in `state.extra`. `state = step.init(state)` puts the average there; `ft.fit` does it by itself.

    A step that makes no update (see `ft.with_loss_scale`) is averaged like any other, as `AveragedModel` does.

    Returns:
        A step. `ft.eval_step(model, fn, params="ema")` and `ft.to_module(model, state, params="ema")` use the average.

    Raises:
        LimitError: a decay outside of [0, 1], or times that make no sense.

    Source: Polyak & Juditsky, "Acceleration of stochastic approximation by averaging", 1992; warm-up as in TensorFlow's
    ExponentialMovingAverage; without it as `torch.optim.swa_utils.get_ema_multi_avg_fn`.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(1, 1, bias=False), ft.optim.sgd(0.1)
    >>> step = ft.with_ema(ft.train_step(model, lambda model, batch: model(batch).mean(), tx), decay=0.5)
    >>> state = step.init(ft.init(model, tx).replace(params={"weight": torch.ones(1, 1)}))
    >>> for _ in range(2):
    ...     state, metrics = step(state, torch.ones(4, 1))
    >>> state.params["weight"], state.extra["ema"].params["weight"]
    (tensor([[0.8000]]), tensor([[0.8500]]))
    """
    nonnegative(decay=decay)
    if isinstance(decay, (int, float)) and decay > 1:
        raise LimitError(
            explain(f"with_ema: decay={decay!r} is above 1.", expected="between 0 and 1", fix="decay=0.999")
        )

    def weight(n: Tensor) -> Tensor:
        d = value_at(decay, n)
        if warmup:
            ramp = (1.0 + n) / (10.0 + n)
            d = torch.minimum(ramp, d) if isinstance(d, Tensor) else ramp.clamp(max=d)
        return torch.as_tensor(1.0 - d, dtype=torch.float64, device=n.device)

    return _make("with_ema", step, weight, start=start, every=every, buffers=buffers, name=name)


def with_swa(
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    *,
    start: int,
    every: int = 1,
    buffers: bool = False,
    name: str = "swa",
) -> Averaged:
    """Keep the plain mean of the parameters after steps `start`, `start + every`, ... (stochastic weight averaging).

    Law, after n averages: `swa = swa + (params - swa) / (n + 1)`. Batch-norm statistics of averaged weights are not averages:
    re-estimate them with `ft.update_bn(model, state, data, params="swa")` before evaluating.

    Args:
        step: a step that is not compiled yet.
        start: the first step after which it is averaged.
        every: then after every so many steps, e.g. the steps of an epoch.
        buffers: average the floating buffers too; False keeps those of the last average.
        name: key in `state.extra`.

    Raises:
        LimitError: times that make no sense.

    Source: Izmailov et al., "Averaging weights leads to wider optima and better generalization", UAI 2018; as
    `torch.optim.swa_utils.AveragedModel`.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(1, 1, bias=False), ft.optim.sgd(0.1)
    >>> step = ft.with_swa(ft.train_step(model, lambda model, batch: model(batch).mean(), tx), start=2)
    >>> state = step.init(ft.init(model, tx).replace(params={"weight": torch.ones(1, 1)}))
    >>> for _ in range(3):
    ...     state, metrics = step(state, torch.ones(4, 1))
    >>> state.extra["swa"].params["weight"], state.extra["swa"].count
    (tensor([[0.7500]]), tensor(2))
    """
    return _make("with_swa", step, lambda n: 1.0 / (n + 1.0), start=start, every=every, buffers=buffers, name=name)


def _make(what: str, step: Any, weight: Any, *, start: int, every: int, buffers: bool, name: str) -> Averaged:
    check_level(step, "step", f"ft.{what}")
    check_name(name, f"ft.{what}")
    if hasattr(step, "rung"):
        raise StateError(
            explain(
                f"ft.{what} wants a step that is not compiled yet.",
                expected="a function (state, batch) -> (state, metrics)",
                got=repr(step) if callable(step) else type(step).__name__,
                fix=f"step = ft.compile(ft.{what}(step, ...))",
            )
        )
    if isinstance(step, Stepped) and name in step.names():
        raise LimitError(
            explain(
                f"ft.{what}: the step inside keeps something under the name {name!r} already.",
                where=f"state.extra[{name!r}]",
                expected="a name for each average and each loss scale",
                got=f"name={name!r} twice",
                fix=f'ft.{what}(step, ..., name="{name}_2")',
            )
        )
    for argument, value, least in (("start", start, 0), ("every", every, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise LimitError(
                explain(
                    f"ft.{what}: {argument}={value!r} makes no sense.",
                    expected=f"an integer >= {least}, in steps",
                    got=repr(value),
                    fix=f"{argument}={max(least, 1)}",
                )
            )
    return Averaged(step, weight, start=start, every=every, buffers=buffers, name=name)


def averaged(state: TrainState, name: str, what: str) -> tuple[Params, Params]:
    """The averaged parameters and buffers of a state, in the dtypes of its own.

    Raises:
        StateError: the state has no such average; those that it has are named.

    >>> import torch, ftrain as ft
    >>> from ftrain.steps.average import averaged
    >>> averaged(ft.init(torch.nn.Linear(1, 1), ft.optim.sgd(0.1)), "ema", "ft.eval_step")
    Traceback (most recent call last):
    ftrain.errors.StateError: ft.eval_step: the state has no averaged parameters 'ema'.
      expected: one of: none
      got:      params='ema'
      fix:      step = ft.with_ema(step); state = step.init(state)
    """
    own = state.extra.get(name)
    if not isinstance(own, Average):
        known = [key for key, value in state.extra.items() if isinstance(value, Average)]
        raise StateError(
            explain(
                f"{what}: the state has no averaged parameters {name!r}.",
                expected=f"one of: {', '.join(known) or 'none'}",
                got=f"params={name!r}",
                fix=f"params={nearest(name, known) or known[0]!r}"
                if known
                else "step = ft.with_ema(step); state = step.init(state)",
            )
        )
    params = {key: leaf.to(state.params[key].dtype) for key, leaf in own.params.items()}
    return params, {key: leaf.to(state.buffers[key].dtype) for key, leaf in own.buffers.items()}
