"""Curves of a run: one panel per metric, training and evaluators together. Needs matplotlib, which ftrain does not install.

The figure is a value: it belongs to no pyplot state and to no GUI, is not shown by itself, and displays itself in Jupyter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .. import figure
from ..errors import explain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["curves"]

Array = np.ndarray[Any, Any]
AXES = {"step": "step", "epoch": "epoch", "samples": "samples", "seconds": "time (s)"}


class Row(Protocol):
    """What is drawn of a `Record`, which cannot be named here: `record.py` imports this file."""

    @property
    def step(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def samples(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def split(self) -> str: ...
    @property
    def metrics(self) -> Mapping[str, Any]: ...


def curves(
    history: Iterable[Row],
    names: Sequence[str] = (),
    *,
    x: str = "step",
    log: bool = False,
    smooth: float = 0.0,
    path: str | Path | None = None,
) -> Figure:
    """Draw the metrics of a run, one panel each, with the training curve and all evaluators in it.

    A smoothed curve shows at each record the mean of it and those before it, with weights 1, a, a^2, ... for a = `smooth`
    going back, and the curve as recorded stays faintly behind it. What is not finite (nor, with `log`, positive) leaves a gap.

    Args:
        history: records, as in `fit(...).history`.
        names: metrics without the evaluator's prefix, e.g. `["loss"]`; default: all that are numbers.
        x: `"step"`, `"epoch"`, `"samples"` or `"seconds"`. Records within an epoch are spread evenly over it.
        log: logarithmic values.
        smooth: how strongly training curves are smoothed, from 0 (not at all) to below 1.
        path: also save the figure there, in the format of the suffix; missing directories are made.

    Returns:
        The figure. It displays itself in Jupyter; elsewhere use `path`, or `figure.savefig`.

    Raises:
        ValueError: there is nothing to draw, a metric or axis is unknown, or `smooth` is outside [0, 1).
        ImportError: matplotlib is not installed.

    >>> from ftrain.sinks import History, Record
    >>> from ftrain.sinks.plots import curves
    >>> records = [Record(i, 0, 8 * i, 0.1 * i, "train", {"loss": 1 / i}) for i in range(1, 50)]
    >>> figure = curves(History([*records, Record(49, 1, 392, 5.0, "val", {"loss": 0.1})]), log=True, smooth=0.6)
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['loss']
    """
    rows = list(history)
    known = list(dict.fromkeys(name for row in rows for name, value in row.metrics.items() if isinstance(value, Real)))
    wanted = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    _check(wanted, known, x, smooth)
    wanted = wanted or known
    places = _places(rows, x)
    splits = list(dict.fromkeys(["train", *(row.split for row in rows)]))  # a split has one colour in all panels
    drawn, panels = _grid(len(wanted), AXES[x])
    for axes, name in zip(panels, wanted, strict=True):
        for number, split in enumerate(splits):
            found = [i for i, row in enumerate(rows) if row.split == split and isinstance(row.metrics.get(name), Real)]
            if found:
                values = np.asarray([float(rows[i].metrics[name]) for i in found])
                _draw(axes, places[found], values, split=split, colour=f"C{number}", log=log, smooth=smooth)
        _dress(axes, name, log, whole=x != "seconds")
    figure.save(drawn, path)
    return drawn


def _check(wanted: list[str], known: list[str], x: str, smooth: float) -> None:
    where = "ftrain.sinks.plots.curves"
    if not known:
        raise ValueError(
            explain(
                "there is nothing to draw.",
                where=where,
                expected="a record with a metric that is a number",
                got="no such record",
                cause="the run ended before its first log point",
                fix="ft.fit(..., log=ft.every(steps=1))",
            )
        )
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(
            explain(
                f"no record has a number called {unknown[0]!r}.",
                where=where,
                expected=" or ".join(map(repr, known)),
                got=repr(unknown[0]),
                cause="a panel is named for the metric alone and shows all evaluators" if "/" in unknown[0] else None,
                fix=f"history.plot({known[0]!r})",
            )
        )
    if x not in AXES:
        raise ValueError(
            explain(
                f"a curve has no axis {x!r}.",
                where=f"{where}(x=...)",
                expected=" or ".join(map(repr, AXES)),
                got=repr(x),
                fix='history.plot(x="step")',
            )
        )
    if not 0 <= smooth < 1:
        raise ValueError(
            explain(
                "smooth is the weight of the past, relative to the present.",
                where=f"{where}(smooth=...)",
                expected="0 <= smooth < 1",
                got=repr(smooth),
                fix="history.plot(smooth=0.9)",
            )
        )


def _places(rows: list[Row], x: str) -> Array:
    """Where each record stands on the x axis."""
    whole = np.asarray([float(getattr(row, x)) for row in rows])
    if x != "epoch":
        return whole
    # Records count completed epochs; without this, all that happened within one would stand on a vertical line.
    begins = {0: 0}  # the first step known of each epoch
    for row in sorted(rows, key=lambda row: row.step):
        if row.epoch > max(begins) and row.step > max(begins.values()):
            begins[row.epoch] = row.step
    epochs, steps = list(begins), list(begins.values())
    if len(epochs) == 1:
        return whole  # the first epoch is under way, and its length is not known
    # The last epoch is taken to be as long as the one before it.
    length = (steps[-1] - steps[-2]) / (epochs[-1] - epochs[-2])
    taken = np.asarray([row.step for row in rows])
    within: Array = np.interp(taken, steps, epochs) + np.clip((taken - steps[-1]) / length, 0, 1)
    return within


def _grid(panels: int, label: str) -> tuple[Figure, list[Axes]]:
    """A figure with at most three panels side by side."""
    columns = {1: 1, 2: 2, 4: 2}.get(panels, 3)
    lines = math.ceil(panels / columns)
    size = (6.0, 4.0) if panels == 1 else (4.2 * columns, 3.2 * lines)
    drawn = figure.new("ftrain.sinks.plots.curves", size)
    axes: list[Axes] = []
    for i in range(panels):
        axes.append(drawn.add_subplot(lines, columns, i + 1, sharex=axes[0] if axes else None))
        if i + columns >= panels:  # nothing stands below it
            axes[-1].set_xlabel(label)
    drawn.align_ylabels()
    return drawn, axes


def _draw(axes: Axes, at: Array, values: Array, *, split: str, colour: str, log: bool, smooth: float) -> None:
    good = np.isfinite(values) & ((values > 0) if log else True)
    values = np.where(good, values, np.nan)
    if not good.any():
        return
    if split != "train":
        axes.plot(at, values, color=colour, label=split, marker="o", markersize=4, linewidth=1.2)
        return
    alone = good & ~np.append(False, good[:-1]) & ~np.append(good[1:], False)  # no line leads there
    dots: dict[str, Any] = {"marker": ".", "markevery": np.flatnonzero(alone).tolist()} if alone.any() else {}
    if smooth:
        axes.plot(at, values, color=colour, alpha=0.25, linewidth=1, **dots)
    axes.plot(at, _smoothed(values, smooth) if smooth else values, color=colour, label=split, linewidth=1.5, **dots)


def _smoothed(values: Array, smooth: float) -> Array:
    total = weight = 0.0
    means = np.full_like(values, np.nan)
    for i in np.flatnonzero(np.isfinite(values)):
        total, weight = smooth * total + values[i], smooth * weight + 1
        means[i] = total / weight
    return means


def _dress(axes: Axes, name: str, log: bool, whole: bool) -> None:
    axes.set_ylabel(name)
    axes.grid(which="both", alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params(axis="x", nbins=6, integer=whole)
    lines, labels = axes.get_legend_handles_labels()
    if not lines:
        axes.text(0.5, 0.5, "no finite values", transform=axes.transAxes, ha="center", va="center", alpha=0.6)
        return
    if log:
        from matplotlib.ticker import LogFormatter

        class Plain(LogFormatter):
            def __call__(self, x: float, pos: int | None = None) -> str:
                return f"{x:g}" if super().__call__(x, pos) else ""  # 0.2, where it would write 2e-01

        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(Plain())
        axes.yaxis.set_minor_formatter(Plain(minor_thresholds=(2, 0.5)))
    # Above the panel, where it covers no curve.
    axes.legend(
        lines,
        labels,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=4,
        frameon=False,
        fontsize="small",
        borderaxespad=0,
    )
