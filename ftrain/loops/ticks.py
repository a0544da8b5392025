"""Ticks, one for each step, and what those of one run share: where in the data it is, and how much was done."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .. import tree
from ..data import Epochs, Feed, Window
from ..errors import LimitError, StateError, explain
from ..state import Counters, TrainState
from ..steps.bind import batch_size as count_samples
from ..types import Metrics
from .cadences import Clock
from .position import Position

__all__ = ["Run", "Tick", "count_tokens"]


@dataclass(slots=True)
class Tick:
    """What one step gave.

    Attributes:
        state: the new state. With a donated step it is valid until the next tick.
        metrics: the step's metrics, on the device.
        step: steps taken, as counted by the state.
        epoch: the epoch that this step belongs to, from 0 on.
        samples: samples seen, as counted by the state.
        batch: position of the batch in its epoch, from 0 on.
        waited: seconds spent waiting for data since the run began.
        end: True on the extra tick at the end of an epoch (only with `epoch_ends=True`): no step was taken for it.
        tokens: tokens seen since the run began, where `tokens=` counts them.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(1, 1), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> for tick in ft.loop(ft.init(model, tx), step, [torch.zeros(4, 1)] * 2):
    ...     print(tick.step, tick.epoch, tick.batch, tick.samples)
    1 0 0 4
    2 0 1 8
    """

    state: TrainState
    metrics: Metrics
    step: int
    epoch: int
    samples: int
    batch: int
    waited: float = 0.0
    end: bool = False
    tokens: int = 0
    _run: Run | None = field(default=None, repr=False, compare=False)

    def ran(self) -> bool:
        """Whether a loop gave this tick, which so knows where in the data it is.

        >>> import ftrain as ft
        >>> ft.Tick(None, {}, step=0, epoch=0, samples=0, batch=-1).ran()
        False
        """
        return self._run is not None

    def position(self) -> Position:
        """Where the run is after this tick; ask before the next one. With the state, it is all that is needed to go on.

        >>> import torch, ftrain as ft
        >>> model, tx = torch.nn.Linear(1, 1), ft.optim.sgd(0.1)
        >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
        >>> tick = next(ft.loop(ft.init(model, tx), step, [torch.zeros(4, 1)] * 2))
        >>> tick.position().epoch, tick.position().data, tick.position().clock.steps
        (0, {'batch': 1}, 1)
        """
        return _running(self._run).position(self)

    def last(self) -> bool:
        """Whether this step was the last one of its epoch; where only the data can tell, reads one batch ahead.

        >>> import torch, ftrain as ft
        >>> model, tx = torch.nn.Linear(1, 1), ft.optim.sgd(0.1)
        >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
        >>> [tick.last() for tick in ft.loop(ft.init(model, tx), step, [torch.zeros(4, 1)] * 2)]
        [False, True]
        """
        return self.end or _running(self._run).last(self)


@dataclass(slots=True)
class Run:
    """What the ticks of one run share."""

    source: Epochs
    begin: Counters  # of the state when the run began, in whichever process that was
    started: float
    done: int = 0  # epochs completed in this run
    tokens: Callable[[Any], int] | None = None  # of a batch
    words: int = 0  # tokens seen in this run
    before: Clock | None = None  # when `until=` was asked before the present tick
    feed: Feed | None = None
    next: dict[str, Any] = field(default_factory=dict)  # where the epoch after the one that is over begins
    left: Mapping[str, Any] | Exception | None = (
        None  # the place in an epoch that was left, where only an open loader can tell it
    )

    @classmethod
    def of(cls, source: Epochs, now: Counters, clock: Clock, tokens: Callable[[Any], int] | None) -> Run:
        """The run of a state with these counters that has done so much since it began."""
        begin = Counters(now.step - clock.steps, now.epoch - clock.epochs, now.samples - clock.samples, now.seed)
        return cls(source, begin, time.perf_counter() - clock.seconds, clock.epochs, tokens, clock.tokens)

    def count(self, batch: Any) -> int:
        """How many samples the batch has that is due; its tokens are counted, too."""
        if self.tokens is not None:
            self.words += count_tokens(self.tokens, batch)
        return count_samples(batch)

    def clock(self, tick: Tick) -> Clock:
        return Clock(
            tick.step - self.begin.step,
            self.done,
            tick.samples - self.begin.samples,
            time.perf_counter() - self.started,
            tick.tokens,
            0 if tick.end else tick.batch + 1,
        )

    def position(self, tick: Tick) -> Position:
        if tick.end:
            return Position(tick.epoch + 1, self.next, self.clock(tick), self.before)
        assert self.feed is not None, "a step needs a batch"
        if isinstance(self.left, Exception):
            raise self.left
        place = self.feed.place(tick.batch + 1) if self.left is None else self.left
        return Position(tick.epoch, place, self.clock(tick), self.before)

    def leave(self, read: int | None) -> None:
        """Close the data; in the middle of an epoch, after so many batches, keep the place first where it cannot be told later."""
        assert self.feed is not None, "it was opened"
        try:
            if read is not None and not self.feed.steady:
                self.left = self.feed.place(read)
        except Exception as error:  # raised by whoever asks for the position
            self.left = error
        finally:
            self.feed.close()

    def last(self, tick: Tick) -> bool:
        if self.source.length is not None:
            return tick.batch + 1 == self.source.length
        return self.feed is not None and not self.feed.more()


def _running(run: Run | None) -> Run:
    if run is None:
        raise StateError(explain("this tick was not given by ft.loop, so it has no position in any data."))
    return run


def count_tokens(tokens: Callable[[Any], int], batch: Any) -> int:
    """How many tokens a batch has; raises where the user's function gives something else than a count."""
    if isinstance(batch, Window):
        return sum(count_tokens(tokens, one) for one in batch.batches)
    n = tokens(batch)
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise LimitError(
            explain(
                "tokens= gave no count.",
                expected="an int >= 0",
                got=tree.describe(n),
                cause="a tensor, which would have to be read from the device" if isinstance(n, Tensor) else None,
                fix='tokens=lambda batch: batch["tokens"].numel()',
            )
        )
    return n
