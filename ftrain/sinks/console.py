"""The progress display of `fit`: one line in a terminal, one display updated in place in Jupyter, log lines elsewhere.

Three laws:

* It is given host numbers only and reads no clock: rate and remaining time come from the `seconds` that `fit` passes.
* What the user prints, to stdout or stderr, arrives unchanged and in order; the line steps aside and comes back below it.
* It never ends a run: a stream that is closed, broken, narrow or without Unicode costs the display, not the training.

The cursor is never hidden, so that there is nothing to restore, not even after `kill -9`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol, TextIO, cast

from ..errors import explain
from .line import Lines
from .notebook import Notebook
from .record import Record
from .terminal import Terminal, is_terminal

if TYPE_CHECKING:
    pass

__all__ = ["Progress", "console"]


class Progress(Protocol):
    """What `fit` calls to show how far it is.

    Attributes:
        interval: seconds between refreshes; `fit` calls `refresh` at most that often.

    >>> from ftrain.sinks import Progress
    >>> class Plain:
    ...     interval = 1.0
    ...
    ...     def refresh(self, step, epoch, samples, seconds):
    ...         print("at", step)
    ...
    ...     def record(self, record):
    ...         print(record.metrics)
    ...
    ...     def close(self, status):
    ...         print(status)
    >>> plain: Progress = Plain()
    >>> plain.refresh(1, 0, 8, 0.1)
    at 1
    >>> plain.close("steps")
    steps
    """

    interval: float

    def refresh(self, step: int, epoch: int, samples: int, seconds: float) -> None:
        """Show the counters, which are host numbers; `seconds` is the time since `fit` began."""

    def record(self, record: Record) -> None:
        """Show a log point or the result of an evaluation."""

    def close(self, status: str) -> None:
        """Leave the screen tidy; called once, on every exit, with the reason for it or `"error"`."""


def console(
    *,
    start: int = 0,
    steps: int | None = None,
    epochs: int | None = None,
    steps_per_epoch: int | None = None,
    stream: TextIO | None = None,
    interval: float | None = None,
) -> Progress:
    """Show the progress of a run in the way that suits the place where it runs.

    In a terminal it is a line (bar, steps, epochs completed, training metrics, steps per second, training time left),
    with evaluations as rows above it. In Jupyter it is one display that is updated in place, with evaluations as a table.
    Elsewhere (a file, CI) each record is a line. The rate is that of the last 15 seconds, evaluations left out.

    Args:
        start: the state's step when the run begins.
        steps: how many more steps are to run, where known.
        epochs: how many more epochs are to run, where known.
        steps_per_epoch: the length of an epoch in steps, where known.
        stream: where to write; default: the notebook, or `sys.stdout`.
        interval: seconds between refreshes; default: 0.1 in a terminal, 0.5 in a notebook.

    Returns:
        The display, with nothing shown yet.

    Raises:
        ValueError: `interval` is negative or NaN.

    >>> from ftrain.sinks import Record, console
    >>> progress = console(epochs=3, steps_per_epoch=150)
    >>> progress.refresh(75, 0, 4800, 0.5)
    >>> progress.record(Record(150, 1, 9600, 1.0, "train", {"loss": 0.31207, "accuracy": 0.91}))
    step 150/450  epoch 1  loss 0.3121  accuracy 0.91  150 steps/s
    >>> progress.close("epochs")
    """
    if interval is not None and not interval >= 0:
        raise ValueError(
            explain(
                "the interval between refreshes makes no sense.",
                where="ftrain.sinks.console(interval=...)",
                expected="seconds >= 0, or None",
                got=repr(interval),
                fix="ftrain.sinks.console(interval=0.5)",
            )
        )
    totals = [steps, epochs * steps_per_epoch if epochs is not None and steps_per_epoch is not None else None]
    end = min((start + total for total in totals if total is not None), default=None)
    if stream is None and _in_notebook():
        return Notebook(start, end, 0.5 if interval is None else interval)
    stream = cast("TextIO | None", sys.stdout) if stream is None else stream  # None under pythonw
    if stream is not None and is_terminal(stream):
        return Terminal(start, end, 0.1 if interval is None else interval, stream)
    return Lines(start, end, 1.0 if interval is None else interval, stream)


def _in_notebook() -> bool:
    # Only a process that has IPython imported can be a kernel; its terminal shell has no `kernel`.
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return getattr(get_ipython() if get_ipython else None, "kernel", None) is not None
