"""Statistics of each parameter's gradient, as metrics of the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from ..errors import MetricError, explain
from ..metrics import Mean, Metric
from ..optim.masks import resolve
from ..types import LOSS_SCALE, Batch, GradFn, Params
from .wrap import GradWrapper

__all__ = ["STATISTICS", "with_grad_stats"]

# On float32 or float64, so that a half-precision gradient does not overflow in its own square.
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": lambda g: g.norm(),
    "mean": lambda g: g.mean(),
    "std": lambda g: g.std(correction=0),
    "max": lambda g: g.abs().max(),
    "zeros": lambda g: (g == 0).to(g.dtype).mean(),
}


class Measured(GradWrapper):
    """Made by `with_grad_stats`."""

    made_by = "ft.with_grad_stats"

    def __init__(self, grad_fn: GradFn, match: Any, statistics: tuple[str, ...], prefix: str) -> None:
        super().__init__(grad_fn)
        self.match, self.statistics, self.prefix = match, statistics, prefix

    def __call__(self, params: Params, buffers: Params, batch: Batch, rng: Tensor, /) -> Any:
        grads, loss, (metrics, new) = self.inner(params, buffers, batch, rng)
        told: dict[str, Metric] = {}
        chosen = resolve(self.match, params, "with_grad_stats: match")
        scale = buffers.get(LOSS_SCALE)
        for name, wanted in zip(sorted(grads), chosen, strict=True):
            if not wanted or not grads[name].numel():
                continue
            g = grads[name] if grads[name].element_size() >= 4 else grads[name].float()
            # scale: inside of a loss scale the gradient is that many times larger; what is told is that of the loss
            g = g if scale is None else g / scale
            for statistic in self.statistics:
                value = STATISTICS[statistic](g).to(loss.total.dtype)
                told[f"{self.prefix}_{statistic}/{name}"] = Mean(value, value.new_ones(()))
        return grads, loss, ({**told, **metrics}, new)


def with_grad_stats(
    grad_fn: GradFn,
    match: str | Iterable[str] | Callable[[str, Tensor], bool] = "*",
    *,
    statistics: Iterable[str] = ("norm",),
    prefix: str = "grad",
) -> Measured:
    """Add statistics of the gradient of each parameter to the metrics; the gradient itself stays as it is.

    They are those of the loss, inside of a loss scale as well as outside of it.

    Args:
        grad_fn: a grad-level function.
        match: which parameters: a path pattern, several, or a predicate `(path, parameter) -> bool`.
        statistics: any of `"norm"` (2-norm), `"mean"`, `"std"`, `"max"` (of the absolute values), `"zeros"` (fraction).
        prefix: metrics are called `prefix_statistic/path`.

    Raises:
        MetricError: an unknown statistic.
        ModelError (when called): a pattern that matches nothing.

    >>> import torch, ftrain as ft
    >>> model = torch.nn.Linear(2, 1)
    >>> grad = ft.value_and_grad(ft.bind(model, lambda model, batch: model(batch).mean()))
    >>> grad = ft.with_grad_stats(grad, "weight", statistics=("norm", "max"))
    >>> state = ft.init(model, ft.optim.sgd(0.1))
    >>> _, _, (metrics, _) = grad(state.params, {}, torch.tensor([[3.0, 4.0]]), ft.rng.key(0))
    >>> {name: float(metric.compute()) for name, metric in metrics.items()}
    {'grad_norm/weight': 5.0, 'grad_max/weight': 4.0}
    """
    wanted = (statistics,) if isinstance(statistics, str) else tuple(statistics)
    for name in wanted:
        if name not in STATISTICS:
            raise MetricError(
                explain(f"with_grad_stats: there is no statistic {name!r}.", expected=", ".join(STATISTICS))
            )
    return Measured(grad_fn, match, wanted, prefix)
