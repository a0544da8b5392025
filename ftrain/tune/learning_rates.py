"""Which learning rate: a short run in which it grows from step to step, and the curve of the losses.

Laws
----
- The losses are those of a loop that sets the hyper-parameter by hand before each step, bitwise.
- The caller's state and the global generators are as they were; the step is compiled once, and that serves `fit` too.
- Where the run stops does not depend on how often the losses are read from the device (every `READ` steps).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from .. import figure, rng
from ..data import Epochs, as_epochs
from ..data.checks import integer, one_of
from ..errors import ArgumentError, LimitError, LossError, MetricError, explain
from ..loops.evaluate import Compile, prepare
from ..loops.hooks.hyper import check_injected, replace_hyper
from ..loops.loop import Ticks, loop
from ..metrics import Metric
from ..sinks import Progress, Record, console
from ..state import TrainState, check_state

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["READ", "LrCurve", "lr_find"]

Array = np.ndarray[Any, np.dtype[np.float64]]
Mode = Literal["exponential", "linear"]
READ = 10  # steps between two reads of the losses; the last few after a stop are thrown away


@dataclass(frozen=True, eq=False, repr=False)
class LrCurve:
    """The losses of a run in which the learning rate grew.

    Attributes:
        rates: the learning rate of each step, float64 of shape (n,).
        losses: the loss of each step, before that step's update, float64 of shape (n,).
        smoothed: their exponential average with its bias corrected, `s_i = avg_i / (1 - beta^i)`; NaN where the loss is not finite.
        smooth: beta of that average.
        mode: how the rates are spaced, `"exponential"` or `"linear"`.
        diverged: whether the run was stopped because the loss grew too large or was not finite.

    >>> import numpy as np, ftrain as ft
    >>> rates = np.array([1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    >>> losses = np.array([2.0, 1.9, 1.0, 0.9, 5.0])
    >>> ft.tune.LrCurve(rates, losses, losses, 0.0, "exponential", True).suggestion(skip_start=0)
    0.001
    """

    rates: Array
    losses: Array
    smoothed: Array
    smooth: float
    mode: Mode
    diverged: bool

    def __post_init__(self) -> None:
        for one in (self.rates, self.losses, self.smoothed):
            one.flags.writeable = False

    def __len__(self) -> int:
        return len(self.rates)

    def __repr__(self) -> str:
        if not len(self):
            return "LrCurve(no steps)"
        try:
            found = f"suggestion {self.suggestion():.3g}"
        except ArgumentError:
            found = "no suggestion"
        end = ", diverged" if self.diverged else ""
        return f"LrCurve({len(self)} steps, {self.mode} from {self.rates[0]:.3g} to {self.rates[-1]:.3g}{end}; {found})"

    def suggestion(self, *, skip_start: int = 10, skip_end: int = 1) -> float:
        """The rate at which the smoothed loss falls fastest: at the least `(1 - beta^i) d smoothed_i / d log(rate_i)`.

        It is the steepest descent of fastai and Lightning, in units of its noise: the i-th average of a noisy loss moves by chance
        in proportion to `(1 - beta) / (1 - beta^i)`, so that the steepest place of all would often be among the first few.

        Args:
            skip_start: steps at the beginning that are left out, where the average has few losses yet.
            skip_end: steps at the end that are left out.

        Raises:
            ArgumentError: too few steps are left, or the loss falls nowhere.

        >>> import numpy as np, ftrain as ft
        >>> rates = np.geomspace(1e-5, 1, 50)
        >>> losses = 1 / (1 + rates / 1e-2) + 10 * rates**2
        >>> 1e-3 < ft.tune.LrCurve(rates, losses, losses, 0.0, "exponential", False).suggestion() < 1e-1
        True
        """
        for name, value in (("skip_start", skip_start), ("skip_end", skip_end)):
            fix = f"curve.suggestion({name}=1)"
            integer(value, "LrCurve.suggestion", name, least=0, kind=LimitError, fix=fix)
        weights = 1.0 - self.smooth ** np.arange(1, len(self) + 1)
        columns = [one[skip_start : len(self) - skip_end] for one in (self.rates, self.smoothed, weights)]
        rates, losses, weights = (one[np.isfinite(columns[1])] for one in columns)
        if len(rates) < 3:
            raise ArgumentError(
                explain(
                    "LrCurve.suggestion: too few steps are left to see where the loss falls.",
                    expected="at least 3 finite losses",
                    got=f"{len(rates)} of {len(self)}, with skip_start={skip_start} and skip_end={skip_end}",
                    cause="the run diverged early" if self.diverged else None,
                    fix="ft.lr_find(..., steps=300)   # or a smaller max_lr, or suggestion(skip_start=0)",
                )
            )
        slopes = np.gradient(losses, np.log(rates)) * weights
        steepest = int(slopes.argmin())
        if not slopes[steepest] < 0:
            raise ArgumentError(
                explain(
                    "LrCurve.suggestion: the loss falls at none of these rates.",
                    where=f"rates from {rates[0]:.3g} to {rates[-1]:.3g}",
                    expected="a smoothed loss that falls somewhere",
                    got=f"{losses[0]:.4g} at the first, {losses[-1]:.4g} at the last",
                    cause="rates that are too small, or a loss that does not depend on the parameters",
                    fix="ft.lr_find(..., min_lr=..., max_lr=...)   # look at curve.plot() first",
                )
            )
        return float(rates[steepest])

    def plot(self, path: str | Path | None = None, *, skip_start: int = 10, skip_end: int = 1) -> Figure:
        """Draw loss over rate with matplotlib: as measured, smoothed, and the suggestion where there is one.

        Args:
            path: also save the figure there, in the format of the suffix; missing directories are made.
            skip_start: as for `suggestion`.
            skip_end: as for `suggestion`.

        Returns:
            The figure; it displays itself in Jupyter.

        Raises:
            ArgumentError: there is no finite loss.
            ImportError: matplotlib is not installed.

        >>> import numpy as np, ftrain as ft
        >>> rates = np.geomspace(1e-5, 1, 50)
        >>> curve = ft.tune.LrCurve(rates, 1 / rates, 1 / rates, 0.0, "exponential", False)
        >>> curve.plot("plots/lr.png").axes[0].get_xscale()
        'log'
        """
        if not np.isfinite(self.losses).any():
            raise ArgumentError(
                explain("LrCurve.plot: there is nothing to draw.", expected="a finite loss", got=f"{len(self)} steps")
            )
        drawn = figure.new("LrCurve.plot", size=(6.0, 4.0))
        axes = drawn.add_subplot()
        axes.plot(
            self.rates, np.where(np.isfinite(self.losses), self.losses, np.nan), color="C0", alpha=0.25, label="loss"
        )
        axes.plot(self.rates, self.smoothed, color="C0", linewidth=1.5, label="smoothed")
        try:
            best = self.suggestion(skip_start=skip_start, skip_end=skip_end)
        except ArgumentError:  # the curve is there to show why
            best = None
        if best is not None:
            at = int(np.flatnonzero(self.rates == best)[0])
            axes.plot(
                [best], [self.smoothed[at]], color="C3", marker="o", linestyle="none", label=f"suggestion {best:.3g}"
            )
        axes.set_xscale("log" if self.mode == "exponential" else "linear")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("loss")
        # A loss that diverges would press all that is of interest onto one line.
        known = self.smoothed[np.isfinite(self.smoothed)]
        if len(known) and known.max() > known.min():
            room = 0.1 * (known.max() - known.min())
            axes.set_ylim(known.min() - room, known.max() + room)
        axes.grid(which="both", alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
        figure.save(drawn, path)
        return drawn


def lr_find(
    state: TrainState,
    step: Callable[[TrainState, Any], Any],
    data: Any,
    *,
    min_lr: float = 1e-8,
    max_lr: float = 1.0,
    steps: int = 100,
    mode: Mode = "exponential",
    smooth: float = 0.98,
    stop_factor: float | None = 4.0,
    hyper: str = "lr",
    batch_size: int | None = None,
    shuffle: bool = True,
    compile: Compile = "auto",
    backend: str | Callable[..., Any] = "inductor",
    progress: bool | Progress = True,
) -> LrCurve:
    """Train a copy of the state while the learning rate grows from step to step, and give the losses as a curve.

    Step i of n has the rate `min_lr * (max_lr / min_lr) ** (i / (n - 1))`, or with `mode="linear"` one of equal distances. The
    losses stay on the device, and are read every 10 steps.

    Args:
        state: where to begin. It stays as it is; its learning rate has to be injected: `ft.optim.inject(ft.optim.adamw)(lr=...)`.
            Where there are several (groups of parameters, say), all are set.
        step: as for `fit`; what is compiled for it serves a later `fit` as well.
        data: as for `fit`; begun anew where it has fewer batches. (An iterator is advanced.)
        min_lr: the first rate.
        max_lr: the last rate.
        steps: how many.
        mode: `"exponential"` or `"linear"`.
        smooth: beta of the exponential average of the losses, from 0 (none) to below 1; its bias is corrected.
        stop_factor: end the run where the smoothed loss is more than this many times the least so far, or a loss is not finite;
            None: never.
        hyper: which injected hyper-parameter.
        batch_size: for arrays: samples in a batch.
        shuffle: for arrays: a new order in each epoch.
        compile: as in `fit`.
        backend: a backend of `torch.compile`.
        progress: a line on the console; False for none.

    Returns:
        The curve; `.suggestion()` and `.plot()`. Where it ended early, it has fewer points.

    Raises:
        HookError: the hyper-parameter is not injected, or a schedule sets it.
        LimitError, ArgumentError, DataError: rates or numbers that make no sense.
        LossError: the first loss is not finite, before any update.
        MetricError: the step gives no `"loss"`.

    Source: L. N. Smith, "Cyclical Learning Rates for Training Neural Networks", 2017 (arXiv 1506.01186), section 3.3; the smoothing,
    the end at four times the least loss, and the steepest descent as the suggestion are fastai's.

    >>> import torch, ftrain as ft
    >>> x = torch.linspace(-1, 1, 64).unsqueeze(1)
    >>> model, tx = torch.nn.Linear(1, 1), ft.optim.inject(ft.optim.sgd)(lr=0.1)
    >>> step = ft.train_step(model, lambda model, batch: (model(batch["x"]) - batch["y"]).square().mean(), tx)
    >>> state, quiet = ft.init(model, tx), {"progress": False, "compile": False}
    >>> curve = ft.lr_find(state, step, {"x": x, "y": 3 * x}, batch_size=16, max_lr=10.0, **quiet)
    >>> 1e-2 < curve.suggestion() < 3.0
    True
    >>> state = state.replace(
    ...     opt=state.opt._replace(hyper={"lr": torch.tensor(curve.suggestion(), dtype=torch.float64)})
    ... )
    """
    check_state(state, "ft.lr_find")
    rates = _rates(min_lr, max_lr, steps, mode)
    _check(smooth, stop_factor)
    check_injected(state.opt, hyper, "ft.lr_find")
    begin = state.counters()
    source = as_epochs(data, seed=begin.seed, batch_size=batch_size, shuffle=shuffle, what="ft.lr_find")
    source.check("ft.lr_find")
    compiled = prepare(step, compile, donate=True, backend=backend, what="ft.lr_find")
    show = console(start=begin.step, steps=steps) if progress is True else (progress or None)
    found = _Curve(rates, smooth, stop_factor)
    status = "error"
    try:
        # What the step draws from numpy or random is a function of the state, and does not outlive the call.
        with rng.Isolated(rng.fold_in_host(begin.seed, begin.step, 0x14F)):
            _drive(state.copy(), compiled, source, hyper, found=found, show=show)
        status = "steps"
    finally:
        if show is not None:
            show.close(status)
    return LrCurve(
        rates[: len(found.losses)], np.array(found.losses), np.array(found.smoothed), smooth, mode, found.diverged
    )


def _drive(
    state: TrainState, step: Callable[..., Any], source: Epochs, hyper: str, *, found: _Curve, show: Progress | None
) -> None:
    """Run the steps, each with its own rate, until the curve is complete."""
    rates = found.rates
    ticks: Ticks = loop(_with(state, hyper, rates[0]), step, source, steps=len(rates))
    pending: list[Metric] = []
    began = time.perf_counter()
    try:
        for i, tick in enumerate(ticks):
            if "loss" not in tick.metrics:
                raise MetricError(
                    explain(
                        "ft.lr_find: the step gives no loss.",
                        expected='a metric "loss"',
                        got=", ".join(tick.metrics) or "no metrics",
                        fix='return state.advance(n, params=params), {"loss": loss}',
                    )
                )
            pending.append(tick.metrics["loss"])
            last = i + 1 == len(rates)
            if not last:
                ticks.send(_with(tick.state, hyper, rates[i + 1]))
            if last or i == 0 or (i + 1) % READ == 0:
                over = found.take(pending)
                pending = []
                if show is not None:
                    metrics = {"lr": float(rates[i]), "loss": found.losses[-1]}
                    seconds = time.perf_counter() - began
                    show.record(Record(tick.step, tick.epoch, tick.samples, seconds, "train", metrics))
                if over:
                    return
        found.take(pending)  # of an iterator that ended early
    finally:
        ticks.close()


def _with(state: TrainState, hyper: str, rate: float) -> TrainState:
    """The state with every injected hyper-parameter of this name at one value; no synchronisation, no other shape or dtype."""
    return state.replace(opt=replace_hyper(state.opt, hyper, lambda leaf: torch.full_like(leaf, rate)))


class _Curve:
    """The losses so far, and whether they have grown too large."""

    def __init__(self, rates: Array, smooth: float, stop_factor: float | None) -> None:
        self.rates, self.smooth, self.stop_factor = rates, smooth, stop_factor
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self.average = self.weight = 0.0
        self.least = math.inf
        self.diverged = False

    def take(self, metrics: list[Metric]) -> bool:
        """Read the losses of some steps; whether the run is over. Those after its end are left out."""
        if not metrics:
            return self.diverged
        values = torch.stack([one.compute().to(torch.float64) for one in metrics]).tolist()
        return any(self._add(value) for value in values)

    def _add(self, loss: float) -> bool:
        if not self.losses and not math.isfinite(loss):
            raise LossError(
                explain(
                    f"ft.lr_find: the loss is {loss} at the first step, before any update.",
                    expected="a finite number",
                    cause="inputs that are not normalised or hold NaN, a log or division by zero, or half precision",
                    fix="loss_fn(ft.to_module(model, state), batch)   # look at it eagerly",
                )
            )
        self.losses.append(loss)
        if not math.isfinite(loss):
            self.smoothed.append(math.nan)
            self.diverged = self.stop_factor is not None
            return self.diverged
        self.average = self.smooth * self.average + (1 - self.smooth) * loss
        self.weight = self.smooth * self.weight + (1 - self.smooth)  # 1 - beta^i
        now = self.average / self.weight
        self.smoothed.append(now)
        if self.stop_factor is not None and len(self.losses) > 1 and now > self._most():
            self.diverged = True
            return True
        self.least = min(self.least, now)
        return False

    def _most(self) -> float:
        """The loss at which the run ends: `stop_factor` times the least, and as far above it where that is negative."""
        assert self.stop_factor is not None, "asked only then"
        return self.least + (self.stop_factor - 1) * abs(self.least)


def _rates(min_lr: float, max_lr: float, steps: int, mode: Mode) -> Array:
    one_of(mode, Mode, "ft.lr_find", "mode", kind=LimitError)
    integer(steps, "ft.lr_find", "steps", least=2, kind=LimitError, fix="ft.lr_find(state, step, data, steps=100)")
    for name, value in (("min_lr", min_lr), ("max_lr", max_lr)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ArgumentError(
                explain(
                    f"ft.lr_find: {name}={value!r} is no learning rate.",
                    expected="a finite number",
                    got=repr(value),
                    fix="ft.lr_find(state, step, data, min_lr=1e-8, max_lr=1.0)",
                )
            )
    if not 0 < min_lr < max_lr:
        raise LimitError(
            explain(
                "ft.lr_find: the rates make no sense.",
                expected="0 < min_lr < max_lr",
                got=f"min_lr={min_lr!r}, max_lr={max_lr!r}",
                fix="ft.lr_find(state, step, data, min_lr=1e-8, max_lr=1.0)",
            )
        )
    if mode == "linear":
        return np.linspace(min_lr, max_lr, steps)
    return np.asarray(min_lr * (max_lr / min_lr) ** (np.arange(steps) / (steps - 1)))


def _check(smooth: float, stop_factor: float | None) -> None:
    if isinstance(smooth, bool) or not isinstance(smooth, (int, float)) or not 0 <= smooth < 1:
        raise LimitError(
            explain(
                "ft.lr_find: smooth is the weight of the past.",
                expected="0 <= smooth < 1",
                got=repr(smooth),
                fix="smooth=0.98",
            )
        )
    good = stop_factor is None or (
        not isinstance(stop_factor, bool) and isinstance(stop_factor, (int, float)) and stop_factor > 1
    )
    if not good:
        raise LimitError(
            explain(
                f"ft.lr_find: stop_factor={stop_factor!r} would end the run at once.",
                expected="a number > 1, or None: never end early",
                got=repr(stop_factor),
                fix="stop_factor=4.0",
            )
        )
