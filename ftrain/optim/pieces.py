"""Small transforms to chain: scaling, decay, noise, centralisation.

An optimizer of one's own is a chain of such pieces, from the gradient to the update; the last one, `scale_by_learning_rate`,
turns the sign, since updates are added to the parameters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import rng, tree
from ..errors import ArgumentError, LimitError, explain
from ..types import Schedule, Transform
from .lists import over
from .masks import Mask, put, resolve, take
from .report import lr_at, lr_leaf
from .rules.gradient import is_zero
from .transform import CountState, new_count, nonnegative, value_at

__all__ = [
    "LearningRateState",
    "NoiseState",
    "add_decayed_weights",
    "add_noise",
    "centralize",
    "scale",
    "scale_by_learning_rate",
    "scale_by_schedule",
]


class LearningRateState(NamedTuple):
    """`count`: int64 (), updates made; `lr`: float32 (), that of the last one."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in optax
    lr: Tensor

    def metrics(self) -> dict[str, Tensor]:
        return {"lr": self.lr}


class NoiseState(NamedTuple):
    """`count`: int64 (), updates made; `key`: int64 (), the root of the noise."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in optax
    key: Tensor


def scale(step_size: float | Tensor) -> Transform:
    """Multiply by a number: `u = step_size * g`.

    Args:
        step_size: the factor, of either sign.

    Raises:
        ArgumentError: it is not a number.

    >>> import torch, ftrain as ft
    >>> ft.optim.scale(-0.5).update({"w": torch.ones(1)}, (), {"w": torch.ones(1)})[0]
    {'w': tensor([-0.5000])}
    """
    if isinstance(step_size, bool) or not isinstance(step_size, (int, float, Tensor)):
        raise ArgumentError(
            explain(
                f"scale: {step_size!r} is not a factor.",
                expected="a number or a 0-d tensor",
                got=type(step_size).__name__,
                fix="scale_by_schedule(schedule)" if callable(step_size) else "scale(0.5)",
            )
        )

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        # scale: the factor that was asked for
        return over(lambda g, s: g * s, grads, scalars=(step_size,)), state

    return Transform(lambda params: (), update)


def scale_by_learning_rate(lr: float | Tensor | Schedule) -> Transform:
    """The last piece of an optimizer: `u = -lr * g`. It reports its learning rate.

    Args:
        lr: learning rate.

    Raises:
        LimitError: a negative one.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.chain(ft.optim.centralize(), ft.optim.scale_by_learning_rate(0.5))
    >>> params = {"w": torch.ones(1)}
    >>> updates, state = tx.update({"w": torch.ones(1)}, tx.init(params), params)
    >>> updates, ft.optim.metrics(state)
    ({'w': tensor([-0.5000])}, {'lr': tensor(0.5000)})
    """
    nonnegative(lr=lr)

    def init(params: Any, /) -> LearningRateState:
        count = new_count(params)
        return LearningRateState(count, lr_leaf(lr, count))

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        rate = value_at(lr, state.count)
        # scale: by the learning rate, downhill
        updates = over(lambda g, r: g * -r, grads, scalars=(rate,))
        return updates, LearningRateState(state.count + 1, lr_at(rate, state.lr))

    return Transform(init, update)


def scale_by_schedule(step_size_fn: Schedule) -> Transform:
    """Multiply by a function of the count of updates: `u = step_size_fn(t) * g`, with t from 0 on.

    Args:
        step_size_fn: the factor, of either sign, as a function of the count (0-d), e.g. from `ft.schedules`.

    Raises:
        ArgumentError: it cannot be called.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.scale_by_schedule(lambda t: 1.0 / (t + 1.0))
    >>> grads = {"w": torch.ones(1)}
    >>> updates, state = tx.update(grads, tx.init(grads), grads)
    >>> tx.update(grads, state, grads)[0]
    {'w': tensor([0.5000])}
    """
    if not callable(step_size_fn):
        raise ArgumentError(
            explain(
                f"scale_by_schedule: {step_size_fn!r} is no function of the step.",
                expected="a schedule",
                got=type(step_size_fn).__name__,
                fix="scale(0.5)",
            )
        )

    def init(params: Any, /) -> CountState:
        return CountState(new_count(params))

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        # scale: by the schedule
        updates = over(lambda g, s: g * s, grads, scalars=(value_at(step_size_fn, state.count),))
        return updates, CountState(state.count + 1)

    return Transform(init, update)


def add_decayed_weights(weight_decay: float | Tensor | Schedule = 0.0, mask: Mask | None = None) -> Transform:
    """Add a multiple of the parameters: `u = g + weight_decay * p`.

    Before an optimizer this is an L2 penalty; between its scaling and its learning rate it is decoupled weight decay.

    Args:
        weight_decay: strength of the decay.
        mask: which parameters decay, e.g. `ft.optim.no_bias_or_norm`; patterns, a predicate or a tree. Default: all.

    Raises:
        LimitError: a negative decay.
        ModelError: from `init`, a mask that does not fit the parameters.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.add_decayed_weights(0.1, mask="w")
    >>> params = {"w": torch.ones(1), "b": torch.ones(1)}
    >>> tx.update({"w": torch.zeros(1), "b": torch.zeros(1)}, tx.init(params), params)[0]
    {'w': tensor([0.1000]), 'b': tensor([0.])}
    """
    nonnegative(weight_decay=weight_decay)

    def init(params: Any, /) -> CountState:
        if mask is not None:
            resolve(mask, params, "add_decayed_weights: mask")
        return CountState(new_count(params))

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        after = CountState(state.count + 1)
        if is_zero(weight_decay):
            return grads, after
        decay = (value_at(weight_decay, state.count),)
        if mask is None:
            return over(lambda g, p, d: g + p * d, grads, params, scalars=decay), after
        chosen = resolve(mask, params, "add_decayed_weights: mask")
        part = over(lambda g, p, d: g + p * d, take(grads, chosen), take(params, chosen), scalars=decay)
        return put(grads, part), after

    return Transform(init, update)


def add_noise(eta: float | Tensor, gamma: float | Tensor, seed: int = 0) -> Transform:
    """Add Gaussian noise that dies out: `u = g + n`, n normal with variance `eta / t^gamma`, t the update, from 1 on.

    Args:
        eta: variance, in squared units of the gradient, before it decays.
        gamma: how fast it dies out; the paper has 0.55.
        seed: the noise is a function of it, the count of updates and the leaf's place.

    Raises:
        LimitError: a negative `eta` or `gamma`, or a seed that is no integer.

    Source: Neelakantan et al., "Adding gradient noise improves learning for very deep networks", 2015.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.add_noise(eta=1.0, gamma=0.55)
    >>> zeros = {"w": torch.zeros(10_000)}
    >>> noise, _ = tx.update(zeros, tx.init(zeros), zeros)
    >>> abs(float(noise["w"].var()) - 1.0) < 0.05
    True
    """
    nonnegative(eta=eta, gamma=gamma)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise LimitError(explain(f"add_noise: {seed!r} is no seed.", expected="an integer", got=type(seed).__name__))

    def init(params: Any, /) -> NoiseState:
        count = new_count(params)
        return NoiseState(count, torch.full_like(count, rng.fold_in_host(seed)))

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        count = state.count + 1
        size = (value_at(eta, count) / count.to(torch.float64) ** value_at(gamma, count)).sqrt()
        step_key = rng.fold_in(state.key, count)
        leaves = [
            # Drawn in float64 where the leaf is, else in float32: noise in bfloat16 would be of 8 bits.
            (g + rng.normal(rng.fold_in(step_key, i), tuple(g.shape), _wide(g.dtype)) * size).to(g.dtype)
            for i, g in enumerate(tree.leaves(grads))
        ]
        return tree.unflatten(tree.structure(grads), leaves), NoiseState(count, state.key)

    return Transform(init, update)


def centralize() -> Transform:
    """Take from each gradient of two or more dimensions its mean over all but the first: `u = g - mean(g)`, row by row.

    Source: Yong et al., "Gradient centralization: A new optimization technique for deep neural networks", ECCV 2020.

    >>> import torch, ftrain as ft
    >>> ft.optim.centralize().update({"w": torch.tensor([[1.0, 3.0]]), "b": torch.tensor([1.0, 3.0])}, (), None)[0]
    {'w': tensor([[-1.,  1.]]), 'b': tensor([1., 3.])}
    """

    def one(g: Tensor) -> Tensor:
        if g.ndim < 2:
            return g
        return g - g.mean(dim=tuple(range(1, g.ndim)), keepdim=True)

    return Transform(lambda params: (), lambda grads, state, params: (tree.map(one, grads), state))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
