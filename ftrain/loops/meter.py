"""The meter: collects the metrics of many steps on the device, and brings them to the host in one transfer.

Laws
----
- `fetch` gives what merging all added metrics gives, computed in float64.
- A meter that took over another's `plain()` fetches what that one would have.
- `drop(n)` makes it as if the last n steps had not been added, those left out that were fetched before.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import MetricError, explain
from ..metrics import Collect, Metric
from ..steps.packed import Packed
from ..tree import fields, registered

__all__ = ["Meter", "pack_metrics", "unpack_metrics"]

# So many steps are kept as they are before their numbers are packed into one tensor (on the device, without a sync): bounds the
# number of small tensors that stay alive between two log points.
_PACK_AFTER = 128


_getters: dict[type, Callable[[Any], Any]] = {}


class _Pack(NamedTuple):
    """The scalars of several steps with the same metrics: one row of `stacks` for each field, in the order of `names`."""

    names: tuple[str, ...]
    kinds: tuple[type[Metric], ...]
    steps: int
    stacks: list[Tensor]
    told: bool  # by hooks, not by the step
    rows: list[tuple[str, ...]]  # for each step, which metrics it gave whose values are collected one by one


class Meter:
    """Metrics since the last `fetch`."""

    def __init__(self) -> None:
        self._waiting: list[Mapping[str, Metric]] = []
        self._told: list[Mapping[str, Metric]] = []
        self._packs: list[_Pack] = []
        self._collected: dict[str, list[tuple[Any, ...]]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting or self._told or self._packs or self._collected)

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Take one step's metrics; no arithmetic is done here."""
        self._waiting.append(metrics)
        if len(self._waiting) >= _PACK_AFTER:
            self._pack()

    def tell(self, metrics: Mapping[str, Metric]) -> None:
        """Take metrics that do not come from a step. Where one has the name of a step's metric, it takes its place."""
        self._told.append(metrics)
        if len(self._told) >= _PACK_AFTER:
            self._pack()

    def drop(self, steps: int) -> None:
        """Forget the last so many steps."""
        waiting = min(steps, len(self._waiting))
        del self._waiting[len(self._waiting) - waiting :]
        left = steps - waiting
        for at in reversed(range(len(self._packs))):
            pack = self._packs[at]
            if pack.told or not left:
                continue
            n = min(left, pack.steps)
            left -= n
            for name in (name for row in pack.rows[pack.steps - n :] for name in row):
                self._collected[name].pop()
            stacks = [stack.reshape(-1, pack.steps)[:, : pack.steps - n] for stack in pack.stacks]
            self._packs[at] = pack._replace(steps=pack.steps - n, stacks=stacks, rows=pack.rows[: pack.steps - n])
        self._packs = [pack for pack in self._packs if pack.steps]
        self._collected = {name: parts for name, parts in self._collected.items() if parts}

    def fetch(self) -> dict[str, Any]:
        """Merge all, compute, forget: floats by name (a tensor on the CPU for `Collect`). One transfer for all scalars."""
        self._pack()
        flat = [stack.flatten().double() for pack in self._packs for stack in pack.stacks]
        numbers: list[float] = torch.cat(flat).tolist() if flat else []  # sync: the one transfer of a log point
        columns: dict[tuple[bool, str, type[Metric]], list[list[float]]] = {}
        at = 0
        for pack in self._packs:
            for name, kind in zip(pack.names, pack.kinds, strict=True):
                own = columns.setdefault((pack.told, name, kind), [[] for _ in fields(kind)])
                for column in own:
                    column.extend(numbers[at : at + pack.steps])
                    at += pack.steps
        # What hooks told comes last, and so stays; of a name that was told in several forms, the last one.
        latest = {
            name: kind for pack in self._packs if pack.told for name, kind in zip(pack.names, pack.kinds, strict=True)
        }
        ordered = sorted(columns.items(), key=lambda item: (item[0][0], latest.get(item[0][1]) is item[0][2]))
        found: dict[str, Any] = {name: kind.fold(*own).compute() for (_, name, kind), own in ordered}
        for name, parts in self._collected.items():
            found[name] = Collect.fold(parts).compute().cpu()  # sync: values that are kept one by one
        self._packs, self._collected = [], {}
        return found

    def plain(self) -> dict[str, Any]:
        """What was collected so far, as nested dicts and lists of tensors; for a checkpoint."""
        self._pack()
        return {
            "packs": [
                {
                    "names": list(one.names),
                    "kinds": [_named(k) for k in one.kinds],
                    "steps": one.steps,
                    "stacks": one.stacks,
                    "told": one.told,
                    "rows": [list(row) for row in one.rows],
                }
                for one in self._packs
            ],
            "collected": {name: [list(parts) for parts in rows] for name, rows in self._collected.items()},
        }

    def take(self, plain: Mapping[str, Any], device: torch.device) -> None:
        """Go on with what another meter had collected.

        Raises:
            MetricError: it had metrics of a kind that this process does not know.
        """
        self._waiting, self._told = [], []
        self._packs = [
            _Pack(
                tuple(one["names"]),
                tuple(_kind(name) for name in one["kinds"]),
                one["steps"],
                [stack.to(device) for stack in one["stacks"]],
                one["told"],
                [tuple(row) for row in one["rows"]],
            )
            for one in plain["packs"]
        ]
        self._collected = {
            name: [tuple(part.to(device) for part in parts) for parts in rows]
            for name, rows in plain["collected"].items()
        }

    def _pack(self) -> None:
        """Stack the waiting scalars; runs of steps with the same metrics go together."""
        waiting, self._waiting = self._waiting, []
        self._stack(waiting, False)
        waiting, self._told = self._told, []
        self._stack(waiting, True)

    def _stack(self, waiting: list[Mapping[str, Metric]], told: bool) -> None:
        run: list[list[Any]] = []
        rows: list[tuple[str, ...]] = []
        form: tuple[tuple[str, ...], tuple[type[Metric], ...], bool] = ((), (), False)
        for metrics in waiting:
            collected: tuple[str, ...] = ()
            if type(metrics) is Packed:
                these, row = (metrics.names, metrics.kinds, True), [metrics.values_]
            else:
                scalars: Mapping[str, Metric] = metrics
                if Collect in map(type, metrics.values()):
                    collected = tuple(name for name, metric in metrics.items() if isinstance(metric, Collect))
                    for name in collected:
                        self._collected.setdefault(name, []).append(metrics[name].parts)  # type: ignore[attr-defined]
                    scalars = {name: metric for name, metric in metrics.items() if name not in collected}
                these = (tuple(scalars), tuple(map(type, scalars.values())), False)
                row = [part for metric in scalars.values() for part in _parts(metric)]
            if these != form:
                self._close(form[0], form[1], run, rows, told)
                run, rows, form = [], [], these
            run.append(row)
            rows.append(collected)
        self._close(form[0], form[1], run, rows, told)

    def _close(
        self,
        names: tuple[str, ...],
        kinds: tuple[type[Metric], ...],
        run: list[list[Any]],
        rows: list[tuple[str, ...]],
        told: bool,
    ) -> None:
        """Put the numbers of steps with the same metrics into stacks: a row for each field, a column for each step."""
        if not run:
            return
        stacks: list[Tensor] = []
        if run[0] and isinstance(run[0][0], Tensor) and run[0][0].ndim == 1:  # one vector a step
            stacks = [torch.stack([row[0] for row in run], dim=1)]
        elif run[0]:
            device = next((value.device for value in run[0] if isinstance(value, Tensor)), torch.device("cpu"))
            group: list[Tensor] = []
            for column in zip(*run, strict=True):  # neighbouring columns of one dtype are stacked together
                tensors = [
                    v if isinstance(v, Tensor) else torch.tensor(float(v), dtype=torch.float64, device=device)
                    for v in column
                ]
                if group and group[-1].dtype != tensors[0].dtype:
                    stacks.append(torch.stack(group))
                    group = []
                group.extend(tensors)
            stacks.append(torch.stack(group))
        self._packs.append(_Pack(names, kinds, len(run), stacks, told, rows))


