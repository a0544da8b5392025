"""Loss scaling: gradients in float16 without underflow.

The loss is multiplied by a scale before the backward pass, and the gradient divided by it before anything else sees it. Where a
gradient is not finite, the step makes no update (a `where` on the device) and the scale becomes smaller; after many good steps
it grows. Scale and counters live in `state.extra`.

Laws
----
- The loss and the metrics that come out are not scaled; clipping and everything else after it sees the true gradient.
- The sequence of scales is that of `torch.amp.GradScaler`.
- After a step whose gradient was not finite, parameters, buffers and the optimizer's state are bitwise what they were.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import LimitError, LossError, StateError, explain
from ..metrics import Last, Mean, Metric
from ..optim.guard import all_finite
from ..optim.lists import over
from ..optim.transform import nonnegative
from ..types import LOSS_SCALE, Batch, GradFn, Params
from .wrap import GradWrapper, check_name

__all__ = ["LossScale", "with_loss_scale"]


class LossScale(NamedTuple):
    """The sub-state of `with_loss_scale`.

    `scale`: float32 (); `good`: int64 (), steps since the scale last changed; `finite`: bool (), whether the last gradient was;
    `skipped`: int64 (), steps that made no update.
    """

    scale: Tensor
    good: Tensor
    finite: Tensor
    skipped: Tensor


class Scaled(GradWrapper):
    """Made by `with_loss_scale`."""

    made_by = "ft.with_loss_scale"

    def __init__(
        self, grad_fn: GradFn, name: str, *, init_scale: float, growth: float, backoff: float, interval: int
    ) -> None:
        super().__init__(grad_fn)
        self._refuse_another(grad_fn)
        self.name = name
        self.init_scale, self.growth, self.backoff, self.interval = init_scale, growth, backoff, interval
        self.states = {**self.states, name: self.init}
        self.guards = (*self.guards, name)
        self._count = (
            "skipped" if name == "loss_scale" else f"skipped/{name}"
        )  # of two in a step, neither hides the other

    def _refuse_another(self, inner: Any) -> None:
        """Raise where the gradient is scaled already: it would be scaled once, and divided twice."""
        while inner is not None and not isinstance(inner, Scaled):
            inner = getattr(inner, "inner", getattr(inner, "__wrapped__", None))
        if inner is not None:
            raise LimitError(
                explain(
                    "with_loss_scale: the gradient is scaled already.",
                    expected="one loss scale in a gradient",
                    got=f"the loss scale {inner.name!r} inside of another one",
                    cause='precision="16-mixed" makes one too',
                    fix="ft.make_step(ft.with_loss_scale(grad), tx)   # once, outside of accumulation",
                )
            )

    def init(self, params: Params) -> LossScale:
        """The first sub-state."""
        device = next(iter(params.values())).device
        count = torch.zeros((), dtype=torch.int64, device=device)
        scale = torch.full((), self.init_scale, dtype=torch.float32, device=device)
        return LossScale(scale, count, torch.ones((), dtype=torch.bool, device=device), count.clone())

    def __call__(
        self, params: Params, buffers: Params, batch: Batch, rng: Tensor, /
    ) -> tuple[Params, Mean, tuple[dict[str, Metric], Params]]:
        given: dict[str, Any] = dict(buffers)
        state = given.pop(self.name, None)
        if not isinstance(state, LossScale):
            raise StateError(
                explain(
                    "with_loss_scale: the state has no loss scale.",
                    where=f"state.extra[{self.name!r}]",
                    expected="a LossScale",
                    got="nothing" if state is None else type(state).__name__,
                    cause="a bare step, or a wrapper around this one that is a plain function without functools.wraps",
                    fix="state = step.init(state)   # once, before the first step; ft.fit does it by itself",
                )
            )
        grads, loss, (metrics, new) = self.inner(params, {**given, LOSS_SCALE: state.scale}, batch, rng)
        if LOSS_SCALE in new:
            raise LossError(
                explain(
                    "with_loss_scale: the gradient function inside does not scale the loss.",
                    expected=f"buffers[{LOSS_SCALE!r}] used by the engine, and not handed back",
                    cause="a gradient function written by hand",
                    fix="with_loss_scale(ft.value_and_grad(loss))",
                )
            )
        # scale: the gradient is that of the loss times the scale; from here on it is the true one
        grads = over(_divided, grads, scalars=(state.scale,))
        after = self._next(state, all_finite(grads))
        dtype = loss.total.dtype
        one = torch.ones_like(state.scale, dtype=dtype)
        told: dict[str, Metric] = {
            self.name: Last(state.scale.to(dtype, copy=True), one),
            self._count: Last(after.skipped.to(dtype), one),
        }
        return grads, loss, ({**told, **metrics}, {**new, self.name: after})  # type: ignore[dict-item]

    def _next(self, state: LossScale, finite: Tensor) -> LossScale:
        """The scale after a step, as `torch.amp.GradScaler.update` has it."""
        good = torch.where(finite, state.good + 1, torch.zeros_like(state.good))
        grows = good >= self.interval
        larger = state.scale * self.growth
        grown = torch.where(grows & larger.isfinite(), larger, state.scale)
        scale = torch.where(finite, grown, state.scale * self.backoff)
        skipped = state.skipped + (~finite).to(torch.int64)
        return LossScale(scale, torch.where(grows, torch.zeros_like(good), good), finite, skipped)


def _finite(number: object) -> bool:
    return isinstance(number, (int, float)) and math.isfinite(number)


def _divided(g: Any, scale: Any) -> Any:
    return g / scale


def with_loss_scale(
    grad_fn: GradFn,
    *,
    init_scale: float = 2.0**16,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 2000,
    name: str = "loss_scale",
) -> Scaled:
    """Scale the loss so that float16 gradients do not underflow; the scale adapts, and steps that overflow are skipped.

    Law: `grads = grad(scale * loss) / scale`. Where they are not finite the step keeps parameters, buffers and optimizer state,
    and `scale *= backoff_factor`; after `growth_interval` good steps in a row `scale *= growth_factor`.

    Args:
        grad_fn: a grad-level function, accumulated or not; this wrapper stands outside of `with_accumulation`.
        init_scale: the first scale.
        growth_factor: at least 1.
        backoff_factor: between 0 and 1.
        growth_interval: good steps until the scale grows.
        name: key of the sub-state in `state.extra`, and of the scale among the metrics; `state = step.init(state)` puts it there.
            Steps without an update are the metric `skipped`, or `skipped/name` where the name is another than the default.

    Raises:
        LimitError: a factor that makes no sense.

    Source: Micikevicius et al., "Mixed precision training", ICLR 2018; the rule and defaults of `torch.amp.GradScaler`.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(2, 1), ft.optim.sgd(0.1)
    >>> grad = ft.value_and_grad(ft.bind(model, lambda model, batch: model(batch).square().mean()))
    >>> step = ft.make_step(ft.with_loss_scale(grad), tx)
    >>> state = step.init(ft.init(model, tx))
    >>> state, metrics = step(state, torch.full((4, 2), float("inf")))
    >>> state.extra["loss_scale"].scale, metrics["skipped"].compute()
    (tensor(32768.), tensor(1.))
    """
    nonnegative(init_scale=init_scale, growth_factor=growth_factor, backoff_factor=backoff_factor)
    bad = {
        "init_scale": (_finite(init_scale) and init_scale > 0, "a number above 0", 2.0**16),
        "growth_factor": (_finite(growth_factor) and growth_factor >= 1.0, "a number of at least 1", 2.0),
        "backoff_factor": (_finite(backoff_factor) and 0.0 < backoff_factor < 1.0, "between 0 and 1", 0.5),
        "growth_interval": (type(growth_interval) is int and growth_interval >= 1, "an integer of at least 1", 2000),
    }
    for argument, (right, expected, fix) in bad.items():
        if not right:
            raise LimitError(
                explain(
                    f"with_loss_scale: {argument} makes no sense.",
                    expected=expected,
                    got=repr(locals()[argument]),
                    fix=f"{argument}={fix}",
                )
            )
    check_name(name, "ft.with_loss_scale")
    return Scaled(
        grad_fn,
        name,
        init_scale=init_scale,
        growth=growth_factor,
        backoff=backoff_factor,
        interval=growth_interval,
    )
