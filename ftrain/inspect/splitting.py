"""Where the time of a run goes, as a value: seconds by part.

Law: the parts of a split add up to its total.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import DataError, explain
from ..sinks import Record

__all__ = ["Split", "split"]


@dataclass(frozen=True, repr=False)
class Split:
    """Seconds by part: `data`, `step`, `evaluation`, `hooks`, `checkpoint`, `sinks`, and perhaps `other`, the loop itself.

    Attributes:
        seconds: by part.

    >>> import ftrain as ft
    >>> found = ft.inspect.Split({"data": 1.0, "step": 3.0})
    >>> found.total, found.share("data")
    (4.0, 0.25)
    >>> found
    Split(4 s)
      step    75.0 %  3 s
      data    25.0 %  1 s
    """

    seconds: Mapping[str, float]

    @property
    def total(self) -> float:
        """All seconds."""
        return sum(self.seconds.values())

    def share(self, part: str) -> float:
        """A part's share of the total, between 0 and 1."""
        total = self.total
        return self.seconds[part] / total if total else 0.0

    def __repr__(self) -> str:
        width = max((len(part) for part in self.seconds), default=0)
        rows = sorted(self.seconds, key=lambda part: -self.seconds[part])
        lines = [f"  {part:<{width}}  {100 * self.share(part):6.1f} %  {self.seconds[part]:.4g} s" for part in rows]
        return "\n".join([f"Split({self.total:.4g} s)", *lines])


def split(history: Iterable[Record]) -> Split:
    """Where the time of a run went: waiting for data, in steps, evaluating, in hooks, saving, in sinks.

    Args:
        history: the records of a run: `result.history`, or a part of it (`result.history[10:]`, to leave out the compilation).

    Returns:
        The seconds by part, of all records together. On a GPU, `step` is the time of the host, which may run ahead of the device.

    Raises:
        DataError: there is no record of training that tells.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(1, 1), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> result = ft.fit(ft.init(model, tx), step, [torch.ones(4, 1)] * 9, progress=False, compile=False)
    >>> sorted(ft.inspect.split(result.history).seconds)
    ['checkpoint', 'data', 'evaluation', 'hooks', 'sinks', 'step']
    """
    added: dict[str, float] = {}
    records = list(history) if isinstance(history, Iterable) else [history]
    for record in records:
        spent: Any = getattr(record, "spent", None)
        for part, seconds in (spent or {}).items():
            added[part] = added.get(part, 0.0) + seconds
    if not added:
        raise DataError(
            explain(
                "ft.inspect.split: no record says where the time went.",
                expected="the history of ft.fit, with records of training",
                got=f"{len(records)} records" if records and isinstance(records[0], Record) else type(history).__name__,
                fix="ft.inspect.split(result.history)",
            )
        )
    return Split(added)
