"""Metrics as monoids: values that merge, and that are computed only when somebody asks.

Laws (for all metrics `a`, `b`, `c` of one kind)
----
- `a.merge(b.merge(c)) == a.merge(b).merge(c)`, up to rounding: merging is associative.
- `a.merge(a.empty()) == a == a.empty().merge(a)`: `empty` is neutral.
- Weights are explicit, so merging the metrics of the parts of a batch gives the metric of the whole batch, and what is
  masked out (padding) does not count.
- `fold(*columns)` is `functools.reduce(merge, rows)` for rows given as columns, one for each field.

No method reads a value on the host. `compute` gives a 0-d tensor where the metric holds tensors, and a number where it holds
numbers (as the records of a history do).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tree
from .errors import MetricError, explain

__all__ = [
    "Collect",
    "Last",
    "Max",
    "Mean",
    "Metric",
    "Min",
    "Perplexity",
    "Sum",
    "accuracy",
    "normalise",
    "perplexity",
]

Scalar = Any  # a 0-d tensor inside a step, a float in a record


class Metric:
    """Base of all metrics: `empty`, `merge`, `compute`. Subclass it as a frozen dataclass registered with `tree.register`.

    >>> from ftrain.metrics import Sum
    >>> Sum(2.0).merge(Sum(3.0)).compute()
    5.0
    """

    @classmethod
    def empty(cls) -> Self:
        """The neutral element."""
        raise TypeError(f"{cls.__name__} has no neutral element")

    def merge(self, other: Self) -> Self:
        """This metric and another of its kind, as one."""
        raise TypeError(f"{type(self).__name__} does not merge")

    def compute(self) -> Any:
        """The value of the metric."""
        raise TypeError(f"{type(self).__name__} has no value")

    @classmethod
    def fold(cls, *columns: Sequence[Any]) -> Self:
        """Many metrics merged, from left to right; their fields come as columns of equal length."""
        rows = [cls(*row) for row in zip(*columns, strict=True)]
        return functools.reduce(lambda a, b: a.merge(b), rows, cls.empty())


@tree.register("total", "weight")
@dataclass(frozen=True)
class Mean(Metric):
    """A weighted mean: `total / weight`.

    Args:
        total: sum of the values, each times its weight; 0-d.
        weight: sum of the weights (samples, tokens ...); 0-d.

    >>> import torch
    >>> from ftrain.metrics import Mean
    >>> Mean(6.0, 3.0).merge(Mean(4.0, 1.0)).compute()
    2.5
    >>> Mean.of(torch.tensor([1.0, 2.0, 99.0]), mask=torch.tensor([1, 1, 0])).compute()
    tensor(1.5000)
    """

    total: Scalar
    weight: Scalar

    @classmethod
    def of(cls, values: Tensor, mask: Tensor | None = None) -> Self:
        """The mean over all elements of `values`; `mask` (same shape, bool or weights) says how much each counts."""
        if mask is None:
            return cls(values.sum(), torch.full((), float(values.numel()), dtype=torch.float32, device=values.device))
        if mask.shape != values.shape:
            raise MetricError(
                explain(
                    f"{cls.__name__}.of: the mask has another shape than the values.",
                    expected=str(tuple(values.shape)),
                    got=str(tuple(mask.shape)),
                    fix="mask.expand_as(values)",
                )
            )
        weights = mask.to(values.dtype)
        return cls(torch.where(mask != 0, values * weights, torch.zeros_like(values)).sum(), weights.sum())

    @classmethod
    def empty(cls) -> Self:
        return cls(0.0, 0.0)

    def merge(self, other: Self) -> Self:
        return type(self)(self.total + other.total, self.weight + other.weight)

    def compute(self) -> Any:
        return _ratio(self.total, self.weight)

    @classmethod
    def fold(cls, *columns: Sequence[Any]) -> Self:
        total, weight = columns
        return cls(_sum(total), _sum(weight))


@tree.register("total", "weight")
@dataclass(frozen=True)
class Perplexity(Mean):
    """`exp` of a mean negative log-likelihood: merges like the mean, computes like the exponential.

    >>> from ftrain.metrics import Perplexity
    >>> round(Perplexity(0.0, 5.0).compute(), 3)
    1.0
    """

    def compute(self) -> Any:
        mean = _ratio(self.total, self.weight)
        if isinstance(mean, Tensor):
            return mean.exp()
        return math.exp(mean) if mean < 700.0 else math.inf


@tree.register("total")
@dataclass(frozen=True)
class Sum(Metric):
    """A sum.

    >>> from ftrain.metrics import Sum
    >>> Sum(2.0).merge(Sum.empty()).compute()
    2.0
    """

    total: Scalar

    @classmethod
    def empty(cls) -> Self:
        return cls(0.0)

    def merge(self, other: Self) -> Self:
        return type(self)(self.total + other.total)

    def compute(self) -> Any:
        return self.total

    @classmethod
    def fold(cls, *columns: Sequence[Any]) -> Self:
        return cls(_sum(columns[0]))


@tree.register("value")
@dataclass(frozen=True)
class Min(Metric):
    """The smallest value; NaN if any value is.

    >>> from ftrain.metrics import Min
    >>> Min(2.0).merge(Min(3.0)).compute()
    2.0
    """

    value: Scalar

    @classmethod
    def empty(cls) -> Self:
        return cls(math.inf)

    def merge(self, other: Self) -> Self:
        return type(self)(_extreme(torch.minimum, min, self.value, other.value))

    def compute(self) -> Any:
        return self.value


@tree.register("value")
@dataclass(frozen=True)
class Max(Metric):
    """The largest value; NaN if any value is.

    >>> from ftrain.metrics import Max
    >>> Max(2.0).merge(Max(3.0)).compute()
    3.0
    """

    value: Scalar

    @classmethod
    def empty(cls) -> Self:
        return cls(-math.inf)

    def merge(self, other: Self) -> Self:
        return type(self)(_extreme(torch.maximum, max, self.value, other.value))

    def compute(self) -> Any:
        return self.value


@tree.register("value", "seen")
@dataclass(frozen=True)
class Last(Metric):
    """The newest value.

    Args:
        value: 0-d.
        seen: 1 where there is a value, 0 in the neutral element.

    >>> from ftrain.metrics import Last
    >>> Last(2.0).merge(Last(3.0)).merge(Last.empty()).compute()
    3.0
    """

    value: Scalar
    seen: Scalar = 1.0

    @classmethod
    def empty(cls) -> Self:
        return cls(math.nan, 0.0)

    def merge(self, other: Self) -> Self:
        if isinstance(other.seen, Tensor):
            return type(self)(
                torch.where(other.seen > 0, other.value, self.value),
                torch.maximum(other.seen, _like(self.seen, other.seen)),
            )
        return other if other.seen else self

    def compute(self) -> Any:
        return self.value


@tree.register("parts")
@dataclass(frozen=True)
class Collect(Metric):
    """Every value, in order: `Collect((values,))` with `values` of shape (n, ...).

    >>> import torch
    >>> from ftrain.metrics import Collect
    >>> Collect((torch.tensor([1, 2]),)).merge(Collect((torch.tensor([3]),))).compute()
    tensor([1, 2, 3])
    """

    parts: tuple[Any, ...]

    @classmethod
    def empty(cls) -> Self:
        return cls(())

    def merge(self, other: Self) -> Self:
        return type(self)((*self.parts, *other.parts))

    def compute(self) -> Any:
        return torch.cat([*self.parts], dim=0) if self.parts else torch.empty(0)

    @classmethod
    def fold(cls, *columns: Sequence[Any]) -> Self:
        return cls(tuple(part for parts in columns[0] for part in parts))


def accuracy(logits: Tensor, target: Tensor, mask: Tensor | None = None, topk: int = 1) -> Mean:
    """How often the target is among the `topk` highest logits.

    Args:
        logits: (..., classes), any floating dtype.
        target: (...), int64.
        mask: (...), bool or 0/1; what is 0 does not count.
        topk: how many of the highest logits count as a hit.

    Returns:
        `Mean` weighted by the number of targets.

    >>> import torch
    >>> from ftrain.metrics import accuracy
    >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1])).compute()
    tensor(0.5000)
    """
    if topk == 1:
        hit = logits.argmax(dim=-1) == target
    else:
        hit = (logits.topk(topk, dim=-1).indices == target.unsqueeze(-1)).any(dim=-1)
    return Mean.of(hit.to(torch.float32), mask)


def perplexity(logits: Tensor, target: Tensor, mask: Tensor | None = None) -> Perplexity:
    """`exp` of the mean cross-entropy in nats.

    Args:
        logits: (..., classes), any floating dtype.
        target: (...), int64.
        mask: (...), bool or 0/1; what is 0 does not count.

    >>> import torch
    >>> from ftrain.metrics import perplexity
    >>> perplexity(torch.zeros(3, 4), torch.tensor([0, 1, 2])).compute()
    tensor(4.)
    """
    nll = F.cross_entropy(logits.flatten(0, -2).float(), target.flatten(), reduction="none").reshape(target.shape)
    return Perplexity.of(nll, mask)


def normalise(metrics: object, weight: Tensor | float | None = None, what: str = "the metrics") -> dict[str, Metric]:
    """Bring what a user returned into one form: a flat dict of monoids, nested names joined with `/`.

    Args:
        metrics: a mapping, possibly nested, of monoids, 0-d tensors or numbers.
        weight: what a bare scalar weighs as a mean (the batch size); None: each call counts once.
        what: how the error calls it.

    Raises:
        MetricError: a value is neither a scalar nor a monoid, or two names are the same once joined.

    >>> from ftrain.metrics import normalise
    >>> normalise({"train": {"loss": 2.0}}, weight=4.0)
    {'train/loss': Mean(total=8.0, weight=4.0)}
    """
    flat: dict[str, Metric] = {}
    _flatten(metrics, "", weight, what, flat)
    return flat


def _flatten(found: object, prefix: str, weight: Tensor | float | None, what: str, into: dict[str, Metric]) -> None:
    if not isinstance(found, Mapping):
        raise MetricError(
            explain(
                f"{what} must be a dict of metrics.",
                expected='{"accuracy": ft.metrics.accuracy(logits, y)}',
                got=tree.describe(found),
                fix='return loss, {"name": value}',
            )
        )
    for key, value in found.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            _flatten(value, f"{name}/", weight, what, into)
            continue
        if name in into:
            raise MetricError(
                explain(f"{what} contain the name {name!r} twice, once the nested names are joined with '/'.")
            )
        into[name] = _monoid(value, name, weight, what)


def _monoid(value: object, name: str, weight: Tensor | float | None, what: str) -> Metric:
    if isinstance(value, Metric):
        return value
    scalar = isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.ndim == 0)
    if not scalar:
        raise MetricError(
            explain(
                f"{what}: {name!r} is neither a scalar nor a metric.",
                where=f"metrics[{name!r}]",
                expected="a 0-d tensor, or one of ft.metrics.Mean, Sum, Min, Max, Last, Collect",
                got=tree.describe(value),
                fix=f'{{"{name}": value.mean()}}   # or ft.metrics.Mean.of(value), or ft.metrics.Collect((value,))',
            )
        )
    detached: Any = value.detach() if isinstance(value, Tensor) else value
    if isinstance(detached, Tensor) and not detached.is_floating_point():
        detached = detached.to(torch.float32)
    if weight is None:
        return Mean(detached, torch.ones_like(detached) if isinstance(detached, Tensor) else 1.0)
    if isinstance(detached, Tensor) and not isinstance(weight, Tensor):
        weight = torch.full_like(detached, weight)
    return Mean(detached * weight, weight)


def _ratio(total: Any, weight: Any) -> Any:
    if isinstance(total, Tensor) or isinstance(weight, Tensor):
        return total / weight
    return total / weight if weight else math.nan


def _sum(values: Sequence[Any]) -> Any:
    if any(isinstance(v, Tensor) for v in values):
        return functools.reduce(operator.add, values)
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # inf - inf, or an overflow on the way
        return sum(values)


def _like(value: Any, ref: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full_like(ref, value)


def _extreme(on_tensors: Any, on_numbers: Any, a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        ref = a if isinstance(a, Tensor) else b
        return on_tensors(_like(a, ref), _like(b, ref))
    return math.nan if math.isnan(a) or math.isnan(b) else on_numbers(a, b)
