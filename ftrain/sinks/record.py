"""Records, what a sink is given, and the history that keeps them.

A sink is any function `(record) -> None`. It may have a `close(status)`, which is called once when `fit` ends, however it
ends. Sinks have effects and may not change the state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np

__all__ = ["History", "Record"]


@dataclass(frozen=True)
class Record:
    """What happened up to one point of a run.

    Attributes:
        step: steps taken so far, as counted by the state.
        epoch: epochs completed so far.
        samples: samples seen so far.
        seconds: wall-clock time since `fit` began.
        split: `"train"`, or the name of an evaluator.
        metrics: values by name, as Python floats (arrays for `Collect`), over the steps since the record before.
        waited: seconds spent waiting for data since the record of training before (0 for an evaluator).
        tokens: tokens seen since the run began, where `fit(tokens=...)` counts them.
        spent: where the seconds since the record of training before went: `data` (as `waited`), `step`, `evaluation`, `hooks`,
            `checkpoint`, `sinks`; empty for an evaluator. On a GPU, `step` is the time of the host, which may run ahead.

    >>> from ftrain.sinks import Record
    >>> Record(step=10, epoch=0, samples=160, seconds=0.5, split="val", metrics={"loss": 0.3}).named()
    {'val/loss': 0.3}
    """

    step: int
    epoch: int
    samples: int
    seconds: float
    split: str = "train"
    metrics: Mapping[str, Any] = field(default_factory=dict)
    waited: float = 0.0
    tokens: int = 0
    spent: Mapping[str, float] = field(default_factory=dict)

    def named(self) -> dict[str, Any]:
        """The metrics under their full names: `loss` for training, `val/loss` for the evaluator `val`."""
        prefix = "" if self.split == "train" else f"{self.split}/"
        return {f"{prefix}{name}": value for name, value in self.metrics.items()}


class History(Sequence[Record]):
    """The records of a run, in order. Iterate it, index it by number, or by the name of a metric.

    >>> from ftrain.sinks import History, Record
    >>> history = History([Record(1, 0, 8, 0.1, "train", {"loss": 2.0}), Record(2, 0, 16, 0.2, "train", {"loss": 1.0})])
    >>> history["loss"], len(history), history[-1].step
    (array([2., 1.]), 2, 2)
    """

    def __init__(self, records: Sequence[Record] = ()) -> None:
        self._records = tuple(records)

    @overload
    def __getitem__(self, key: str) -> np.ndarray[Any, Any]: ...
    @overload
    def __getitem__(self, key: int) -> Record: ...
    @overload
    def __getitem__(self, key: slice) -> History: ...
    def __getitem__(self, key: str | int | slice) -> np.ndarray[Any, Any] | Record | History:
        if isinstance(key, str):
            rows = [(r, r.named()) for r in self._records]
            values = [named[key] for _, named in rows if key in named]
            if not values:
                raise KeyError(f"no record has the metric {key!r}; there are: {', '.join(self.names()) or 'none'}")
            return np.asarray(values)
        if isinstance(key, slice):
            return History(self._records[key])
        return self._records[key]

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def __repr__(self) -> str:
        last = ", ".join(f"{name}={value:.4g}" for name, value in self.last().items() if isinstance(value, float))
        return f"History({len(self)} records; {last})" if self._records else "History(no records)"

    def names(self) -> list[str]:
        """The full names of all metrics, in the order in which they first appeared."""
        return list(dict.fromkeys(name for record in self._records for name in record.named()))

    def steps(self, name: str) -> np.ndarray[Any, Any]:
        """The steps at which a metric was recorded; goes with `history[name]`."""
        return np.asarray([r.step for r in self._records if name in r.named()])

    def last(self) -> dict[str, Any]:
        """The newest value of each metric."""
        newest: dict[str, Any] = {}
        for record in self._records:
            newest.update(record.named())
        return newest

    def to_dict(self) -> dict[str, list[Any]]:
        """Columns of equal length, ready for a data frame; None where a record lacks a metric.

        >>> from ftrain.sinks import History, Record
        >>> History([Record(1, 0, 8, 0.5, "train", {"loss": 2.0})]).to_dict()["loss"]
        [2.0]
        """
        rows = [(r, r.named()) for r in self._records]
        columns: dict[str, list[Any]] = {
            name: [getattr(r, name) for r, _ in rows]
            for name in ("step", "epoch", "samples", "tokens", "seconds", "split", "waited")
        }
        for name in self.names():
            columns[name] = [named.get(name) for _, named in rows]
        return columns

    def plot(
        self, *names: str, x: str = "step", log: bool = False, smooth: float = 0.0, path: str | None = None
    ) -> Any:
        """Draw the curves with matplotlib, one panel per metric, training and evaluators together.

        Args:
            *names: metrics without the evaluator's prefix, e.g. `"loss"`; default: all that are numbers.
            x: `"step"`, `"epoch"`, `"samples"` or `"seconds"`.
            log: logarithmic values.
            smooth: exponential smoothing of training curves, from 0 (none) to below 1.
            path: also save the figure there.

        Returns:
            The matplotlib figure.

        Raises:
            ValueError: nothing to draw, or an unknown metric or axis.
        """
        from .plots import curves

        return curves(self, names, x=x, log=log, smooth=smooth, path=path)
