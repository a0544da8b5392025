"""Precision at the loss level: in which dtype the forward and backward pass are computed.

Laws
----
- Where nothing is to be converted, the wrapped function is the function, bitwise.
- Parameters are only read: gradients come in their dtype. Loss and floating metrics are in the policy's output dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import tree
from ..errors import PrecisionError, explain
from ..metrics import Mean, Metric
from ..precision import Policy, as_policy, check_supported
from ..types import Batch, LossFn, Params
from .wrap import LossWrapper

__all__ = ["check_precision", "computing", "with_precision"]


class Precise(LossWrapper):
    """Made by `with_precision`."""

    made_by = "ft.with_precision"

    def __init__(self, loss_fn: LossFn, policy: Policy) -> None:
        super().__init__(loss_fn)
        self.policy = policy

    def scope(self, params: Params, buffers: Params) -> AbstractContextManager[Any]:
        """The scope of the function inside; an autocast of the caller's reaches neither in it nor into the backward pass."""
        inner = self.inner.scope(params, buffers)
        device = next(iter(params.values())).device
        return _without_autocast(inner, device) if torch.is_autocast_enabled(device.type) else inner

    def __call__(
        self, params: Params, buffers: Params, batch: Batch, rng: Tensor, /
    ) -> tuple[Mean, tuple[dict[str, Metric], Params]]:
        policy = self.policy
        check_precision(policy, params)
        with computing(policy, next(iter(params.values())).device):
            loss, (metrics, new) = self.inner(params, buffers, cast_inputs(policy, batch), rng)
        out = cast_outputs(policy, (loss, metrics))
        return out[0], (out[1], new)


@contextmanager
def _without_autocast(inner: AbstractContextManager[Any], device: torch.device) -> Iterator[Any]:
    with torch.autocast(device.type, enabled=False), inner as found:
        yield found


def with_precision(loss_fn: LossFn, precision: str | int | Policy) -> Precise:
    """Compute a loss in another precision.

    Mixed precisions keep the parameters as they are and let `torch.autocast` choose for each operation; the others want a state
    in that dtype (`ft.init(..., precision=...)`) and convert the floating tensors of the batch to it.

    Args:
        loss_fn: a loss-level function, as made by `ft.bind`.
        precision: a name such as `"bf16-mixed"`, or an `ft.Policy`.

    Returns:
        A loss-level function. float16 gradients need `ft.with_loss_scale` around the gradient.

    Raises:
        PrecisionError: an unknown name; when called: parameters of another dtype than the policy says.
        DeviceError (when called): the device cannot compute in it.

    Source: Micikevicius et al., "Mixed precision training", ICLR 2018.

    >>> import torch, ftrain as ft
    >>> model = torch.nn.Linear(3, 1)
    >>> seen = []
    >>> def loss_fn(model, batch):
    ...     out = model(batch)
    ...     seen.append(out.dtype)
    ...     return out.float().square().mean()
    >>> loss = ft.with_precision(ft.bind(model, loss_fn), "bf16-mixed")
    >>> state = ft.init(model, ft.optim.sgd(0.1))
    >>> value, _ = loss(state.params, state.buffers, torch.ones(4, 3), ft.rng.key(0))
    >>> seen[0], value.compute().dtype
    (torch.bfloat16, torch.float32)
    """
    return Precise(loss_fn, as_policy(precision, "ft.with_precision"))


def computing(policy: Policy, device: torch.device) -> AbstractContextManager[Any]:
    """Context of the forward pass: autocast for mixed precisions, and none for the others, even inside of the caller's."""
    if not policy.mixed:
        return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
    # Without its cache of converted weights: a block that is computed again in the backward pass would find other casts than in the
    # forward pass ("encountered during backward but not found in storage", 2.13).
    return torch.autocast(device.type, dtype=policy.compute, cache_enabled=False)


def check_precision(policy: Policy, params: Params) -> None:
    """Raise unless the device supports the policy, and the parameters have its dtype."""
    for name, leaf in params.items():
        if leaf.is_floating_point() and leaf.dtype != policy.param:
            raise PrecisionError(
                explain(
                    "the state is kept in another precision than the step computes in.",
                    where=f"state.params[{name!r}]",
                    expected=str(policy.param),
                    got=str(leaf.dtype),
                    fix="state = ft.init(model, tx, precision=...)   # the same as in ft.train_step",
                )
            )
    first = next(iter(params.values()), None)
    if first is not None:
        check_supported(policy, first.device, "a step")


def cast_inputs(policy: Policy, batch: Batch) -> Batch:
    """A batch as the forward pass wants it: autocast converts by itself, other policies want their dtype."""
    return batch if policy.mixed else tree.map(lambda leaf: _to(leaf, policy.compute), batch)


def cast_outputs(policy: Policy, found: Any) -> Any:
    """Loss and metrics in the output dtype."""
    return tree.map(lambda leaf: _to(leaf, policy.output), found)


def _to(leaf: Any, dtype: torch.dtype) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != dtype:
        return leaf.to(dtype)
    return leaf
