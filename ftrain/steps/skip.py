"""Steps that are skipped inside the graph: where the loss spikes, or something is not finite, the state stays as it was.

Laws
----
- Where nothing is skipped, parameters, buffers, optimizer state and metrics are bitwise those of the step inside.
- After a step that was skipped all leaves but the counters `step` and `samples`, and the counts of this wrapper, are bitwise as before.
- The host is never asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..errors import ArgumentError, LimitError, MetricError, StateError, explain
from ..metrics import Last, Metric, normalise
from ..optim.guard import all_finite, select
from ..state import TrainState
from ..types import Batch, Metrics
from .regions import region
from .spikes import Rule, Watch, enter, first_watch, judge, make_rule
from .train import Stepped
from .wrap import check_level, check_name, step_result

__all__ = ["Skips", "with_skip"]


class Skips(NamedTuple):
    """The sub-state of `with_skip`: the statistic `watch`; `skipped` and `row` int64 (), skipped in all, and the last ones in a row."""

    watch: Watch
    skipped: Tensor
    row: Tensor


class Skipping(Stepped):
    """Made by `with_skip`."""

    def __init__(
        self,
        step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
        rule: Rule,
        *,
        monitor: str,
        limit: int,
        name: str,
    ) -> None:
        super().__init__(step, ())
        self.step = step
        self.rule, self.monitor, self.limit, self.name = rule, monitor, limit, name
        self.count = "skipped" if name == "skip" else f"skipped/{name}"
        self.advances = bool(getattr(step, "advances", False))  # as the step inside does

    def __repr__(self) -> str:
        return f"with_skip({self.step!r}, monitor={self.monitor!r})"

    def init(self, state: TrainState) -> TrainState:
        """The state with the sub-states of this wrapper and of the step inside, where they are not there yet."""
        inner = getattr(self.step, "init", None)
        if inner is not None:
            state = inner(state)
        if self.name in state.extra:
            return state
        zero = torch.zeros((), dtype=torch.int64, device=state.device)
        own = Skips(first_watch(self.rule, state.device), zero, zero.clone())
        return state.replace(extra={**state.extra, self.name: own})

    def names(self) -> set[str]:
        """The names of the sub-states that the step keeps in `state.extra`."""
        return {self.name} | (self.step.names() if isinstance(self.step, Stepped) else set())

    def check(self, state: TrainState, batch: Batch | None = None) -> None:
        """Raise unless the state has this wrapper's sub-state, and suits the step inside."""
        inner = getattr(self.step, "check", None)
        if inner is not None:
            inner(state, batch)
        own = state.extra.get(self.name)
        if not isinstance(own, Skips) or own.watch.values.shape != (self.rule.window,):
            raise StateError(
                explain(
                    f"the state has no statistic {self.name!r} of {self.rule.window} values.",
                    where=f"state.extra[{self.name!r}]",
                    expected=f"the sub-state of ft.with_skip(..., window={self.rule.window})",
                    got=f"one of {own.watch.values.numel()} values"
                    if isinstance(own, Skips)
                    else f"state.extra with {', '.join(state.extra) or 'nothing'}",
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
        new, found = step_result(self.step(state, batch), repr(self))
        metrics = normalise(found, None, "the metrics that the step returned")
        value = _value(metrics, self.monitor, self.count)
        before, after = _moved(state, self.name), _moved(new, self.name)
        kept, own, told = region(self, self._choose)(before, after, state.extra[self.name], value, metrics)
        extra = {**kept.pop("extra"), self.name: own}
        counted = Last(own.skipped.to(value.dtype), torch.ones_like(value))
        return new.replace(**kept, extra=extra), {**told, self.count: counted}

    def _choose(
        self, old: dict[str, Any], new: dict[str, Any], own: Skips, value: Tensor, metrics: dict[str, Metric]
    ) -> tuple[dict[str, Any], Skips, dict[str, Metric]]:
        """What the step made, or what there was before; the statistic and counts; and the metrics, which count nothing if skipped."""
        wide = value.detach().to(torch.float64)
        watch, spike = own.watch, judge(self.rule, own.watch, wide).bad
        whole = _finite(new, old, wide)
        finite = torch.isfinite(wide) & whole if self.rule.nonfinite else torch.ones_like(spike)
        # So many in a row are no spike: there the values lie now. The statistic begins anew, and the step is made.
        level = spike & finite & (own.row >= self.limit)
        good = (finite & ~spike) | level
        watch = select(level, Watch(torch.zeros_like(watch.values), torch.zeros_like(watch.seen)), watch)
        skip = (~good).to(torch.int64)
        after = Skips(enter(watch, wide, good), own.skipped + skip, (own.row + 1) * skip)
        return select(good, new, old), after, {name: _where(good, metric) for name, metric in metrics.items()}


def _moved(state: TrainState, name: str) -> dict[str, Any]:
    """What a step may change, its counters left out."""
    extra = {key: value for key, value in state.extra.items() if key != name}
    return {
        "params": state.params,
        "frozen": state.frozen,
        "buffers": state.buffers,
        "opt": state.opt,
        "extra": extra,
    }


def _finite(new: dict[str, Any], old: dict[str, Any], like: Tensor) -> Tensor:
    """Whether what the step made is finite: bool (). Where inf is at home (in a mask among the buffers), it is no bad sign."""
    found = torch.ones_like(like, dtype=torch.bool)
    for part in ("params", "frozen", "buffers", "opt"):
        pairs = [(a, b) for a, b in zip(tree.leaves(new[part]), tree.leaves(old[part]), strict=True) if a is not b]
        for device in dict.fromkeys(a.device for a, _ in pairs):  # an optimizer of torch keeps some leaves on the CPU
            after, before = zip(*[pair for pair in pairs if pair[0].device == device], strict=True)
            fine = all_finite(after) if part == "params" else all_finite(after) | ~all_finite(before)
            found = found & fine.to(like.device)
    return found


def _where(good: Tensor, metric: Metric) -> Metric:
    """The metric, or the neutral one of its kind; what holds more than numbers (`Collect`) stays."""
    kind, neutral = type(metric), type(metric).empty()
    fields = [(getattr(metric, key), getattr(neutral, key)) for key in tree.fields(kind)]
    if not all(isinstance(one, (Tensor, int, float)) for pair in fields for one in pair):
        return metric
    return kind(*[_either(good, own, none) for own, none in fields])


def _either(good: Tensor, own: Any, none: Any) -> Tensor:
    if not isinstance(own, Tensor):
        own = torch.full((), float(own), dtype=torch.float64, device=good.device)
    if not own.is_floating_point() and isinstance(none, float) and math.isfinite(none):
        none = int(none)  # else a count would become a float
    return torch.where(good, own, none)


def _value(metrics: Mapping[str, Metric], monitor: str, count: str) -> Tensor:
    if monitor not in metrics or count in metrics:
        twice = monitor in metrics
        raise MetricError(
            explain(
                f"ft.with_skip: the step has a metric {count!r} already."
                if twice
                else f"ft.with_skip: the step gives no metric {monitor!r}.",
                expected="no other count of that name inside (ft.with_skip twice, ft.with_loss_scale, ft.optim.skip_nonfinite)"
                if twice
                else " or ".join(map(repr, metrics)) or "a step with metrics",
                got=repr(count if twice else monitor),
                fix='ft.with_skip(step, name="spikes")   # then it is "skipped/spikes"'
                if twice
                else f"ft.with_skip(step, monitor={next(iter(metrics), 'loss')!r})",
            )
        )
    value = metrics[monitor].compute()
    if not isinstance(value, Tensor) or value.ndim:
        raise MetricError(
            explain(
                f"ft.with_skip: the metric {monitor!r} is not a 0-d tensor.",
                expected="a metric of one number, on the device",
                got=tree.describe(value),
                fix="monitor a mean of it",
            )
        )
    return value if value.is_floating_point() else value.to(torch.float32)


def with_skip(
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    *,
    monitor: str = "loss",
    window: int = 128,
    factor: float = 6.0,
    warmup: int | None = None,
    atol: float = 0.0,
    nonfinite: bool = True,
    limit: int = 10,
    name: str = "skip",
) -> Skipping:
    """Skip the steps whose loss spikes or is not finite, inside the graph: a `where` over the state, and no look from the host.

    Law, with v the metric and m, s the mean and standard deviation of the last `window` values that were not skipped: where
    `v > m + max(factor s, atol)`, or v or an updated leaf is not finite, all leaves of the state are bitwise what they were, but
    for `step` and `samples`. Metrics of a step that was skipped count nothing in the records; `skipped` is how many there were so far.

    `step` and `samples` go on, because the host counts the calls of a step without asking how they went. So dropout after a skipped
    batch draws other numbers than without that batch (schedules do not move: they follow the optimizer's own count). Where the run
    has to be exactly the one without the batch, use `ft.hooks.spike_guard("skip")`, which reads the device at every step.

    Args:
        step: a step that is not compiled yet; `ft.train_step(...)`, one of several optimizers, or one written by hand. What stands
            inside of this wrapper (`ft.with_ema`) is skipped with it.
        monitor: a metric of the step that is high where something is wrong: `"loss"`, `"grad_norm"`.
        window: over how many values mean and deviation are taken.
        factor: how many deviations above the mean a spike is; inf is none: leave it to `nonfinite`.
        warmup: so many values are needed before there are spikes; default: half the window.
        atol: a rise that is not larger is no spike, in units of the metric, however small the deviation.
        nonfinite: whether inf and NaN, in the metric or in the updated state, are skipped (from the first step on).
        limit: after so many spikes in a row that are finite, the next one is taken to be the new level: the statistic begins anew.
        name: key of the sub-state in `state.extra`; `state = step.init(state)` puts it there, `ft.fit` does it by itself. The metric
            is `skipped/name` where it is another than the default.

    Returns:
        A step.

    Raises:
        LimitError: a number that makes no sense.
        MetricError: (when called) the step has no such metric.

    Source: Team OLMo, "2 OLMo 2 Furious", 2025; see `ftrain/steps/spikes.py`.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(1, 1), ft.optim.adam(0.1)
    >>> step = ft.with_skip(ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx))
    >>> state = step.init(ft.init(model, tx))
    >>> new, metrics = step(state, torch.full((4, 1), torch.nan))
    >>> metrics["skipped"].compute(), torch.equal(new.params["weight"], state.params["weight"]), new.step
    (tensor(1.), True, tensor(1))
    """
    check_level(step, "step", "ft.with_skip")
    check_name(name, "ft.with_skip")
    if not isinstance(monitor, str) or not monitor:
        raise ArgumentError(
            explain(
                f"ft.with_skip: monitor={monitor!r} is no name.",
                expected="a str, the name of a metric of the step",
                got=type(monitor).__name__,
                fix='monitor="loss"',
            )
        )
    rule = make_rule("ft.with_skip", window=window, factor=factor, warmup=warmup, atol=atol, nonfinite=nonfinite)
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise LimitError(
            explain(
                f"ft.with_skip: limit={limit!r} makes no sense.",
                expected="an integer >= 1, in steps",
                got=repr(limit),
                fix="limit=10",
            )
        )
    if hasattr(step, "rung"):
        raise StateError(
            explain(
                "ft.with_skip wants a step that is not compiled yet.",
                expected="a function (state, batch) -> (state, metrics)",
                got=repr(step),
                fix="step = ft.compile(ft.with_skip(step, ...))",
            )
        )
    if isinstance(step, Stepped) and name in step.names():
        raise LimitError(
            explain(
                f"ft.with_skip: the step inside keeps something under the name {name!r} already.",
                where=f"state.extra[{name!r}]",
                expected="a name for each wrapper",
                got=f"name={name!r} twice",
                fix=f'ft.with_skip(step, ..., name="{name}_2")',
            )
        )
    return Skipping(step, rule, monitor=monitor, limit=limit, name=name)
