"""What a run tells: metrics that wait for the next record, the records so far, and who is given them.

Law: a recorder that took over another's `plain()` makes the records that that one would have made, times excepted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..metrics import Metric
from ..sinks import Progress, Record
from .meter import Meter
from .spent import Spent

__all__ = ["Recorder"]


class Recorder:
    """The records of one run.

    Args:
        sinks: functions of a record.
    """

    def __init__(self, sinks: Sequence[Callable[[Record], None]] = ()) -> None:
        self.sinks = sinks
        self.progress: Progress | None = None
        self.records: list[Record] = []
        self.meter = Meter()
        self.extra: dict[str, Any] = {}  # numbers from hooks, for the next record
        self.spent = Spent()
        self.last = 0.0  # the second of the last record of training
        self.waited = 0.0  # seconds spent waiting for data up to then

    def take(self, metrics: Mapping[str, Any]) -> None:
        """Take what hooks tell: numbers, and metrics on the device."""
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, Metric)}
        self.extra = {name: value for name, value in self.extra.items() if name not in metrics} | numbers
        if len(numbers) < len(metrics):
            self.meter.tell({name: value for name, value in metrics.items() if name not in numbers})

    def make(self, tell: Callable[..., Record], waited: float, now: float) -> list[Record]:
        """Bring the metrics since the last record of training to the host; none where there are none.

        Args:
            tell: makes the record of metrics and times.
            waited: seconds spent waiting for data so far.
            now: the second of the run.
        """
        if not self.meter and not self.extra:
            return []
        metrics = {**self.meter.fetch(), **self.extra}
        found, self.waited = waited - self.waited, waited
        spent = self.spent.taken(found, now - self.last)
        self.extra, self.last = {}, now
        return [tell(metrics, waited=found, spent=spent)]

    def emit(self, record: Record) -> None:
        """Give a record to all who want it."""
        if self.progress is not None:
            self.progress.record(record)
        if self.sinks:
            with self.spent.on("sinks"):
                for sink in self.sinks:
                    sink(record)

    def add(self, record: Record) -> None:
        """Keep a record, and give it to all who want it."""
        self.records.append(record)
        self.emit(record)

    def plain(self, extra: Mapping[str, Any], waited: float) -> dict[str, Any]:
        """For a checkpoint, as nested dicts and lists; `extra`: the numbers from hooks that count."""
        return {
            "meter": self.meter.plain(),
            "extra": dict(extra),
            "waited": waited - self.waited,
            "spent": self.spent.plain(),
            "last": self.last,
        }

    def resume(self, plain: Mapping[str, Any], records: Sequence[Record], device: torch.device) -> None:
        """Go on with what another recorder had. Waiting for data is counted anew from 0."""
        self.records, self.extra = list(records), dict(plain["extra"])
        self.meter.take(plain["meter"], device)
        self.spent.take(plain["spent"])
        self.waited, self.last = -plain["waited"], plain["last"]
