"""Sharpness-aware minimisation, as a wrapper of the gradient: any optimizer and any other wrapper goes with it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import ArgumentError, explain
from ..optim.clipping import global_norm
from ..optim.lists import over
from ..optim.transform import nonnegative
from ..types import Batch, GradFn, Params
from .grad import constants
from .wrap import GradWrapper

__all__ = ["with_sam"]


class Sharpness(GradWrapper):
    """Made by `with_sam`."""

    made_by = "ft.with_sam"

    def __init__(self, grad_fn: GradFn, rho: float, adaptive: bool) -> None:
        super().__init__(grad_fn)
        self.refuse_guards()
        self.rho, self.adaptive = rho, adaptive

    def __call__(self, params: Params, buffers: Params, batch: Batch, rng: Tensor, /) -> Any:
        grads, loss, rest = self.inner(params, buffers, batch, rng)
        plain = constants(params)
        uphill = over(_weighted, grads, plain) if self.adaptive else grads
        size = self.rho / (global_norm(uphill) + 1e-12)
        climb = over(_weighted, uphill, plain) if self.adaptive else uphill
        there = over(_moved, plain, climb, scalars=(size,))
        # Metrics, loss and buffers are those at the parameters themselves; batch statistics of the climb are dropped.
        grads, _, _ = self.inner(there, buffers, batch, rng)
        return grads, loss, rest


def _weighted(g: Any, p: Any) -> Any:
    return g * p.abs()


def _moved(p: Any, e: Any, size: Any) -> Any:
    return p + e * size


def with_sam(grad_fn: GradFn, rho: float = 0.05, *, adaptive: bool = False) -> Sharpness:
    """Take the gradient at the worst point nearby, so that flat minima are preferred. Costs a second gradient.

    Law: `grads = g(p + e)` with `e = rho g(p) / |g(p)|`, or with `adaptive`, element by element, `e = rho |p|^2 g(p) / | |p| g(p) |`.
    `rho=0` gives the gradient itself.

    Args:
        grad_fn: a grad-level function, accumulated or not.
        rho: radius of the neighbourhood, in units of the parameters.
        adaptive: scale it by the size of each parameter.

    Raises:
        LimitError: a negative radius.
        ArgumentError: a schedule, or something else that is no number.

    Source: Foret et al., "Sharpness-aware minimization for efficiently improving generalization", ICLR 2021; adaptive: Kwon et
    al., "ASAM", ICML 2021.

    >>> import torch, ftrain as ft
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> grad = ft.value_and_grad(ft.bind(model, lambda model, batch: model(batch).square().mean()))
    >>> params = {"weight": torch.ones(1, 1)}
    >>> ft.with_sam(grad, rho=0.5)(params, {}, torch.ones(1, 1), ft.rng.key(0))[0]["weight"]
    tensor([[3.]])
    """
    if isinstance(rho, bool) or not isinstance(rho, (int, float, Tensor)):
        raise ArgumentError(
            explain(
                "with_sam: rho is neither a number nor a 0-d tensor.",
                expected="a number >= 0, in units of the parameters",
                got=type(rho).__name__,
                cause="a gradient has no count of updates, which a schedule would need" if callable(rho) else None,
                fix="rho=0.05",
            )
        )
    nonnegative(rho=rho)
    return Sharpness(grad_fn, rho, adaptive)