def _parts(metric: Metric) -> Any:
    """The fields of a metric, in order."""
    kind = type(metric)
    getter = _getters.get(kind)
    if getter is None:
        names = fields(kind)
        one = operator.attrgetter(*names)
        getter = _getters[kind] = one if len(names) > 1 else lambda m: (one(m),)
    return getter(metric)


def _named(kind: type[Metric]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _kind(name: str) -> type[Metric]:
    """The class of this name among those that are registered; nothing is imported for the sake of a name."""
    for kind in registered():
        if issubclass(kind, Metric) and _named(kind) == name:
            return kind
    raise MetricError(
        explain(
            f"the checkpoint holds metrics of a kind that is not known here: {name}.",
            expected="its class, registered with ftrain.tree.register",
            fix=f"import {name.rpartition('.')[0]}   # before fit",
        )
    )


def pack_metrics(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """Metrics of one step as nested dicts and lists; `unpack_metrics` is the way back.

    >>> from ftrain.loops.meter import pack_metrics
    >>> from ftrain.metrics import Sum
    >>> pack_metrics({"n": Sum(2.0)})
    {'n': {'kind': 'ftrain.metrics.Sum', 'fields': [2.0]}}
    """
    return {
        name: {"kind": _named(type(metric)), "fields": list(_parts(metric))} for name, metric in dict(metrics).items()
    }


def unpack_metrics(plain: Mapping[str, Any], device: torch.device) -> dict[str, Metric]:
    """The metrics that `pack_metrics` packed, on a device.

    >>> import torch
    >>> from ftrain.loops.meter import unpack_metrics
    >>> unpack_metrics({"n": {"kind": "ftrain.metrics.Sum", "fields": [2.0]}}, torch.device("cpu"))
    {'n': Sum(total=2.0)}
    """

    def there(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return tuple(there(one) for one in value) if isinstance(value, (tuple, list)) else value

    return {name: _kind(one["kind"])(*[there(field) for field in one["fields"]]) for name, one in plain.items()}
